"""A tokenizer as constrained decoding sees it, and JSON values followed token by token over it.

llguidance turns the grammar of a value (`chat/grammar.py`) into a mask over the vocabulary. Beside it runs a bound: how
many tokens finish the value from here (`chat/completion.py`), and what one more token can add to that. A token is
offered only if what it may open can still be closed within the budget.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from moonbase.chat.completion import completion
from moonbase.chat.grammar import GrammarError, json_grammar
from moonbase.chat.schema_walk import SchemaError
from moonbase.chat.shape import Array, Choice, Literals, Number, Object, Shape, String, any_object, build_shape, walk
from moonbase.errors import UserError

MAX_NESTING = 64
"""Open braces and brackets at which a value is brought to its end: readers of JSON limit their depth."""
_SLACK = 4
"""Tokens kept beyond the bound: the rest of a character, or an ending that merges differently."""
_CACHED_GRAMMARS = 256
_TRIED = 16
"""Tokens that are tried one by one where the bound leaves none."""
_LONGEST_SPELLED = 16
"""Bytes of the longest tokens that endings are written with."""
_OPENING_BYTES = [bytes([byte]) for byte in b'{[,:"\\']
"""Bytes that can make the ending longer. One of them can commit to a key and to the value behind it."""


class Tokenizer(Protocol):
    """What is needed of `moonbase.data.tokenizer.Tokenizer`."""

    special_tokens: dict[str, int]
    eos_ids: tuple[int, ...]
    im_end_id: int | None
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def token_bytes(self, id: int) -> bytes: ...


class Value:
    """A shape compiled for one vocabulary: where every JSON value of this kind starts."""

    def __init__(self, vocabulary: Vocabulary, shape: Shape, path: str) -> None:
        """Raises SchemaError at `path` where llguidance cannot use the grammar."""
        self.vocabulary = vocabulary
        self.shape = shape
        try:
            text = json_grammar(shape)
        except GrammarError as error:
            raise SchemaError(path, f"this schema cannot be enforced: {error}") from None
        self._matcher = vocabulary.library.LLMatcher(vocabulary.backend, text, log_level=0)
        if self._matcher.is_error():
            problem = " ".join(self._matcher.get_error().split("\n")[0].split())
            raise SchemaError(path, f"this schema cannot be enforced: {problem}")
        assert shape.shortest is not None
        self.shortest = vocabulary.spell(shape.shortest)
        # Tokens that one commitment adds to the ending at most.
        self.step = 1 + _most_tokens(vocabulary, _commitments(shape))

    def start(self) -> Any:
        """A matcher of its own for one value."""
        return self._matcher.deep_copy()


def _most_tokens(vocabulary: Vocabulary, texts: Iterable[bytes]) -> int:
    """Tokens of the text that has most of them; one shorter in bytes than the most so far need not be spelled."""
    most = 0
    for text in sorted(set(texts), key=len, reverse=True):
        if len(text) <= most:
            break
        most = max(most, len(vocabulary.spell(text)))
    return most


def _commitments(root: Shape) -> Iterable[bytes]:
    """Texts that the choice of one more letter can add to the ending: what need not have come, but was begun."""
    yield b""
    for shape in walk(root):
        if isinstance(shape, Object):
            optional = [member for member in shape.members if not member.required]
            yield from (b"," + member.key + b":" + (member.shape.shortest or b"") for member in optional)
            if shape.others is not None:
                yield b',"":' + (shape.others.shortest or b"")
        elif isinstance(shape, Array):
            yield from (b"," + (part.shortest or b"") for part in shape.parts())
        elif isinstance(shape, Literals):
            yield max(shape.texts, key=len, default=b"")
        elif isinstance(shape, Choice) and len(shape.options) > 1:
            yield from (option.shortest or b"" for option in shape.options)
        elif isinstance(shape, String) and shape.pattern is not None:
            yield b"0" * (shape.pattern.farthest() + shape.low)
        elif isinstance(shape, Number):
            bounds = [bound for bound in (shape.low, shape.high) if bound is not None]
            yield b"0" * max((len(f"{abs(bound):f}") for bound in bounds), default=3)


class Vocabulary:
    """What constraints need to know of a tokenizer, worked out once for each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.library = _llguidance()
        self.size = tokenizer.vocab_size
        self.special = dict(tokenizer.special_tokens)
        self.eos_ids = tuple(tokenizer.eos_ids)
        if tokenizer.im_end_id is None and not self.eos_ids:
            raise UserError("the tokenizer has no token that ends a turn: constrained replies need <|im_end|> or [EOS]")
        self.end_id = tokenizer.im_end_id if tokenizer.im_end_id is not None else self.eos_ids[0]
        self.pieces = [tokenizer.token_bytes(id) for id in range(self.size)]
        specials = set(self.special.values())
        self.id_of: dict[bytes, int] = {}
        for id, piece in enumerate(self.pieces):
            if id not in specials and piece:
                self.id_of.setdefault(piece, id)
        # Ids that spell what an earlier id spells (holes of a foreign vocabulary) are left out with the special ones.
        self.ordinary = np.zeros(self.size, dtype=bool)
        self.ordinary[list(self.id_of.values())] = True
        self.longest = max(map(len, self.id_of), default=1)
        self.opening = np.array([sum(map(piece.count, _OPENING_BYTES)) for piece in self.pieces], dtype=np.int16)
        self.nesting = np.array([piece.count(b"{") + piece.count(b"[") for piece in self.pieces], dtype=np.int16)
        self.most_opening = int(self.opening[self.ordinary].max(initial=0))
        unused = np.flatnonzero(~self.ordinary).tolist()
        self.backend = self.library.LLTokenizer(
            _Backend(tokenizer, self.pieces, self.end_id, unused),
            n_vocab=self.size, eos_token=self.end_id, slices=self.library.LLTokenizer.json_slices(),
        )
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._lock = threading.Lock()

    def value(self, schema: dict[str, Any] | None, path: str) -> Value:
        """The compiled form of a schema (None: any object); the latest used are remembered. Raises SchemaError.

        Requests of several threads may ask at once. Only looking up is done one by one: compiling takes longer.
        """
        try:
            key = json.dumps(schema)
        except RecursionError:
            raise SchemaError(path, "the schema nests too deep") from None
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = Value(self, any_object() if schema is None else build_shape(schema, path), path)
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            while len(self._values) > _CACHED_GRAMMARS:
                self._values.popitem(last=False)
        return value

    def spell(self, text: bytes) -> list[int]:
        """Ids of a text, from the left the longest each time."""
        ids, place = [], 0
        while place < len(text):
            for end in range(min(len(text), place + _LONGEST_SPELLED), place, -1):
                id = self.id_of.get(text[place:end])
                if id is not None:
                    break
            else:
                raise UserError(f"the tokenizer has no token for byte {text[place]:#04x}: it cannot be constrained")
            ids.append(id)
            place = end
        return ids

    def prefixes(self, text: bytes) -> list[int]:
        """Ids of the tokens that `text` may begin with."""
        found = (self.id_of.get(text[:end]) for end in range(1, min(len(text), self.longest) + 1))
        return [id for id in found if id is not None]


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, Vocabulary] = weakref.WeakKeyDictionary()
_vocabularies_lock = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer; kept as long as the tokenizer lives."""
    with _vocabularies_lock:
        found = _vocabularies.get(tokenizer)
        if found is None:
            found = _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return found


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("tool calls and JSON replies need llguidance: pip install 'moonbase[serve]'") from None
    return llguidance


class _Backend:
    """The tokenizer as llguidance wants to see it; holds it weakly, for the cache is keyed by it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, pieces: list[bytes], end_id: int, unused: list[int]) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.tokens = pieces
        self.eos_token_id = end_id
        self.special_token_ids = unused

    def __call__(self, text: bytes | str) -> list[int]:
        tokenizer = self._tokenizer()
        assert tokenizer is not None
        return tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Written:
    """One JSON value while it is written."""

    def __init__(self, value: Value) -> None:
        self.value = value
        self.text = bytearray()
        self._matcher = value.start()
        self._bits = np.zeros((value.vocabulary.size + 31) // 32, dtype=np.int32)
        self._ending = value.shortest
        self._opened = 0
        self._nested = 0
        self._looked_at = 0
        self._spare = 0

    @property
    def whole(self) -> bool:
        """The text so far is a value."""
        return self._matcher.is_accepting()

    @property
    def ending(self) -> list[int]:
        """Tokens of the shortest ending."""
        self._look()
        return self._ending

    def accept(self, token: int) -> None:
        vocabulary = self.value.vocabulary
        self.text += vocabulary.pieces[token]
        self._opened += int(vocabulary.opening[token])
        self._nested += int(vocabulary.nesting[token])
        self._matcher.consume_token(token)

    def mask_into(self, mask: np.ndarray, room: int) -> bool:
        """Write into `mask` [>= vocabulary size] what may come next, with `room` tokens left for this value.

        False: nothing was written, the shortest ending is all that is left to do.
        """
        vocabulary, cost = self.value.vocabulary, 2 * self.value.step
        danger = cost * vocabulary.most_opening
        spare = self._spare_tokens(room)
        # The bound may be stale. Looking costs time, so it is done when the bound begins to matter, and again when it
        # has used up a quarter of what the last look found, or is about to decide.
        if (spare < danger and (spare < 0.75 * self._spare or spare < 2 * cost)) or self._nested > MAX_NESTING:
            self._look()
            spare = self._spare = self._spare_tokens(room)
        if spare <= 0 or self._nested > MAX_NESTING:
            return False
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return False
        size = vocabulary.size
        bits = np.unpackbits(self._bits.view(np.uint8), count=size, bitorder="little").view(bool)
        bits[vocabulary.end_id] = False
        if spare < danger:
            cheap = np.logical_and(bits, vocabulary.opening <= spare // cost)
            bits = cheap if cheap.any() else self._affordable(bits, room)
        mask[:size] = bits
        return bool(bits.any())

    def _affordable(self, bits: np.ndarray, room: int) -> np.ndarray:
        """Of the tokens in `bits`, those after which the rest still fits, by trying: what must come next may look like
        an opening, and then the bound says too much. A few tokens are tried, the others left out."""
        few = [id for id in np.flatnonzero(bits).tolist() if self.value.vocabulary.opening[id] <= 1][:_TRIED]
        found = np.zeros_like(bits)
        for id in few:
            ending = completion(self.value.shape, bytes(self.text) + self.value.vocabulary.pieces[id])
            assert ending is not None
            found[id] = 1 + len(self.value.vocabulary.spell(ending)) + _SLACK <= room
        return found

    def _spare_tokens(self, room: int) -> int:
        return room - len(self._ending) - (2 * self._opened + 1) * self.value.step - _SLACK

    def _look(self) -> None:
        """Work out the ending and the nesting from the text."""
        if self._looked_at == len(self.text):
            return
        text = bytes(self.text)
        ending = completion(self.value.shape, text)
        # What was generated is nobody's business but the client's: it must not come into a log.
        assert ending is not None, f"no ending for a text of {len(text)} bytes"
        self._ending = self.value.vocabulary.spell(ending)
        self._opened, self._nested, self._looked_at = 0, nesting_of(text), len(text)


def nesting_of(text: bytes) -> int:
    """Open braces and brackets at the end of a JSON text."""
    depth, inside, escaped = 0, False, False
    for byte in text:
        if escaped:
            escaped = False
        elif inside:
            escaped, inside = byte == 0x5C, byte != 0x22
        elif byte == 0x22:
            inside = True
        else:
            depth += (byte in b"{[") - (byte in b"}]")
    return depth
