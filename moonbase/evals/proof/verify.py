"""Checking a bundle without trusting anyone: every digest, every record, every figure, every cell of every report.

Nothing in a bundle is executed, no link is followed, records stream by, and whatever a bundle holds, the answer is a
list of findings of one line each.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from moonbase.errors import UserError
from moonbase.evals.proof import chain, manifest, signing, tables
from moonbase.evals.proof.canonical import BundleError, clean
from moonbase.evals.proof.complete import Shortfall, absent, compared, shortfalls
from moonbase.evals.proof.copies import Copies
from moonbase.evals.proof.folder import file_digest, read_document, read_json, walk
from moonbase.evals.proof.levels import (
    NAMES,
    RE_GENERABLE,
    RE_RUNNABLE,
    REPLICATED,
    Sources,
    figure_models,
    levelled,
)
from moonbase.evals.proof.limits import refuse_gigantic
from moonbase.evals.proof.logs import check_logs
from moonbase.evals.proof.rescoring import Rescorer
from moonbase.evals.proof.seal import (
    CHALLENGES,
    PROMISES,
    RECORDS,
    REPORTS,
    RESULTS_SCHEMA,
    SCHEMA,
    SIGSTORE,
    STATEMENT,
    TABLE,
    unsealed,
    verdicts,
)
from moonbase.evals.proof.settled import Settled
from moonbase.evals.proof.survey import Survey
from moonbase.evals.records import Record
from moonbase.evals.suite import suite_of

MOST_FINDINGS = 20
"""Of one check; the rest is counted."""
MOST_CHALLENGES = 100
"""Counter-statements: each takes a pass over the records."""
MOST_FIGURES = 20_000
"""That a suite and its records may ask for."""


@dataclass(frozen=True)
class Finding:
    """One line of an answer. `ok`: checked and right; `note`: what the reader should know; `failed`: a difference."""

    status: Literal["ok", "note", "failed"]
    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.status}: {self.check}: {self.message}"


def failures(findings: list[Finding]) -> list[Finding]:
    """The differences among the findings: none, and the bundle is what it says."""
    return [finding for finding in findings if finding.status == "failed"]


@dataclass(frozen=True)
class Aids:
    """What a reader has besides the bundle, and may want it checked against."""

    data: Path | None = None
    """The folder of his own copies of public sets."""
    salt: bytes = b""
    """Of the digests of withheld texts, where the publisher gave it to him."""
    identity: str | None = None
    """Whose signature by Sigstore there must be: an address, or the URL of a workflow; with `issuer`."""
    issuer: str | None = None
    trusted_root: Path | None = None
    """Another root of trust than the one that Sigstore's library brings."""


def verify(bundle: Path, public_key: str | Path | None = None, *, rescore: bool = True,
           aids: Aids = Aids()) -> list[Finding]:
    """Everything that was checked, in order. `public_key`: ed25519:HEX or a .pub file; None takes the bundle's own.

    Raises UserError only for what is no bundle at all (no such folder, an unreadable key) or cannot be asked.
    """
    if (aids.identity is None) != (aids.issuer is None):
        raise UserError("verify: --identity (whose signature) and --issuer (who vouches for it) are given together")
    public = signing.read_public_key(public_key) if public_key is not None else None
    bundle = Path(bundle)
    if not bundle.is_dir():
        raise UserError(f"{bundle}: no such folder; a bundle is the folder that sealing wrote")
    if (bundle / "suite.json").is_file() and not any((bundle / name).exists() for name in (STATEMENT, "manifest.json")):
        raise UserError(f"{bundle}: an evaluation that is not sealed; `moonbase seal {bundle}` makes a bundle of it")
    checking = Verification(bundle, public, rescore, aids)
    checking.run()
    return checking.findings


class Verification:
    """One pass over one bundle; afterwards `findings`, `figures` (as computed here, by id) and their `levels`."""

    def __init__(self, bundle: Path, public: str | None, rescore: bool = True, aids: Aids = Aids()) -> None:
        self.bundle, self.public, self.rescore, self.aids = bundle, public, rescore, aids
        self.findings: list[Finding] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.levels: dict[str, int] = {}
        self.root = ""
        self.key: str | None = None
        self._sizes: dict[str, int] = {}
        self._statement: dict[str, Any] | None = None
        self._suite: dict[str, Any] | None = None
        self._results: dict[str, Any] = {}
        self._survey: Survey | None = None
        self._manifest: dict[str, Any] = {}
        self._shortfalls: dict[tuple[str, str], Shortfall] = {}
        self._table: Any = None
        self._computed: list[Any] = []
        self._stated = False

    def run(self) -> None:
        with self._checking("folder"):
            self._sizes = walk(self.bundle)
        if failures(self.findings):
            return  # A folder with links in it is read no further.
        for name, check in (("signature", self._check_signature), ("files", self._check_files),
                            ("records", self._check_records), ("logs", self._check_logs),
                            ("manifest", self._check_manifest), ("complete", self._check_complete),
                            ("figures", self._check_figures),
                            ("promise", self._check_promise), ("tables", self._check_tables),
                            ("challenges", self._check_challenges)):
            with self._checking(name):
                check()

    # Findings

    def ok(self, check: str, message: str) -> None:
        self.findings.append(Finding("ok", check, message))

    def note(self, check: str, message: str) -> None:
        self.findings.append(Finding("note", check, message))

    def fail(self, check: str, messages: str | list[str]) -> None:
        messages = [messages] if isinstance(messages, str) else messages
        for message in messages[:MOST_FINDINGS]:
            self.findings.append(Finding("failed", check, clean(message, 400)))
        if len(messages) > MOST_FINDINGS:
            self.findings.append(Finding("failed", check, f"and {len(messages) - MOST_FINDINGS} more"))

    @contextmanager
    def _checking(self, check: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.fail(check, str(error).replace(f"{self.bundle}/", ""))
        except ValidationError as error:
            first = error.errors()[0]
            self.fail(check, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        except Exception as error:
            # Whatever a stranger's file makes stumble is a finding about the file, not a crash of the reader.
            self.fail(check, f"could not be checked ({type(error).__name__}: {error})")

    # Checks, in order

    def _check_signature(self) -> None:
        if STATEMENT not in self._sizes:
            self.fail("signature", f"{STATEMENT} is missing: the bundle is not signed")
            return
        data = read_document(self.bundle, STATEMENT)
        try:
            self._statement, self.key = signing.open_envelope(data, signing.BUNDLE_PREDICATE, self.public)
        except BundleError as error:
            self.fail("signature", f"{STATEMENT}: {error}")
            return
        if self._statement["predicate"].get("schema") != SCHEMA:
            self.fail("signature", f"{STATEMENT}: not a statement of {SCHEMA}")
        self.ok("signature", f"by {self.key}")
        self._check_sigstore(data)
        if self.public is None:
            self.note("signature", "no key was given to compare with: anyone can sign with a key of their own")

    def _check_sigstore(self, statement: bytes) -> None:
        """The second signature, where there is one and the reader says whose it should be."""
        from moonbase.evals.proof import sigstore

        if SIGSTORE not in self._sizes:
            if self.aids.identity is not None:
                self.fail("signature", f"{SIGSTORE} is missing: nobody's identity is shown")
            return
        data = read_document(self.bundle, SIGSTORE)
        if self.aids.identity is None or self.aids.issuer is None:
            named = sigstore.identities(data)
            self.note("signature", f"{SIGSTORE} names {named or 'nobody'}, which is not checked unless you say whom "
                                   "you expect (--identity, --issuer)")
            return
        try:
            told = sigstore.check(data, statement, self.aids.identity, self.aids.issuer, self.aids.trusted_root)
            self.ok("signature", f"by {told}")
        except UserError as error:
            self.fail("signature", f"{SIGSTORE}: {error}")

    def _check_files(self) -> None:
        for name in ("suite.json", "manifest.json", "results.json", RECORDS, TABLE, *REPORTS):
            if name not in self._sizes:
                self.fail("files", f"{name} is missing")
        if self._statement is None:
            return
        problems = []
        subjects = {subject["name"]: subject for subject in self._statement["subject"]}
        for name, size in self._sizes.items():
            if name not in subjects and not unsealed(name):
                problems.append(f"{name} is not covered by the signature: it was added after sealing")
            elif name in subjects:
                stated = (subjects[name].get("annotations") or {}).get("size")
                if stated != size:
                    problems.append(f"{name} has {size} bytes, {stated} were signed")
                elif file_digest(self.bundle, name) != subjects[name]["digest"]["sha256"]:
                    problems.append(f"{name} was changed after sealing")
        problems += [f"{clean(name)} was signed and is missing" for name in subjects if name not in self._sizes]
        self.fail("files", problems)
        if not problems:
            self.ok("files", f"{len(subjects)} files are as signed")

    def _check_records(self) -> None:
        self._suite = read_json(self.bundle, "suite.json")
        sources = Sources(self._suite)
        survey, tree, rescorer = Survey(sources), chain.MerkleTree(), Rescorer(sources)
        suite = suite_of(self.bundle)
        settled = Settled(suite, self._suite)
        copies = Copies(suite, self._suite, self.aids.data, self.aids.salt, rescorer)
        head, problems = chain.genesis(self._suite), [f"suite.json: {line}" for line in settled.unknown_sources()]
        for link in chain.read_links(self.bundle, RECORDS, head):
            head = link.digest
            found = [link.problem] if link.problem else []
            tree.append(chain.leaf_of(head))
            try:
                record = Record.model_validate(link.record)
            except ValidationError as error:
                first = error.errors()[0]
                found.append(f"not a record: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            else:
                survey.add(record)
                before = rescorer.rescored
                if self.rescore:
                    found += rescorer.check(record)
                found += copies.check(record)  # scores what is withheld, where the reader has it
                found += sources.outside(record) + settled.check(record, again=rescorer.rescored > before)
            if len(problems) <= MOST_FINDINGS * 5:
                problems += [f"{RECORDS}, line {link.number}: {problem}" for problem in found]
        self.root, self._survey = "sha256:" + tree.root().hex(), survey
        if repeated := survey.repeated():
            problems.append(f"{repeated} records repeat the item, sample, model and condition of another")
        problems += self._differs_from_statement(survey.count, head)
        self.fail("records", problems)
        if not problems:
            self.ok("records", f"{survey.count} in an unbroken chain; scored again: {rescorer.rescored}, "
                               f"items made again from the seed: {rescorer.regenerated}")
        for line in settled.taken_on_word(self.rescore):
            self.note("records", line)
        for task in sorted(copies.tasks & survey.tasks):
            status, message = copies.said(task)
            (self.ok if status == "ok" else self.note)("items", message)
        self._stated = any(sources.by_digest(task) and not copies.compared[task] and not copies.salted[task]
                           for task in copies.tasks & survey.tasks)
        for line in survey.uneven():
            self.note("records", f"not every model has the same number of samples in {clean(line, 300)}")
        self._shortfalls = {(one.task, one.model): one
                            for one in shortfalls(suite, self._suite, survey.counts(), copies.asked)}

    def _differs_from_statement(self, count: int, head: str) -> list[str]:
        if self._statement is None:
            return []
        found = {"count": count, "head": head, "root": self.root}
        stated = self._statement["predicate"].get("records")
        return manifest.differences(stated, found, "the signed statement's records")

    def _check_logs(self) -> None:
        if not any(name.startswith("logs/") and name.endswith(".eval") for name in self._sizes):
            self.note("logs", "none in the bundle: the records are the publisher's reading of them")
            return
        if not self.rescore or self._suite is None:
            return
        try:
            suite = suite_of(self.bundle)
            from moonbase.evals.collect import asked_in

            same, problems = check_logs(self.bundle, suite, self._suite, RECORDS)
        except ImportError:
            self.note("logs", 'not compared with the records: that needs Inspect (pip install "moonbase[evals]")')
            return
        if self._survey is not None:
            logged = asked_in(self.bundle / "logs", (), suite)
            for one in shortfalls(suite, self._suite, self._survey.counts(), lambda *key: logged.get(key)):
                self._shortfalls.setdefault((one.task, one.model), one)
        self.fail("logs", problems)
        if not problems:
            self.ok("logs", f"{same} records follow from Inspect's logs")

    def _check_manifest(self) -> None:
        stated = read_json(self.bundle, "manifest.json")
        if stated.get("schema") != manifest.SCHEMA:
            raise BundleError(f"manifest.json: `schema` is not {manifest.SCHEMA!r}")
        if self._survey is None or self._suite is None:
            raise BundleError("manifest.json: cannot be checked without readable records")
        self._manifest = stated
        derived = manifest.derived(self._suite, self._survey)
        problems = manifest.differences({name: stated[name] for name in derived if name in stated}, derived)
        if stated.get("publish") and (stated.get("dirty") or not stated.get("commit")):
            problems.append("says that it was published, but from code that is no commit")
        self.fail("manifest", [f"manifest.json: {problem}" for problem in problems])
        if not problems:
            self.ok("manifest", "items, models, decoding and hypotheses follow from the records and the suite")
        for kind, digest in manifest.code_digests().items():
            if (stated.get("code") or {}).get(kind) != digest:
                self.note("manifest", f"the code of {kind} here is not that of commit {clean(stated.get('commit'))}")
        if not stated.get("commit"):
            self.note("manifest", "not made from a commit: nobody can fetch the code that made it")
        elif stated.get("dirty"):
            self.note("manifest", f"made from a checkout of commit {clean(stated['commit'], 60)} with changes that are "
                                  "in no commit: nobody can fetch the code that made it")

    def _check_complete(self) -> None:
        if self._survey is not None:
            told, wrong = compared(self._manifest.get("missing", {}), self._shortfalls, self._survey.counts())
            self.fail("complete", wrong)
            counts = self._survey.counts()
            told += absent(suite_of(self.bundle), self._suite or {}, counts, self._shortfalls)
            for line in told:
                self.note("complete", line)

    def _check_figures(self) -> None:
        from moonbase.evals.figure_plan import specs_of
        from moonbase.evals.figures import Table, figures_of

        if self._survey is None or self._suite is None:
            raise BundleError("cannot be computed without readable records")
        refuse_gigantic(self._suite)
        suite, models = suite_of(self.bundle), self._survey.models
        if max(10 * self._survey.cells, len(suite.hypotheses) * max(1, models * (models - 1) // 2)) > MOST_FIGURES:
            raise BundleError(f"would take more than {MOST_FIGURES} figures: too many tasks, models or hypotheses")
        self._table = Table.read(self.bundle / RECORDS)
        if len(specs_of(suite, self._table)) > MOST_FIGURES:
            raise BundleError(f"would take more than {MOST_FIGURES} figures: too many conditions")
        self._computed = levelled(figures_of(suite, self._table), self._table, self._survey.levels)
        self.figures = {figure.id: figure.model_dump(mode="json") for figure in self._computed}
        self.levels = {figure.id: figure.level for figure in self._computed}
        self._results = read_json(self.bundle, "results.json")
        stated = self._results.get("figures")
        if not isinstance(stated, list) or not all(isinstance(figure, dict) for figure in stated):
            raise BundleError("results.json: `figures` is not a list of figures")
        problems, seen = [], set()
        for figure in stated:
            name = figure.get("id")
            if not isinstance(name, str) or name not in self.figures:
                problems.append(f"figure {clean(name)!r} does not follow from the suite and the records")
            elif name in seen:
                problems.append(f"figure {clean(name)} is there twice")
            else:
                problems += [f"figure {clean(name)}: {line}" for line in _figure_differs(figure, self.figures[name])]
                seen.add(name)
        problems += [f"figure {clean(name)} was left out" for name in self.figures if name not in seen]
        problems += self._hypotheses_differ()
        rest = {name: value for name, value in self._results.items() if name not in ("figures", "hypotheses")}
        own = {"suite": manifest.suite_part(self._suite, "name")} if "suite" in rest else {}
        problems += manifest.differences(rest, {"schema": RESULTS_SCHEMA, **own})
        self.fail("figures", [f"results.json: {problem}" for problem in problems])
        if not problems:
            counts = [f"{list(self.levels.values()).count(level)} {name} (L{level})"
                      for level, name in enumerate(NAMES) if level in self.levels.values()]
            stated = ", as far as sets are what the suite's digests say" if self._stated and max(
                self.levels.values(), default=0) >= RE_GENERABLE else ""
            self.ok("figures", f"{len(self.figures)} computed again and equal: {', '.join(counts)}{stated}")

    def _hypotheses_differ(self) -> list[str]:
        """Every verdict decided again."""
        assert self._survey is not None
        found = verdicts(suite_of(self.bundle), self._table, self._survey.levels)
        stated = self._results.get("hypotheses")
        if not isinstance(stated, list) or len(stated) != len(found):
            return [f"`hypotheses` has not the {len(found)} verdicts that follow from the suite and the records"]
        return [f"hypothesis {clean(ours['id'])}: {line}" for theirs, ours in zip(stated, found, strict=True)
                for line in _figure_differs(theirs, ours)]

    def _check_promise(self) -> None:
        """Fresh problems that were promised: every item follows from what was signed before the models were named."""
        there = [name for name in PROMISES if name in self._sizes]
        if not there:
            return
        from moonbase.evals.fresh.commitment import check

        found = check(self.bundle) if len(there) == len(PROMISES) else []
        self.fail("promise", [f"{clean(one.where)}: {clean(one.text)}" for one in found])
        if len(there) < len(PROMISES):
            self.note("promise", f"{there[0]} is there alone: what was promised was not revealed")
        elif not found:
            self.ok("promise", "every item follows from the commitment, its secret and the models' names")

    def _check_tables(self) -> None:
        if not self._computed:
            raise BundleError("cannot be compared: no figures could be computed")
        # As the suite is read: a field that it leaves out has its default.
        asked = suite_of(self.bundle).hypotheses if self._suite else ()
        hypotheses = [*(self._results.get("hypotheses") or []),
                      *(one.model_dump(mode="json") for one in asked)]
        known = tables.Known(self.figures, hypotheses)
        for name, language in ((TABLE, None), *REPORTS.items()):
            if name not in self._sizes:
                continue
            data = read_document(self.bundle, name)
            cells, problems = tables.check_page(data, known, language) if language else tables.check_csv(data, known)
            self.fail("tables", [f"{name}: {problem}" for problem in problems])
            if not problems and not cells:
                self.note("tables", f"{name} shows no figure")
            elif not problems:
                self.ok("tables", f"{name}: {cells} cells are the figures they name")
        self._write_again()

    def _write_again(self) -> None:
        """The reports written anew from the figures computed here: what stands between the cells is compared too."""
        from moonbase.evals.report import write_report

        names = [name for name in (TABLE, *REPORTS) if name in self._sizes]
        with tempfile.TemporaryDirectory(prefix="moonbase-verify-") as place:
            folder = Path(place)
            for name in ("suite.json", "manifest.json"):
                (folder / name).write_bytes(read_document(self.bundle, name))
            results = self._results | {"figures": list(self.figures.values())}
            (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
            for language in ("en", "zh"):
                write_report(folder, language)
            differ = [name for name in names if (folder / name).read_bytes() != read_document(self.bundle, name)]
        if not differ:
            self.ok("tables", "the reports written again are the same to the byte")
        elif manifest.same_writer(read_json(self.bundle, "manifest.json")):
            self.fail("tables", [f"{name}: written again it differs outside of the figures" for name in differ])
        else:
            self.note("tables", f"{', '.join(differ)}: written again they differ outside of the figures; another "
                                "version of the code wrote them, so their prose was not checked")

    def _check_challenges(self) -> None:
        from moonbase.evals.proof.challenge import check_counter_statement

        replicated, contested = set(), set()
        names = [name for name in self._sizes if unsealed(name) and name.startswith(CHALLENGES)]
        if len(names) > MOST_CHALLENGES:
            self.note("challenges", f"{len(names)} counter-statements; only {MOST_CHALLENGES} are looked at")
        for name in names[:MOST_CHALLENGES]:
            try:
                outcome = check_counter_statement(self.bundle, read_document(self.bundle, name))
            except BundleError as error:
                # It is somebody else's word: a false one says nothing about the bundle.
                self.note("challenges", f"{name} does not count: {error}")
                continue
            if outcome.key == self.key:
                self.note("challenges", f"{name} does not count: signed by the publisher's own key")
            elif failures(self.findings):
                self.note("challenges", f"{name} does not count: the bundle itself is not in order")
            elif outcome.agrees:
                replicated.add(outcome.model)
                self.ok("challenges", f"{name}: {outcome.words}; signed by {outcome.key}")
            else:
                if outcome.enough and not outcome.other_weights:
                    contested.add(outcome.model)
                self.note("challenges", f"{name}: {outcome.words}: DISAGREES with the bundle; signed by {outcome.key}")
        for model in sorted(replicated & contested):
            self.note("challenges", f"{clean(model)}: one counter-statement agrees and another does not, so no level "
                                    "is raised: run it again")
        self._raise_levels(replicated - contested)

    def _raise_levels(self, replicated: set[str]) -> None:
        if not replicated:
            return
        raised = [figure.id for figure in self._computed
                  if figure.level == RE_RUNNABLE
                  and figure_models(figure, self._table) <= replicated]
        self.levels |= dict.fromkeys(raised, REPLICATED)
        self.ok("challenges", f"{len(raised)} figures are {NAMES[REPLICATED]} (L{REPLICATED})")


def _figure_differs(stated: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Field by field; numbers to eight digits, for libraries of other versions sum in another order."""
    return manifest.differences(stated, found, tolerance=1e-8)
