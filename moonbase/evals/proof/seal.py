"""From an evaluation folder to a bundle: a folder beside it that cannot be changed without being noticed.

Sealing links the records, computes every figure anew from them, gives each its level, writes the reports, and signs
the digests of all files. The evaluation folder stays as it is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.proof import chain, manifest, signing
from moonbase.evals.proof.canonical import BundleError, canonical, portable
from moonbase.evals.proof.complete import Shortfall, as_told, shortfalls
from moonbase.evals.proof.copies import Copies
from moonbase.evals.proof.folder import file_digest, open_file, read_document, read_json, walk
from moonbase.evals.proof.levels import Sources, levelled
from moonbase.evals.proof.survey import Survey
from moonbase.evals.records import Record, read_records
from moonbase.evals.suite import suite_of
from moonbase.files import write_bytes, write_folder, write_pieces

STATEMENT = "statement.dsse.json"
SIGSTORE = "statement.sigstore.json"
CHALLENGES = "challenges/"
RECORDS = "records.jsonl"
REPORTS = {"report.html": "en", "report.zh.html": "zh"}
"""Each page and its language."""
TABLE = "results.csv"
PROMISES = ("commitment.dsse.json", "reveal.dsse.json")
"""Of fresh problems (`fresh.commitment`), where they were promised."""
SCHEMA = "moonbase.bundle/1"
RESULTS_SCHEMA = "moonbase.results/1"
_PIECE = 2**20


def unsealed(name: str) -> bool:
    """The only files of a bundle that its statement does not cover: signatures, which cover themselves."""
    return name in (STATEMENT, SIGSTORE) or (name.startswith(CHALLENGES) and name.endswith(".dsse.json")
                                             and name.count("/") == 1)


def seal(folder: Path, key: Path, *, publish: bool = False, out: Path | None = None) -> Path:
    """Write and sign a bundle of the evaluation in `folder`; returns it (by default FOLDER-bundle, beside).

    `publish`: refuse what no stranger could check or should see (a changed checkout, texts that the suite withholds).
    Logs go along unless the suite withholds texts. Raises UserError.
    """
    folder = Path(folder)
    out = Path(out) if out is not None else folder.resolve().with_name(folder.resolve().name + "-bundle")
    if out.exists() and not (out / STATEMENT).is_file():
        raise UserError(f"{out}: exists and is no bundle; name another place for it")
    if signed := [name for name in (walk(out) if out.exists() else ()) if unsealed(name) and name != STATEMENT]:
        raise UserError(f"{out}: holds {len(signed)} signatures of others, such as {signed[0]}, "
                        "which sealing again would throw away; name another place with --out")
    signer = signing.load_key(Path(key))
    if not (folder / "suite.json").is_file():
        raise UserError(f"{folder}/suite.json: No such file or directory; name the folder that `moonbase eval` wrote")
    suite_json = portable(read_json(folder, "suite.json"))
    with write_folder(out) as aside:
        write_bytes(aside / "suite.json", canonical(suite_json) + b"\n")
        survey, head, tree = _write_records(folder, aside, suite_json, publish)
        facts = manifest.build(suite_json, survey, publish=publish, missing=as_told(
            _missing(folder, aside, suite_json, survey)))
        write_bytes(aside / "manifest.json", canonical(facts) + b"\n")
        _write_results(folder, aside, survey)
        for name in PROMISES:
            if (folder / name).is_file():
                write_bytes(aside / name, read_document(folder, name))
        if not manifest.suite_part(suite_json, "withhold"):
            _copy_logs(folder, aside)
        predicate = {"schema": SCHEMA, "key": signing.public_text(signer),
                     "records": {"count": survey.count, "head": head, "root": "sha256:" + tree.root().hex()}}
        subjects = [{"name": name, "digest": {"sha256": file_digest(aside, name)}, "annotations": {"size": size}}
                    for name, size in walk(aside).items()]
        payload = signing.statement(signing.BUNDLE_PREDICATE, subjects, predicate)
        write_bytes(aside / STATEMENT, signing.sign(payload, signer))
    return out


def _write_records(folder: Path, aside: Path, suite_json: dict[str, Any], publish: bool,
                   ) -> tuple[Survey, str, chain.MerkleTree]:
    survey, tree = Survey(Sources(suite_json)), chain.MerkleTree()
    head = chain.genesis(suite_json)
    withheld = bool(manifest.suite_part(suite_json, "withhold"))

    def lines() -> Iterator[bytes]:
        nonlocal head
        for number, record in enumerate(read_records(folder / RECORDS), 1):
            if publish and withheld and record.output is not None:
                raise UserError(f"{folder / RECORDS}, line {number}: holds an output, though the suite withholds "
                                "texts; collect the records again")
            try:
                # Through Record once more: what is sealed is what whoever reads it back will have.
                record = Record.model_validate(portable(record.canonical()))
                line, head = chain.link(head, record.canonical())
            except BundleError as error:
                raise UserError(f"{folder / RECORDS}, line {number}: {error}") from None
            survey.add(record)
            tree.append(chain.leaf_of(head))
            yield line + b"\n"

    write_pieces(aside / RECORDS, lines())
    if not survey.count:
        raise UserError(f"{folder / RECORDS}: no records; there is nothing to seal")
    return survey, head, tree


def _missing(folder: Path, aside: Path, suite_json: dict[str, Any], survey: Survey) -> list[Shortfall]:
    """What the suite asks and the records lack: told when it is sealed, or it looks as if it had been left out."""
    suite, logged = suite_of(aside), {}
    for logs in (folder / "logs", folder / "private" / "logs"):
        with contextlib.suppress(ImportError, UserError):
            from moonbase.evals.collect import asked_in

            logged |= asked_in(logs, (), suite)
    copies = Copies(suite, suite_json, None)

    def asked(task: str, model: str) -> int | None:
        known = copies.asked(task, model)
        return logged.get((task, model)) if known is None else known

    return list(shortfalls(suite, suite_json, survey.counts(), asked))


def _write_results(folder: Path, aside: Path, survey: Survey) -> None:
    from moonbase.evals.figures import Table, figures_of
    from moonbase.evals.report import write_report

    table = Table.read(aside / RECORDS)
    figures = levelled(figures_of(suite_of(aside), table), table, survey.levels)
    results = read_json(folder, "results.json") if (folder / "results.json").is_file() else {}
    results = {name: results[name] for name in ("suite",) if name in results}
    results |= {"schema": RESULTS_SCHEMA, "figures": [figure.model_dump(mode="json") for figure in figures],
                "hypotheses": verdicts(suite_of(aside), table, survey.levels)}
    text = json.dumps(portable(results), ensure_ascii=False, indent=1, allow_nan=False)
    write_bytes(aside / "results.json", text.encode() + b"\n")
    for language in ("en", "zh"):
        write_report(aside, language)


def verdicts(suite: Any, table: Any, record_levels: Sequence[int]) -> list[dict[str, Any]]:
    """Of the hypotheses that were registered beforehand, as results.json has them; their figures have their levels."""
    from moonbase.evals.comparison import hypotheses_of

    return [one.model_copy(update={"figure": levelled([one.figure], table, record_levels)[0]}).model_dump(mode="json")
            for one in hypotheses_of(suite, table)]


def _copy_logs(folder: Path, aside: Path) -> None:
    logs = folder / "logs"
    if not logs.is_dir():
        return
    for name in walk(logs):
        if not name.endswith(".eval"):
            continue
        target = aside / "logs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_file(logs, name) as file:
            write_pieces(target, iter(lambda file=file: file.read(_PIECE), b""))


def disclose(bundle: Path, index: int, *, text: bool = True) -> dict[str, Any]:
    """Record `index` (from 0) with its place in the tree: it can be shown without showing the others.

    `text` False leaves the record out and shows the digests of its parts only. Raises UserError.
    """
    suite_json = read_json(bundle, "suite.json")
    tree, shown = chain.MerkleTree(follow=index), None
    for link in chain.read_links(bundle, RECORDS, chain.genesis(suite_json)):
        tree.append(chain.leaf_of(link.digest))
        if link.number == index + 1:
            shown = link
    if shown is None:
        raise UserError(f"{bundle}: has no record {index}; they are numbered from 0 to {tree.size - 1}")
    if shown.problem:
        raise BundleError(f"{RECORDS}, line {index + 1}: {shown.problem}")
    return {
        "schema": "moonbase.disclosure/1", "index": index, "digest": shown.digest,
        "parts": chain.parts_of(shown.record), "previous": shown.previous,
        "record": shown.record if text else None,
        "path": [step.hex() for step in tree.path()],
    }


def check_disclosure(disclosure: dict[str, Any], sealed: dict[str, Any]) -> None:
    """Raises BundleError unless the record shown is the one at its place; `sealed`: `records` of a verified statement.

    The number of records must come from there: a path alone fits trees of several sizes.
    """
    try:
        parts, record = disclosure["parts"], disclosure["record"]
        if record is not None and parts != chain.parts_of(record):
            raise BundleError("the record is not the one whose parts are shown")
        if chain.link_digest(disclosure["previous"], parts) != disclosure["digest"]:
            raise BundleError("the parts are not those of the record's digest")
        path = [bytes.fromhex(step) for step in disclosure["path"]]
        found = chain.root_of_path(chain.leaf_of(disclosure["digest"]), disclosure["index"], sealed["count"], path)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BundleError("not a disclosure") from None
    if found is None or "sha256:" + found.hex() != sealed["root"]:
        raise BundleError("the record does not belong to this bundle")
