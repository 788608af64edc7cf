"""The block pool piece by piece: free list, hash map, reference counts, and that check() sees corruption."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.engine.sched.block_pool import BlockHashToBlockMap, BlockPool, FreeKVCacheBlockQueue, KVCacheBlock


def ids(blocks) -> list[int]:
    return [block.block_id for block in blocks]


@given(st.lists(st.tuples(st.sampled_from(["append", "prepend", "remove", "popleft"]), st.integers(0, 4))))
def test_the_free_list_behaves_like_a_list(steps):
    blocks = [KVCacheBlock(i) for i in range(5)]
    queue, model = FreeKVCacheBlockQueue(blocks[:3]), [0, 1, 2]
    for step, i in steps:
        if step == "popleft" and model:
            assert queue.popleft().block_id == model.pop(0)
        elif step == "remove" and i in model:
            queue.remove(blocks[i])
            model.remove(i)
        elif step in ("append", "prepend") and i not in model:
            getattr(queue, step)(blocks[i])
            model.insert(len(model) if step == "append" else 0, i)
        assert ids(queue) == model
        assert len(queue) == len(model)


def test_the_free_list_refuses_to_lose_count():
    queue, stranger = FreeKVCacheBlockQueue(), KVCacheBlock(7)
    with pytest.raises(AssertionError, match="not in the free list"):
        queue.popleft()
    with pytest.raises(AssertionError, match="not in the free list"):
        queue.remove(stranger)
    queue.append(stranger)
    with pytest.raises(AssertionError, match="already in the free list"):
        queue.prepend(stranger)


def test_the_map_keeps_the_first_of_two_equal_blocks():
    cached, first, second = BlockHashToBlockMap(), KVCacheBlock(1), KVCacheBlock(2)
    cached.insert(b"h", first)
    cached.insert(b"h", second)
    assert (cached.get(b"h"), second.block_hash, len(cached)) == (first, None, 1)
    cached.remove(second)
    assert cached.get(b"h") is first
    cached.remove(first)
    assert (cached.get(b"h"), first.block_hash, len(cached)) == (None, None, 0)


def test_blocks_are_reused_unhashed_first_then_least_recently_used():
    pool = BlockPool(5)
    a, b, c, d = pool.get_free_blocks(4)
    for block, name in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.cached.insert(name, block)
    pool.free_blocks([b, a])
    pool.free_blocks([d, c])
    assert ids(pool.free_queue) == ids([d, b, a, c])
    pool.touch([b])  # a hit takes a block out of the middle; its next release is its latest use
    pool.free_blocks([b])
    assert ids(pool.free_queue) == ids([d, a, c, b])
    assert ids(pool.get_free_blocks(2)) == ids([d, a])
    assert (pool.cached.get(b"a"), pool.cached.get(b"c")) == (None, c)


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = BlockPool(3)
    [block] = pool.get_free_blocks(1)
    pool.touch([block])
    pool.free_blocks([block])
    assert (block.ref_cnt, pool.num_free_blocks, pool.usage) == (1, 1, 0.5)
    pool.free_blocks([block])
    assert (block.ref_cnt, pool.num_free_blocks, pool.usage) == (0, 2, 0.0)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free_blocks([block])


def test_the_null_block_is_never_handed_out():
    pool = BlockPool(4)
    assert 0 not in ids(pool.get_free_blocks(3))
    assert pool.usage == 1.0
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 free"):
        pool.get_free_blocks(1)


def test_reset_forgets_everything_but_only_when_nothing_is_held():
    pool = BlockPool(3)
    [block] = pool.get_free_blocks(1)
    pool.cached.insert(b"h", block)
    assert not pool.reset_prefix_cache()
    assert pool.cached.get(b"h") is block
    pool.free_blocks([block])
    assert pool.reset_prefix_cache()
    assert (len(pool.cached), block.block_hash) == (0, None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, held, idle: setattr(held, "ref_cnt", 2),
        lambda pool, held, idle: setattr(held, "ref_cnt", 0),
        lambda pool, held, idle: setattr(idle, "ref_cnt", 1),
        lambda pool, held, idle: setattr(held, "block_hash", b"other"),
        lambda pool, held, idle: setattr(held, "block_hash", None),
        lambda pool, held, idle: pool.free_queue.append(held),
        lambda pool, held, idle: pool.free_queue.remove(idle),
        lambda pool, held, idle: pool.free_queue.append(pool.null_block),
        lambda pool, held, idle: pool.cached.insert(b"null", pool.null_block),
        lambda pool, held, idle: pool.touch([pool.null_block]),
    ],
)
def test_check_sees_every_kind_of_damage(damage):
    pool = BlockPool(4)
    [held] = pool.get_free_blocks(1)
    pool.cached.insert(b"h", held)
    pool.check([[held]])
    with pytest.raises(AssertionError):
        damage(pool, held, next(iter(pool.free_queue)))
        pool.check([[held]])


@pytest.mark.parametrize("tables", [[], [[1], [1]], [[1, 1]], [[1, 2]], [[0], [1]]])
def test_check_sees_holders_that_do_not_match(tables):
    pool = BlockPool(4)
    assert ids(pool.get_free_blocks(1)) == [1]
    with pytest.raises(AssertionError):
        pool.check([[pool.blocks[i] for i in table] for table in tables])
