"""A forward pass in C against `Transformer.decode`; that no row notices the others; that weights are never stale."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.engine import Engine, Sampling
from moonbase.engine.cache import BLOCK_TOKENS, Batch, LatentCache
from moonbase.engine.pass_cpu import CpuPass
from moonbase.model import Transformer
from moonbase.ops import native
from tests.engine.tiny import PROMPTS, Bytes, by_hand
from tests.model.tiny import tiny_model, yarn

pytestmark = pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")

WIDE: dict[str, Any] = dict(q_lora_rank=32, kv_lora_rank=16, v_head_dim=16, qk_nope_head_dim=10, qk_rope_head_dim=6,
                            max_position_embeddings=4096, rope_scaling=yarn(8))
"""Tiny, with widths that the kernels take."""


class Bench:
    """A model, its pass, and a cache for each of the two ways; what was never written is NaN."""

    def __init__(self, model: Transformer, sequences: int = 3, tokens: int = 1100) -> None:
        self.model = model.eval()
        blocks = -(-tokens // BLOCK_TOKENS)
        order = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(0)) + 1
        self.tables = order.view(sequences, blocks).int().contiguous()
        self.caches = [LatentCache(model.config, sequences * blocks + 1, torch.float32, torch.device("cpu"))
                       for _ in range(2)]
        self.empty()
        self.fast = CpuPass(model, self.caches[0])

    def empty(self) -> None:
        for cache in self.caches:
            cache.store.fill_(torch.nan)

    @torch.no_grad()
    def reference(self, tokens: Sequence[int], sequences: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        position = torch.tensor(positions)
        block = self.tables[torch.tensor(sequences), position // BLOCK_TOKENS].long()
        self.caches[1].batch = Batch(torch.tensor(sequences, dtype=torch.int32), position.int(),
                                     block * BLOCK_TOKENS + position % BLOCK_TOKENS, self.tables)
        return self.model.decode(torch.tensor(tokens), position, self.caches[1])

    def compute(self, tokens: Sequence[int], sequences: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        assert self.fast.ready()
        return self.fast.compute(tokens, sequences, positions, self.tables)

    def assert_equal(self, seed: int, *passes: Sequence[tuple[int, int, int]]) -> None:
        """Each pass is some (sequence, first position, count)."""
        generator = torch.Generator().manual_seed(seed)
        for rows in passes:
            sequences = [sequence for sequence, _, count in rows for _ in range(count)]
            positions = [position for _, start, count in rows for position in range(start, start + count)]
            tokens = torch.randint(0, 61, (len(positions),), generator=generator).tolist()
            expected = self.reference(tokens, sequences, positions)
            found = self.compute(tokens, sequences, positions)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
            wanted = list(range(0, len(tokens), 3))
            torch.testing.assert_close(self.fast.logits(found, wanted), self.model.lm_head(found[wanted]).detach(),
                                       rtol=1e-4, atol=1e-4)


@st.composite
def configurations(draw) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 4]))
    kept = draw(st.integers(1, groups))
    experts = draw(st.sampled_from([8, 20]))
    return WIDE | dict(
        hidden_size=draw(st.sampled_from([16, 48])), q_lora_rank=draw(st.sampled_from([None, 16, 48])),
        kv_lora_rank=draw(st.sampled_from([16, 48])), num_attention_heads=draw(st.sampled_from([1, 3, 5, 50])),
        qk_nope_head_dim=draw(st.integers(1, 20)), qk_rope_head_dim=draw(st.sampled_from([2, 6, 16])),
        num_hidden_layers=3, first_k_dense_replace=draw(st.integers(0, 3)), n_shared_experts=draw(st.integers(0, 2)),
        n_routed_experts=experts, n_group=groups, topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, min(6, experts // groups * kept))),
        norm_topk_prob=draw(st.booleans()), routed_scaling_factor=draw(st.sampled_from([1.0, 2.827])),
        rope_scaling=draw(st.sampled_from([None, yarn(1), yarn(8), yarn(40) | dict(mscale_all_dim=0.0)])))


@given(changes=configurations(), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_equals_the_definition(changes: dict[str, Any], seed: int) -> None:
    # Narrow weights: with wide ones rounding grows from layer to layer.
    bench = Bench(tiny_model(seed, 0.1, **changes), tokens=100)
    bench.assert_equal(seed, [(0, 0, 1)], [(1, 0, 70), (0, 1, 1)], [(2, 0, 3), (0, 2, 20), (1, 70, 1)])


def test_equals_the_definition_far_into_the_context() -> None:
    """Beyond one stretch of keys and one piece of rotations; a single token there too."""
    bench = Bench(tiny_model(1, 0.1, **WIDE))
    bench.assert_equal(1, [(0, 0, 600)], [(0, 600, 470), (1, 0, 30)], [(0, 1070, 1)], [(0, 1071, 1), (1, 30, 1)])


@pytest.mark.parametrize("heads", [2, 50])
def test_a_row_has_the_same_bits_in_any_company(heads: int) -> None:
    """Alone, in chunks, beside others, and with any number of threads."""
    bench = Bench(tiny_model(2, 0.1, **WIDE | dict(num_attention_heads=heads, n_shared_experts=2)))
    lengths, generator = (1060, 37, 530), torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]

    def read(cuts: Sequence[int], together: bool, threads: int) -> list[torch.Tensor]:
        bench.empty()
        torch.set_num_threads(threads)
        found: list[list[torch.Tensor]] = [[], [], []]
        for start, stop in itertools.pairwise(cuts):
            parts = [(number, range(start, min(stop, length)))
                     for number, length in enumerate(lengths) if start < length]
            for rows in [parts] if together else [[part] for part in parts]:
                out = bench.compute([tokens[number][place] for number, places in rows for place in places],
                                    [number for number, places in rows for _ in places],
                                    [place for _, places in rows for place in places])
                for (number, _), piece in zip(rows, out.split([len(places) for _, places in rows]), strict=True):
                    found[number].append(piece)
        return [torch.cat(pieces) for pieces in found]

    expected = read([0, 1060], together=False, threads=1)
    single = [0, *range(1, 40), 500, *range(511, 530), 1040, *range(1041, 1061)]
    for cuts, together, threads in (([0, 1060], True, 1), (range(0, 1156, 105), True, 2), (single, True, 1),
                                    (single, False, 2), ([0, 512, 1024, 1060], True, 3)):
        found = read(list(cuts), together, threads)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), (cuts, threads)


def test_weights_are_never_stale() -> None:
    bench = Bench(tiny_model(3, 0.1, **WIDE), tokens=64)
    model, other = bench.model, tiny_model(4, 0.1, **WIDE)
    bench.assert_equal(0, [(0, 0, 20)])
    model.load_state_dict(other.state_dict())
    bench.assert_equal(1, [(0, 0, 20)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.loss(torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 9))).loss_sum.backward()
    optimizer.step()
    model.model.layers[1].mlp.gate.e_score_correction_bias += torch.randn(8)
    bench.assert_equal(2, [(0, 0, 20)])
    model.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
    bench.assert_equal(3, [(0, 0, 20)])
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 32))
    model.lm_head.weight.data = torch.randn(61, 32)
    model.model.layers[1].self_attn = tiny_model(5, 0.1, **WIDE).model.layers[1].self_attn
    bench.assert_equal(4, [(0, 0, 20)])
    model.to(torch.bfloat16)
    assert not bench.fast.ready()
    model.to(torch.float32)
    bench.assert_equal(5, [(0, 0, 20)])


def test_what_the_kernels_do_not_fit_is_left_alone() -> None:
    for changes in (dict(kv_lora_rank=10), dict(q_lora_rank=14), dict(v_head_dim=9), dict(moe_intermediate_size=24)):
        assert not Bench(tiny_model(**WIDE | changes), tokens=32).fast.ready()
    model = tiny_model(**WIDE)
    bench = Bench(model, tokens=32)
    assert bench.fast.ready()
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp)
    assert not bench.fast.ready()
    assert not Bench(tiny_model(**WIDE).bfloat16(), tokens=32).fast.ready()


@pytest.mark.parametrize("changes", [dict(), dict(num_nextn_predict_layers=1), dict(q_lora_rank=None, n_group=4)])
def test_the_engine_generates_what_the_plain_loop_does(changes: dict[str, Any]) -> None:
    model = tiny_model(6, **WIDE | changes).eval()
    engine = Engine(model, Bytes(), chunk_tokens=8)
    found = engine.generate_ids(PROMPTS, Sampling(max_tokens=20))
    assert found == [by_hand(model, prompt, 20) for prompt in PROMPTS]


_PROGRAM = """
import torch
from moonbase.engine import Engine, Sampling
from tests.engine.test_pass_cpu import WIDE
from tests.engine.tiny import PROMPTS, Bytes
from tests.model.tiny import tiny_model
torch.set_num_threads(1)
print(Engine(tiny_model(6, **WIDE).eval(), Bytes()).generate_ids(PROMPTS, Sampling(max_tokens=20)))
"""


def test_without_the_kernels_the_definition_is_used() -> None:
    texts = []
    for switch in ("0", "1"):
        done = subprocess.run([sys.executable, "-c", _PROGRAM], env=os.environ | {"MOONBASE_NATIVE": switch},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] != ""
