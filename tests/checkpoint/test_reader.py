"""Reading what transformers wrote, in every variant and storage format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moonbase.checkpoint import load_weights, read_config, stored_mtp
from moonbase.errors import CheckpointError
from tests.checkpoint.variants import (
    SENTINEL,
    add_mtp,
    as_disk,
    assert_same,
    edit_config,
    empty_state,
    load,
    quantise_fp8,
    quantise_int4,
)


def test_equals_the_transformers_module(written, variant: str) -> None:
    model, folder = written(variant)
    assert_same(load(folder, mtp=False), dict(model.state_dict()))


def test_shards_and_index(written, tmp_path: Path) -> None:
    model, _ = written("k2")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(load(tmp_path), dict(model.state_dict()))


def test_stacked_experts_as_transformers_can_write_them(written, tmp_path: Path) -> None:
    model, _ = written("k2")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    assert_same(load(tmp_path), dict(model.state_dict()))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_files(written, tmp_path: Path, stored: torch.dtype) -> None:
    tensors = load_file(written("k2")[1] / "model.safetensors")
    halves = {name: t if "bias" in name else t.to(stored) for name, t in tensors.items()}
    shutil.copy(written("k2")[1] / "config.json", tmp_path)
    save_file(halves, tmp_path / "model.safetensors")
    state = load(tmp_path)
    assert torch.equal(state["lm_head.weight"], tensors["lm_head.weight"].to(stored).float())
    kept = load(tmp_path, dtype=stored)
    assert kept["lm_head.weight"].dtype == stored
    assert torch.equal(kept["lm_head.weight"], halves["lm_head.weight"])
    assert kept["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_mtp_kept_or_skipped(written, tmp_path: Path) -> None:
    model, source = written("v3")
    folder = Path(shutil.copytree(source, tmp_path / "v3"))
    config = read_config(folder)
    assert not stored_mtp(folder, config)
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\..*mtp=False"):
        load(folder)
    module = add_mtp(folder)
    assert stored_mtp(folder, config)
    state = load(folder)
    assert torch.equal(state["mtp.0.eh_proj.weight"], module["model.layers.4.eh_proj.weight"])
    assert torch.equal(state["mtp.0.norm.weight"], module["model.layers.4.shared_head.norm.weight"])
    expert = module["model.layers.4.mlp.experts.3.down_proj.weight"]
    assert torch.equal(state["mtp.0.layer.mlp.experts.down_proj"][3], expert)
    assert_same({name: t for name, t in state.items() if not name.startswith("mtp.")}, dict(model.state_dict()))
    # Skipped: the model's own module stays as it is, or need not be there at all.
    untouched = empty_state(config)
    load_weights(untouched, folder, config, mtp=False)
    assert all((t == SENTINEL).all() for name, t in untouched.items() if name.startswith("mtp."))
    assert_same(load(folder, mtp=False), dict(model.state_dict()))
    edit_config(folder, num_nextn_predict_layers=0)
    assert_same(load(folder, mtp=False), dict(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\..*does not belong to this configuration"):
        load(folder, mtp=True)


def test_mtp_without_its_copies_of_embedding_and_head(written, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written("v3")[1], tmp_path / "v3"))
    add_mtp(folder)
    tensors = load_file(folder / "model.safetensors")
    whole = load(folder)
    for name in ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    assert_same(load(folder), whole)


def test_kimi_k25_wrapper(written, folder: Path) -> None:
    """Text config nested, prefixes, vision tensors counted and skipped, old rope buffers ignored."""
    tensors = load_file(folder / "model.safetensors")
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    wrapped["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    wrapped["vision_tower.patch_embed.proj.weight"] = torch.ones(2, 2)
    wrapped["vision_tower.patch_embed.pos_emb.weight"] = torch.ones(2, 2)
    wrapped["mm_projector.proj.0.bias"] = torch.ones(2)
    save_file(wrapped, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({
        "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "media_placeholder_token_id": 3,
        "vision_config": {"patch_size": 14}, "text_config": values | {"model_type": "kimi_k2"}}))
    reports = []
    state = load(folder, progress=lambda *report: reports.append(report))
    assert_same(state, dict(written("k2")[0].state_dict()))
    assert reports[0] == ("vision tensors skipped", 3, 3)
    assert reports[-1] == ("loading weights", len(tensors), len(tensors))


def quantise_int4_with_long_shapes(folder: Path) -> dict[str, torch.Tensor]:
    return quantise_int4(folder, torch.int64)


@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_int4, quantise_int4_with_long_shapes])
def test_quantised_weights_are_multiplied_out(folder: Path, quantise: Callable) -> None:
    meaning = quantise(folder)
    assert_same(as_disk(load(folder), read_config(folder)), meaning)


def test_quantised_rows_are_read_in_blocks(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices higher than one run of rows, with scale blocks that do not divide the height."""
    from moonbase.checkpoint import reader

    folder = Path(shutil.copytree(written("moonlight")[1], tmp_path / "m"))
    meaning = quantise_fp8(folder)
    whole = load(folder)
    monkeypatch.setattr(reader, "READ_BYTES", 64)
    assert_same(load(folder), whole)
    assert_same(as_disk(whole, read_config(folder)), meaning)


def test_tensors_are_filled_in_place_and_meta_tensors_get_memory(written) -> None:
    model, folder = written("k2")
    config = read_config(folder)
    state = empty_state(config)
    before = {name: tensor.data_ptr() for name, tensor in state.items()}
    load_weights(state, folder, config)
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == before
    with torch.device("meta"):
        hollow = type(model)(model.config)
    load_weights(hollow, folder, config, dtype=torch.bfloat16)
    assert hollow.lm_head.weight.dtype == torch.bfloat16 and hollow.lm_head.weight.requires_grad
    assert torch.equal(hollow.lm_head.weight, model.lm_head.weight.bfloat16())
    gate = hollow.model.layers[1].mlp.gate
    assert torch.equal(gate.e_score_correction_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    assert gate.e_score_correction_bias.dtype == torch.float32
