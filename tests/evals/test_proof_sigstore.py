"""The second signature: what is signed, what is told where it cannot be, and a bundle that Sigstore itself published.

Signing needs Sigstore's network, so its library is played here by a stand-in; checking is tried on a real bundle where
library and data are there: shared/data/sigstore/ with `artifact`, `artifact.sigstore.json` and `trusted_root.json` of
one public signature.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moonbase.errors import UserError
from moonbase.evals.proof import seal, signing, sigstore, verify
from moonbase.evals.proof.canonical import BundleError
from tests.evals import proof_samples as samples

WHO = verify.Aids(identity="me@example.org", issuer="https://login.example.org")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sigstore")
    signing.generate_key(place / "key")
    samples.write_evaluation(place / "run", items=1)
    seal.seal(place / "run", place / "key", out=place / "bundle")
    return place


@pytest.fixture
def bundle(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(verify.Verification, "_write_again", lambda self: None)
    return samples.copy_of(home / "bundle", tmp_path / "bundle")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Modules of the library's names; `signed` holds what it was given, `fails` makes it raise."""
    told = SimpleNamespace(signed=[], tokens=[], fails=None, ambient=None)

    @contextmanager
    def signer(identity: str) -> Iterator[Any]:
        told.tokens.append(identity)
        yield SimpleNamespace(sign_artifact=lambda data: told.signed.append(data) or SimpleNamespace(
            to_json=lambda: '{"mediaType": "x"}'))

    def production(**given: Any) -> Any:
        if told.fails:
            raise told.fails
        return SimpleNamespace()

    parts = {"sigstore": {}, "sigstore.models": {"ClientTrustConfig": SimpleNamespace(production=production)},
             "sigstore.sign": {"SigningContext": SimpleNamespace(
                 from_trust_config=lambda trust: SimpleNamespace(signer=signer))},
             "sigstore.oidc": {"IdentityToken": lambda raw: f"token {raw}", "Issuer": None,
                               "detect_credential": lambda: told.ambient}}
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(sigstore.TOKEN, raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    return told


def failed(bundle: Path, aids: verify.Aids = WHO) -> list[str]:
    return [str(line) for line in verify.failures(verify.verify(bundle, aids=aids))]


def test_the_statement_is_what_is_signed(bundle: Path, stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
                                         ) -> None:
    stand_in.ambient = "workflow"
    assert sigstore.countersign(bundle) == bundle / "statement.sigstore.json"
    monkeypatch.setenv(sigstore.TOKEN, "given")
    sigstore.countersign(bundle)
    assert stand_in.tokens == ["token workflow", "token given"]
    assert stand_in.signed == [(bundle / "statement.dsse.json").read_bytes()] * 2
    # It lies beside what was signed, and nothing that was signed has changed.
    found = verify.verify(bundle)
    assert not verify.failures(found)
    assert any("names nobody, which is not checked unless you say whom you expect" in str(line) for line in found)


def test_what_cannot_be_signed_leaves_the_bundle_as_it_was(bundle: Path, stand_in: SimpleNamespace) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(UserError, match="no identity: set \\$SIGSTORE_IDENTITY_TOKEN"):
        sigstore.countersign(bundle)
    stand_in.fails = ConnectionError("Name or service\nnot known")
    with pytest.raises(UserError, match="Sigstore: Name or service not known; nothing was signed") as caught:
        sigstore.countersign(bundle)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_without_the_library_one_line_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sigstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sigstore", None)
    with pytest.raises(UserError, match=r"pip install \"moonbase\[sigstore\]\""):
        sigstore.countersign(bundle)
    assert failed(bundle) == ["failed: signature: statement.sigstore.json is missing: nobody's identity is shown"]
    (bundle / "statement.sigstore.json").write_text("{}")
    assert "is not installed" in failed(bundle)[0]
    with pytest.raises(UserError, match="given together"):
        verify.verify(bundle, aids=verify.Aids(identity="me@example.org"))


# A real one

def published(shared_data: Path) -> tuple[bytes, bytes, Path]:
    pytest.importorskip("sigstore", reason="Sigstore's library is not installed (moonbase[sigstore])")
    folder = shared_data / "sigstore"
    if not folder.is_dir():
        pytest.skip(f"real test data is absent: {folder}")
    return (folder / "artifact.sigstore.json").read_bytes(), (folder / "artifact").read_bytes(), \
        folder / "trusted_root.json"


def flipped(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[len(raw) // 2] ^= 1
    return base64.b64encode(raw).decode()


SPOILT: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "the signature": lambda value, entry: value["messageSignature"].update(
        signature=flipped(value["messageSignature"]["signature"])),
    "the certificate": lambda value, entry: value["verificationMaterial"]["certificate"].update(
        rawBytes=flipped(value["verificationMaterial"]["certificate"]["rawBytes"])),
    "the date": lambda value, entry: entry.update(integratedTime=str(int(entry["integratedTime"]) + 1)),
    "the place in the log": lambda value, entry: entry.update(logIndex="1"),
    "the log's proof": lambda value, entry: entry["inclusionProof"]["hashes"].reverse(),
    "the log's entry": lambda value, entry: entry.update(canonicalizedBody=flipped(entry["canonicalizedBody"])),
    "no log": lambda value, entry: value["verificationMaterial"].update(tlogEntries=[]),
}


def test_a_published_signature_is_accepted_and_no_other(shared_data: Path) -> None:
    data, artifact, root = published(shared_data)
    who, issuer = sigstore.identities(data), "https://github.com/login/oauth"
    assert sigstore.check(data, artifact, who, issuer, root).startswith(f"{who} (says {issuer}) is entry ")
    for other in ((data, artifact + b"x", who, issuer, root), (data, artifact, "a@b.c", issuer, root),
                  (data, artifact, who, "https://accounts.google.com", root), (b"{}", artifact, who, issuer, root),
                  (data, artifact, who, issuer, None), (b"[" * 10_000, artifact, who, issuer, root)):
        with pytest.raises(BundleError):
            sigstore.check(*other)
    for what, spoil in SPOILT.items():
        value = json.loads(data)
        spoil(value, value["verificationMaterial"]["tlogEntries"][0])
        with pytest.raises(BundleError):
            sigstore.check(json.dumps(value).encode(), artifact, who, issuer, root)
            pytest.fail(what)
