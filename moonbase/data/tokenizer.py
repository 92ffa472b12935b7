"""Text to token ids and back: byte-level BPE, so that every text has an encoding and every encoding its exact bytes.

Three kinds of vocabulary load into one class. One that was trained here (`tokenizer.json`), the published Kimi one
(`tiktoken.model` + `tokenizer_config.json`), and any other byte-level `tokenizer.json`, DeepSeek-V3's for example. The
first two run on tiktoken, which is several times faster than the `tokenizers` library and scales over threads; the last
runs on `tokenizers`, which also trains.

Text that people or tools wrote is never read as markup: `encode` turns `<|im_end|>` into ordinary letters. Only
`encode_rendered`, meant for what the program itself laid out, knows the special tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moonbase import files
from moonbase.errors import UserError
from moonbase.vocabulary import (
    SPECIAL_NAMES,
    SPLIT_PATTERN,
    VISIBLE_SPECIALS,
    byte_alphabet,
    name_specials,
    parse_object,
    read_ranks,
)

Progress = Callable[[str, int, int | None], None]

# Longer texts, and longer runs of one kind, are cut before the regular expression sees them: it looks back over a run,
# and the published tokenizer has the same limits.
_MAX_CHARACTERS = 400_000
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN}}}(?=\s)|\S{{{_MAX_RUN}}}(?=\S)")

_REPLACEMENT = "\ufffd".encode()


class Engine(Protocol):
    """Plain text to ids; knows no special tokens."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32 [num_tokens]. Releases the interpreter lock while it works."""


class _RankEngine:
    """tiktoken: of all neighbours that form a token, the one with the lowest id merges first."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding("moonbase", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        if len(text) <= _MAX_RUN:
            return self._encoding.encode_to_numpy(text)
        parts = [self._encoding.encode_to_numpy(part) for part in _cut_long_runs(text)]
        return np.concatenate(parts)


class _JsonEngine:
    """A foreign `tokenizer.json`, run by the library that defines it, with its special tokens taken out."""

    def __init__(self, content: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        added = {token["content"] for token in content.get("added_tokens", [])}
        plain = dict(content, added_tokens=[], post_processor=None, truncation=None, padding=None)
        plain["model"] = dict(content["model"])
        plain["model"]["vocab"] = {name: id for name, id in content["model"]["vocab"].items() if name not in added}
        self._backend = Backend.from_str(json.dumps(plain))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)


def _cut_long_runs(text: str) -> list[str]:
    parts = []
    for start in range(0, len(text), _MAX_CHARACTERS):
        section = text[start : start + _MAX_CHARACTERS]
        position = 0
        for run in _LONG_RUN.finditer(section):
            parts.append(section[position : run.end()])
            position = run.end()
        parts.append(section[position:])
    return parts


class Tokenizer:
    """A byte-level BPE vocabulary with special tokens. Made by `load_tokenizer` or `train_tokenizer`."""

    special_tokens: dict[str, int]
    """Every special token, by name. Ids not in it belong to ordinary text."""
    eos_ids: tuple[int, ...]
    """Ids that end a document or a turn: generation stops at any of them."""

    def __init__(
        self,
        engine: Engine,
        pieces: Sequence[bytes],
        special_tokens: dict[str, int],
        skipped: Iterable[int],
        roles: dict[str, str],
        saved: dict[str, bytes],
    ) -> None:
        """`pieces`: the bytes of every id; `skipped`: ids that `skip_special` leaves out; `roles`: bos, eos, pad to
        their names; `saved`: the files that this tokenizer is on disk."""
        self._engine = engine
        self._pieces = list(pieces)
        self._skipped = frozenset(skipped)
        self._saved = saved
        self._special_pattern: re.Pattern[str] | None = None
        self.special_tokens = dict(special_tokens)
        self.bos_id = special_tokens.get(roles.get("bos", ""))
        self.eos_id = special_tokens.get(roles.get("eos", ""))
        self.pad_id = special_tokens.get(roles.get("pad", ""), self.eos_id)
        self.im_end_id = special_tokens.get("<|im_end|>")
        self.eos_ids = tuple(id for id in (self.eos_id, self.im_end_id) if id is not None)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; every id is smaller."""
        return len(self._pieces)

    @property
    def digest(self) -> str:
        """A hash of the files that this tokenizer is on disk."""
        digest = hashlib.sha256()
        for name, content in sorted(self._saved.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of plain text, uint32 [num_tokens]. Other threads run meanwhile."""
        try:
            return self._engine.encode(text)
        except (UnicodeEncodeError, TypeError):
            # Half of a surrogate pair is no character and has no UTF-8 form.
            return self._engine.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. The name of a special token in it is text like any other."""
        return self.encode_array(text).tolist()

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of text in which special-token names are tokens. Never for text from outside: it could forge a turn."""
        if self._special_pattern is None:
            names = sorted(self.special_tokens, key=len, reverse=True)
            self._special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else r"((?!))")
        ids: list[int] = []
        for index, part in enumerate(self._special_pattern.split(text)):
            if index % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids.extend(self.encode(part))
        return ids

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The exact bytes of `ids`; an id outside the vocabulary becomes U+FFFD."""
        pieces, size = self._pieces, len(self._pieces)
        if skip_special:
            ids = (id for id in ids if id not in self._skipped)
        return b"".join([pieces[id] if 0 <= id < size else _REPLACEMENT for id in map(int, ids)])

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves out control tokens, not the
        tool-call and thinking marks."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for (of a special token, its name)."""
        return self._pieces[id]

    def byte_lengths(self, vocab_size: int | None = None) -> np.ndarray:
        """Bytes of text behind each id, int32 [vocab_size]; 0 for special and unused ids, which stand for no text."""
        lengths = np.zeros(max(vocab_size or 0, self.vocab_size), dtype=np.int32)
        lengths[: self.vocab_size] = [len(piece) for piece in self._pieces]
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`, the same bytes every time."""
        folder = files.make_folder(folder)
        for name, content in self._saved.items():
            files.write_bytes(folder / name, content)


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: Progress | None = None,
                    split_digits: bool = False) -> Tokenizer:
    """Learn a vocabulary of up to `vocab_size` ids: 256 bytes, merges, then Kimi's special tokens at the end.

    The same texts in the same order give the same vocabulary. A small text may have fewer pairs that repeat than there
    is room for; the vocabulary is then smaller. With `split_digits` no merge joins digits. Raises UserError where
    `vocab_size` is too small for bytes and specials.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    smallest = 256 + len(SPECIAL_NAMES)
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone need {smallest}")
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Digits that never met in training have no merge; the saved vocabulary then needs no rule of its own.
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, *digits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_NAMES),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.add_tokens([
        AddedToken(name, normalized=False, special=name not in VISIBLE_SPECIALS) for name in SPECIAL_NAMES
    ])
    if progress:
        progress("training the tokenizer", 1, 1)
    saved = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": _config_file(backend.token_to_id),
    }
    return _from_json(saved, Path("tokenizer.json"))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (or of its `tokenizer.json` / `tiktoken.model`). Raises UserError naming the file."""
    path = Path(path)
    folder, names = (path, ("tiktoken.model", "tokenizer.json")) if path.is_dir() else (path.parent, (path.name,))
    main = next((name for name in names if (folder / name).is_file()), None)
    if main is None:
        raise UserError(f"{path}: no tokenizer here; a folder with tokenizer.json or tiktoken.model is needed")
    saved = {}
    for name in (main, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        try:
            if (folder / name).is_file():
                saved[name] = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror or error}") from None
    if main.endswith(".json"):
        if main != "tokenizer.json":
            saved["tokenizer.json"] = saved.pop(main)
        return _from_json(saved, folder / main)
    return _from_ranks(saved, main, folder)


def _config_file(token_to_id: Callable[[str], int]) -> bytes:
    """`tokenizer_config.json` for a vocabulary trained here, as transformers reads it."""
    ordinary = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "added_tokens_decoder": {
            str(token_to_id(name)): {"content": name, "special": name not in VISIBLE_SPECIALS, **ordinary}
            for name in SPECIAL_NAMES
        },
        "additional_special_tokens": [
            name for name in SPECIAL_NAMES if name not in VISIBLE_SPECIALS and name not in named.values()
        ],
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _token_name(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _roles(config: dict[str, Any], special_tokens: dict[str, int]) -> dict[str, str]:
    """Which special tokens begin, end and pad: from the configuration, else by their usual names."""
    usual = {
        # DeepSeek writes its names with a full-width bar.
        "bos": ("[BOS]", "<\uff5cbegin▁of▁sentence\uff5c>", "<|begin_of_text|>", "<s>"),
        "eos": ("[EOS]", "<\uff5cend▁of▁sentence\uff5c>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
        "pad": ("[PAD]", "<\uff5c▁pad▁\uff5c>", "<pad>"),
    }
    roles = {}
    for role, names in usual.items():
        for name in (_token_name(config.get(f"{role}_token")), *names):
            if name in special_tokens:
                roles[role] = name
                break
    return roles


def _from_json(saved: dict[str, bytes], path: Path) -> Tokenizer:
    content = parse_object(saved["tokenizer.json"], path)
    config = parse_object(saved.get("tokenizer_config.json", b"{}"), path.parent / "tokenizer_config.json")
    model = content.get("model") or {}
    kinds = re.findall(r'"type": ?"ByteLevel"', json.dumps([content.get("pre_tokenizer"), content.get("decoder")]))
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict) or not kinds:
        raise UserError(f"{path}: not a byte-level BPE tokenizer, the only kind that reproduces every byte")
    added = content.get("added_tokens") or []
    special_tokens = {token["content"]: token["id"] for token in added}
    skipped = [token["id"] for token in added if token.get("special")]
    alphabet = byte_alphabet()
    size = 1 + max([*model["vocab"].values(), *special_tokens.values()], default=-1)
    pieces = [_REPLACEMENT] * size
    for name, id in model["vocab"].items():
        if name not in special_tokens:
            known = all(character in alphabet for character in name)
            pieces[id] = bytes(alphabet[character] for character in name) if known else name.encode()
    for name, id in special_tokens.items():
        pieces[id] = name.encode()
    ranks = _own_ranks(content, pieces)
    try:
        engine = _JsonEngine(content) if ranks is None else _RankEngine(ranks)
    except Exception as error:  # the library raises plain Exception for a file that it cannot use
        raise UserError(f"{path}: {error}") from None
    return Tokenizer(engine, pieces, special_tokens, skipped, _roles(config, special_tokens), saved)


def _own_ranks(content: dict[str, Any], pieces: list[bytes]) -> dict[bytes, int] | None:
    """The ranks of a vocabulary trained here, None for a foreign one.

    Where every merge makes the next new id, ids and merge order say the same, and tiktoken gives the same encoding.
    """
    cut = content.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers") or []
    model = content["model"]
    ours = (
        [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and steps[0].get("pattern") == {"Regex": SPLIT_PATTERN}
        and steps[0].get("behavior") == "Isolated"
        and not steps[0].get("invert")
        and not steps[1].get("add_prefix_space")
        and not steps[1].get("use_regex")
        and not content.get("normalizer")
        and not any(model.get(name) for name in ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix"))
    )
    if not ours:
        return None
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [model["vocab"].get("".join(pair)) for pair in pairs]
    if made != list(range(256, 256 + len(made))) or len(model["vocab"]) != 256 + len(made):
        return None
    return {pieces[id]: id for id in range(256 + len(made))}


def _from_ranks(saved: dict[str, bytes], main: str, folder: Path) -> Tokenizer:
    ranks = read_ranks(saved[main], folder / main)
    config_path = folder / "tokenizer_config.json"
    config = parse_object(saved.get("tokenizer_config.json", b"{}"), config_path)
    named = name_specials(len(ranks), config, config_path)
    special_tokens = {name: id for id, (name, _) in named.items()}
    pieces = [_REPLACEMENT] * (len(ranks) + len(named))
    for piece, rank in ranks.items():
        pieces[rank] = piece
    for name, id in special_tokens.items():
        pieces[id] = name.encode()
    skipped = [id for id, (_, special) in named.items() if special]
    return Tokenizer(_RankEngine(ranks), pieces, special_tokens, skipped, _roles(config, special_tokens), saved)
