"""The paged cache: how little it holds, who owns which block, whose content may be shared."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.engine.cache import BLOCK_TOKENS, BlockPool, LatentCache, block_keys
from moonbase.presets import preset_config
from moonbase.sizes import kv_bytes_per_token


def test_it_holds_what_the_sizes_promise() -> None:
    """576 values per token and layer for Kimi K2, whatever the number of heads."""
    config = preset_config("kimi-k2")
    cache = LatentCache(config, 3, torch.bfloat16, torch.device("meta"))
    bytes_per_token = cache.store.numel() * cache.store.element_size() / (3 * BLOCK_TOKENS)
    assert bytes_per_token == kv_bytes_per_token(config) == 70_272


def test_a_key_stands_for_everything_up_to_its_end() -> None:
    ids = list(range(100))
    keys = block_keys(ids)
    assert len(keys) == 100 // BLOCK_TOKENS and len(set(keys)) == len(keys)
    assert block_keys(ids[:50]) == keys[:3] and block_keys(ids[: BLOCK_TOKENS - 1]) == []
    assert block_keys(ids, keys[:2]) == keys
    changed = block_keys([7, *ids[1:]])
    assert not set(changed) & set(keys), "another first token changes every key after it"
    assert block_keys([*ids[:40], 7, *ids[41:]])[:2] == keys[:2]


def test_the_longest_unused_block_goes_first() -> None:
    pool = BlockPool(5)
    first, second = [pool.allocate(), pool.allocate()], [pool.allocate(), pool.allocate()]
    for block, key in zip([*first, *second], (b"a", b"ab", b"c", b"cd"), strict=True):
        pool.publish(block, key)
    assert pool.allocate() is None
    pool.release(first)
    pool.release(second)
    assert pool.available == 4
    # The end of the first table goes before its beginning.
    assert [pool.allocate() for _ in range(3)] == [first[1], first[0], second[1]]
    assert pool.match([b"a"]) == [] and pool.match([b"c", b"cd"]) == second[:1]


def test_sharing_counts_owners() -> None:
    pool = BlockPool(4)
    block = pool.allocate()
    pool.publish(block, b"a")
    assert pool.match([b"a", b"b"]) == [block] and pool.used == 1
    pool.release([block])
    assert pool.used == 1
    pool.release([block])
    assert pool.used == 0 and pool.available == 3
    pool.forget_all()
    assert pool.match([b"a"]) == [] and pool.available == 3


@given(seed=st.integers(0, 10_000), blocks=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_no_block_is_lost_or_given_twice(seed: int, blocks: int) -> None:
    """Random use against a plain count of who holds what."""
    chance, pool = random.Random(seed), BlockPool(blocks)
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}
    for _ in range(200):
        action = chance.random()
        if action < 0.4:
            block = pool.allocate()
            owned = {block for table in tables for block in table}
            assert block not in owned and block != 0
            assert (block is None) == (len(owned) == pool.num_blocks)
            if block is not None:
                content.pop(block, None)
                tables.append([block])
        elif action < 0.6 and tables:
            key = bytes([chance.randrange(6)])
            block = chance.choice(tables)[0]
            pool.publish(block, key)
            if block not in content and key not in content.values():
                content[block] = key
        elif action < 0.8:
            for block in (found := pool.match([bytes([chance.randrange(6)])])):
                assert block in content
            if found:
                tables.append(found)
        elif tables:
            pool.release(tables.pop(chance.randrange(len(tables))))
        assert pool.used == len({block for table in tables for block in table})
