"""Loading needs little more memory than the loaded model, in every format: measured from outside, one process each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moonbase.checkpoint.formats import quantize_fp8, quantize_int4
from moonbase.checkpoint.names import checkpoint_pieces
from moonbase.checkpoint.quantization import quantization_block
from moonbase.config import ModelConfig
from tests.checkpoint.variants import BASE

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")

# 160 MB in bf16, nearly all in matrices of 4.2M and 8.4M numbers: the larger a tensor, the more its copies show.
VALUES = BASE | dict(vocab_size=8192, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=4096,
                     n_routed_experts=3, num_experts_per_tok=2, num_hidden_layers=2)
CONFIG = ModelConfig.parse(VALUES)
Tensors = dict[str, torch.Tensor]

MEASURE = """
import sys
import torch
from moonbase.checkpoint import load_weights, read_config
from moonbase.model import Transformer
torch.set_num_threads(1)

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def load(model, folder, config):
    load_weights(model, folder, config, dtype=torch.bfloat16)

def load_at_once(model, folder, config):
    from pathlib import Path
    from safetensors.torch import load_file
    from moonbase.checkpoint.names import checkpoint_pieces
    tensors = load_file(next(Path(folder).glob("*.safetensors")))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model.to_empty(device="cpu").to(torch.bfloat16)
    state = model.state_dict()
    for piece in checkpoint_pieces(config):
        target = state[piece.target]
        if piece.expert is not None:
            target = target[piece.expert, piece.row : piece.row + piece.shape[0]]
        target.copy_(tensors[piece.disk])

config = read_config(sys.argv[1])
warm = torch.randn(64, 64).bfloat16() @ torch.randn(64, 64).bfloat16()
with torch.device("meta"):
    model = Transformer(config)
before = memory("VmRSS")
with torch.no_grad():
    globals()[sys.argv[2]](model, sys.argv[1], config)
print((memory("VmHWM") - before) / sum(t.numel() * t.element_size() for t in model.state_dict().values()))
"""


def measured(folder: Path, loader: str = "load") -> float:
    """Peak resident memory above what the process held before, over the bytes of the loaded bf16 model."""
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, loader], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    return float(done.stdout)


@pytest.fixture(scope="module")
def weights() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 23, generator=generator).bfloat16()
    return {piece.disk: noise[: torch.Size(piece.shape).numel()].view(piece.shape) for piece in
            checkpoint_pieces(CONFIG)}


def in_one_file(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def in_shards(folder: Path, tensors: Tensors) -> None:
    names = list(tensors)
    weight_map = {}
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        part = names[number::4]
        save_file({name: tensors[name].contiguous().clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def put_config(folder: Path, values: dict) -> None:
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "deepseek_v3"}))


def bf16_single(folder: Path, weights: Tensors) -> None:
    in_one_file(folder, weights)
    put_config(folder, VALUES)


def bf16_sharded(folder: Path, weights: Tensors) -> None:
    in_shards(folder, weights)
    put_config(folder, VALUES)


def fp32_single(folder: Path, weights: Tensors) -> None:
    in_one_file(folder, {name: tensor.float() for name, tensor in weights.items()})
    put_config(folder, VALUES)


def fp8(folder: Path, weights: Tensors) -> None:
    stored = dict(weights)
    for piece in checkpoint_pieces(CONFIG):
        if piece.kind in ("attention", "dense", "shared", "expert"):
            stored[piece.disk], stored[piece.disk + "_scale_inv"] = quantize_fp8(weights[piece.disk])
    in_one_file(folder, stored)
    put_config(folder, VALUES | {"quantization_config": quantization_block("hf-fp8")})


def as_int4(weights: Tensors) -> Tensors:
    stored = dict(weights)
    for piece in checkpoint_pieces(CONFIG):
        if piece.kind == "expert":
            packed, scale = quantize_int4(stored.pop(piece.disk))
            stored |= {piece.disk + "_packed": packed, piece.disk + "_scale": scale,
                       piece.disk + "_shape": torch.tensor(piece.shape, dtype=torch.int32)}
    return stored


def int4(folder: Path, weights: Tensors) -> None:
    in_one_file(folder, as_int4(weights))
    put_config(folder, VALUES | {"quantization_config": quantization_block("hf-int4")})


def kimi_k25(folder: Path, weights: Tensors) -> None:
    """The text part under its prefix, 42 MB of vision tensors beside it, in shards."""
    wrapped = {f"language_model.{name}": tensor for name, tensor in as_int4(weights).items()}
    vision = {f"vision_tower.encoder.blocks.{n}.weight": weights["lm_head.weight"][:1024] for n in range(20)}
    in_shards(folder, wrapped | vision)
    text = VALUES | {"model_type": "kimi_k2", "quantization_config": quantization_block("hf-int4")}
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test: it will be large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("write", [
    int4, *(pytest.param(write, marks=pytest.mark.slow)
            for write in (bf16_single, fp8, bf16_sharded, fp32_single, kimi_k25))])
def test_peak_stays_under_a_quarter_above_the_model(write: Callable, weights: Tensors, place: Path) -> None:
    write(place, weights)
    share = measured(place)
    # Below 0.9 the model itself would not have been seen.
    assert 0.9 < share < 1.25


def test_the_measure_notices_a_second_copy(weights: Tensors, place: Path) -> None:
    bf16_single(place, weights)
    assert measured(place, "load_at_once") > 1.8
