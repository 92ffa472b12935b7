"""Two namings of the same weights: tensors on disk (experts one by one) and tensors in the model (experts stacked).

On disk, Hugging Face layout: `model.layers.L.mlp.experts.E.gate_proj.weight` [I, D] and so on. In the model one
matrix product serves all experts, so gate and up of every expert live in `experts.gate_up_proj` [E, 2·I, D] (rows
0..I-1 gate, I..2I-1 up) and `experts.down_proj` [E, D, I]. Multi-token-prediction module k is `mtp.k.` in the model
and `model.layers.{num_hidden_layers + k}.` on disk. A model that holds a stack in INT4 has `NAME_packed` and
`NAME_scale` in its place (`ops.int4_packed`), as the disk has `weight_packed` and `weight_scale`.

Letters: E experts, I width of one expert, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from moonbase.config import ModelConfig
from moonbase.layout import INT4_GROUP, TensorSpec, checkpoint_layout

if TYPE_CHECKING:
    from torch import Tensor

VISION_PREFIXES = ("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector.")


class Piece(NamedTuple):
    """One tensor on disk and the place in the model that it fills."""

    disk: str
    """Name on disk."""
    shape: tuple[int, ...]
    kind: str
    """As in `moonbase.layout`."""
    target: str
    """Name of the model's tensor. Copies (kind `copy`) point at the tensor that they repeat."""
    expert: int | None = None
    """Index into the first dimension of a stacked target; None fills the whole target."""
    row: int = 0
    """First row within the expert's matrix."""


def checkpoint_pieces(config: ModelConfig, mtp: bool = True) -> Iterator[Piece]:
    """Yield every tensor of a checkpoint in the published order, experts one by one."""
    experts: list[TensorSpec] = []
    for spec in checkpoint_layout(config, mtp):
        if "{expert}" in spec.name:
            experts.append(spec)
            continue
        yield from _expert_pieces(config, experts)
        experts = []
        yield Piece(spec.name, spec.shape, spec.kind, _model_name(config, spec.name))
    yield from _expert_pieces(config, experts)


def _expert_pieces(config: ModelConfig, specs: list[TensorSpec]) -> Iterator[Piece]:
    for expert in range(specs[0].count if specs else 0):
        for spec in specs:
            prefix, projection = spec.name.split("{expert}.")
            down = projection == "down_proj.weight"
            target = _model_name(config, prefix) + ("down_proj" if down else "gate_up_proj")
            row = config.moe_intermediate_size if projection == "up_proj.weight" else 0
            yield Piece(spec.name.format(expert=expert), spec.shape, spec.kind, target, expert, row)


def _model_name(config: ModelConfig, disk: str) -> str:
    """The model's name of a tensor (or prefix) on disk."""
    layer = layer_number(disk)
    if layer is None or layer < config.num_hidden_layers:
        return disk
    rest = disk.removeprefix(f"model.layers.{layer}.")
    module = f"mtp.{layer - config.num_hidden_layers}."
    if rest == "embed_tokens.weight":
        return "model.embed_tokens.weight"
    if rest == "shared_head.head.weight":
        return "lm_head.weight"
    if rest == "shared_head.norm.weight":
        return module + "norm.weight"
    if rest in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
        return module + rest
    return f"{module}layer.{rest}"


def layer_number(disk: str) -> int | None:
    """The layer that a tensor on disk belongs to, or None."""
    parts = disk.split(".", 3)
    if len(parts) > 3 and parts[:2] == ["model", "layers"] and parts[2].isdecimal():
        return int(parts[2])
    return None


def packed_stacks(names: Collection[str]) -> set[str]:
    """Which stacks of experts a model with tensors of these names holds in INT4."""
    return {name.removesuffix("_packed") for name in names if name.endswith("_packed")}


def model_shapes(
    config: ModelConfig, mtp: bool = True, packed: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, experts stacked, the stacks `packed` in INT4."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in checkpoint_pieces(config, mtp):
        if piece.kind == "copy":
            continue
        if piece.expert is None:
            shapes[piece.target] = piece.shape
        else:
            stacked = 2 if piece.target.endswith("gate_up_proj") else 1
            shape = (config.n_routed_experts, stacked * piece.shape[0])
            if piece.target in packed:
                shapes[piece.target + "_packed"] = (*shape, piece.shape[1] // 8)
                shapes[piece.target + "_scale"] = (*shape, piece.shape[1] // INT4_GROUP)
            else:
                shapes[piece.target] = (*shape, piece.shape[1])
    return shapes


def check_fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Assert that a model holds exactly these tensors."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{name}: {found.get(name)} for {shape}" for name, shape in shapes.items() if found.get(name) != shape]
    extra = [name for name in found if name not in shapes]
    assert not wrong and not extra, f"the model does not fit its configuration: {wrong[:3]} {extra[:3]}"


def plain_name(stored: str) -> str | None:
    """Strip the wrapper that multimodal checkpoints put around the text model; None for a tensor of the vision part.

    `language_model.model.X` and `language_model.lm_head.X` (Kimi K2.5 as published) and `model.language_model.X` (its
    transformers form) become `model.X` and `lm_head.X`.
    """
    if stored.startswith(VISION_PREFIXES):
        return None
    if stored.startswith("model.language_model."):
        return "model." + stored.removeprefix("model.language_model.")
    return stored.removeprefix("language_model.")


def is_ignored(disk: str) -> bool:
    """Buffers that old files carry although they follow from the configuration."""
    return disk.endswith("rotary_emb.inv_freq")
