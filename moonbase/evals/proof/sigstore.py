"""A second signature, by a person's or a workflow's public identity and with a public date: Sigstore, when online.

An Ed25519 key says nothing of whose it is or when it signed. Sigstore's authority (Fulcio) certifies for ten minutes
that whoever holds a fresh key has logged in as somebody (OpenID Connect), and a public log (Rekor) that nobody can
rewrite notes the signature. What is signed is the file statement.dsse.json, so the `sigstore` and `cosign` programs
check it, too. Signing needs a network; checking needs none: the authority's and the log's keys come with the library.

The work is done by the package `sigstore` (moonbase[sigstore]); nothing else of moonbase needs it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.proof.canonical import BundleError, clean, parse
from moonbase.evals.proof.folder import read_document
from moonbase.evals.proof.seal import SIGSTORE, STATEMENT
from moonbase.files import write_bytes

TOKEN = "SIGSTORE_IDENTITY_TOKEN"
"""Where Sigstore's own program looks for a token, too; without one it is asked for in the browser."""
LARGEST = 2**20
"""Bytes of a Sigstore bundle; real ones have some five thousand."""
INSTALL = 'Sigstore\'s library is not installed: pip install "moonbase[sigstore]"'


def countersign(bundle: Path) -> Path:
    """Sign the statement of a sealed bundle under the caller's public identity; returns the file that was written.

    The identity is a token in $SIGSTORE_IDENTITY_TOKEN, that of the workflow this runs in (GitHub, GitLab, ...), or a
    login in the browser. It and the statement's digest become public for ever. Raises UserError, and leaves the bundle
    as it was: not installed, no network, no identity.
    """
    envelope = read_document(bundle, STATEMENT)
    with _library():
        from sigstore.models import ClientTrustConfig
        from sigstore.sign import SigningContext

    with _quiet(), _explained("nothing was signed, and the bundle is as it was"):
        trust = ClientTrustConfig.production()
        with SigningContext.from_trust_config(trust).signer(_identity(trust)) as signer:
            signed = signer.sign_artifact(envelope).to_json()
    write_bytes(bundle / SIGSTORE, signed.encode() + b"\n")
    return bundle / SIGSTORE


def _identity(trust: Any) -> Any:
    from sigstore.oidc import IdentityToken, Issuer, detect_credential

    if token := os.environ.get(TOKEN) or detect_credential():
        return IdentityToken(token)
    if not sys.stdin.isatty():
        raise UserError(f"Sigstore: no identity: set ${TOKEN}, run this in a workflow that has one, or in a terminal")
    return Issuer(trust.signing_config.get_oidc_url()).identity_token()


def check(data: bytes, statement: bytes, identity: str, issuer: str, trusted_root: Path | None = None) -> str:
    """Who signed `statement` and when it was logged, in words, from a Sigstore bundle; no network is used.

    `identity`: an address, or the URL of a workflow; `issuer`: the URL of who vouches for it. `trusted_root`: another
    root of trust than the one that the library brings (trusted_root.json). Raises BundleError where anything is amiss,
    UserError where the library is not installed or the root cannot be read.
    """
    if len(data) > LARGEST:
        raise BundleError(f"larger than {LARGEST} bytes")
    stated = parse(data)
    with _library():
        from sigstore.errors import Error
        from sigstore.models import Bundle
        from sigstore.verify import Verifier, policy

    with _quiet():
        verifier = _verifier(Verifier, trusted_root)
        try:
            bundle = Bundle.from_json(data)
            verifier.verify_artifact(statement, bundle, policy.Identity(identity=identity, issuer=issuer))
        except Error as error:
            raise BundleError(f"Sigstore: {_line(error)}") from None
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise BundleError(f"not a Sigstore bundle ({type(error).__name__}: {_line(error)})") from None
    return f"{clean(identity)} (says {clean(issuer)}) {_entry(stated)}"


def _verifier(kind: Any, trusted_root: Path | None) -> Any:
    from sigstore.models import TrustedRoot

    if trusted_root is None:
        return kind.production(offline=True)
    try:
        return kind(trusted_root=TrustedRoot.from_file(str(trusted_root)))
    except Exception as error:
        raise UserError(f"{trusted_root}: not a root of trust of Sigstore ({type(error).__name__})") from None


def _entry(stated: Any) -> str:
    """Place and date in the public log, which `check` has found to be in order."""
    entry = stated["verificationMaterial"]["tlogEntries"][0]
    seconds = int(entry.get("integratedTime") or 0)
    when = f" on {datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if seconds else ""
    return f"is entry {int(entry['logIndex'])} of the public log{when}"


@contextlib.contextmanager
def _library() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UserError(INSTALL) from None


@contextlib.contextmanager
def _explained(outcome: str) -> Iterator[None]:
    """Whatever the library, its network or its host say: one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Sigstore: {_line(error)}; {outcome}. Signing needs a network") from None


def _line(error: BaseException) -> str:
    return clean(" ".join(str(error).split()) or type(error).__name__, 160)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warning that it uses the root of trust at hand, which is what is wanted."""
    logger = logging.getLogger("sigstore")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def identities(data: bytes) -> str:
    """Whom the certificate of a Sigstore bundle names, unchecked: what a reader may ask to have checked."""
    try:
        from cryptography import x509

        material = json.loads(data)["verificationMaterial"]
        held = material.get("certificate") or material["x509CertificateChain"]["certificates"][0]
        certificate = x509.load_der_x509_certificate(base64.b64decode(held["rawBytes"]))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return clean(", ".join(str(name.value) for name in names))
    except Exception:
        return ""
