"""The two namings against transformers' modules and the published files."""

from __future__ import annotations

import pytest
import torch

from moonbase.checkpoint.names import check_fit, checkpoint_pieces, layer_number, model_shapes, plain_name
from moonbase.checkpoint.quantization import read_config
from moonbase.checkpoint.writer import encoded_group
from moonbase.presets import preset_config


def test_model_names_and_shapes_are_those_of_transformers(written, variant: str) -> None:
    model, folder = written(variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert model_shapes(read_config(folder), mtp=False) == shapes


def test_kimi_k25_published_files() -> None:
    """208 550 tensors and 554.3 GiB, of which 335 tensors and 471.1M bf16 parameters are vision."""
    config = preset_config("kimi-k2.5")
    slots = [slot for piece in checkpoint_pieces(config)
             for slot in encoded_group(piece, "hf-int4", torch.float32 if piece.kind == "bias" else torch.bfloat16,
                                       "absmax/7", lambda: torch.empty(0)).slots]
    assert len(slots) + 335 == 208_550
    num_bytes = sum(slot.num_bytes for slot in slots) + 2 * (416_866_032 + 54_277_888)
    assert round(num_bytes / 2**30, 1) == 554.3
    shapes = {slot.name: (slot.dtype, slot.shape) for slot in slots}
    expert = "model.layers.60.mlp.experts.383."
    assert shapes[expert + "up_proj.weight_packed"] == (torch.int32, (2048, 896))
    assert shapes[expert + "up_proj.weight_scale"] == (torch.bfloat16, (2048, 224))
    assert shapes[expert + "down_proj.weight_packed"] == (torch.int32, (7168, 256))
    assert shapes[expert + "down_proj.weight_scale"] == (torch.bfloat16, (7168, 64))
    assert shapes[expert + "down_proj.weight_shape"] == (torch.int32, (2,))
    assert shapes["model.layers.1.mlp.gate.e_score_correction_bias"] == (torch.float32, (384,))
    assert shapes["model.layers.0.self_attn.kv_b_proj.weight"] == (torch.bfloat16, (16384, 512))


def test_deepseek_v3_published_files() -> None:
    """The fp8 files quantise attention, dense and expert matrices in 128x128 blocks; layer 61 is the MTP module."""
    config = preset_config("deepseek-v3")
    slots = {slot.name: (slot.dtype, slot.shape) for piece in checkpoint_pieces(config) if ".experts." not in piece.disk
             for slot in encoded_group(piece, "hf-fp8", torch.bfloat16, "absmax/7", lambda: torch.empty(0)).slots}
    assert slots["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (torch.float8_e4m3fn, (576, 7168))
    assert slots["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (torch.float32, (5, 56))
    assert slots["model.layers.61.eh_proj.weight"] == (torch.bfloat16, (7168, 14336))
    for name in ("eh_proj.weight_scale_inv", "mlp.gate.weight_scale_inv", "embed_tokens.weight_scale_inv"):
        assert f"model.layers.61.{name}" not in slots
    for name in ("model.layers.61.shared_head.head.weight", "lm_head.weight"):
        assert slots[name] == (torch.bfloat16, (129280, 7168))


def test_every_element_of_the_model_is_filled_exactly_once(written, variant: str) -> None:
    config = read_config(written(variant)[1])
    counts = {name: torch.zeros(shape) for name, shape in model_shapes(config).items()}
    for piece in checkpoint_pieces(config):
        if piece.kind == "copy":
            continue
        target = counts[piece.target]
        if piece.expert is not None:
            target = target[piece.expert, piece.row : piece.row + piece.shape[0]]
        assert tuple(target.shape) == piece.shape
        target += 1
    assert all((count == 1).all() for count in counts.values())


def test_mtp_names(written) -> None:
    config = read_config(written("v3")[1])
    places = {piece.disk: piece.target for piece in checkpoint_pieces(config)}
    assert places["model.layers.4.enorm.weight"] == "mtp.0.enorm.weight"
    assert places["model.layers.4.eh_proj.weight"] == "mtp.0.eh_proj.weight"
    assert places["model.layers.4.shared_head.norm.weight"] == "mtp.0.norm.weight"
    assert places["model.layers.4.self_attn.o_proj.weight"] == "mtp.0.layer.self_attn.o_proj.weight"
    assert places["model.layers.4.mlp.experts.7.down_proj.weight"] == "mtp.0.layer.mlp.experts.down_proj"
    assert places["model.layers.4.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert places["model.layers.4.shared_head.head.weight"] == "lm_head.weight"


def test_wrappers_of_multimodal_files() -> None:
    assert plain_name("language_model.model.norm.weight") == "model.norm.weight"
    assert plain_name("language_model.lm_head.weight") == "lm_head.weight"
    assert plain_name("model.language_model.layers.0.x") == "model.layers.0.x"
    assert plain_name("vision_tower.patch_embed.proj.weight") is None
    assert plain_name("mm_projector.proj.0.bias") is None
    assert layer_number("model.layers.12.mlp.gate.weight") == 12
    assert layer_number("model.norm.weight") is None


def test_a_model_of_another_configuration_is_an_assertion(written) -> None:
    shapes = model_shapes(read_config(written("k2")[1]))
    with pytest.raises(AssertionError, match="does not fit"):
        check_fit({"model.norm.weight": torch.empty(3)}, shapes)
