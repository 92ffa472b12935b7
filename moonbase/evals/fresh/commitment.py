"""Commit, then reveal: nobody can choose problems for or against a model, and everybody can make them again.

1. Before any model is named, `commit` signs and publishes the digest of the generator, the configuration, and a salted
   hash of a secret seed.
2. When the models are named, `effective_seed` mixes their sorted names (and public randomness of a source that was
   named in the commitment) into the secret: whoever chose the secret could not know the items, whoever chose the
   models neither.
3. After the run `reveal` signs secret, salt, models and randomness; `check` makes every item anew and compares it with
   the records.

Both documents are in-toto statements in DSSE envelopes, canonical JSON, signed with Ed25519 (`proof/signing.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moonbase.errors import UserError
from moonbase.evals.fresh.itemset import Configuration, problems
from moonbase.evals.fresh.problem import FAMILIES
from moonbase.evals.proof.canonical import BundleError, canonical, digest_bytes, digest_json
from moonbase.evals.proof.signing import load_key, open_envelope, public_text, sign, statement
from moonbase.evals.records import Record, read_records
from moonbase.files import write_bytes

COMMITMENT, REVEAL, OPENING = "commitment.dsse.json", "reveal.dsse.json", "opening.json"
"""Files: the first two are published, the third is kept until the run is over."""
COMMITMENT_TYPE = "urn:moonbase:fresh-commitment:v1"
REVEAL_TYPE = "urn:moonbase:fresh-reveal:v1"
PACKAGES = ("reasoning-gym", "numpy")
"""Whose versions items depend on."""
_PACKAGE = Path(__file__).resolve().parents[2]
_GENERATORS = ("evals/fresh/*.py", "agents/worlds/wideworld/*.py", "agents/worlds/world.py", "agents/worlds/index.py",
               "agents/worlds/grading.py", "agents/worlds/cells.py", "agents/worlds/tables_in_text.py",
               "agents/worlds/metrics.py", "agents/tools/sandbox*.py")


@dataclass(frozen=True)
class Opening:
    """What is kept secret until the run is over: 32 random bytes each, as hexadecimal digits."""

    secret: str
    salt: str

    @classmethod
    def new(cls) -> Opening:
        return cls(secrets.token_hex(32), secrets.token_hex(32))

    def write(self, path: Path) -> None:
        """Readable by its owner only. Raises UserError where there is a file already."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise UserError(f"{path}: exists already; a secret is not overwritten") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"secret": self.secret, "salt": self.salt}, file)

    @classmethod
    def read(cls, path: Path) -> Opening:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            opening = cls(str(values["secret"]), str(values["salt"]))
            bytes.fromhex(opening.secret), bytes.fromhex(opening.salt)
            return opening
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not the opening of a commitment") from None

    def seal(self) -> str:
        """The salted hash that is published: it binds to the secret and tells nothing of it."""
        text = b"moonbase fresh commitment\x00" + bytes.fromhex(self.salt) + bytes.fromhex(self.secret)
        return digest_bytes(text)


@dataclass(frozen=True)
class Finding:
    """Something that does not fit. `where`: a file, an item."""

    where: str
    text: str


def generator() -> dict[str, Any]:
    """The code that makes and grades items: the SHA-256 of each file, and the versions of packages they use."""
    files = {str(path.relative_to(_PACKAGE)): digest_bytes(path.read_bytes())
             for pattern in _GENERATORS for path in sorted(_PACKAGE.glob(pattern))}
    return {"digest": digest_json(files), "files": files,
            "packages": {name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def configuration_of(suite: Any, limit: int | None = None) -> Configuration:
    """What a suite of fresh problems asks, as it is committed to. Raises UserError for one that is more than that."""
    families, params = [], []
    for task in suite.tasks:
        kind, _, family = task.source.removeprefix("builtin:").partition("/")
        if kind != "fresh" or not task.source.startswith("builtin:"):
            raise UserError(f"suite {suite.name}: {task.name} is no task of fresh problems; commit to a suite of these "
                            "alone")
        given = {name: value for name, value in task.params.items() if name not in ("samples", "seed")}
        families += [family] if family else list(given.get("families", FAMILIES))
        limits = [one for one in (given.pop("limit", None), task.limit, limit) if one is not None]
        params.append({**given, "limit": min(limits, default=None), "families": ()})
    if any(one != params[0] for one in params):
        raise UserError(f"suite {suite.name}: its tasks differ in more than their family; they cannot be committed to "
                        "as one")
    try:
        return Configuration.model_validate({**params[0], "families": tuple(families)})
    except ValidationError as error:
        raise UserError(f"suite {suite.name}: params: {error.errors()[0]['msg']}") from None


def commit(configuration: Configuration, opening: Opening, key: Path, *, randomness_source: str | None = None) -> bytes:
    """The signed commitment. `randomness_source`: which public draw will be mixed in, such as a round of a beacon that
    lies in the future. Raises UserError."""
    signer = load_key(key)
    predicate = {"key": public_text(signer), "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                 "generator": generator(), "configuration": configuration.model_dump(mode="json"),
                 "seed": opening.seal(), "randomness_source": randomness_source}
    subject = {"name": "generator", "digest": {"sha256": predicate["generator"]["digest"].removeprefix("sha256:")}}
    return sign(statement(COMMITMENT_TYPE, [subject], predicate), signer)


def effective_seed(opening: Opening, models: Iterable[str], public_randomness: str | None = None) -> str:
    """HMAC-SHA-256 of the sorted model names and the randomness under the secret: 32 hexadecimal digits."""
    message = canonical({"models": sorted(set(models)), "public_randomness": public_randomness})
    return hmac.new(bytes.fromhex(opening.secret), message, hashlib.sha256).hexdigest()[:32]


def reveal(commitment: bytes, opening: Opening, models: Sequence[str], key: Path, *,
           public_randomness: str | None = None) -> bytes:
    """The signed reveal. Raises UserError where the opening or the key is another commitment's."""
    signer = load_key(key)
    told, signed_by = open_envelope(commitment, COMMITMENT_TYPE, None)
    if signed_by != public_text(signer):
        raise UserError("reveal: the commitment is signed with another key")
    if told["predicate"]["seed"] != opening.seal():
        raise UserError("reveal: this secret is not the one that was committed to")
    _check_randomness(told["predicate"], public_randomness)
    predicate = {"key": public_text(signer), "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                 "secret": opening.secret, "salt": opening.salt, "models": sorted(set(models)),
                 "public_randomness": public_randomness,
                 "seed": effective_seed(opening, models, public_randomness)}
    subject = {"name": COMMITMENT, "digest": {"sha256": digest_bytes(commitment).removeprefix("sha256:")}}
    return sign(statement(REVEAL_TYPE, [subject], predicate), signer)


def _check_randomness(committed: dict[str, Any], public_randomness: str | None) -> None:
    if (committed.get("randomness_source") is None) != (public_randomness is None):
        raise BundleError("public randomness is mixed in where its source was committed to, and only there")


def write(folder: Path, name: str, envelope: bytes) -> Path:
    """A commitment or reveal as a file of a folder; never over another one. Raises UserError."""
    path = folder / name
    if path.exists():
        raise UserError(f"{path}: exists already; what was published is not replaced")
    write_bytes(path, envelope)
    return path


@dataclass(frozen=True)
class Revealed:
    """Commitment and reveal that belong together."""

    configuration: Configuration
    models: tuple[str, ...]
    seed: str
    key: str


def open_both(commitment: bytes, revealed: bytes, public_key: str | None = None) -> Revealed:
    """Raises BundleError where the two do not belong together, or the code here is not what was committed to."""
    told, key = open_envelope(commitment, COMMITMENT_TYPE, public_key)
    shown, _ = open_envelope(revealed, REVEAL_TYPE, key)
    promise, truth = told["predicate"], shown["predicate"]
    try:
        if shown["subject"][0]["digest"]["sha256"] != digest_bytes(commitment).removeprefix("sha256:"):
            raise BundleError("the reveal belongs to another commitment")
        opening, models = Opening(truth["secret"], truth["salt"]), tuple(map(str, truth["models"]))
        if opening.seal() != promise["seed"]:
            raise BundleError("the revealed secret is not the one that was committed to")
        _check_randomness(promise, truth["public_randomness"])
        if effective_seed(opening, models, truth["public_randomness"]) != truth["seed"]:
            raise BundleError("the seed does not follow from secret, models and randomness")
        ours, theirs = generator(), promise["generator"]
        if ours["digest"] != theirs["digest"]:
            changed = sorted(name for name in ours["files"].keys() | theirs["files"].keys()
                             if ours["files"].get(name) != theirs["files"].get(name))
            raise BundleError(f"another generator than the committed one is installed ({', '.join(changed)[:200]}): "
                              "check with the version of moonbase that made the commitment")
        if ours["packages"] != theirs["packages"]:
            raise BundleError(f"the commitment was made with {theirs['packages']}, here is {ours['packages']}")
        return Revealed(Configuration.model_validate(promise["configuration"]), models, truth["seed"], key)
    except (KeyError, TypeError, IndexError, AttributeError, ValidationError) as error:
        raise BundleError(f"commitment or reveal is incomplete ({type(error).__name__})") from None
    except ValueError as error:
        raise BundleError(f"commitment or reveal: {error}") from None


def check(folder: Path, public_key: str | None = None) -> list[Finding]:
    """Make every item of an evaluation anew and compare it with its records; [] where all is as committed.

    Found: another secret, configuration, generator, key or model than committed to; an item that asks or expects
    something else, that does not come from the seed, or that one of the models has no record of.
    """
    documents = []
    for name in (COMMITMENT, REVEAL):
        try:
            documents.append((folder / name).read_bytes())
        except OSError as error:
            return [Finding(name, error.strerror or "unreadable")]
    try:
        revealed = open_both(*documents, public_key)
    except BundleError as error:
        return [Finding(f"{COMMITMENT}, {REVEAL}", str(error))]
    return list(_compare(revealed, read_records(folder / "records.jsonl")))


def _compare(revealed: Revealed, records: Iterable[Record]) -> Iterator[Finding]:
    # Of each item its digests alone are kept: a prompt may have 256k tokens.
    wanted = {problem.id: (problem.input_digest, problem.target_digest)
              for problem in problems(revealed.configuration, revealed.seed)}
    seen: set[tuple[str, str, int]] = set()
    models: set[str] = set()
    for record in records:
        id = f"{record.item}/{record.condition.get('language', 'en')}"
        models.add(record.model)
        if record.model not in revealed.models:
            yield Finding(id, f"model {record.model} was not named when the seed was made")
        if id not in wanted:
            yield Finding(id, "does not come from the revealed seed and configuration")
            continue
        if (record.model, id, record.sample) in seen:
            yield Finding(id, f"model {record.model}, sample {record.sample}: two records")
        seen.add((record.model, id, record.sample))
        if record.input_digest != wanted[id][0]:
            yield Finding(id, f"model {record.model} was asked something else")
        if record.target_digest != wanted[id][1]:
            yield Finding(id, f"model {record.model}: another answer was expected")
    answered = {(model, id) for model, id, _ in seen}
    for model in revealed.models:
        missing = [id for id in wanted if (model, id) not in answered]
        if missing:
            yield Finding(missing[0], f"model {model}: no record of {len(missing)} of {len(wanted)} items")


