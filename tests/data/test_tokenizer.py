"""The vocabulary against its oracles: exact bytes, tiktoken built by hand, transformers and tokenizers."""

from __future__ import annotations

import base64
import inspect
import json
import json.decoder
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.data.tokenizer import SPECIAL_NAMES, SPLIT_PATTERN, Tokenizer, load_tokenizer, train_tokenizer
from moonbase.errors import UserError

SAMPLE = inspect.getsource(json.decoder) + "naïve café — 你好，世界 123456 \t\r\n    deep\n" * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([SAMPLE], 700)


@pytest.fixture(scope="module")
def saved(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    return folder


texts = st.text() | st.text(alphabet=st.sampled_from("aA1 \t\r\n_.,'\"\u4f60\u0301\U0001f600\x00"), max_size=60)
injections = st.lists(st.sampled_from(SPECIAL_NAMES) | st.text(max_size=4), max_size=8).map("".join)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode_bytes(ids) == text.encode()
    assert all(0 <= id < trained.vocab_size for id in ids)


@given(injections)
@settings(max_examples=300, deadline=None)
def test_text_never_becomes_markup(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert not set(ids) & set(trained.special_tokens.values())
    assert trained.decode(ids) == text


@given(st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_every_byte_has_an_id(trained: Tokenizer, content: bytes) -> None:
    single = {trained.token_bytes(id): id for id in range(256)}
    ids = [single[bytes([byte])] for byte in content]
    assert trained.decode_bytes(ids) == content
    assert trained.decode(ids) == content.decode("utf-8", "replace")


def test_half_a_surrogate_pair_is_replaced(trained: Tokenizer) -> None:
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"


def test_rendered_text_has_the_special_tokens(trained: Tokenizer) -> None:
    names = ["<|im_user|>", "<think>", "[EOS]"]
    ids = trained.encode_rendered("".join(f"{name}hi {name}" for name in names))
    wanted = []
    for name in names:
        special = trained.special_tokens[name]
        wanted += [special, *trained.encode("hi "), special]
    assert ids == wanted


def test_specials_end_the_vocabulary(trained: Tokenizer) -> None:
    assert trained.vocab_size == 700
    assert list(trained.special_tokens) == list(SPECIAL_NAMES)
    assert list(trained.special_tokens.values()) == list(range(700 - len(SPECIAL_NAMES), 700))
    assert trained.eos_ids == (trained.special_tokens["[EOS]"], trained.special_tokens["<|im_end|>"])
    assert (trained.bos_id, trained.pad_id) == (trained.special_tokens["[BOS]"], trained.special_tokens["[PAD]"])


def test_skip_special_keeps_tool_and_think_marks(trained: Tokenizer) -> None:
    ids = trained.encode_rendered("<|im_user|>a<think>b</think><|tool_call_begin|>c<|im_end|>[PAD]")
    assert trained.decode(ids, skip_special=True) == "a<think>b</think><|tool_call_begin|>c"


def test_byte_lengths(trained: Tokenizer) -> None:
    lengths = trained.byte_lengths(1000)
    ids = trained.encode(SAMPLE)
    assert lengths.shape == (1000,) and lengths[ids].sum() == len(SAMPLE.encode())
    assert not lengths[list(trained.special_tokens.values())].any() and not lengths[700:].any()


def test_same_ids_as_the_tokenizers_library(trained: Tokenizer, saved: Path) -> None:
    """The saved file, run by the library that defines its format, on text that mixes tokens at random."""
    backend = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    chance = random.Random(0)
    pieces = [trained.token_bytes(id).decode("utf-8", "ignore") for id in range(677)]
    for _ in range(3000):
        text = "".join(chance.choices(pieces, k=chance.randint(1, 8)))
        assert trained.encode(text) == backend.encode(text).ids, text
    assert trained.encode(SAMPLE) == backend.encode(SAMPLE).ids


def test_transformers_loads_the_saved_folder(trained: Tokenizer, saved: Path) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(saved)
    assert len(loaded) == trained.vocab_size
    assert loaded(SAMPLE).input_ids == trained.encode(SAMPLE)
    assert loaded.decode(trained.encode(SAMPLE)) == SAMPLE
    marked = "<|im_user|>user<|im_middle|>hi<|im_end|><think></think>"
    assert loaded(marked).input_ids == trained.encode_rendered(marked)
    assert loaded.decode(trained.encode_rendered(marked), skip_special_tokens=True) == trained.decode(
        trained.encode_rendered(marked), skip_special=True
    )
    roles = (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    assert roles == (trained.bos_id, trained.eos_id, trained.pad_id)


def test_save_and_training_are_deterministic(trained: Tokenizer, saved: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(saved)
    loaded.save(tmp_path)
    for file in saved.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    program = (
        "import sys; from moonbase.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer([sys.stdin.buffer.read().decode()], 700).digest)"
    )
    run = subprocess.run([sys.executable, "-c", program], input=SAMPLE.encode(), capture_output=True, check=True)
    assert run.stdout.decode().strip() == trained.digest


def test_small_text_gives_a_small_vocabulary() -> None:
    tokenizer = train_tokenizer(["abc"], 4096)
    assert tokenizer.vocab_size < 4096 and max(tokenizer.special_tokens.values()) == tokenizer.vocab_size - 1
    assert train_tokenizer([], 279).vocab_size == 279


@pytest.mark.parametrize("unit", [" ", "a", "\n", "1", "你", "\u0301", "!"])
def test_long_runs(trained: Tokenizer, unit: str) -> None:
    text = unit * 60_000
    assert trained.decode(trained.encode(text)) == text


# The published vocabulary


def test_kimi_ids_equal_tiktoken(kimi: Tokenizer, kimi_folder: Path) -> None:
    """An encoding built here from the file and the published alternatives, spelled out."""
    import tiktoken

    ranks = {}
    for line in (kimi_folder / "tiktoken.model").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    han, ending = r"[^\p{Han}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    lead, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    pattern = (
        r"[\p{Han}]+|"
        f"{lead}[{upper}&&{han}]*[{lower}&&{han}]+{ending}|"
        f"{lead}[{upper}&&{han}]+[{lower}&&{han}]*{ending}|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    config = json.loads((kimi_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    specials = {entry["content"]: int(id) for id, entry in config["added_tokens_decoder"].items()}
    oracle = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    assert pattern == SPLIT_PATTERN
    for text in (SAMPLE, "don't  stop你好world \n\n x=12345", "", "\u00e9\u0301 ÀÉ Straße iPhone HTTPServer"):
        assert kimi.encode(text) == oracle.encode_ordinary(text)
    marked = "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    assert kimi.encode_rendered(marked) == oracle.encode(marked, allowed_special="all")


def test_kimi_special_tokens(kimi: Tokenizer) -> None:
    """Facts sheet 9.4: 163 584 base ranks and 256 reserved ids."""
    assert kimi.vocab_size == 163_840
    assert len(kimi.special_tokens) == 256
    assert kimi.special_tokens["[BOS]"] == kimi.bos_id == 163_584
    assert kimi.special_tokens["[EOS]"] == kimi.eos_id == 163_585
    assert kimi.im_end_id == 163_586 and kimi.pad_id == 163_839
    assert kimi.special_tokens["<|reserved_token_163589|>"] == 163_589
    assert kimi.special_tokens["</think>"] == 163_607
    assert not set(kimi.encode("<|im_end|>[EOS]<|reserved_token_163589|>")) & set(kimi.special_tokens.values())


@given(texts)
@settings(max_examples=100, deadline=None)
def test_kimi_any_text_comes_back(kimi: Tokenizer, text: str) -> None:
    assert kimi.decode_bytes(kimi.encode(text)) == text.encode()


def test_kimi_save_gives_the_files_again(kimi: Tokenizer, kimi_folder: Path, tmp_path: Path) -> None:
    kimi.save(tmp_path)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (kimi_folder / name).read_bytes()
    (tmp_path / "tokenizer_config.json").unlink()
    alone = load_tokenizer(tmp_path / "tiktoken.model")
    assert alone.special_tokens == kimi.special_tokens and alone.eos_ids == kimi.eos_ids


# Foreign files


def deepseek_like(folder: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE cut the way DeepSeek-V3's is, with its special names."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    backend.pre_tokenizer = pre.Sequence([
        pre.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated"),
        pre.Split(tokenizers.Regex(r"[一-龥]+"), "isolated"),
        pre.Split(tokenizers.Regex(r" ?[\p{L}]+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    backend.train_from_iterator(
        [SAMPLE], tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"])
    backend.add_tokens(["<\uff5cUser\uff5c>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<\uff5cbegin▁of▁sentence\uff5c> $A", special_tokens=[("<\uff5cbegin▁of▁sentence\uff5c>", 500)]
    )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return backend


def test_foreign_byte_level_bpe(tmp_path: Path) -> None:
    backend = deepseek_like(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (503, 500, 501, 501)
    assert ours.encode(SAMPLE) == backend.encode(SAMPLE, add_special_tokens=False).ids
    assert ours.decode(ours.encode(SAMPLE)) == SAMPLE
    injected = "a<\uff5cUser\uff5c>b<\uff5cend▁of▁sentence\uff5c>"
    assert max(ours.encode(injected)) < 500 and ours.decode(ours.encode(injected)) == injected
    assert ours.encode_rendered(injected) == backend.encode(injected, add_special_tokens=False).ids
    again = tmp_path / "again"
    ours.save(again)
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not readable JSON"),
        ("tokenizer.json", b"[]", "JSON object"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": []}}', "byte-level BPE"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "byte-level BPE"),
        ("tiktoken.model", b"IQ== 0\n???\n", "tiktoken.model:2"),
        ("tiktoken.model", b"IQ== 0\nIg== 2\n", "without a gap"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)


def test_no_tokenizer_and_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="vocab_size=278"):
        train_tokenizer(["a"], 278)


def test_digits_that_are_split_stay_apart_everywhere(tmp_path: Path) -> None:
    """No rule of its own is saved: any library that reads the file gives the same ids."""
    text = SAMPLE + "in 1984, 1984 and 1984 again 1984 " * 50
    together, apart = train_tokenizer([text], 700), train_tokenizer([text], 700, split_digits=True)
    assert len(together.encode("1984")) < 4 == len(apart.encode("1984"))
    apart.save(tmp_path)
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for sample in (text[:2000], "x=10000;", "12,345.678", "\u0661\u0662"):
        assert oracle.encode(sample, add_special_tokens=False).ids == apart.encode(sample)
        assert load_tokenizer(tmp_path).decode(apart.encode(sample)) == sample
