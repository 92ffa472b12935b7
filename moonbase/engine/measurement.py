"""What measurements need of an engine, and nobody else: contexts that need not be computed, and a look at routing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moonbase.engine.cache import block_keys
from moonbase.engine.engine import Engine
from moonbase.errors import UserError


@torch.no_grad()
def pretend_known(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Fill the cache with random latents that stand for all full blocks of `prompts` but each one's last token.

    Requests with these prompts then begin as after an earlier conversation, through the prefix cache: only what stands
    behind the last full block is computed. Nothing may be running. Raises UserError where there is no room.
    """
    pool = engine._ready().pool
    assert pool.prefix_cache and not engine.busy
    known = [block_keys(ids[:-1]) for ids in prompts]
    if sum(map(len, known)) > pool.available:
        raise UserError(f"{sum(map(len, known))} blocks of prompts do not fit into a cache of {pool.available}")
    for layer_PZX in engine._forward.cache.store:
        layer_PZX.normal_()
    for keys in known:
        blocks = [pool.allocate() for _ in keys]
        for block, key in zip(blocks, keys, strict=True):
            pool.publish(block, key)
        pool.release(blocks)


def step_and_count_experts(engine: Engine) -> list[int] | None:
    """One pass, not recorded, and how many different experts its rows chose in each sparse layer; None on a CPU."""
    engine._ready()
    fused, recorder = engine._forward._fused, engine._forward._recorder
    if fused is None:
        engine.step()
        return None
    fused.chosen, engine._forward._recorder = [], None
    try:
        engine.step()
        return [len(indices_NK.unique()) for indices_NK in fused.chosen]
    finally:
        fused.chosen, engine._forward._recorder = None, recorder
