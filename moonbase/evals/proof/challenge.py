"""Running a random part of a bundle again, and signing what came out.

Which samples: those with the smallest SHA-256 of (seed, position), where the seed is the SHA-256 of the bundle's root
and a nonce. The publisher fixed the root before the nonce existed and so cannot choose; a nonce from public randomness
(a drand round, a block) keeps the challenger from choosing either. Anyone who has the bundle draws the same samples.

What agreement means: other weights never agree. A sample that was decoded greedily has the same text as output. Those
that were not may differ, and their scores are compared: a sign test must find no trend among the scores that changed
(p >= 0.05), and at least four in five of them must not have changed. Each of these is computed again from the statement
by whoever verifies it.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.proof import chain, signing
from moonbase.evals.proof.canonical import BundleError, clean, portable
from moonbase.evals.proof.folder import file_digest, read_document, read_json
from moonbase.evals.proof.seal import CHALLENGES, RECORDS, STATEMENT
from moonbase.evals.records import Record
from moonbase.files import make_folder, write_bytes

SCHEMA = "moonbase.challenge/1"
SMALLEST = 10
"""Samples below which agreement raises no level, unless the bundle has fewer."""
LARGEST = 10_000
SIGNIFICANT = 0.05
SAME_SHARE = 0.8
_NONCE = re.compile(r"[!-~]{8,200}")

Runner = Callable[[Path, list[Record], str, Path], Iterable[Record]]
"""(bundle, records to run again, model, an empty folder to work in) -> new records of the same items."""


@dataclass(frozen=True)
class Chosen:
    """One drawn sample: its place among all records, the digest of its line, and its record."""

    index: int
    digest: str
    record: Record


@dataclass(frozen=True)
class Outcome:
    """What a counter-statement says, as far as it was found to be true of this bundle."""

    model: str
    key: str
    n: int
    same: dict[str, tuple[int, int]]
    """`outputs` or `scores` to how many are the same, of how many that are compared so."""
    agrees: bool
    enough: bool
    other_weights: bool = False

    @property
    def words(self) -> str:
        few = "" if self.enough else f" (fewer than {SMALLEST}: too few to count)"
        other = "; other weights answered than the sealed ones" if self.other_weights else ""
        same = " and ".join(f"{same} of {total} {how}" for how, (same, total) in self.same.items())
        return f"{self.model} run again: {same} are the same{few}{other}"


def challenge(bundle: Path, n: int, model: str, key: Path, *, nonce: str, sealed_model: str | None = None,
              run: Runner | None = None, data: Path | None = None) -> Path:
    """Run `n` random samples of a bundle again on `model` and write a signed counter-statement into the bundle.

    `nonce`: public randomness from after the bundle was published. `sealed_model`: the name under which the bundle
    has the model, where it has several. Returns the statement's file. Raises UserError.
    """
    from moonbase.evals.proof.verify import failures, verify

    if not 1 <= n <= LARGEST:
        raise UserError(f"challenge: n is {n}; it must be from 1 to {LARGEST}")
    if not _NONCE.fullmatch(nonce):
        raise UserError("challenge: the nonce must be 8 to 200 printable ASCII characters without blanks")
    signer = signing.load_key(Path(key))
    if wrong := failures(verify(bundle)):
        raise UserError(f"{bundle}: not in order, so there is nothing to challenge: {wrong[0].message}")
    sealed, publisher = _statement(bundle)
    if publisher == signing.public_text(signer):
        raise UserError(f"{key}: this key sealed the bundle; a challenge counts only by somebody else's")
    name = _sealed_model(bundle, sealed_model, model)
    chosen = draw(bundle, name, n, sealed["predicate"]["records"]["root"], nonce)
    with tempfile.TemporaryDirectory(prefix="moonbase-challenge-") as work:
        again = _by_identity((run or _with_inspect(data))(bundle, [one.record for one in chosen], model, Path(work)))
        predicate = {
            "schema": SCHEMA, "key": signing.public_text(signer), "nonce": nonce, "n": n, "model": name, "ran": model,
            "root": sealed["predicate"]["records"]["root"],
            "samples": [_compared(one, again.get(_identity(one.record))) for one in chosen],
        }
    subject = {"name": STATEMENT, "digest": {"sha256": file_digest(bundle, STATEMENT)}}
    payload = signing.statement(signing.CHALLENGE_PREDICATE, [subject], portable(predicate))
    envelope = signing.sign(payload, signer)
    folder = make_folder(bundle / CHALLENGES.rstrip("/"))
    path = folder / f"{hashlib.sha256(envelope).hexdigest()[:16]}.dsse.json"
    write_bytes(path, envelope)
    return path


def _with_inspect(data: Path | None) -> Runner:
    from moonbase.evals.proof.rerun import rerun

    return lambda bundle, records, model, work: rerun(bundle, records, model, work, data)


def draw(bundle: Path, model: str, n: int, root: str, nonce: str) -> list[Chosen]:
    """The `n` samples of a model that root and nonce choose, in the order of the records.

    Samples that ended in an error are not drawn: there is no answer to compare with. Records stream by.
    """
    seed = hashlib.sha256(f"moonbase challenge\0{root}\0{nonce}".encode()).digest()

    def ranked() -> Iterator[tuple[bytes, int, Chosen]]:
        for number, link in enumerate(chain.read_links(bundle, RECORDS, "")):
            if link.record.get("model") == model and link.record.get("status") != "error":
                rank = hashlib.sha256(seed + number.to_bytes(8, "big")).digest()
                yield rank, number, Chosen(number, link.digest, Record.model_validate(link.record))

    found = [chosen for _, _, chosen in heapq.nsmallest(n, ranked(), key=lambda ranking: ranking[:2])]
    if not found:
        raise UserError(f"{bundle}: has no answers of {clean(model)!r}")
    return sorted(found, key=lambda chosen: chosen.index)


def check_counter_statement(bundle: Path, data: bytes) -> Outcome:
    """What a counter-statement proves about this bundle, whose own statement must have been verified before.

    Raises BundleError where it is about another bundle, names samples that were not drawn, or misquotes the bundle.
    """
    found, key = signing.open_envelope(data, signing.CHALLENGE_PREDICATE, None)
    sealed, _ = _statement(bundle)
    predicate = found["predicate"]
    _check_shape(predicate)
    if [(subject["name"], subject["digest"]["sha256"]) for subject in found["subject"]] \
            != [(STATEMENT, file_digest(bundle, STATEMENT))] \
            or predicate["root"] != sealed["predicate"]["records"]["root"]:
        raise BundleError("it is about another bundle")
    try:
        chosen = draw(bundle, predicate["model"], predicate["n"], predicate["root"], predicate["nonce"])
    except UserError:
        raise BundleError("it is about a model that this bundle does not have") from None
    samples = predicate["samples"]
    if [(sample.get("index"), sample.get("digest")) for sample in samples] \
            != [(one.index, one.digest) for one in chosen]:
        raise BundleError("its samples are not those that root and nonce choose")
    for sample, one in zip(samples, chosen, strict=True):
        if sample.get("sealed") != _result(one.record):
            raise BundleError(f"it misquotes record {one.index} of the bundle")
    return judge(predicate["model"], key, samples, asked=predicate["n"])


def judge(model: str, key: str, samples: Sequence[dict[str, Any]], asked: int) -> Outcome:
    """Whether the samples agree, by the rule above. One that was not run again, or was asked something else, does not.

    `asked`: how many were wanted; where the bundle has fewer, all of them are enough.
    """
    pairs = [(sample["sealed"], sample["again"]) for sample in samples]
    greedy = [pair for pair in pairs if _comparable(*pair)]
    others = [pair for pair in pairs if not _comparable(*pair)]
    enough = len(samples) >= SMALLEST or len(samples) < asked
    # A host that names no weights may have run the same ones; who names others has run another model.
    other = any(again is not None and sealed["weights"] and again["weights"]
                and sealed["weights"] != again["weights"] for sealed, again in pairs)
    outputs = sum(_same_question(*pair) and pair[0]["output"] == pair[1]["output"] for pair in greedy)
    scores = sum(again is not None and _same_question(sealed, again) and _verdict(again) == _verdict(sealed)
                 for sealed, again in others)
    ups = sum(_total(again) > _total(sealed) for sealed, again in others if again is not None)
    downs = sum(_total(again) < _total(sealed) for sealed, again in others if again is not None)
    agrees = (outputs == len(greedy) and scores >= SAME_SHARE * len(others)
              and sign_test(ups, downs) >= SIGNIFICANT)
    same = {how: counts for how, counts in (("outputs", (outputs, len(greedy))), ("scores", (scores, len(others))))
            if counts[1]}
    return Outcome(model, key, len(pairs), same, agrees and enough and not other, enough, other)


def sign_test(ups: int, downs: int) -> float:
    """Two-sided exact p that as many changes go one way by chance."""
    total, fewer = ups + downs, min(ups, downs)
    return min(1.0, 2 * sum(comb(total, k) for k in range(fewer + 1)) / 2**total)


def _compared(one: Chosen, again: Record | None) -> dict[str, Any]:
    return {"index": one.index, "digest": one.digest, "sealed": _result(one.record),
            "again": None if again is None else _result(again)}


def _result(record: Record) -> dict[str, Any]:
    """What of a record is compared."""
    return portable({"input": record.input_digest, "output": record.output_digest, "scores": record.scores,
                     "label": record.label, "status": record.status, "weights": record.call.weights_digest,
                     "decoding": record.call.decoding})


def _comparable(sealed: dict[str, Any], again: dict[str, Any] | None) -> bool:
    """Whether both outputs must be the same text: the same weights, decoded greedily in the same way."""
    return (again is not None and _deterministic(sealed) and _deterministic(again)
            and sealed["weights"] == again["weights"] and _greedy(sealed) == _greedy(again)
            and again["output"].startswith("sha256:") and sealed["output"].startswith("sha256:"))


def _deterministic(result: dict[str, Any]) -> bool:
    return bool(result["weights"]) and result["decoding"].get("temperature") == 0


def _greedy(result: dict[str, Any]) -> dict[str, Any]:
    """The decoding without what greedy decoding does not read."""
    return {name: value for name, value in result["decoding"].items() if name != "seed"}


def _verdict(result: dict[str, Any]) -> Any:
    return result["scores"], result["label"], result["status"]


def _total(result: dict[str, Any]) -> float:
    return sum(value for value in result["scores"].values() if value is not None)


def _same_question(sealed: dict[str, Any], again: dict[str, Any]) -> bool:
    """Salted digests of two runs cannot be compared: their items are the same by id only."""
    salted = not (sealed["input"].startswith("sha256:") and again["input"].startswith("sha256:"))
    return salted or sealed["input"] == again["input"]


def _identity(record: Record) -> tuple[Any, ...]:
    """The same for both runs: neither the model's name nor its provider is part of it."""
    condition = tuple(sorted((name, value) for name, value in record.condition.items() if name != "provider"))
    return record.task, record.item, record.sample, condition


def _by_identity(records: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
    return {_identity(record): record for record in records}


def _statement(bundle: Path) -> tuple[dict[str, Any], str]:
    return signing.open_envelope(read_document(bundle, STATEMENT), signing.BUNDLE_PREDICATE, None)


def _sealed_model(bundle: Path, wanted: str | None, model: str) -> str:
    """The name under which the bundle has the model that is run again."""
    names = list(read_json(bundle, "manifest.json").get("models") or {})
    wanted = wanted or (model if model in names else names[0] if len(names) == 1 else None)
    if wanted not in names:
        raise UserError(f"{bundle}: say which of its models is challenged: {clean(', '.join(names), 400)}")
    return wanted


_RESULT_FIELDS = {"input": str, "output": str, "scores": dict, "label": str | None, "status": str,
                  "weights": str | None, "decoding": dict}


def _check_shape(predicate: dict[str, Any]) -> None:
    shape = {"schema": str, "key": str, "nonce": str, "n": int, "model": str, "ran": str, "root": str, "samples": list}
    _check_fields(predicate, shape)
    if predicate["schema"] != SCHEMA or not 1 <= predicate["n"] <= LARGEST or not _NONCE.fullmatch(predicate["nonce"]):
        raise BundleError(f"not a counter-statement of {SCHEMA}")
    for sample in predicate["samples"]:
        _check_fields(sample, {"index": int, "digest": str, "sealed": dict, "again": dict | None})
        for result in (sample["sealed"], sample["again"]):
            if result is not None:
                _check_fields(result, _RESULT_FIELDS)
                if not all(value is None or type(value) in (int, float) for value in result["scores"].values()):
                    raise BundleError("not a counter-statement: a score is no number")


def _check_fields(value: Any, shape: dict[str, Any]) -> None:
    if not isinstance(value, dict) or value.keys() != shape.keys() or not all(
            isinstance(value[name], kind) and not isinstance(value[name], bool) for name, kind in shape.items()):
        raise BundleError(f"not a counter-statement: it must have {', '.join(shape)}, and nothing else")
