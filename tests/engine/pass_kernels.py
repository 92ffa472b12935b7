"""A pass of fused GPU kernels against `Transformer.decode`, decoding and reading prompts. Started by
tests/engine/test_cuda_pass.py, in Triton's interpreter (fp32) or on a GPU (bf16)."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.checkpoint.formats import quantize_int4
from moonbase.engine import Engine, Sampling
from moonbase.engine.cache import BLOCK_TOKENS, Batch, LatentCache
from moonbase.engine.pass_cuda import CudaPass, Reading, context_attention
from moonbase.model import Transformer
from moonbase.model.moe import Router
from moonbase.model.quantized_experts import hold_in_int4
from moonbase.ops import attention_cuda
from moonbase.ops.attention import attention_reference
from tests.engine.tiny import Bytes
from tests.model.tiny import tiny_model, yarn

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
MODELS = {
    "plain query, groups": dict(q_lora_rank=None, kv_lora_rank=16, n_group=2, topk_group=1),
    "long context": dict(rope_scaling=yarn(8), n_shared_experts=2, max_position_embeddings=4096),
    "INT4 experts": dict(hidden_size=128, moe_intermediate_size=128, n_routed_experts=2, num_experts_per_tok=1,
                         num_hidden_layers=2),
}
TOLERANCE = dict(rtol=4e-2, atol=4e-2) if DEVICE.type == "cuda" else dict(rtol=1e-4, atol=1e-5)


def model_of(changes: dict) -> Transformer:
    model = tiny_model(**changes).eval()
    if changes is MODELS["INT4 experts"]:
        held = {name: [torch.stack(each) for each in zip(*map(quantize_int4, stack.data), strict=True)]
                for name, stack in model.named_parameters() if ".experts." in name}
        hold_in_int4(model)
        model.load_state_dict({name + part: tensor for name, both in held.items()
                               for part, tensor in zip(("_packed", "_scale"), both, strict=True)}, strict=False)
    model = model.to(DEVICE)
    if DEVICE.type == "cuda":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


class Caches:
    """The same paged cache for each of the two ways; its blocks lie about."""

    def __init__(self, model: Transformer, sequences: int = 3, blocks: int = 12) -> None:
        order = 1 + torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(sequences, blocks).int().to(DEVICE)
        dtype = next(model.parameters()).dtype
        self.of_reference, self.of_pass = (
            LatentCache(model.config, 1 + sequences * blocks, dtype, DEVICE) for _ in range(2))

    def batch(self, sequences: torch.Tensor, positions: torch.Tensor) -> Batch:
        blocks = self.tables[sequences.clamp_min(0), positions // BLOCK_TOKENS].long()
        slots = torch.where(sequences < 0, 0, blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS)
        return Batch(sequences.int(), positions.int(), slots, self.tables)

    def slots(self, sequence: int, stop: int) -> torch.Tensor:
        places = torch.arange(stop, device=DEVICE)
        return self.tables[sequence].long()[places // BLOCK_TOKENS] * BLOCK_TOKENS + places % BLOCK_TOKENS


@pytest.mark.parametrize(("changes", "most_sequences"), [
    *(pytest.param(changes, 1, id=name) for name, changes in MODELS.items()),
    # So many that rows that decode take the experts' kernel for prompts.
    pytest.param(MODELS["INT4 experts"], 64, id="INT4 experts, crowded", marks=on_gpu)])
@torch.no_grad()
def test_it_reads_prompts_and_decodes_like_the_model(changes: dict, most_sequences: int) -> None:
    """Two prompts at once, then a chunk behind one of them beside a token of the other, then one token each."""
    model = model_of(changes)
    caches = Caches(model)
    fused = CudaPass(model, caches.of_pass, most_sequences)
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[1]))
    seen, alike = 0, 0
    generator = torch.Generator().manual_seed(1)
    passes = [([(0, 0, 37), (2, 0, 5)], 0), ([(2, 5, 1), (0, 37, 20)], 1), ([(0, 57, 1), (2, 6, 1), (-1, 0, 2)], 3)]
    for parts, decoding in passes:
        sequences = torch.tensor([row for row, _, count in parts for _ in range(count)], device=DEVICE)
        positions = torch.tensor([start + place for _, start, count in parts for place in range(count)], device=DEVICE)
        tokens = torch.randint(0, model.config.vocab_size, positions.shape, generator=generator).to(DEVICE)
        batch = caches.batch(sequences, positions)
        caches.of_reference.batch = batch
        fused.chosen = []
        chosen.clear()
        expected = model.decode(tokens, positions, caches.of_reference)
        reading = [(row, start + count, count) for row, start, count in parts[decoding:]]
        found = fused.decode(tokens, positions, batch, None if not reading else Reading(
            sum(count for *_, count in parts[:decoding]), [count for *_, count in reading],
            [stop for _, stop, _ in reading], torch.cat([caches.slots(row, stop) for row, stop, _ in reading])))
        # bf16 rounds at other places, and now and then that sends a token to another expert: such tokens do not count.
        same = torch.stack([(ours.sort(-1).values == theirs.sort(-1).values).all(-1)
                            for ours, theirs in zip(fused.chosen, chosen, strict=True)]).all(0)
        known = sequences >= 0
        seen, alike = seen + int(known.sum()), alike + int((known & same).sum())
        found, expected = found[known & same].float(), expected[known & same].float()
        assert (found - expected).norm() <= (0.05 if DEVICE.type == "cuda" else 1e-5) * expected.norm()
    assert alike > (0.8 if DEVICE.type == "cuda" else 0.999) * seen


@pytest.mark.parametrize("counts_and_stops", [
    ([5], [5]), ([3, 1, 8], [3, 20, 8]), ([2, 40], [70, 41]), ([33, 9], [70, 9])], ids=str)
@pytest.mark.parametrize("far", [1 << 30, 8], ids=["end to end", "in pieces"])
def test_context_attention(
    counts_and_stops: tuple[list[int], list[int]], far: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cuda, "FAR", far)
    monkeypatch.setattr(attention_cuda, "CHUNK", 16)
    counts, stops = counts_and_stops
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(rows, 3, dims, generator=generator).to(dtype)
                         for rows, dims in ((sum(counts), 24), (sum(stops), 24), (sum(stops), 16)))
    expected = []
    for number, (count, stop) in enumerate(zip(counts, stops, strict=True)):
        first = sum(stops[:number])
        context = slice(first, first + stop)
        padded = torch.zeros(stop, 3, 24)
        padded[stop - count :] = query[sum(counts[:number]) :][:count]
        whole, _ = attention_reference(padded[None], key[None, context].float(), value[None, context].float(), 0.2)
        expected.append(whole[0, stop - count :])
    found = context_attention(query.to(DEVICE), key.to(DEVICE), value.to(DEVICE), counts, stops, 0.2)
    torch.testing.assert_close(found.float().cpu(), torch.cat(expected), **TOLERANCE)


@on_gpu
def test_recorded_passes_say_what_unrecorded_ones_say() -> None:
    """With sequences that come, go and grow over several table widths, and weights that move."""
    model = model_of(dict(kv_lora_rank=64, qk_rope_head_dim=16, hidden_size=64, max_position_embeddings=4096))
    assert CudaPass.fits(model)
    prompts = [[id % 61 for id in range(count)] for count in (3, 40, 700, 1500)]
    sampling = [Sampling(max_tokens=count, temperature=1.0) for count in (60, 9, 30, 25)]
    plain, recorded = (Engine(model, Bytes(), cuda_graphs=graphs) for graphs in (False, True))
    for _ in range(2):
        found = [[output.ids for output in engine.complete(prompts, sampling)] for engine in (plain, recorded)]
        assert found[0] == found[1]
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.1
        plain.weights_changed()
        recorded.weights_changed()


@on_gpu
def test_a_reply_has_the_same_bits_in_any_company() -> None:
    """Tokens and log-probabilities alone, and together with others in chunks of any size, from a warm cache, preempted,
    with guesses and without graphs. The longest prompts reach into the part that cuDNN reads."""
    model = model_of(dict(
        hidden_size=256, num_attention_heads=4, q_lora_rank=128, kv_lora_rank=256, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=16, n_group=1, topk_group=1, num_experts_per_tok=4,
        moe_intermediate_size=96, num_nextn_predict_layers=1, max_position_embeddings=16384))
    assert CudaPass.fits(model)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (count,), generator=generator).tolist()
               for count in (3, 40, 300, 513, 700, 1500, 4097, 5000, 9000, *range(20, 50))]
    sampling = Sampling(max_tokens=40, temperature=0.0, logprobs=0)

    def replies(engine: Engine, asked: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        return [(output.ids, output.logprobs) for output in engine.complete(asked, sampling)]

    alone = Engine(model, Bytes(), prefix_cache=False, speculate=False)
    expected = [replies(alone, [prompt])[0] for prompt in prompts]
    assert len({tuple(ids) for ids, _ in expected}) > len(prompts) // 2, "replies that are all alike would show nothing"
    plain = dict(prefix_cache=False, speculate=False)
    ways = {"together": plain, "small chunks": plain | dict(chunk_tokens=333), "without graphs": plain | dict(
        cuda_graphs=False), "prefix cache": dict(speculate=False), "guesses": dict(prefix_cache=False),
        "preempted": plain | dict(cache_tokens=9200), "all": dict(chunk_tokens=1000, cache_tokens=12000)}
    seen = {}
    for way, settings in ways.items():
        engine = Engine(model, Bytes(), **settings)
        for _ in range(2):  # the second time from a warm cache, where there is one
            found = replies(engine, prompts)
            wrong = [number for number in range(len(prompts)) if found[number] != expected[number]]
            assert not wrong, (way, [len(prompts[number]) for number in wrong])
        seen[way] = engine.statistics
    assert seen["preempted"].preemptions > 0 < seen["guesses"].drafted_tokens
