"""An exported tokenizer in the hands of transformers, without remote code: ids as the published tiktoken gives them."""

from __future__ import annotations

import json
import random
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moonbase.checkpoint import convert
from moonbase.checkpoint.tokenizer_files import portable, recover_merges
from moonbase.data import Tokenizer, load_tokenizer
from moonbase.errors import UserError

transformers = pytest.importorskip("transformers")

TEXTS = (
    "", " ", "\n", "Hello, world!", "don't  stop: WE'LL see, I'VE said. HTTPServer iPhone Straße ﬃ K'S ſ's 'ſ",
    "月之暗面的模型可以处理很长的上下文。你好,world! 日本語のテキスト、한국어 문장, हिन्दी पाठ, ภาษาไทย, العربية, עברית",
    "漢字kanji漢字123漢字 〇々〆 𠀀𠀁 㐀", "1234567 12,345.678 ٣٤٥ ⅷ ²³ 1e-9 0xdeadbeef",
    "def main(argv: list[str]) -> int:\n\tif not argv:\r\n\t\treturn 1\n\n\n    # done  \n    return 0\n   ",
    "😀 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ e\u0301 \u0301a n\u0303o \u200b\u200d\ufeff",
    "".join(map(chr, range(0x21))) + "\x7f\x80\x85\x9f\xa0\u2028\u2029\u3000",
    "x" * 300, " " * 300 + "a", "\n" * 200, "!" * 300, "=" * 80 + "\n", "\ufffd \U0010ffff \ue000 \u0378",
    "<|im_end|>", "<|im_user|>user<|im_middle|>Hi there<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>",
    " [BOS] [EOS][PAD] <|reserved_token_163589|>\n<|tool_calls_section_begin|> <|im_end |> <| im_end|>",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(kimi_folder: Path, written: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the published vocabulary and its code, after `convert`."""
    folder = Path(shutil.copytree(written("k2")[1], tmp_path_factory.mktemp("source") / "kimi"))
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(kimi_folder / name, folder / name)
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('remote code ran')\n")
    out = tmp_path_factory.mktemp("exported") / "out"
    convert(folder, out, "hf")
    return out


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(exported)


def test_files_of_the_export(exported: Path, kimi_folder: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"tiktoken.model", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "tokenization_kimi.py" not in names
    assert (exported / "tiktoken.model").read_bytes() == (kimi_folder / "tiktoken.model").read_bytes()
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (kimi_folder, exported))
    assert "auto_map" not in after
    assert {key for key in before if before[key] != after.get(key)} == {"auto_map", "tokenizer_class"}


def test_transformers_gives_the_published_ids(theirs: Any, kimi: Tokenizer) -> None:
    for text in TEXTS:
        ids = kimi.encode_rendered(text)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids) == text
        assert theirs.decode(ids, skip_special_tokens=True) == kimi.decode(ids, skip_special=True)
    assert len(theirs) == kimi.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (kimi.bos_id, kimi.eos_id, kimi.pad_id)
    assert {name: theirs.convert_tokens_to_ids(name) for name in kimi.special_tokens} == kimi.special_tokens


def pages() -> Iterator[str]:
    """Whole files of this interpreter: code and prose as people write it."""
    for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))[::12]:
        yield path.read_text(encoding="utf-8", errors="replace")


def test_on_code_and_on_tokens_in_any_order(theirs: Any, kimi: Tokenizer) -> None:
    for text in pages():
        assert theirs(text).input_ids == kimi.encode_rendered(text)
    chance = random.Random(0)
    for _ in range(3000):
        text = b"".join(kimi.token_bytes(chance.randrange(163_584)) for _ in range(12)).decode("utf-8", "ignore")
        assert theirs(text, add_special_tokens=False).input_ids == kimi.encode_rendered(text), text


def in_context(c: str) -> str:
    return f"a{c}A{c}a 1{c}1 {c}{c}.{c}\n'{c}  {c}"


def test_every_kind_of_character_is_cut_alike(theirs: Any, kimi: Tokenizer) -> None:
    """Between letters, digits, signs and spaces, by two engines for regular expressions. Of letters without case, a
    hundred thousand, every twentieth."""
    kinds = {code: unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1)}
    characters = [chr(code) for code, kind in kinds.items()
                  if kind not in ("Cs", "Cn", "Co") and (kind != "Lo" or code % 20 == 0)]
    different = []
    for start in range(0, len(characters), 100):
        some = characters[start : start + 100]
        text = "".join(map(in_context, some))
        if theirs(text).input_ids != kimi.encode(text):
            different += [hex(ord(one)) for one in some if theirs(in_context(one)).input_ids
                          != kimi.encode(in_context(one))]
    assert not different and len(characters) > 20_000


def test_the_written_file_alone_is_the_same_tokenizer(exported: Path, kimi: Tokenizer) -> None:
    ours = load_tokenizer(exported / "tokenizer.json")
    assert [ours.encode(text) for text in TEXTS] == [kimi.encode(text) for text in TEXTS]
    assert ours.special_tokens == kimi.special_tokens and ours.eos_ids == kimi.eos_ids
    assert all(ours.token_bytes(id) == kimi.token_bytes(id) for id in range(163_840))
    everything = range(163_840)
    assert ours.decode_bytes(everything, skip_special=True) == kimi.decode_bytes(everything, skip_special=True)


def test_an_exported_folder_is_converted_as_it_is(exported: Path, tmp_path: Path) -> None:
    convert(exported, tmp_path / "again", "hf")
    for name in ("tiktoken.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def ranks_of(*words: bytes) -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *words])}


def test_merges_of_a_small_vocabulary() -> None:
    ranks = ranks_of(b"ab", b"bc", b"abc", b"aa", b"aaa", b"abcaaa")
    assert recover_merges(ranks, Path("x")) == [
        (b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"a"), (b"aa", b"a"), (b"abc", b"aaa")]
    with pytest.raises(UserError, match=r"tiktoken\.model: token 256 is not made of two others"):
        recover_merges(ranks_of(b"abc"), Path("tiktoken.model"))


def test_a_broken_vocabulary_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text("IQ== 0\n???\n")
    with pytest.raises(UserError, match=r"tiktoken\.model:2"):
        portable({"tiktoken.model": tmp_path / "tiktoken.model"})
