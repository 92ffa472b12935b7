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
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moonbase.errors import UserError
from moonbase.evals.fresh.itemset import Configuration, forms_of, problems
from moonbase.evals.fresh.problem import FAMILIES, Problem, verify
from moonbase.evals.proof.canonical import BundleError, canonical, digest_bytes, digest_json
from moonbase.evals.proof.signing import load_key, open_envelope, public_text, sign, statement
from moonbase.evals.records import Record, digest, read_records
from moonbase.files import write_bytes

COMMITMENT, REVEAL, OPENING = "commitment.dsse.json", "reveal.dsse.json", "opening.json"
"""Files: the first two are published, the third is kept until the run is over."""
COMMITMENT_TYPE = "urn:moonbase:fresh-commitment:v1"
REVEAL_TYPE = "urn:moonbase:fresh-reveal:v1"
PACKAGES = ("reasoning-gym", "numpy")
"""Whose versions items depend on."""
_PACKAGE = Path(__file__).resolve().parents[2]
_GENERATORS = ("evals/fresh/*.py", "evals/tasks/fresh_task.py", "agents/worlds/wideworld/*.py",
               "agents/worlds/world.py", "agents/worlds/index.py", "agents/worlds/grading.py", "agents/worlds/cells.py",
               "agents/worlds/tables_in_text.py", "agents/worlds/metrics.py", "agents/tools/sandbox*.py")


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
        if "seed" in task.params:
            raise UserError(f"suite {suite.name}: {task.name} has a seed of its own; items that are promised come from "
                            "the promised one")
        given = dict(task.params)
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


def folded(name: str) -> str:
    """As names and draws count in the seed: NFKC, small letters, no blanks around, no empty or `.` part of a path.

    Whoever spells a name in another way gets no other items.
    """
    parts = unicodedata.normalize("NFKC", name).casefold().strip().split("/")
    return "/".join(part for place, part in enumerate(parts) if part not in ("", ".") or (place == 0 and not part))


def effective_seed(opening: Opening, models: Iterable[str], public_randomness: str | None = None) -> str:
    """HMAC-SHA-256 of the sorted folded model names and the folded randomness under the secret: 32 hexadecimal digits.
    """
    draw = None if public_randomness is None else folded(public_randomness)
    message = canonical({"models": sorted({folded(model) for model in models}), "public_randomness": draw})
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
    public_randomness: str | None = None


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
        return Revealed(Configuration.model_validate(promise["configuration"]), models, truth["seed"], key,
                        truth["public_randomness"])
    except (KeyError, TypeError, IndexError, AttributeError, ValidationError) as error:
        raise BundleError(f"commitment or reveal is incomplete ({type(error).__name__})") from None
    except ValueError as error:
        raise BundleError(f"commitment or reveal: {error}") from None


def check(folder: Path, public_key: str | None = None, public_randomness: str | None = None) -> list[Finding]:
    """Make every item of an evaluation anew and compare it with its records; [] where all is as committed.

    `public_key`: whose commitment it has to be; `public_randomness`: the draw as its source published it. Both are
    taken from the documents where they are not given, and then prove nothing about who or when.

    Found: another secret, configuration, generator, key, draw or model than committed to; an item that asks or expects
    something else, that does not come from the seed, that is filed under another family, language, difficulty or form;
    a sample too many or too few; a score that the verifier does not give; an answer without its score.
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
    found = []
    if public_randomness is not None and folded(public_randomness) != folded(str(revealed.public_randomness)):
        found.append(Finding(REVEAL, f"its public draw is {revealed.public_randomness!r}, not {public_randomness!r}"))
    return found + list(Audit(revealed).of(read_records(folder / "records.jsonl")))


class Audit:
    """Records against the items that the revealed seed makes."""

    def __init__(self, revealed: Revealed) -> None:
        self.revealed = revealed
        # Without their prompts, which may have 256k tokens.
        self._items = {problem.id: (replace(problem, prompt=""), problem.input_digest)
                       for problem in problems(revealed.configuration, revealed.seed)}
        self._seen: set[tuple[str, str, str | None, int]] = set()
        self._tasks: dict[str, str] = {}
        self._weights: dict[str, str] = {}

    def of(self, records: Iterable[Record]) -> Iterator[Finding]:
        for record in records:
            id = f"{record.item}/{record.condition.get('language', 'en')}"
            if record.model not in self.revealed.models:
                yield Finding(id, f"model {record.model} was not named when the seed was made")
            if id not in self._items:
                yield Finding(id, "does not come from the revealed seed and configuration")
                continue
            problem, input_digest = self._items[id]
            for text in (*self._identity(record, problem, input_digest), *self._filing(record, problem),
                         *_grading(record, problem)):
                yield Finding(id, f"model {record.model}: {text}")
        yield from self._missing()

    def _identity(self, record: Record, problem: Problem, input_digest: str) -> Iterator[str]:
        form = record.condition.get("calls") if problem.family == "tools" else None
        key = (record.model, problem.id, form, record.sample)
        if key in self._seen:
            yield f"sample {record.sample}: two records"
        self._seen.add(key)
        if not 0 <= record.sample < self.revealed.configuration.samples:
            yield f"sample {record.sample}: {self.revealed.configuration.samples} were committed to"
        if form not in self._forms(problem.family):
            yield f"asked in the form {form!r}, which was not committed to"
        if record.input_digest != input_digest:
            yield "was asked something else"
        if record.target_digest != problem.target_digest:
            yield "another answer was expected"

    def _filing(self, record: Record, problem: Problem) -> Iterator[str]:
        """What figures are sorted by."""
        wanted = {"language", "difficulty", *(("calls",) if problem.family == "tools" else ())}
        for name in sorted(wanted ^ record.condition.keys()):
            yield f"its condition {name} is {'missing' if name in wanted else 'none that an item of its family has'}"
        if (filed := record.condition.get("difficulty")) not in (None, str(problem.difficulty)):
            yield f"filed under difficulty {filed}, made with {problem.difficulty}"
        if record.group != problem.family:
            yield f"filed under group {record.group}, of family {problem.family}"
        if record.cluster != problem.item:
            yield f"filed under cluster {record.cluster}"
        if (task := self._tasks.setdefault(problem.family, record.task)) != record.task:
            yield f"filed under task {record.task}, others of family {problem.family} under {task}"
        weights = record.call.weights_digest
        if weights and self._weights.setdefault(record.model, weights) != weights:
            yield "answered with other weights than before"

    def _missing(self) -> Iterator[Finding]:
        wanted = [(id, form, sample) for id, (problem, _) in self._items.items()
                  for form in self._forms(problem.family) for sample in range(self.revealed.configuration.samples)]
        for model in self.revealed.models:
            missing = [id for id, form, sample in wanted if (model, id, form, sample) not in self._seen]
            if missing:
                yield Finding(missing[0], f"model {model}: no record of {len(missing)} of {len(wanted)} items")

    def _forms(self, family: str) -> tuple[str | None, ...]:
        return forms_of(self.revealed.configuration, family)


def _grading(record: Record, problem: Problem) -> Iterator[str]:
    """The score once more, where the answer is kept and is no program. A call that failed has none, and is counted."""
    from moonbase.evals.proof.rescoring import RUNS_ANSWERS, answer_text

    if not record.output or problem.family in RUNS_ANSWERS or record.status == "error":
        return
    if record.output_digest != digest(record.output):
        yield "the answer is not the text that its digest is of"
    stated = record.scores.get("accuracy")
    score, _ = verify(problem, answer_text(record))
    if stated is None and score is not None:
        yield f"an answer that can be scored has no score ({record.status})"
    elif score is not None and abs(score - (stated or 0.0)) > 1e-9:
        yield f"the answer's score is {score:g}, the record says {stated:g}"
