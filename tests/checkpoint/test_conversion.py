"""From format to format without a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moonbase.checkpoint import convert, read_config, save_weights
from moonbase.checkpoint.names import checkpoint_pieces
from moonbase.errors import CheckpointError, UserError
from tests.checkpoint.test_writer import disk, fingerprint
from tests.checkpoint.variants import add_mtp, assert_same, edit_config, load


@pytest.mark.parametrize("fmt", ["hf", "hf-fp8", "hf-int4"])
def test_equals_loading_and_saving(written, tmp_path: Path, fmt: str) -> None:
    model, source = written("k2")
    convert(source, tmp_path / "converted", fmt)
    save_weights(model, tmp_path / "saved", read_config(source), fmt=fmt)
    assert_same(disk(tmp_path / "converted"), disk(tmp_path / "saved"))
    assert read_config(tmp_path / "converted") == read_config(source)


@pytest.mark.parametrize("fmt", ["hf-fp8", "hf-int4"])
def test_the_same_format_is_copied_bit_for_bit(written, tmp_path: Path, fmt: str) -> None:
    """With scales that quantising again would not find."""
    model, source = written("k2")
    save_weights(model, tmp_path / "one", read_config(source), fmt=fmt)
    shard = next((tmp_path / "one").glob("*.safetensors"))
    tensors = disk(tmp_path / "one")
    for name in tensors:
        if "_scale" in name:
            tensors[name] = tensors[name] * 1.5
        if name.endswith("_packed"):
            tensors[name] = torch.zeros_like(tensors[name]) + 0x77777777
    save_file(tensors, shard, metadata={"format": "pt"})
    convert(tmp_path / "one", tmp_path / "two", fmt)
    assert_same(disk(tmp_path / "two"), tensors)
    convert(tmp_path / "two", tmp_path / "three", fmt)
    assert fingerprint(tmp_path / "two") == fingerprint(tmp_path / "three")


@pytest.mark.parametrize("fmt", ["hf-fp8", "hf-int4"])
def test_back_to_floats(written, tmp_path: Path, fmt: str) -> None:
    model, source = written("k2")
    save_weights(model, tmp_path / "quantised", read_config(source), fmt=fmt)
    convert(tmp_path / "quantised", tmp_path / "plain", "hf")
    values = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in values and values["dtype"] == "bfloat16"
    assert_same(load(tmp_path / "plain", dtype=torch.bfloat16), load(tmp_path / "quantised", dtype=torch.bfloat16))
    convert(tmp_path / "quantised", tmp_path / "exact", "hf", dtype=torch.float32)
    assert_same(load(tmp_path / "exact"), load(tmp_path / "quantised"))


def test_mtp_kept_dropped_or_absent(written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(written("v3")[1], tmp_path / "source"))
    convert(source, tmp_path / "absent", "hf")
    assert read_config(tmp_path / "absent").num_nextn_predict_layers == 0
    with pytest.raises(CheckpointError, match="is missing"):
        convert(source, tmp_path / "wanted", "hf", mtp=True)
    module = add_mtp(source)
    convert(source, tmp_path / "kept", "hf")
    kept = disk(tmp_path / "kept")
    assert_same({name: kept[name] for name in module}, module)
    assert read_config(tmp_path / "kept").num_nextn_predict_layers == 1
    convert(source, tmp_path / "dropped", "hf", mtp=False)
    assert_same(disk(tmp_path / "dropped"), disk(tmp_path / "absent"))


def test_companions_come_along(folder: Path, tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "tiktoken.model", "chat_template.jinja",
             "generation_config.json", "tokenization_kimi.py", "LICENSE"]
    for name in names:
        (folder / name).write_text(name)
    for name in ("optimizer.bin", "README.md", "modeling_deepseek.py", "pytorch_model.bin"):
        (folder / name).write_text(name)
    convert(folder, tmp_path / "out", "hf")
    others = {path.name for path in (tmp_path / "out").iterdir() if "model-" not in path.name}
    assert others == {*names, "config.json", "model.safetensors.index.json"}
    assert (tmp_path / "out" / "tiktoken.model").read_text() == "tiktoken.model"


def test_refusals_leave_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    for destination, fmt, message in (
        (folder, "hf", "same folder"),
        (folder / ".." / folder.name, "hf", "same folder"),
        (tmp_path / "full", "hf", "not an empty folder"),
        (tmp_path / "file", "hf", "not an empty folder"),
        (tmp_path / "out", "gguf", "unknown format 'gguf': choose one of hf, hf-int4, hf-fp8"),
    ):
        with pytest.raises(UserError, match=message):
            convert(folder, destination, fmt)
    with pytest.raises(UserError, match="no such f"):
        convert(tmp_path / "absent", tmp_path / "out", "hf")
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        convert(folder, tmp_path / "out", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_empty_destination_is_filled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "empty", "hf")
    assert_same(disk(tmp_path / "empty"), disk(folder))


MEASURE = """
import sys
import torch
from moonbase.checkpoint import convert
torch.set_num_threads(1)

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

from moonbase.checkpoint import conversion
before = memory("VmRSS")
convert(sys.argv[1], sys.argv[2], "hf-int4")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_checkpoint(written, tmp_path: Path) -> None:
    """A 150 MB checkpoint of small experts: a few tensors at a time are in memory."""
    folder = tmp_path / "big"
    folder.mkdir()
    shutil.copy(written("k2")[1] / "config.json", folder)
    edit_config(folder, hidden_size=512, moe_intermediate_size=512, n_routed_experts=24)
    save_file({piece.disk: torch.ones(piece.shape) for piece in checkpoint_pieces(read_config(folder))},
              folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    assert size > 150e6
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, tmp_path / "out"], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < size / 3
