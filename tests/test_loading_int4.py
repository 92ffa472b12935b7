"""`moonbase.load(..., keep_int4=...)`: what stays packed, that the same bytes come out again, and who is told no."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moonbase.checkpoint import convert, load_weights, save_weights
from moonbase.errors import CheckpointError, UserError
from moonbase.loading import load, packed_is_fast
from moonbase.model.quantized_experts import QuantizedExperts, hold_in_int4
from moonbase.ops import experts_int4_hopper, experts_int4_prompt_hopper
from moonbase.presets import preset_config
from tests.checkpoint.test_writer import disk, fingerprint
from tests.checkpoint.variants import assert_same, edit_config
from tests.model.tiny import tiny_model

WIDTHS = dict(hidden_size=64, moe_intermediate_size=32, num_nextn_predict_layers=1)
EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    model = tiny_model(5, **WIDTHS)
    save_weights(model, path / "hf", model.config)
    convert(path / "hf", path / "int4", "hf-int4")
    return path


def rewritten(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the INT4 folder with other tensors."""
    copy.mkdir()
    shutil.copy(folder / "int4" / "config.json", copy)
    tensors = disk(folder / "int4")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_the_words_of_the_files_are_held(folder: Path) -> None:
    model, stored = load(folder / "int4", device="cpu", keep_int4=True), disk(folder / "int4")
    state = model.state_dict()
    for projection, target, first in (("gate_proj", "gate_up_proj", 0), ("up_proj", "gate_up_proj", 32),
                                      ("down_proj", "down_proj", 0)):
        for suffix in ("_packed", "_scale"):
            for expert in range(8):
                expected = stored[f"{EXPERTS}{expert}.{projection}.weight{suffix}"]
                found = state[EXPERTS + target + suffix][expert, first : first + expected.shape[0]]
                assert found.dtype == expected.dtype and torch.equal(found, expected)
    packed = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(packed) == 2 and not model.training
    held = sum(buffer.numel() * buffer.element_size() for module in packed for buffer in module.buffers())
    assert held == 0.5625 * sum(2 * 3 * 8 * [64 * 32])
    assert not any(".experts." in name and "shared" not in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_again_it_is_the_same_folder(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(folder / "int4", device="cpu", dtype=dtype, keep_int4="auto")
    save_weights(model, tmp_path / "again", model.config, fmt="hf-int4")
    assert fingerprint(tmp_path / "again") == fingerprint(folder / "int4")
    for fmt in ("hf", "hf-fp8"):
        save_weights(model, tmp_path / fmt, model.config, fmt=fmt, dtype=torch.bfloat16)
        convert(folder / "int4", tmp_path / f"{fmt}-converted", fmt)
        assert fingerprint(tmp_path / fmt) == fingerprint(tmp_path / f"{fmt}-converted")


def test_a_state_dict_is_taken_back(folder: Path) -> None:
    model, other = (load(folder / "int4", device="cpu", keep_int4=True) for _ in range(2))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(model.state_dict())
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    model.bfloat16()
    assert_same({name: t for name, t in model.state_dict().items() if EXPERTS in name},
                {name: t for name, t in other.state_dict().items() if EXPERTS in name})


def test_by_default_experts_are_floats_that_can_be_trained(folder: Path) -> None:
    model = load(folder / "int4", device="cpu")
    assert model.get_parameter(EXPERTS + "down_proj").requires_grad


def test_auto_leaves_floats_alone(folder: Path) -> None:
    for source in (folder / "hf", "preset:pico"):
        model = load(source, device="cpu", keep_int4="auto")
        assert not any(isinstance(module, QuantizedExperts) for module in model.modules())


def test_auto_keeps_them_where_a_gpu_has_kernels_for_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    k2, odd, gpu = preset_config("kimi-k2"), preset_config("kimi-k2").model_copy(update={"hidden_size": 7200}), "cuda"
    for compiles in (False, True):
        for kernels in (experts_int4_hopper, experts_int4_prompt_hopper):
            monkeypatch.setattr(kernels, "available", lambda compiles=compiles: compiles)
        assert packed_is_fast(k2, torch.device(gpu), torch.bfloat16) == compiles
        assert not packed_is_fast(k2, torch.device(gpu), torch.float16)
        assert not packed_is_fast(odd, torch.device(gpu), torch.bfloat16)
        assert packed_is_fast(odd, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("source", "says"), [
    ("hf", "its experts are not in INT4; moonbase convert .*hf NEW --format hf-int4 makes a folder where they are"),
    ("preset:pico", "preset:pico: a preset has random weights, none of them in INT4"),
])
def test_there_must_be_something_to_keep(folder: Path, source: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(folder / source if source == "hf" else source, keep_int4=True)


def test_other_kinds_of_int4_are_multiplied_out(folder: Path, tmp_path: Path) -> None:
    """fp32 scales, or one expert that is not quantised: nothing that the packed form could hold."""
    scale, expert = EXPERTS + "3.up_proj.weight_scale", EXPERTS + "0.down_proj.weight"

    def unquantise(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("_packed", "_scale", "_shape"):
            del tensors[expert + suffix]
        tensors[expert] = torch.ones(64, 32).bfloat16()

    def other_scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors[scale] = tensors[scale].float()

    for name, change in (("scale", other_scale), ("expert", unquantise)):
        copy = rewritten(folder, tmp_path / name, change)
        assert load(copy, device="cpu", keep_int4="auto").get_parameter(EXPERTS + "down_proj").shape == (8, 64, 32)
        with pytest.raises(UserError, match="not in INT4"):
            load(copy, device="cpu", keep_int4=True)


def test_groups_of_another_size_are_multiplied_out(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "hf", tmp_path / "hf"))
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                 "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}}}}
    edit_config(copy, quantization_config=block)
    assert load(copy, device="cpu", keep_int4="auto").get_parameter(EXPERTS + "down_proj").shape == (8, 64, 32)


def test_a_stack_that_no_file_has_in_int4(folder: Path) -> None:
    """The reader's own word, for whoever builds the packed model by hand."""
    model = tiny_model(5, **WIDTHS)
    hold_in_int4(model)
    for buffer in model.buffers():
        buffer.zero_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight is not "
                                              r"stored in INT4 with groups of 32 and bf16 scales; .*; and \d+ more"):
        load_weights(model, folder / "hf", model.config)
    assert_same(dict(model.state_dict()), before)  # nothing was written
