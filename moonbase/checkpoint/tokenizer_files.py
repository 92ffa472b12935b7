"""Kimi's vocabulary as `tokenizer.json`, so that an exported checkpoint's tokenizer loads without remote code.

The published checkpoints carry a tiktoken file and Python code that reads it; `transformers.AutoTokenizer` runs such
code only when it is told to trust it. The same vocabulary, written as byte-level BPE with its merges, needs none.

A tiktoken file has no merges: of all neighbours that form a token, the one with the lowest id joins first. What joined
into a token is found by running that rule on the token's own bytes with the lower ids alone. If two parts are left for
every token, these pairs in the order of ids are a list of merges with the same result for every text: a token's bytes
inside a text are not joined with what stands beside them before the token itself is, so they go through the same steps
as alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.vocabulary import SPLIT_PATTERN, byte_alphabet, name_specials, parse_object, read_ranks


def portable(companions: Mapping[str, Path]) -> dict[str, bytes | Path]:
    """`companions` (files beside a checkpoint's weights, by name) with a tokenizer that needs no remote code.

    Where there is a `tiktoken.model` and no `tokenizer.json`, the latter is made (seconds), `tokenizer_config.json`
    names no code any longer, and the code stays behind. Others are returned as they are. Raises UserError: a broken
    file, or a vocabulary that no list of merges describes.
    """
    found: dict[str, bytes | Path] = dict(companions)
    if "tiktoken.model" not in companions or "tokenizer.json" in companions:
        return found
    path = companions["tiktoken.model"]
    config_path = path.parent / "tokenizer_config.json"
    config = parse_object(config_path.read_bytes() if "tokenizer_config.json" in companions else b"{}", config_path)
    ranks = read_ranks(path.read_bytes(), path)
    specials = name_specials(len(ranks), config, config_path)
    found = {name: content for name, content in found.items() if not name.startswith("tokenization_")}
    found["tokenizer.json"] = _to_bytes(_byte_level_bpe(ranks, specials, path))
    found["tokenizer_config.json"] = _to_bytes(_without_code(config, {name for name, _ in specials.values()}))
    return found


def recover_merges(ranks: Mapping[bytes, int], path: Path) -> list[tuple[bytes, bytes]]:
    """The two parts of every token longer than a byte, in the order of ids. Raises UserError naming `path` and the id
    where a token is not made of two."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _join(token, ranks, rank)
            if len(parts) != 2:
                raise UserError(f"{path}: token {rank} is not made of two others, so tokenizer.json cannot describe "
                                "this vocabulary; put a tokenizer.json of its own beside it, or remove the file")
            merges.append((parts[0], parts[1]))
    return merges


def _join(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """The bytes of `token` joined by ids below `limit`, the lowest and leftmost first, until none applies."""
    parts = [token[place : place + 1] for place in range(len(token))]
    pairs = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
    while len(parts) > 2 and (best := min(pairs)) < limit:
        place = pairs.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        del pairs[place]
        for changed in (place - 1, place):
            if 0 <= changed < len(pairs):
                pairs[changed] = ranks.get(parts[changed] + parts[changed + 1], limit)
    return parts


def _byte_level_bpe(ranks: Mapping[bytes, int], specials: Mapping[int, tuple[str, bool]], path: Path) -> dict[str, Any]:
    """The contents of `tokenizer.json`."""
    # latin-1 has a character for every byte, so a table of characters translates bytes.
    table = {byte: character for character, byte in byte_alphabet().items()}

    def name(token: bytes) -> str:
        return token.decode("latin-1").translate(table)

    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    ordinary = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": content, **ordinary, "special": special}
                         for id, (content, special) in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {name(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
            "merges": [[name(left), name(right)] for left, right in recover_merges(ranks, path)],
        },
    }


def _without_code(config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """`tokenizer_config.json` for the class that reads `tokenizer.json`; the published roles where it states none."""
    roles = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    stated = {role: name for role, name in roles.items() if name in names}
    return stated | {"clean_up_tokenization_spaces": False} | kept | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _to_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode()
