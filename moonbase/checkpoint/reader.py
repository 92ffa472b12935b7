"""Reading a checkpoint: everything is checked from the headers first, then tensors are filled row by row.

Nothing is written into a model before the whole folder has been found complete: names, shapes, dtypes, file sizes and
the scales of quantised weights. Peak memory is the model plus a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moonbase.checkpoint.formats import dequantize_fp8, quantize_int4
from moonbase.checkpoint.names import (
    Piece,
    check_fit,
    checkpoint_pieces,
    is_ignored,
    layer_number,
    model_shapes,
    packed_stacks,
    plain_name,
)
from moonbase.checkpoint.placement import local_part, materialise, named_tensors
from moonbase.checkpoint.quantization import Quantization, read_quantization
from moonbase.checkpoint.safetensors_file import DTYPES, StoredTensor, read_header
from moonbase.config import ModelConfig, read_json
from moonbase.errors import CheckpointError
from moonbase.layout import INT4_GROUP, Int4Rule
from moonbase.ops.int4_packed import dequantize_int4

Progress = Callable[[str, int, int | None], None]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Rows are read in runs of about this many bytes, counted as stored or, where they are multiplied out, as the fp32 that
# they become: large enough for full disk speed, small beside any model. The memory manager keeps several runs' worth of
# freed buffers, and runs that stay in the processor's cache are also multiplied out faster.
READ_BYTES = 1 << 20
_FLOATS = ("BF16", "F16", "F32")


class StoredWeight:
    """One tensor of the layout as the folder holds it: plain, fp8 with scales, or INT4 with scales and shape."""

    def __init__(self, piece: Piece, parts: dict[str, StoredTensor], quantization: Quantization | None) -> None:
        self.piece, self.parts, self.quantization = piece, parts, quantization
        """`parts`: suffix after the tensor's name ("" for the tensor itself) -> stored tensor."""

    @property
    def form(self) -> str:
        return "int4" if "_packed" in self.parts else "fp8" if "_scale_inv" in self.parts else "plain"

    @property
    def dtype(self) -> torch.dtype:
        """What the weight naturally becomes: its stored dtype, or bf16 where it is quantised."""
        return DTYPES[self.parts[""].dtype] if self.form == "plain" else torch.bfloat16

    @property
    def is_published_int4(self) -> bool:
        """Whether it is stored as we would write it in INT4: groups of 32, bf16 scales."""
        return (self.form == "int4" and self.quantization is not None and self.quantization.group == INT4_GROUP
                and self.parts["_scale"].dtype == "BF16")

    def packed_blocks(self, rule: Int4Rule | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (first row, words, scales): as stored, or floats quantised by `rule`."""
        if self.is_published_int4:
            step = max(READ_BYTES // self.piece.shape[1], 1)
            for row in range(0, self.piece.shape[0], step):
                end = min(row + step, self.piece.shape[0])
                yield row, self.parts["_packed"].rows(row, end), self.parts["_scale"].rows(row, end)
            return
        assert rule is not None
        for row, rows in self.blocks():
            yield row, *quantize_int4(rows, rule)

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) until row `last`: plain weights in their stored dtype, quantised ones in fp32."""
        last = self.piece.shape[0] if last is None else last
        main = self.parts["_packed" if self.form == "int4" else ""]
        stored_bytes = (main.end - main.start) // max(main.shape[0], 1)
        row_bytes = stored_bytes if self.form == "plain" else 4 * self.piece.shape[1]
        step = max(READ_BYTES // max(row_bytes, 1), 1)
        if self.form == "fp8":
            assert self.quantization is not None
            height = self.quantization.block[0]
            first, step = first - first % height, max(step - step % height, height)
        for row in range(first, last, step):
            yield row, self._rows(main, row, min(row + step, self.piece.shape[0]))

    def _rows(self, main: StoredTensor, row: int, end: int) -> Tensor:
        if self.form == "plain":
            return main.rows(row, end)
        assert self.quantization is not None
        if self.form == "int4":
            return dequantize_int4(main.rows(row, end), self.parts["_scale"].rows(row, end), self.quantization.group)
        height = self.quantization.block[0]
        scale = self.parts["_scale_inv"].rows(row // height, -(-end // height))
        return dequantize_fp8(main.rows(row, end), scale, self.quantization.block)

    def read(self) -> Tensor:
        """The whole weight: stored dtype if plain, fp32 if quantised."""
        return torch.cat([rows for _, rows in self.blocks()])


class Checkpoint:
    """A folder whose every tensor has been found and checked. Raises CheckpointError, one line, if any is wrong."""

    def __init__(self, folder: str | Path, config: ModelConfig, mtp: bool = True,
                 progress: Progress | None = None) -> None:
        self.folder, self.config, self.mtp = Path(folder), config, mtp
        self.quantization = read_quantization(folder)
        stored, self.num_vision_tensors = _text_tensors(self.folder, config, mtp)
        self.weights = _match(self.folder, config, mtp, stored, self.quantization)
        _check_scales(self.weights)
        if progress is not None and self.num_vision_tensors:
            progress("vision tensors skipped", self.num_vision_tensors, self.num_vision_tensors)


def stored_mtp(folder: str | Path, config: ModelConfig) -> bool:
    """Whether the folder holds the multi-token-prediction modules that its configuration announces."""
    first = config.num_hidden_layers
    return config.num_nextn_predict_layers > 0 and any(
        (layer_number(plain_name(name) or "") or 0) >= first for name in _all_tensors(Path(folder))
    )


def experts_in_int4(folder: str | Path) -> bool:
    """Whether all routed experts that the folder holds are INT4 in the published form: groups of 32, bf16 scales."""
    quantization = read_quantization(folder)
    if quantization is None or quantization.kind != "int4" or quantization.group != INT4_GROUP:
        return False
    stored = {plain_name(name): tensor for name, tensor in _all_tensors(Path(folder)).items()}
    experts = [name for name in stored if name is not None and ".mlp.experts." in name]
    return bool(experts) and all(name.endswith(("_packed", "_scale", "_shape")) for name in experts) and all(
        stored[name].dtype == "BF16" for name in experts if name.endswith("_scale"))


def load_weights(model: nn.Module | Mapping[str, Tensor], folder: str | Path, config: ModelConfig, *,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None, mtp: bool = True,
                 int4_rule: Int4Rule | None = None, progress: Progress | None = None) -> None:
    """Fill the tensors of `model` in place from a checkpoint folder.

    `model` is a module or a mapping with the model's names (see `moonbase.checkpoint.names`); its tensors may be on the
    meta device (they get memory on `device`, default CPU) or sharded (`DTensor`: every process reads its own part).
    `dtype` is the dtype of the loaded weights, None keeps each tensor's own; the router's bias always stays fp32.
    Quantised weights are multiplied out in fp32. Stacks of experts that the model holds in INT4 (`QuantizedExperts`)
    get words and scales as stored; where the folder has floats for them, what `int4_rule` makes of these. With
    `mtp=False` multi-token-prediction modules are neither needed in the folder nor touched in the model. Raises
    CheckpointError before anything is written.
    """
    checkpoint = Checkpoint(folder, config, mtp, progress)
    found = named_tensors(model)
    packed = packed_stacks(found)
    shapes = model_shapes(config, mtp, packed)
    check_fit({name: found[name] for name in found if mtp or not name.startswith("mtp.")}, shapes)
    if int4_rule is None:
        _raise_problems(checkpoint.folder, [
            f"tensor {weight.piece.disk} is not stored in INT4 with groups of {INT4_GROUP} and bf16 scales"
            for weight in checkpoint.weights if weight.piece.target in packed and not weight.is_published_int4])
    keep_dtype = {weight.piece.target for weight in checkpoint.weights if weight.piece.kind == "bias"}
    keep_dtype |= {name + suffix for name in packed for suffix in ("_packed", "_scale")}
    materialise(model, set(shapes), dtype, device, keep_dtype)
    tensors = named_tensors(model)
    with torch.no_grad():
        for done, weight in enumerate(checkpoint.weights):
            target = weight.piece.target
            if target in packed:
                _fill_packed(tensors[target + "_packed"], tensors[target + "_scale"], weight, int4_rule)
            elif weight.piece.kind != "copy":
                _fill(tensors[target], weight)
            if progress is not None:
                progress("loading weights", done + 1, len(checkpoint.weights))


def _fill_packed(words: Tensor, scales: Tensor, weight: StoredWeight, rule: Int4Rule | None) -> None:
    """Copy a weight in INT4 into its place of two stacks, which nobody shards."""
    piece = weight.piece
    assert piece.expert is not None
    for row, *parts in weight.packed_blocks(rule):
        for target, rows in zip((words, scales), parts, strict=True):
            target[piece.expert, piece.row + row : piece.row + row + rows.shape[0]].copy_(rows)


def _fill(target: Tensor, weight: StoredWeight) -> None:
    """Copy a stored weight into its place of the model's tensor, or into the part of it that this process holds."""
    local, offsets = local_part(target)
    piece = weight.piece
    if piece.expert is not None:
        slot = piece.expert - offsets[0]
        if not 0 <= slot < local.shape[0]:
            return
        local, offsets = local[slot], offsets[1:]
    # Rows of the stored tensor that fall into this process's part, and where they land.
    first = max(offsets[0] - piece.row, 0)
    last = min(offsets[0] + local.shape[0] - piece.row, piece.shape[0])
    if last <= first:
        return
    columns = tuple(slice(start, start + size) for start, size in zip(offsets[1:], local.shape[1:], strict=True))
    shift = piece.row - offsets[0]
    for row, rows in weight.blocks(first, last):
        start, end = max(row, first), min(row + rows.shape[0], last)
        local[start + shift : end + shift].copy_(rows[(slice(start - row, end - row), *columns)])


# --- finding and checking ---------------------------------------------------------------------------------------------


def _all_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its stored name; index and shards agree. Raises CheckpointError."""
    index, single = folder / INDEX, folder / SINGLE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if index.exists() and single.exists():
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the stale one")
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise CheckpointError(_nothing_to_read(folder))
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is missing or malformed")
    for name in weight_map:
        if not name.isprintable():
            raise CheckpointError(f"{index}: {name!r} is no name of a tensor")
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file == ".." or not file.isprintable():
            raise CheckpointError(f"{index}: shard {file!r} is not a plain file name")
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                problems.append(f"tensor {name} is in both {tensors[name].path.name} and {file}")
            elif weight_map.get(name) != file:
                where = f"places it in {weight_map[name]}" if name in weight_map else "does not know it"
                problems.append(f"tensor {name} is in {file}, but the index {where}")
            tensors[name] = tensor
    problems += [f"the index names tensor {name}, but {file} does not hold it"
                 for name, file in weight_map.items() if name not in tensors]
    _raise_problems(folder, problems)
    return tensors


def _nothing_to_read(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (f"{folder}: holds only pickled weights, which are never opened because a pickle can run any code; "
                "convert them to safetensors first")
    if any(folder.glob("model-*.safetensors")):
        return f"{folder}: {INDEX} is missing"
    return f"{folder}: no weights here (neither {SINGLE} nor {INDEX})"


def _text_tensors(folder: Path, config: ModelConfig, mtp: bool) -> tuple[dict[str, StoredTensor], int]:
    """Tensors of the text model under their plain names, stacked experts taken apart; and how many vision tensors."""
    tensors: dict[str, StoredTensor] = {}
    num_vision, problems = 0, []
    for stored, tensor in _all_tensors(folder).items():
        name = plain_name(stored)
        if name is None:
            num_vision += 1
            continue
        layer = layer_number(name)
        if is_ignored(name) or (not mtp and layer is not None and layer >= config.num_hidden_layers):
            continue
        for part_name, part in _unstack(config, name, tensor, problems):
            if part_name in tensors:
                problems.append(f"tensor {part_name} is stored twice")
            tensors[part_name] = part
    _raise_problems(folder, problems)
    return tensors, num_vision


def _unstack(config: ModelConfig, name: str, tensor: StoredTensor,
             problems: list[str]) -> Iterator[tuple[str, StoredTensor]]:
    """Take a stacked expert tensor apart (transformers 5 can write these); others pass through."""
    prefix, dot, leaf = name.partition(".mlp.experts.")
    hidden, width, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    expected = {"gate_up_proj": (count, 2 * width, hidden), "down_proj": (count, hidden, width)}.get(leaf)
    if not dot or expected is None:
        yield name, tensor
        return
    if tensor.shape != expected or tensor.dtype not in _FLOATS:
        problems.append(f"tensor {name} is {tensor.dtype} {list(tensor.shape)} instead of {list(expected)}")
        return
    for expert in range(count):
        start = expert * expected[1] * expected[2]
        place = f"{prefix}.mlp.experts.{expert}."
        if leaf == "down_proj":
            yield place + "down_proj.weight", tensor.part(start, (hidden, width))
        else:
            yield place + "gate_proj.weight", tensor.part(start, (width, hidden))
            yield place + "up_proj.weight", tensor.part(start + width * hidden, (width, hidden))


def _match(folder: Path, config: ModelConfig, mtp: bool, stored: dict[str, StoredTensor],
           quantization: Quantization | None) -> list[StoredWeight]:
    """Pair the layout with the folder. Raises CheckpointError that names what is missing, surplus or misshapen."""
    weights, missing, wrong = [], [], []
    left = dict(stored)
    for piece in checkpoint_pieces(config, mtp):
        suffixes = ("_packed", "_scale", "_shape") if piece.disk + "_packed" in left else ("", "_scale_inv")
        parts = {suffix: left.pop(piece.disk + suffix) for suffix in suffixes if piece.disk + suffix in left}
        if not parts:
            # The modules' copies of embedding and head repeat tensors that are there anyway.
            if piece.kind != "copy":
                missing.append(f"tensor {piece.disk} is missing")
            continue
        problem = _wrong_part(piece, parts, quantization)
        wrong += [problem] if problem else []
        weights.append(StoredWeight(piece, parts, quantization))
    if missing and mtp and len(missing) == sum("tensor model.layers." in text and (layer_number(text[7:]) or 0)
                                               >= config.num_hidden_layers for text in missing):
        missing[0] += " (the multi-token-prediction module; load with mtp=False to do without)"
    _raise_problems(folder, wrong + missing + [f"tensor {name} does not belong to this configuration" for name in left])
    return weights


def _wrong_part(piece: Piece, parts: dict[str, StoredTensor], quantization: Quantization | None) -> str | None:
    """What is wrong with the stored parts of one tensor, or None."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
    if "_packed" in parts:
        if quantization is None or quantization.kind != "int4":
            return f"tensor {piece.disk}_packed is INT4, but config.json does not announce it"
        rows, columns = piece.shape
        if columns % quantization.group:
            return f"tensor {piece.disk}_packed: {columns} columns are no multiple of group_size={quantization.group}"
        expected = {"_packed": ((rows, columns // 8), ("I32",)), "_shape": ((2,), ("I32", "I64")),
                    "_scale": ((rows, columns // quantization.group), _FLOATS)}
    elif "" not in parts:
        return f"tensor {piece.disk} is missing, its scale is there"
    elif parts[""].dtype == "F8_E4M3":
        if quantization is None or quantization.kind != "fp8":
            return f"tensor {piece.disk} is F8_E4M3, but config.json does not announce it"
        if len(piece.shape) != 2:
            return f"tensor {piece.disk} is F8_E4M3, only matrices can be"
        blocks = tuple(-(-size // step) for size, step in zip(piece.shape, quantization.block, strict=True))
        expected = {"": (piece.shape, ("F8_E4M3",)), "_scale_inv": (blocks, ("F32", "BF16"))}
    else:
        expected = {"": (piece.shape, _FLOATS)}
    for suffix, (shape, dtypes) in expected.items():
        part = parts.get(suffix)
        if part is None:
            return f"tensor {piece.disk}{suffix} is missing"
        if part.shape != shape:
            return f"tensor {piece.disk}{suffix} has shape {list(part.shape)} instead of {list(shape)}"
        if part.dtype not in dtypes:
            return f"tensor {piece.disk}{suffix} is stored as {part.dtype} instead of {' or '.join(dtypes)}"
    surplus = sorted(set(parts) - set(expected))
    return f"tensor {piece.disk}{surplus[0]} is a scale without a quantised weight" if surplus else None


def _check_scales(weights: list[StoredWeight]) -> None:
    """Quantised weights: scales finite, stored shapes as promised. The scales are 1-11% of the file."""
    problems = []
    for weight in weights:
        for suffix, part in weight.parts.items():
            if suffix in ("_scale", "_scale_inv") and not part.read().isfinite().all():
                problems.append(f"tensor {part.name} holds a non-finite scale")
            if suffix == "_shape" and tuple(part.read().tolist()) != weight.piece.shape:
                problems.append(f"tensor {part.name} says {part.read().tolist()} instead of {list(weight.piece.shape)}")
    if problems:
        _raise_problems(weights[0].parts[next(iter(weights[0].parts))].path.parent, problems)


def _raise_problems(folder: Path, problems: list[str]) -> None:
    """One line: the first three problems and how many more there are."""
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{folder}: {'; '.join(problems[:3])}{more}")
