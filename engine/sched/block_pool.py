"""The pool of KV-cache blocks: reference counts, the free list in reuse order, the index of cached ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from .hashing import BlockHash


class KVCacheBlock:
    """One block: `ref_cnt` requests hold it, `block_hash` names its content when that is cached.

    `prev` and `next` are its place in the free list; a block outside the list links to itself.
    """

    __slots__ = ("block_hash", "block_id", "next", "prev", "ref_cnt")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash: BlockHash | None = None
        self.prev: KVCacheBlock = self
        self.next: KVCacheBlock = self

    def __repr__(self) -> str:
        return f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, cached={self.block_hash is not None})"


class FreeKVCacheBlockQueue:
    """Free blocks in the order they will be reused: a ring of intrusive links closed by a sentinel.

    Intrusive, because a prefix hit takes a block out of the middle in O(1), which a deque cannot.
    """

    __slots__ = ("_end", "_len")

    def __init__(self, blocks: Iterable[KVCacheBlock] = ()) -> None:
        self._end = KVCacheBlock(-1)
        self._len = 0
        for block in blocks:
            self.append(block)

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[KVCacheBlock]:
        block = self._end.next
        while block is not self._end:
            yield block
            block = block.next

    def append(self, block: KVCacheBlock) -> None:
        """Put a block last: it will be reused after all others."""
        self._insert(block, self._end)

    def prepend(self, block: KVCacheBlock) -> None:
        """Put a block first: it will be reused next."""
        self._insert(block, self._end.next)

    def _insert(self, block: KVCacheBlock, before: KVCacheBlock) -> None:
        assert block.next is block, f"{block} is already in the free list"
        block.prev, block.next = before.prev, before
        before.prev.next = before.prev = block
        self._len += 1

    def remove(self, block: KVCacheBlock) -> None:
        """Take a block out, wherever it is."""
        assert block.next is not block, f"{block} is not in the free list"
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = block
        self._len -= 1

    def popleft(self) -> KVCacheBlock:
        """Take the first block."""
        block = self._end.next
        self.remove(block)
        return block


class BlockHashToBlockMap:
    """Cached blocks by hash, one block per hash.

    Two requests may compute the same tokens at the same time. Their tables are fixed by then, so the second
    block cannot be swapped for the first: it stays out of the map and, once free, is reused before any cached
    one.
    """

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: dict[BlockHash, KVCacheBlock] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, block_hash: BlockHash) -> KVCacheBlock | None:
        return self._blocks.get(block_hash)

    def insert(self, block_hash: BlockHash, block: KVCacheBlock) -> None:
        """Make `block` the one found by `block_hash`, unless there is one."""
        assert block.block_hash is None, f"{block} is already cached"
        if self._blocks.setdefault(block_hash, block) is block:
            block.block_hash = block_hash

    def remove(self, block: KVCacheBlock) -> None:
        """Forget the content of `block`; a block that is not cached is left as it is."""
        if block.block_hash is not None:
            del self._blocks[block.block_hash]
            block.block_hash = None


class BlockPool:
    """All blocks of the KV cache. Block 0 is the null block: padding points at it and nobody ever holds it.

    A freed block keeps its hash, and can be hit, until it is reused. Eviction is thus lazy and in LRU order.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"a pool of {num_blocks} blocks has none besides the null block"
        self.blocks = [KVCacheBlock(i) for i in range(num_blocks)]
        self.null_block = self.blocks[0]
        self.free_queue = FreeKVCacheBlockQueue(self.blocks[1:])
        self.cached = BlockHashToBlockMap()

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_queue)

    @property
    def usage(self) -> float:
        """Share of the blocks, null block aside, that requests hold: 0 to 1."""
        return 1.0 - len(self.free_queue) / (len(self.blocks) - 1)

    def get_free_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take the blocks that are first in line for reuse; whatever they cached is forgotten.

        The caller has checked `num_free_blocks`.
        """
        assert num_blocks <= len(self.free_queue), f"{num_blocks} blocks wanted, {len(self.free_queue)} free"
        blocks = [self.free_queue.popleft() for _ in range(num_blocks)]
        for block in blocks:
            self.cached.remove(block)
            block.ref_cnt = 1
        return blocks

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Add one holder to each block; a free one leaves the free list, so that it cannot be reused."""
        for block in blocks:
            if block.ref_cnt == 0:
                self.free_queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Take one holder from each block; `blocks` in the order in which they should be reused."""
        for block in blocks:
            assert block.ref_cnt > 0, f"{block} is freed twice"
            block.ref_cnt -= 1
            if block.ref_cnt:
                continue
            if block.block_hash is None:
                self.free_queue.prepend(block)
            else:
                self.free_queue.append(block)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content; refused (False) while any block is held."""
        if len(self.free_queue) < len(self.blocks) - 1:
            return False
        for block in self.blocks:
            self.cached.remove(block)
        return True

    def check(self, tables: Iterable[Sequence[KVCacheBlock]]) -> None:
        """Raise AssertionError unless the pool is consistent with `tables`, the blocks of each holder."""
        holders: Counter[int] = Counter()
        for table in tables:
            ids = {block.block_id for block in table}
            assert len(ids) == len(table), f"a request holds a block twice: {table}"
            holders.update(ids)
        free = {block.block_id for block in self.free_queue}
        null = self.null_block
        assert (null.ref_cnt, null.block_hash, null.next) == (0, None, null), f"{null} is null, but was used"
        assert not holders[0], "a request holds the null block"
        assert len(free) == len(self.free_queue), "the free list counts wrong"
        for block in self.blocks[1:]:
            assert block.ref_cnt == holders[block.block_id], f"{block} has {holders[block.block_id]} holders"
            assert (block.ref_cnt == 0) == (block.block_id in free), f"{block} is free and held, or neither"
            if block.block_hash is not None:
                assert self.cached.get(block.block_hash) is block, f"{block} is not what its hash finds"
        assert len(self.cached) == sum(b.block_hash is not None for b in self.blocks), "stale cached block"
