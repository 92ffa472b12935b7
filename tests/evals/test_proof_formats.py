"""Canonical JSON against the vectors of RFC 8785, the tree against those of RFC 6962 and against its definition."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonbase.evals.proof import chain
from moonbase.evals.proof.canonical import BundleError, canonical, canonical_reference, clean, parse, portable

# RFC 8785, appendix B: the bits of a double and how it is written.
NUMBERS = {
    "0000000000000000": "0", "8000000000000000": "0", "0000000000000001": "5e-324", "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308", "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992", "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000", "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23", "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000", "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21", "3eb0c6f7a0b5ed8c": "9.999999999999997e-7", "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332", "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333", "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343", "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


@pytest.mark.parametrize(("bits", "written"), NUMBERS.items())
def test_numbers_of_rfc_8785(bits: str, written: str) -> None:
    number = struct.unpack(">d", bytes.fromhex(bits))[0]
    assert canonical(number) == written.encode()
    assert canonical(parse(written.encode())) == written.encode()


@pytest.mark.parametrize("bits", ["7fffffffffffffff", "7ff0000000000000"])
def test_rfc_8785_has_no_nan_and_no_infinity(bits: str) -> None:
    with pytest.raises(BundleError, match="not canonical JSON"):
        canonical(struct.unpack(">d", bytes.fromhex(bits))[0])


def test_example_of_rfc_8785_section_3_2() -> None:
    source = (b'{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],'
              b'"string": "\\u20ac$\\u000F\\u000aA\'\\u0042\\u0022\\u005c\\\\\\"\\/","literals": [null, true, false]}')
    text = '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
    assert canonical(parse(source)) == (text + '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}').encode()


def test_keys_are_sorted_by_utf16_as_in_rfc_8785_section_3_2_3() -> None:
    source = {"\u20ac": "Euro Sign", "\r": "Carriage Return", "\ufb33": "Hebrew Letter Dalet With Dagesh", "1": "One",
              "\U0001f600": "Emoji: Grinning Face", "\x80": "Control", "\u00f6": "Latin Small Letter O With Diaeresis"}
    assert list(json.loads(canonical(source)).values()) == [
        "Carriage Return", "One", "Control", "Latin Small Letter O With Diaeresis", "Euro Sign",
        "Emoji: Grinning Face", "Hebrew Letter Dalet With Dagesh"]


@pytest.mark.parametrize(("source", "problem"), [
    (b'{"a":1,"a":1}', "given twice"), (b'{"x":{"b":1,"c":2,"b":3}}', "given twice"), (b"[NaN]", "not a JSON number"),
    (b"-Infinity", "not a JSON number"), (b"\xff", "not UTF-8"), (b"1e999", "beyond the range"),
    (b"9" * 5000, "5000 digits"), (b"0." + b"1" * 5000, "digits"), (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"), (b"", "not readable"), (b"{} {}", "not readable"),
    (b"\xef\xbb\xbf{}", "not readable"), (b'"\n"', "not readable"),
])
def test_the_reader_refuses_what_means_two_things_or_nothing(source: bytes, problem: str) -> None:
    with pytest.raises(BundleError, match=problem) as caught:
        parse(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


ODD_NAMES = st.text(st.sampled_from(
    "aZ\x00\x1f\x7f\x80é€\ue000\ufb33\uffff\U00010000\U0001f600\\\"/\u2028"), max_size=3)


@given(st.recursive(st.none() | st.booleans() | st.integers(-2**53 + 1, 2**53 - 1) | ODD_NAMES
                    | st.floats(allow_nan=False, allow_infinity=False),
                    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(ODD_NAMES, inner, max_size=5)
                    | st.tuples(inner, inner), max_leaves=30))
def test_the_fast_spelling_is_that_of_the_package(value: object) -> None:
    assert canonical(value) == canonical_reference(value)


@pytest.mark.parametrize("value", [
    2**53, -2**53, float("nan"), float("inf"), "\ud800", {"\udfff": 1}, {1: 2}, b"x", {1, 2}, [object()]])
def test_both_spellings_refuse_the_same(value: object) -> None:
    for spell in (canonical, canonical_reference):
        with pytest.raises(BundleError, match="not canonical JSON"):
            spell(value)


def test_a_half_character_has_no_canonical_form() -> None:
    with pytest.raises(BundleError, match="not canonical"):
        canonical(parse(b'"\\ud800"'))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2**53 + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=20)


@given(VALUES)
def test_reading_and_writing_come_back_to_the_same_bytes(value: object) -> None:
    assert canonical(parse(canonical(value))) == canonical(value)
    assert json.loads(canonical(value), parse_int=float) == value


def test_large_numbers_become_words_when_made_portable() -> None:
    assert portable({"a": [2**60, True, 5, 2.5]}) == {"a": ["1152921504606846976", True, 5, 2.5]}


def test_words_of_strangers_stay_on_one_harmless_line() -> None:
    assert clean("a\x1b[31m\nb\u202e" + "x" * 500, 20) == "a\ufffd[31m\ufffdb\ufffd" + "x" * 11 + "…"


# RFC 6962: the leaves and roots that implementations of Certificate Transparency test with.
LEAVES = [bytes.fromhex(leaf) for leaf in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("size", range(9))
def test_roots_of_certificate_transparency(size: int) -> None:
    assert chain.MerkleTree(LEAVES[:size]).root().hex() == ROOTS[size]


def plain_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + plain_root(leaves[:split]) + plain_root(leaves[split:])).digest()


@given(st.lists(st.binary(max_size=4), max_size=70))
def test_the_streaming_root_is_the_defined_one(leaves: list[bytes]) -> None:
    assert chain.MerkleTree(leaves).root() == plain_root(leaves)


@given(st.data(), st.integers(1, 40))
def test_a_path_leads_to_the_root_from_its_own_leaf_only(data: st.DataObject, size: int) -> None:
    leaves = [bytes([number]) for number in range(size)]
    index = data.draw(st.integers(0, size - 1))
    path, root = chain.inclusion_path(leaves, index), plain_root(leaves)
    assert chain.root_of_path(leaves[index], index, size, path) == root
    assert chain.root_of_path(b"other", index, size, path) != root
    for other in {index - 1, index + 1, size} - {index}:
        if 0 <= other <= size:
            assert chain.root_of_path(leaves[index], other, size, path) != root
    assert chain.root_of_path(leaves[index], index, size, [*path, b"x" * 32]) != root
    if path:
        assert chain.root_of_path(leaves[index], index, size, path[:-1]) != root
        flipped = [bytes([path[0][0] ^ 1]) + path[0][1:], *path[1:]]
        assert chain.root_of_path(leaves[index], index, size, flipped) != root


def test_a_line_of_the_chain_spelled_out() -> None:
    record = {"call": {"provider": "x"}, "input_digest": "i", "item": "ü", "output_digest": "o", "scores": {"a": 1.0}}

    def sha(text: str) -> str:
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    spelled = '{"call":{"provider":"x"},"input_digest":"i","item":"ü","output_digest":"o","scores":{"a":1}}'
    score = '{"label":null,"reason":null,"scores":{"a":1},"status":null,"votes":null}'
    parts = \
        '{"call":"' + sha('{"provider":"x"}') + '","input":"i","output":"o","record":"' + sha(spelled) \
        + '","score":"' + sha(score) + '","target":null}'
    digest = sha('{"parts":' + parts + ',"previous":"before"}')
    line = '{"digest":"' + digest + '","parts":' + parts + ',"previous":"before","record":' + spelled + "}"
    assert chain.link("before", record) == (line.encode(), digest)
