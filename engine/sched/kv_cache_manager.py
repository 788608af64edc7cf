"""Which KV-cache blocks each request holds, and which of them other requests may share."""

from __future__ import annotations

from collections.abc import Iterable

from ..plan import BlockIds, KVCacheLayout
from .block_pool import BlockPool, KVCacheBlock
from .hashing import extend_block_hashes
from .request import Request

Blocks = tuple[list[KVCacheBlock], ...]
"""Blocks in the order of the tokens they hold, one list per KV-cache group. All lists are equally long."""


class _Table:
    """The blocks of one request; the first `num_hashed` of each group have been offered for sharing."""

    __slots__ = ("blocks", "num_hashed")

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.num_hashed = len(blocks[0])


class KVCacheManager:
    """Block tables of running requests, over one pool that all groups of the layout draw from.

    A block can be hit from `cache_blocks` on, which the scheduler calls when the step that computed it is
    over: sharing never depends on the order in which one step writes and reads.

    Args:
        num_lookahead_slots: slots kept ready after a request's tokens for what a proposer writes.
    """

    def __init__(
        self, layout: KVCacheLayout, *, enable_prefix_caching: bool = True, num_lookahead_slots: int = 0
    ) -> None:
        self.block_size = layout.block_size
        self.pool = BlockPool(layout.num_blocks)
        self._caching = enable_prefix_caching
        self._lookahead = num_lookahead_slots
        # Groups keep different things for the same tokens, so what names a block ends with its group.
        self._groups = [i.to_bytes(2, "little") for i in range(len(layout.groups))]
        self._tables: dict[str, _Table] = {}

    @property
    def usage(self) -> float:
        """Share of the pool that requests hold: 0 to 1."""
        return self.pool.usage

    def reads_cache(self, request: Request) -> bool:
        """Whether a request may use cached blocks at all."""
        return self._caching and request.reads_prefix_cache

    def get_computed_blocks(self, request: Request) -> Blocks:
        """The longest cached prefix of a request that holds nothing yet.

        At least the last token is left to compute, or there would be nothing to sample from. Nothing is held
        yet: the blocks stay valid until the next call that changes the pool.
        """
        hits = self._no_blocks()
        if not self.reads_cache(request):
            return hits
        self._extend_hashes(request)
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            keys = [block_hash + group for group in self._groups]
            found = [block for key in keys if (block := self.pool.cached.get(key)) is not None]
            if len(found) < len(self._groups):
                break
            for hit, block in zip(hits, found):
                hit.append(block)
        return hits

    def allocate_slots(
        self, request: Request, num_tokens: int, *, computed: Blocks = (), num_spare: int = 0
    ) -> BlockIds | None:
        """Make room for the first `num_tokens` tokens of a request and its lookahead slots.

        Args:
            computed: what `get_computed_blocks` returned, for a request that holds nothing yet.
            num_spare: blocks (of each group) that must be left in the pool.

        Returns:
            The blocks gained; `()` if there was room already; None if the pool has too few: nothing changed.
        """
        table = self._tables.get(request.request_id)
        held = table.blocks if table else computed or self._no_blocks()
        num_slots = min(num_tokens + self._lookahead, request.max_num_tokens)
        num_new = -(-num_slots // self.block_size) - len(held[0])
        if table and num_new <= 0:
            return ()
        # A hit that nobody holds is in the free list and leaves it too.
        num_idle = 0 if table else sum(block.ref_cnt == 0 for group in held for block in group)
        if (num_new + num_spare) * len(self._groups) + num_idle > self.pool.num_free_blocks:
            return None
        if table is None:
            # Hits first, or the blocks allocated next might be those very hits.
            for group in held:
                self.pool.touch(group)
            table = self._tables[request.request_id] = _Table(tuple(group.copy() for group in held))
        gained: Blocks = tuple(self.pool.get_free_blocks(num_new) for _ in self._groups)
        for blocks, new in zip(table.blocks, gained):
            blocks += new
        return tuple([block.block_id for block in group] for group in gained)

    def get_block_ids(self, request: Request) -> BlockIds:
        """All blocks a request holds."""
        return tuple([block.block_id for block in group] for group in self._tables[request.request_id].blocks)

    def cache_blocks(self, request: Request, num_computed: int) -> None:
        """Offer the full blocks of a request's first `num_computed` tokens for sharing.

        Drafts have no hash and never are shared, nor is what a step in flight still computes.
        """
        if not self._caching:
            return
        table = self._tables[request.request_id]
        num_full = min(num_computed, request.num_tokens) // self.block_size
        if num_full <= table.num_hashed:
            return
        self._extend_hashes(request)
        for i in range(table.num_hashed, num_full):
            for group, blocks in zip(self._groups, table.blocks):
                self.pool.cached.insert(request.block_hashes[i] + group, blocks[i])
        table.num_hashed = num_full

    def free(self, request: Request) -> None:
        """Release all blocks of a request, if it holds any.

        Last block first: a chain is only reachable from its start, so its end is to be reused before it.
        """
        table = self._tables.pop(request.request_id, None)
        for group in table.blocks if table else ():
            self.pool.free_blocks(reversed(group))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content; refused (False) while any request holds a block."""
        return self.pool.reset_prefix_cache()

    def check(self, running: Iterable[Request]) -> None:
        """Raise AssertionError unless exactly `running` hold blocks, enough of them, and the pool agrees."""
        requests = {request.request_id: request for request in running}
        assert requests.keys() == self._tables.keys(), f"{list(self._tables)} hold, {list(requests)} run"
        for request_id, table in self._tables.items():
            request, sizes = requests[request_id], {len(group) for group in table.blocks}
            assert len(sizes) == 1, f"groups of different length: {sizes}"
            assert sizes.pop() * self.block_size >= request.num_computed_tokens, f"no room: {request}"
            assert table.num_hashed * self.block_size <= request.num_computed_tokens, f"too early: {request}"
        self.pool.check([b for group in table.blocks for b in group] for table in self._tables.values())

    def _no_blocks(self) -> Blocks:
        return tuple([] for _ in self._groups)

    def _extend_hashes(self, request: Request) -> None:
        extend_block_hashes(request.block_hashes, request.all_token_ids, self.block_size, request.message.cache_salt)
