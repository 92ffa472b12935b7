"""The latent cache: what is stored, what a query may see, how little it holds."""

from __future__ import annotations

import torch

from moonbase.engine.cache import LatentCache
from moonbase.presets import preset_config
from moonbase.sizes import kv_bytes_per_token
from tests.model.tiny import tiny_config


def make(batch: int = 2, capacity: int = 9) -> LatentCache:
    return LatentCache(tiny_config(), batch, capacity, torch.float32, torch.device("cpu"))


def test_what_is_stored_comes_back_in_order() -> None:
    cache, generator = make(), torch.Generator().manual_seed(0)
    stored = []
    for time in (4, 1, 3):
        parts = [[torch.randn(2, time, dims, generator=generator) for dims in (10, 8)] for _ in range(2)]
        for layer, (latent, key) in enumerate(parts):
            found, mask = cache.extend(layer, latent, key)
            assert torch.equal(found, torch.cat([torch.cat(old[layer], dim=-1) for old in [*stored, parts]], dim=1))
            assert mask.shape == (2, time, cache.length + time)
        stored.append(parts)
        cache.advance(time)
    assert cache.length == 8


def test_a_query_sees_its_own_past_and_nothing_skipped() -> None:
    cache = make()
    cache.skip = torch.tensor([0, 3])
    for start, time in ((0, 5), (5, 2)):
        _, mask = cache.extend(0, torch.zeros(2, time, 10), torch.zeros(2, time, 8))
        cache.advance(time)
        for row, skip in enumerate((0, 3)):
            for query in range(start, start + time):
                seen = [slot for slot in range(start + time) if mask[row, query - start, slot] == 0]
                # A skipped slot's own query sees itself only: its result is never used, but it must be finite.
                assert seen == (list(range(skip, query + 1)) or [query])
    assert set(mask.unique().tolist()) <= {0.0, -torch.inf}


def test_it_holds_what_the_sizes_promise() -> None:
    """576 values per token and layer for Kimi K2, whatever the number of heads."""
    config = preset_config("kimi-k2")
    cache = LatentCache(config, 1, 1, torch.bfloat16, torch.device("meta"))
    assert cache.store.numel() * cache.store.element_size() == kv_bytes_per_token(config) == 70_272
