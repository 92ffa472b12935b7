"""Writing a checkpoint in Hugging Face layout: shard by shard, tensor by tensor, the same bytes every time.

The result is what `transformers.AutoModelForCausalLM.from_pretrained` loads without remote code: shards, an index,
and a `config.json`. A sharded (`DTensor`) model is written by its first process; the others take part in gathering.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moonbase import files
from moonbase.checkpoint.formats import quantize_fp8, quantize_int4
from moonbase.checkpoint.names import Piece, check_fit, checkpoint_pieces, model_shapes, packed_stacks
from moonbase.checkpoint.placement import full_tensor, is_sharded, named_tensors, raise_together
from moonbase.checkpoint.quantization import QUANTISED_KINDS, Format, check_format, quantization_block
from moonbase.checkpoint.reader import INDEX, Progress
from moonbase.checkpoint.safetensors_file import SafetensorsWriter, TensorSlot
from moonbase.config import ModelConfig
from moonbase.errors import UserError
from moonbase.layout import FP8_BLOCK, INT4_GROUP, Int4Rule
from moonbase.ops.int4_packed import dequantize_int4

MAX_SHARD_BYTES = 5_000_000_000
ExtraFiles = Mapping[str, bytes | Path]


class Group(NamedTuple):
    """Tensors that go to disk together: one weight, or a quantised weight with its scales."""

    slots: tuple[TensorSlot, ...]
    fetch: Callable[[], Any]
    """Get hold of the source; every process of a sharded model calls it."""
    encode: Callable[[Any], tuple[Tensor, ...]]
    """Turn the source into the tensors of `slots`; only the writing process calls it."""

    @property
    def num_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self.slots)


def save_weights(model: nn.Module | Mapping[str, Tensor], folder: str | Path, config: ModelConfig, *,
                 dtype: torch.dtype | None = None, fmt: Format = "hf", int4_rule: Int4Rule = "absmax/7",
                 max_shard_bytes: int = MAX_SHARD_BYTES, extra_files: ExtraFiles | None = None,
                 progress: Progress | None = None) -> None:
    """Write a checkpoint folder, whole or not at all; an existing folder is replaced at the end.

    `model` is a module or a mapping with the model's names. `dtype` is the dtype on disk; None keeps the model's (and
    means bf16 for what the quantised formats leave unquantised, as published). The router's bias is always fp32.
    `fmt` is hf, hf-int4 (routed experts in groups of 32, scale by `int4_rule`) or hf-fp8 (128x128 blocks). Experts that
    the model holds in INT4 go to hf-int4 as they are and to the others multiplied out.
    `extra_files` maps names to contents or source paths (tokenizer files). A model without the multi-token-prediction
    modules of its configuration is written as one that has none. Raises UserError: full disk, no permission, weights
    that are not finite in a quantised format.
    """
    with _together(model, config, dtype, fmt, int4_rule) as (groups, config_json, writes):
        if writes:
            with files.write_folder(folder) as partial:
                write_groups(partial, groups, config_json, max_shard_bytes, extra_files, progress)


def write_weights(model: nn.Module | Mapping[str, Tensor], folder: str | Path, config: ModelConfig, *,
                  dtype: torch.dtype | None = None, fmt: Format = "hf", int4_rule: Int4Rule = "absmax/7",
                  max_shard_bytes: int = MAX_SHARD_BYTES, extra_files: ExtraFiles | None = None,
                  progress: Progress | None = None) -> None:
    """As `save_weights`, into a folder that exists and that the caller makes atomic (`files.write_folder`).

    For a trainer that puts optimizer state beside the weights. Only the first process of a sharded model uses `folder`.
    """
    with _together(model, config, dtype, fmt, int4_rule) as (groups, config_json, writes):
        if writes:
            write_groups(Path(folder), groups, config_json, max_shard_bytes, extra_files, progress)


@contextlib.contextmanager
def _together(model: nn.Module | Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype | None, fmt: Format,
              rule: Int4Rule) -> Iterator[tuple[Iterable[Group], dict[str, Any], bool]]:
    """Yield what to write and whether this process writes; keep the processes of a sharded model in step.

    Whatever goes wrong in the writing process, all groups are fetched by all processes (or the others would wait for
    ever), and all of them raise.
    """
    check_format(fmt, config)
    tensors = named_tensors(model)
    if not any(name.startswith("mtp.") for name in tensors):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    if dtype is None and fmt != "hf":
        dtype = torch.bfloat16
    listed = list(_model_groups(tensors, config, dtype, fmt, rule))
    config_json = config_file(config, dtype or tensors["model.embed_tokens.weight"].dtype, fmt)
    if not is_sharded(tensors):
        yield listed, config_json, True
        return
    groups, failure = _Counted(listed), None
    try:
        yield groups, config_json, dist.get_rank() == 0
    except Exception as error:
        failure = error
    for group in groups.rest():
        group.fetch()
    raise_together(failure)


class _Counted:
    """A list of groups that knows which ones its user has fetched."""

    def __init__(self, groups: list[Group]) -> None:
        self._groups, self._fetched = groups, 0

    def __iter__(self) -> Iterator[Group]:
        for group in self._groups:
            yield group._replace(fetch=lambda fetch=group.fetch: self._count(fetch))

    def __len__(self) -> int:
        return len(self._groups)

    def _count(self, fetch: Callable[[], Any]) -> Any:
        self._fetched += 1
        return fetch()

    def rest(self) -> list[Group]:
        return self._groups[self._fetched :]


def _model_groups(tensors: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype | None, fmt: Format,
                  rule: Int4Rule) -> Iterator[Group]:
    packed = packed_stacks(tensors)
    check_fit(tensors, model_shapes(config, packed=packed))
    gathered: dict[str, Tensor] = {}

    def fetch(piece: Piece) -> Tensor:
        if piece.expert is None:
            return full_tensor(tensors[piece.target])
        if piece.target not in gathered:
            # Experts come one by one, their stack is gathered once: the two stacks of one layer are kept at a time.
            if len(gathered) > 1:
                gathered.clear()
            gathered[piece.target] = full_tensor(tensors[piece.target])
        return gathered[piece.target][piece.expert, piece.row : piece.row + piece.shape[0]]

    def fetch_packed(piece: Piece) -> tuple[Tensor, Tensor]:
        rows = slice(piece.row, piece.row + piece.shape[0])
        words, scales = (full_tensor(tensors[piece.target + suffix]) for suffix in ("_packed", "_scale"))
        return words[piece.expert, rows], scales[piece.expert, rows]

    def fetch_multiplied_out(piece: Piece) -> Tensor:
        return dequantize_int4(*fetch_packed(piece))

    for piece in checkpoint_pieces(config):
        if piece.target in packed and fmt == "hf-int4":
            shape = torch.tensor(piece.shape, dtype=torch.int32)
            yield Group(_int4_slots(piece), lambda piece=piece: fetch_packed(piece),
                        lambda parts, shape=shape: (parts[0], parts[1].bfloat16(), shape))
        elif piece.target in packed:
            yield encoded_group(piece, fmt, dtype or tensors["model.embed_tokens.weight"].dtype, rule,
                                lambda piece=piece: fetch_multiplied_out(piece))
        else:
            stored_dtype = torch.float32 if piece.kind == "bias" else dtype or tensors[piece.target].dtype
            yield encoded_group(piece, fmt, stored_dtype, rule, lambda piece=piece: fetch(piece))


def encoded_group(piece: Piece, fmt: Format, dtype: torch.dtype, rule: Int4Rule, fetch: Callable[[], Tensor]) -> Group:
    """One weight in the chosen format: quantised if the published files quantise its kind, else in `dtype`."""
    name, shape = piece.disk, piece.shape
    if piece.kind not in QUANTISED_KINDS[fmt]:
        return Group((TensorSlot(name, dtype, shape),), fetch, lambda weight: (weight.detach().to(dtype),))
    if fmt == "hf-fp8":
        rows, columns = shape
        blocks = (-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))
        slots = (TensorSlot(name, torch.float8_e4m3fn, shape), TensorSlot(name + "_scale_inv", torch.float32, blocks))
        return Group(slots, fetch, lambda weight: quantize_fp8(_finite(name, weight)))
    return Group(_int4_slots(piece), fetch, lambda weight: (*quantize_int4(_finite(name, weight), rule),
                                                            torch.tensor(shape, dtype=torch.int32)))


def _int4_slots(piece: Piece) -> tuple[TensorSlot, ...]:
    name, (rows, columns) = piece.disk, piece.shape
    return (TensorSlot(name + "_packed", torch.int32, (rows, columns // 8)),
            TensorSlot(name + "_scale", torch.bfloat16, (rows, columns // INT4_GROUP)),
            TensorSlot(name + "_shape", torch.int32, (2,)))


def _finite(name: str, weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise UserError(f"tensor {name} holds values that are not finite: it cannot be quantised")
    return weight.detach()


def config_file(config: ModelConfig, dtype: torch.dtype, fmt: Format) -> dict[str, Any]:
    """The contents of `config.json`."""
    values = config.to_hf()
    # `torch_dtype` is what published files and older engines use, `dtype` is transformers 5's name.
    values["dtype"] = values["torch_dtype"] = str(dtype).removeprefix("torch.")
    scaling = config.rope_scaling
    if scaling is not None and not (scaling.mscale and scaling.mscale_all_dim):
        # transformers reads a zero as "not given" and takes another temperature than DeepSeek's code; stated, there is
        # no choice.
        values["rope_scaling"]["attention_factor"] = scaling.attention_factor
    block = quantization_block(fmt, mtp=config.num_nextn_predict_layers > 0)
    if block is not None:
        values["quantization_config"] = block
    return values


def write_groups(folder: Path, groups: Iterable[Group], config_json: dict[str, Any], max_shard_bytes: int,
                 extra_files: ExtraFiles | None, progress: Progress | None) -> None:
    """Write shards, index, configuration and extra files into an existing folder. Raises UserError on a full disk."""
    try:
        shards = _plan_shards(groups, max_shard_bytes)
        total, done, weight_map = sum(map(len, shards)), 0, {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            writer = SafetensorsWriter(folder / name, (slot for group in shard for slot in group.slots))
            try:
                for group in shard:
                    for slot, tensor in zip(group.slots, group.encode(group.fetch()), strict=True):
                        writer.write(slot.name, tensor)
                        weight_map[slot.name] = name
                    done += 1
                    if progress is not None:
                        progress("writing weights", done, total)
            except BaseException:
                writer.abandon()
                raise
            writer.close()
        size = sum(group.num_bytes for shard in shards for group in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_json(folder / "config.json", config_json)
        for name, content in (extra_files or {}).items():
            assert Path(name).name == name, f"{name}: extra files have plain names"
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
    except OSError as error:
        raise files.explain_os_error(error, folder) from None


def _plan_shards(groups: Iterable[Group], max_shard_bytes: int) -> list[list[Group]]:
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.num_bytes
    return shards


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
