"""Kimi's published vocabulary: how text is cut, which tokens are special, and the file of its ranks.

Below the rooms, because the tokenizer reads it (`data/`) and an exported checkpoint carries it (`checkpoint/`).
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from moonbase.errors import UserError

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join((
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))
"""How Kimi K2 cuts text before merging: merges never cross these pieces."""

RESERVED_TOKENS = 256
"""Ids after the base vocabulary that the published tokenizer keeps for special tokens, most of them unused."""

SPECIAL_OFFSETS = {
    "[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3, "<|im_assistant|>": 4,
    "<|start_header_id|>": 6, "<|end_header_id|>": 7, "[EOT]": 9, "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11, "<|tool_calls_section_end|>": 12, "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14, "<|tool_call_end|>": 15, "<|im_middle|>": 17,
    "<|media_begin|>": 18, "<|media_content|>": 19, "<|media_end|>": 20, "<|media_pad|>": 21,
    "<think>": 22, "</think>": 23, "[UNK]": 254, "[PAD]": 255,
}  # fmt: skip
"""Kimi's special tokens: name to distance from the end of the base vocabulary."""

SPECIAL_NAMES = tuple(SPECIAL_OFFSETS)

VISIBLE_SPECIALS = frozenset(name for name in SPECIAL_NAMES if name.startswith("<|tool_call") or "think>" in name)
"""Special tokens that `decode(skip_special=True)` keeps, because replies are parsed by them."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    for number, byte in enumerate(byte for byte in range(256) if byte not in printable):
        alphabet[chr(256 + number)] = byte
    return alphabet


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `content`, which was read from `path`. Raises UserError."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Every token of a tiktoken file and its id. Raises UserError that names the line, or a gap among the ids."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: expected a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: ranks must run from 0 without a gap and every single byte must have one")
    return ranks


def name_specials(base: int, config: dict[str, Any], config_path: Path) -> dict[int, tuple[str, bool]]:
    """Every id after the `base` ordinary ones: its name, and whether it is a control token that shown text leaves out.

    From `added_tokens_decoder` of the tokenizer's configuration, else the published names; ids between them are named
    as the published tokenizer does. Raises UserError.
    """
    entries = config.get("added_tokens_decoder")
    if entries:
        try:
            named = {int(id): (entry["content"], bool(entry.get("special"))) for id, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{config_path}: added_tokens_decoder: expected id -> {{content, special}}") from None
    else:
        named = {base + offset: (name, name not in VISIBLE_SPECIALS) for name, offset in SPECIAL_OFFSETS.items()}
    if min(named) < base:
        raise UserError(f"{config_path}: added_tokens_decoder: id {min(named)} is one of the {base} base ids")
    last = max(base + RESERVED_TOKENS, max(named) + 1)
    return {id: named.get(id, (f"<|reserved_token_{id}|>", False)) for id in range(base, last)}
