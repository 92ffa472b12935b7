"""Contexts that a cache pretends to have computed, and how much room a GPU's engine leaves."""

from __future__ import annotations

import pytest
import torch

from moonbase.engine import Engine, Sampling
from moonbase.engine.cache import BLOCK_TOKENS, Batch, LatentCache
from moonbase.engine.measurement import pretend_known, step_and_count_experts
from moonbase.engine.pass_cuda import CHUNK_TOKENS, workspace_bytes
from moonbase.errors import UserError
from moonbase.presets import preset_config
from tests.engine.tiny import Bytes, engine


@torch.no_grad()
def test_replies_follow_from_the_latents_in_the_cache() -> None:
    """Nothing but the last token of a prompt is computed, and the reply is what the model says after these latents."""
    subject = engine(options=dict(max_running=2, cache_tokens=256))
    prompts = [[token % 61 for token in range(first, first + 49)] for first in (0, 7)]
    pretend_known(subject, prompts)
    requests = [subject.request(prompt, Sampling(max_tokens=4, temperature=0.0, ignore_eos=True))
                for prompt in prompts]
    for request in requests:
        subject.submit(request)
    assert step_and_count_experts(subject) is None, "only a GPU's pass counts"
    assert subject.statistics.passes == 1 and all(len(request.output_ids) == 1 for request in requests)
    store = subject._forward.cache.store
    cache = LatentCache(subject.model.config, store.shape[1], store.dtype, store.device)
    cache.store = store.clone()
    for request in requests:
        assert request.cached_tokens == 48
        blocks = torch.tensor([request.blocks], dtype=torch.int32)
        slot = request.blocks[3] * BLOCK_TOKENS
        position = torch.tensor([48])
        cache.batch = Batch(torch.tensor([0], dtype=torch.int32), position.int(), torch.tensor([slot]), blocks)
        hidden = subject.model.decode(torch.tensor([request.prompt_ids[-1]]), position, cache)
        assert int(subject.model.lm_head(hidden)[0].argmax()) == request.output_ids[0]
    while subject.busy:
        subject.step()
    assert subject.statistics.preemptions == 0


def test_what_does_not_fit_is_said() -> None:
    subject = Engine(engine().model, Bytes(), cache_tokens=64)
    with pytest.raises(UserError, match="6 blocks of prompts do not fit into a cache of 4"):
        pretend_known(subject, [[1] * 49, [2] * 49])


def test_the_room_that_a_pass_over_prompts_needs() -> None:
    """The largest tensors of K2's passes, counted by hand: keys and values of 131,072 tokens, 192 dims each and once
    more padded, for 64 heads; or fp32 rows of eight choices."""
    config = preset_config("kimi-k2")
    keys, rows = 131072 * 64 * 192 * 2, 16384 * 8 * 7168 * 4
    assert 3 * keys + rows // 2 < workspace_bytes(config, CHUNK_TOKENS, 2) < 3 * keys + rows
    short = config.model_copy(update={"max_position_embeddings": 4096})
    assert rows < workspace_bytes(short, CHUNK_TOKENS, 2) < 2.5 * rows
    assert workspace_bytes(short, 512, 2) < workspace_bytes(short, 4096, 2)
