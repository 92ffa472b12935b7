"""The engine on experts that stay in INT4: the answers of the model multiplied out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moonbase
from moonbase.checkpoint import load_weights, save_weights
from moonbase.engine import Engine, Sampling
from moonbase.model import Transformer
from moonbase.model.quantized_experts import QuantizedExperts
from moonbase.ops import native
from tests.engine.test_pass_cpu import WIDE, Bench
from tests.engine.tiny import PROMPTS, Bytes, by_hand
from tests.model.tiny import tiny_model

GROUPED = WIDE | dict(hidden_size=64, moe_intermediate_size=32, num_nextn_predict_layers=1, num_hidden_layers=3)
Pair = tuple[Transformer, Transformer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(7, 0.15, **GROUPED)
    path = tmp_path_factory.mktemp("int4") / "int4"
    save_weights(model, path, model.config, fmt="hf-int4", dtype=torch.float32)
    return path


@pytest.fixture
def pair(folder: Path) -> Callable[[torch.dtype], Pair]:
    """The folder's model multiplied out, and as it is."""
    return lambda dtype: (moonbase.load(folder, device="cpu", dtype=dtype),
                          moonbase.load(folder, device="cpu", dtype=dtype, keep_int4=True))


def stacks(model: Transformer) -> list[QuantizedExperts]:
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_those_of_the_model_multiplied_out(pair: Callable[[torch.dtype], Pair], dtype: torch.dtype) -> None:
    floats, packed = pair(dtype)
    assert len(stacks(packed)) == 3 and not stacks(floats), "two sparse layers and the one that looks ahead"
    tokens = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = floats(tokens)
    assert expected.abs().max() > 1 and torch.equal(packed(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_says_the_same(pair: Callable[[torch.dtype], Pair], dtype: torch.dtype) -> None:
    """With guesses of the module that looks ahead; in fp32 as the plain loop without a cache has it."""
    floats, packed = pair(dtype)
    found = [Engine(model, Bytes(), chunk_tokens=8).complete(PROMPTS, Sampling(max_tokens=8, ignore_eos=True))
             for model in (floats, packed)]
    assert [output.ids for output in found[1]] == [output.ids for output in found[0]]
    assert [output.logprobs for output in found[1]] == [output.logprobs for output in found[0]]
    if dtype == torch.float32:
        assert found[1][0].ids == by_hand(floats, PROMPTS[0], 8)


@pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")
def test_the_pass_in_c_reads_the_words(pair: Callable[[torch.dtype], Pair]) -> None:
    """The definition within rounding; the floats' pass to the bit."""
    floats, packed = (Bench(model, tokens=100) for model in pair(torch.float32))
    passes = ([(0, 0, 1)], [(1, 0, 70), (0, 1, 1)], [(2, 0, 3), (0, 2, 20), (1, 70, 1)])
    packed.assert_equal(0, *passes)
    for bench in (floats, packed):
        bench.empty()
    for rows in passes:
        sequences = [sequence for sequence, _, count in rows for _ in range(count)]
        positions = [position for _, start, count in rows for position in range(start, start + count)]
        tokens = [(7 * position + sequence) % 61 for position, sequence in zip(positions, sequences, strict=True)]
        one, other = (bench.compute(tokens, sequences, positions) for bench in (floats, packed))
        assert torch.equal(one, other)


@pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")
def test_the_pass_in_c_follows_words_that_change(pair: Callable[[torch.dtype], Pair]) -> None:
    bench = Bench(pair(torch.float32)[1], tokens=64)
    bench.assert_equal(0, [(0, 0, 20)])
    stack = stacks(bench.model)[0]
    stack.down_proj_packed.bitwise_xor_(0x11111111)
    bench.assert_equal(1, [(0, 0, 20)])
    stack.gate_up_proj_packed = stack.gate_up_proj_packed.flip(0).contiguous()
    bench.assert_equal(2, [(0, 0, 20)])
    stack.gate_up_proj_scale = stack.gate_up_proj_scale.float()
    assert not bench.fast.ready(), "scales that are not bf16 are left to PyTorch"


def _pack(words: torch.Tensor, scales: torch.Tensor, gated: bool) -> torch.Tensor:
    """Bytes of both, experts last; gate's and up's rows in turns."""
    parts = [part.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if gated else part for part in (words, scales)]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1).transpose(0, 2).contiguous()


def _unpack(arranged: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    parts = arranged.transpose(0, 2).split([arranged.shape[0] * 8 // 9, arranged.shape[0] // 9], dim=-1)
    words, scales = (part.contiguous().view(dtype)
                     for part, dtype in zip(parts, (torch.int32, torch.bfloat16), strict=True))
    return tuple(part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if gated else part
                 for part in (words, scales))


@torch.no_grad()
def test_weights_may_lie_in_another_order(pair: Callable[[torch.dtype], Pair], folder: Path, tmp_path: Path) -> None:
    """As a kernel wants them: same answers, same memory, and what is saved does not show it."""
    floats, packed = pair(torch.float32)
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    size = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    for stack in stacks(packed):
        stack.arrange(_pack, _unpack)
        assert {name for name, _ in stack.named_buffers()} == {"gate_up_proj_arranged", "down_proj_arranged"}
    assert size == sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    assert torch.equal(packed(tokens), floats(tokens))
    after = packed.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    save_weights(packed, tmp_path / "again", packed.config, fmt="hf-int4", dtype=torch.float32)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert Engine(packed, Bytes()).generate_ids([[5, 9]]) == Engine(floats, Bytes()).generate_ids([[5, 9]])

    lying = [stack.gate_up_proj_arranged for stack in stacks(packed)]
    for stack in stacks(packed):
        stack.arrange(_pack, _unpack)
    assert all(stack.gate_up_proj_arranged is same for stack, same in zip(stacks(packed), lying, strict=True)), \
        "another engine on the same model finds them as they must be"
    held, first = QuantizedExperts(packed.config), stacks(packed)[0]
    held.hold_arranged({name: getattr(first, name + "_arranged") for name in ("gate_up_proj", "down_proj")}, _pack,
                       _unpack)
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in held.state_dict().items())
    with pytest.raises(AssertionError, match="restore"):
        load_weights(packed, folder, packed.config)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    packed.load_state_dict(zeros)
    assert not any(buffer.any() for stack in stacks(packed) for buffer in stack.buffers())
    packed.load_state_dict(before)
    for stack in stacks(packed):
        stack.restore()
    assert torch.equal(packed(tokens), floats(tokens))
    load_weights(packed, folder, packed.config)
