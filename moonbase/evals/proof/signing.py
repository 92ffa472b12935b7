"""Signatures: an in-toto Statement in a DSSE envelope, signed with Ed25519, offline.

Formats: in-toto Attestation Framework v1, DSSE v1, RFC 8032; the work is done by securesystemslib and cryptography.
A Sigstore bundle made by its own program may lie beside the statement; nothing here needs, makes or checks it.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.errors import UserError
from moonbase.evals.proof.canonical import BundleError, canonical, clean, parse

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
BUNDLE_PREDICATE = "urn:moonbase:evaluation-bundle:v1"
CHALLENGE_PREDICATE = "urn:moonbase:evaluation-challenge:v1"
_PUBLIC = re.compile(r"ed25519:[0-9a-f]{64}")


def generate_key(path: Path) -> str:
    """Write a new private key (PEM, readable by its owner only) and `path`.pub; returns the public key.

    Raises UserError where there is a file already: a key that is overwritten is lost.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                serialization.NoEncryption())
    public = f"ed25519:{private.public_key().public_bytes_raw().hex()}"
    for target, content, mode in ((path, pem, 0o600), (_public_path(path), f"{public}\n".encode(), 0o644)):
        try:
            with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except FileExistsError:
            if target != path:
                path.unlink()
            raise UserError(f"{target}: exists already; choose another name for the key") from None
        except OSError as error:
            raise UserError(f"{target}: {error.strerror}") from None
    return public


def _public_path(path: Path) -> Path:
    return path.with_name(path.name + ".pub")


def load_key(path: Path) -> CryptoSigner:
    """Raises UserError where the file is no Ed25519 key or may be read by others."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    try:
        if path.is_file() and _PUBLIC.fullmatch(path.read_bytes()[:100].decode("ascii", "replace").strip()):
            raise UserError(f"{path}: this is the public key; signing takes the private one")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise UserError(f"{path}: others may read this private key; run `chmod 600 {path}`")
        private = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make a key first") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path}: not a private key in PEM form without a pass phrase") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise UserError(f"{path}: not an Ed25519 key")
    return CryptoSigner(private)


def public_text(signer: CryptoSigner) -> str:
    return f"ed25519:{signer.public_key.keyval['public']}"


def read_public_key(given: str | Path) -> str:
    """`ed25519:HEX` from that text itself, from a .pub file, or from the private key file it belongs to."""
    text = str(given).strip()
    if not _PUBLIC.fullmatch(text):
        path = Path(given)
        try:
            text = path.read_bytes()[:4096].decode("ascii", "replace").strip()
        except OSError as error:
            raise UserError(f"{given}: {error.strerror}; give ed25519:HEX or the .pub file of a key") from None
        if text.startswith("-----BEGIN"):
            return public_text(load_key(path))
    if not _PUBLIC.fullmatch(text):
        raise UserError(f"{given}: not a public key; give ed25519:HEX or the .pub file of a key")
    return text


def as_key(public: str) -> SSlibKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import SSlibKey

    raw = bytes.fromhex(public.removeprefix("ed25519:"))
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(raw))


def statement(predicate_type: str, subjects: list[dict[str, Any]], predicate: dict[str, Any]) -> dict[str, Any]:
    return {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": predicate_type, "predicate": predicate}


def sign(payload: dict[str, Any], signer: CryptoSigner) -> bytes:
    """The envelope of a statement, in canonical JSON."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(canonical(payload), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return canonical(envelope.to_dict())


def open_envelope(data: bytes, predicate_type: str, public_key: str | None) -> tuple[dict[str, Any], str]:
    """The statement in an envelope and the key that signed it. Raises BundleError where anything is amiss.

    With `public_key` None the key that the statement itself names is taken: then the signature proves that nothing was
    changed since that key's owner signed, not who that is.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import Error

    value = parse(data)
    if not _is_envelope(value):
        raise BundleError("not a DSSE envelope with one signature")
    if canonical(value) != data:
        raise BundleError("the envelope is not in canonical form")
    if value["payloadType"] != PAYLOAD_TYPE:
        raise BundleError(f"the envelope holds {clean(value['payloadType'], 60)!r}, not an in-toto statement")
    try:
        envelope = Envelope.from_dict(parse(data))
        if canonical(envelope.to_dict()) != data:
            raise BundleError("the envelope is not in canonical form")
    except (ValueError, KeyError, TypeError, binascii.Error, Error):
        raise BundleError("the envelope's payload or signature is not base64") from None
    claimed = _claimed_key(envelope.payload)
    public = public_key or claimed
    if public is None:
        raise BundleError("the statement names no key")
    try:
        envelope.verify([as_key(public)], 1)
    except (ValueError, TypeError, Error):
        other = f"; it says that {clean(claimed, 80)} signed it" if claimed and claimed != public else ""
        raise BundleError(f"the signature is not by {public}{other}") from None
    found = parse(envelope.payload)
    if canonical(found) != envelope.payload:
        raise BundleError("the statement is not in canonical form")
    _check_statement(found, predicate_type)
    if claimed != public:
        raise BundleError("the statement names another key than the one that signed it")
    return found, public


def _is_envelope(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"payload", "payloadType", "signatures"}:
        return False
    signatures = value["signatures"]
    return (isinstance(value["payload"], str) and isinstance(value["payloadType"], str)
            and isinstance(signatures, list) and len(signatures) == 1 and isinstance(signatures[0], dict)
            and signatures[0].keys() == {"keyid", "sig"} and all(isinstance(v, str) for v in signatures[0].values()))


def _claimed_key(payload: bytes) -> str | None:
    with contextlib.suppress(BundleError, AttributeError, TypeError, KeyError):
        claimed = parse(payload)["predicate"]["key"]
        return claimed if isinstance(claimed, str) and _PUBLIC.fullmatch(claimed) else None
    return None


def _check_statement(found: Any, predicate_type: str) -> None:
    if not isinstance(found, dict) or found.keys() != {"_type", "subject", "predicateType", "predicate"} \
            or found["_type"] != STATEMENT_TYPE or not isinstance(found["predicate"], dict):
        raise BundleError("the envelope holds no in-toto statement of version 1")
    if found["predicateType"] != predicate_type:
        raise BundleError(f"the statement is about {clean(found['predicateType'], 80)!r}, not {predicate_type!r}")
    subjects = found["subject"]
    if not isinstance(subjects, list) or not all(
        isinstance(subject, dict) and isinstance(subject.get("name"), str) and isinstance(subject.get("digest"), dict)
        and isinstance(subject["digest"].get("sha256"), str) for subject in subjects
    ):
        raise BundleError("the statement's subjects have no names and digests")
    names = [subject["name"] for subject in subjects]
    if len(set(names)) < len(names):
        raise BundleError("the statement names a file twice")
