"""From one checkpoint format to another, tensor by tensor: no model is built, memory stays at one tensor.

A weight that is already stored in the wanted form is copied bit for bit (quantising twice would move the scales of
weights that were trained in INT4).
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

import torch

from moonbase import files
from moonbase.checkpoint.quantization import QUANTISED_KINDS, Format, Quantization, check_format, read_config
from moonbase.checkpoint.reader import Checkpoint, Progress, StoredWeight, stored_mtp
from moonbase.checkpoint.safetensors_file import DTYPES, TensorSlot
from moonbase.checkpoint.tokenizer_files import portable
from moonbase.checkpoint.writer import MAX_SHARD_BYTES, Group, config_file, encoded_group, write_groups
from moonbase.errors import UserError
from moonbase.layout import FP8_BLOCK, INT4_GROUP, Int4Rule
from moonbase.recipe import int4_rule_of

# What belongs to a model beside its weights and config.json.
COMPANIONS = ("tokenizer*", "tokenization_*.py", "*.tiktoken", "tiktoken.model", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "chat_template*", "generation_config.json", "LICENSE*")


def convert(source: str | Path, destination: str | Path, fmt: Format, *, dtype: torch.dtype | None = None,
            mtp: bool | None = None, int4_rule: Int4Rule | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
            progress: Progress | None = None) -> None:
    """Rewrite the checkpoint folder `source` as `destination` in format hf, hf-int4 or hf-fp8.

    `dtype` is the dtype of unquantised weights; None keeps what is stored (bf16 for weights that were quantised, and
    for all that the quantised formats leave unquantised). `mtp` keeps (True) or drops (False) multi-token-prediction
    modules; None keeps them where the source has them. `int4_rule`: how groups get their scales; None takes the rule
    that the source was trained with, or absmax/7. Tokenizer, generation and chat-template files come along, the
    tokenizer in a form that needs no remote code (`tokenizer_files`); the vision part of a multimodal source does not.
    Raises UserError: same folder, destination in use, unknown format, anything wrong with the source.
    """
    source, destination = Path(source), Path(destination)
    if source.resolve() == destination.resolve():
        raise UserError(f"{destination}: source and destination are the same folder")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: already exists and is not an empty folder; choose another or remove it")
    config = read_config(source)
    check_format(fmt, config)
    if mtp is None:
        mtp = stored_mtp(source, config)
    checkpoint = Checkpoint(source, config, mtp, progress)
    if not mtp:
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    if dtype is None and fmt != "hf":
        dtype = torch.bfloat16
    rule = int4_rule or int4_rule_of(source)
    groups = [_group(weight, fmt, dtype, rule, checkpoint.quantization) for weight in checkpoint.weights]
    main = next(weight for weight in checkpoint.weights if weight.piece.kind == "embedding")
    config_json = config_file(config, dtype or main.dtype, fmt)
    companions = portable(companion_files(source))
    with files.write_folder(destination) as partial:
        write_groups(partial, groups, config_json, max_shard_bytes, companions, progress)


def companion_files(folder: str | Path) -> dict[str, Path]:
    """Tokenizer, chat-template, generation and licence files of a checkpoint folder, by name."""
    return {path.name: path for path in sorted(Path(folder).iterdir())
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS)}


def _group(weight: StoredWeight, fmt: Format, dtype: torch.dtype | None, rule: Int4Rule,
           quantization: Quantization | None) -> Group:
    piece = weight.piece
    if piece.kind in QUANTISED_KINDS[fmt] and _same_form(weight, fmt, quantization):
        parts = list(weight.parts.values())
        slots = tuple(TensorSlot(piece.disk + suffix, DTYPES[part.dtype], part.shape)
                      for suffix, part in weight.parts.items())
        return Group(slots, lambda: tuple(part.read() for part in parts), lambda tensors: tensors)
    stored_dtype = torch.float32 if piece.kind == "bias" else dtype or weight.dtype
    return encoded_group(piece, fmt, stored_dtype, rule, weight.read)


def _same_form(weight: StoredWeight, fmt: Format, quantization: Quantization | None) -> bool:
    if quantization is None:
        return False
    if fmt == "hf-int4":
        return weight.form == "int4" and quantization.group == INT4_GROUP and weight.parts["_scale"].dtype == "BF16"
    return weight.form == "fp8" and quantization.block == FP8_BLOCK and weight.parts["_scale_inv"].dtype == "F32"
