"""What a checkpoint's `config.json` says about storage: the configuration and its `quantization_config`.

Formats: hf (plain floats), hf-fp8 (DeepSeek-V3 and Kimi K2: fp8 e4m3 in 128x128 blocks) and hf-int4 (Kimi K2-Thinking
and K2.5: compressed-tensors pack-quantized, routed experts in groups of 32). The numbers themselves: `formats.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from moonbase.config import ModelConfig, read_json
from moonbase.errors import CheckpointError, UserError
from moonbase.layout import FP8_BLOCK, FP8_KINDS, INT4_GROUP, INT4_KINDS

Format = Literal["hf", "hf-int4", "hf-fp8"]
FORMATS: tuple[str, ...] = ("hf", "hf-int4", "hf-fp8")
QUANTISED_KINDS: dict[str, frozenset[str]] = {
    "hf": frozenset(),
    "hf-int4": INT4_KINDS,
    "hf-fp8": FP8_KINDS,
}
"""Which kinds of tensor each format quantises."""


class Quantization(NamedTuple):
    """What a `quantization_config` says about storage."""

    kind: Literal["fp8", "int4"]
    block: tuple[int, int] = FP8_BLOCK
    """fp8: rows and columns that share a scale."""
    group: int = INT4_GROUP
    """INT4: columns that share a scale."""


def read_config(folder: str | Path) -> ModelConfig:
    """The network's configuration of a checkpoint folder (K2.5's `text_config` is unwrapped).

    Raises UserError for a field or a kind of quantisation that is not supported, by name.
    """
    config = ModelConfig.from_folder(folder)
    read_quantization(folder)
    return config


def read_quantization(folder: str | Path) -> Quantization | None:
    """How the weights of a folder are stored; None for plain floats. Raises CheckpointError for an unknown kind."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a mapping of fields, found {type(values).__name__}")
    block = values.get("quantization_config")
    if block is None and isinstance(values.get("text_config"), dict):
        block = values["text_config"].get("quantization_config")
    if block is None:
        return None
    if not isinstance(block, dict):
        raise CheckpointError(f"{path}: quantization_config: expected a mapping, found {type(block).__name__}")
    method = block.get("quant_method")
    if method == "fp8":
        return _parse_fp8(block, path)
    if method == "compressed-tensors":
        return _parse_int4(block, path)
    raise CheckpointError(f"{path}: unsupported quantization_config.quant_method={method!r} "
                          "(supported: 'fp8', 'compressed-tensors')")


def _parse_fp8(block: dict[str, Any], path: Path) -> Quantization:
    _require(path, "quantization_config", block,
             {"fmt": ("e4m3", None), "activation_scheme": ("dynamic", None), "scale_fmt": (None, "float", "ue8m0")})
    size = block.get("weight_block_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(f"{path}: unsupported quantization_config.weight_block_size={size!r} "
                              "(supported: [128, 128])")
    return Quantization("fp8", block=(size[0], size[1]))


def _parse_int4(block: dict[str, Any], path: Path) -> Quantization:
    # A transform would turn the weights after they are multiplied out.
    _require(path, "quantization_config", block,
             {"format": ("pack-quantized",), "quantization_status": ("compressed", None), "kv_cache_scheme": (None,),
              "transform_config": (None, {})})
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{path}: quantization_config.config_groups is missing or empty")
    sizes = []
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(f"{path}: {where}.weights is missing")
        _require(path, where, group, {"input_activations": (None,), "output_activations": (None,)})
        _require(path, where + ".weights", group["weights"],
                 {"num_bits": (4,), "type": ("int",), "symmetric": (True,), "strategy": ("group",),
                  "actorder": (None,)})
        sizes.append(group["weights"].get("group_size"))
    size = sizes[0]
    if any(other != size for other in sizes) or type(size) is not int or size <= 0 or size % 8:
        raise CheckpointError(f"{path}: unsupported group_size={size!r} in quantization_config (supported: 32)")
    return Quantization("int4", group=size)


def _require(path: Path, where: str, values: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    for name, choices in allowed.items():
        if values.get(name) not in choices:
            raise CheckpointError(f"{path}: unsupported {where}.{name}={values.get(name)!r} "
                                  f"(supported: {choices[0]!r})")


def quantization_block(fmt: Format, mtp: bool = False) -> dict[str, Any] | None:
    """The `quantization_config` of the published checkpoints in this format; with `mtp` it leaves eh_proj out too."""
    if fmt == "hf-fp8":
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": list(FP8_BLOCK)}
    if fmt == "hf-int4":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": INT4_GROUP,
                   "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None,
                   "block_structure": None}
        ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
                                          "output_activations": None}},
            "ignore": [*ignore, "re:.*eh_proj.*"] if mtp else ignore,
        }
    return None


def check_format(fmt: str, config: ModelConfig) -> None:
    """Raises UserError for an unknown format or widths that INT4 groups do not divide."""
    if fmt not in FORMATS:
        raise UserError(f"unknown format {fmt!r}: choose one of {', '.join(FORMATS)}")
    if fmt == "hf-int4":
        for name in ("hidden_size", "moe_intermediate_size"):
            width = getattr(config, name)
            if width % INT4_GROUP:
                raise UserError(f"hf-int4 needs {name} to be a multiple of {INT4_GROUP}, found {width}: "
                                "choose hf or hf-fp8")
