"""From a suite's name to a folder with records, figures and reports: the order in which the room's parts are called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moonbase.errors import UserError, did_you_mean
from moonbase.files import make_folder, write_bytes, write_text

RESULTS_SCHEMA = "moonbase.results/1"


def evaluate(
    suite_name: str, models: Sequence[str], folder: Path, *, seed: int | str = 0, limit: int | None = None,
    data: Path | None = None, commitment: Path | None = None, public_randomness: str | None = None,
    salt_from: Path | None = None, **settings: Any,
) -> dict[str, Any]:
    """Run a suite, or go on with an interrupted run of it in `folder`, and write everything that follows from it.

    `commitment`: the folder of one made before; its secret and the models' names make the seed, in place of `seed`.
    `salt_from`: another evaluation whose salted digests these shall be comparable with.
    """
    from moonbase.evals.run import inspect_name, run_suite
    from moonbase.evals.suite import load_suite

    suite = load_suite(suite_name)
    if not models:
        raise UserError(f"eval {suite_name}: name at least one model (--model)")
    if data is not None and not data.is_dir():
        raise UserError(f"{data}: no such folder; --data names the one with your copies of public sets")
    check_hypotheses(suite)
    models = [inspect_name(model) for model in models]
    settings["price"] = _of_models("--price", settings.get("price") or {}, models)
    if settings.get("model_args"):
        settings["model_args"] = {inspect_name(model): given for model, given in settings["model_args"].items()}
    if commitment is not None:
        from moonbase.evals.fresh.commitment import OPENING, Opening, effective_seed

        refuse_another_promise(commitment, suite, limit, public_randomness)
        seed = effective_seed(Opening.read(commitment / OPENING), models, public_randomness)
    if salt_from is not None:
        _take_salt(salt_from, folder)
    run_suite(suite, models, folder, seed=seed, limit=limit, data=data, **settings)
    return summarise(folder)


def _of_models(option: str, given: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """By the models' whole names. Raises UserError for a model that is not asked."""
    from moonbase.evals.run import inspect_name

    named = {inspect_name(name): value for name, value in given.items()}
    if other := sorted(named.keys() - set(models)):
        raise UserError(f"{option} {other[0]}: no such --model{did_you_mean(other[0], models)}; there are "
                        f"{', '.join(models)}")
    return named


def check_hypotheses(suite: Any) -> None:
    """Raises UserError, before any answer is paid for, where a hypothesis asks for a function, column, label or group
    that there is not."""
    from moonbase.evals.comparison import expectation_of
    from moonbase.evals.figure_functions import FUNCTIONS
    from moonbase.evals.records import LABELS, Record
    from moonbase.evals.table import Table

    table = Table.of([Record(suite=suite.name, task="", item="", model="", input_digest="", output_digest="")])
    for one in suite.hypotheses:
        where, figure = f"suite {suite.name}, hypothesis {one.id}", one.figure
        if figure.function not in FUNCTIONS:
            raise UserError(f"{where}: no function {figure.function!r}{did_you_mean(figure.function, FUNCTIONS)}")
        sides = [figure.select, figure.versus or {}, *(side for side in figure.params.values()
                                                       if isinstance(side, Mapping))]
        try:
            expectation_of(figure, one.kind, of_two=False)
            for side in sides[:2]:
                table.rows(side)
            if figure.value:
                table.measure({}, figure.value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        kind, _, words = figure.value.partition(":")
        for label in words.rpartition("=")[2].split("|") if kind in ("label", "vote") else ():
            if label not in LABELS:
                raise UserError(f"{where}: no label {label!r}{did_you_mean(label, LABELS)}; there are "
                                f"{', '.join(LABELS)}")
        for group in (group for side in sides for group in str(side.get("group", "")).split("|") if group):
            if suite.groups and group not in suite.groups:
                raise UserError(f"{where}: no group {group!r}{did_you_mean(group, suite.groups)}; `groups` has "
                                f"{', '.join(suite.groups)}")


def refuse_another_promise(folder: Path, suite: Any, limit: int | None, public_randomness: str | None) -> None:
    """Raises UserError where an evaluation would ask other problems than were promised in `folder`: `reveal` could only
    find that out when all answers are there."""
    from moonbase.evals.fresh import commitment
    from moonbase.evals.proof.signing import open_envelope

    path = folder / commitment.COMMITMENT
    try:
        told = open_envelope(path.read_bytes(), commitment.COMMITMENT_TYPE, None)[0]["predicate"]
        promised, source = told["configuration"], told.get("randomness_source")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the folder that `moonbase commit` wrote") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a commitment ({type(error).__name__})") from None
    if (source is None) != (public_randomness is None):
        raise UserError(f"{path}: it names no public draw; leave out --public-randomness" if source is None else
                        f"{path}: the seed takes a public draw, {source!r}; give it with --public-randomness")
    if commitment.configuration_of(suite, limit).model_dump(mode="json") != promised:
        raise UserError(f"{path}: another suite or another --limit was promised (limit {promised.get('limit')}, "
                        f"families {', '.join(promised.get('families') or ())})")


def _take_salt(source: Path, folder: Path) -> None:
    """Withheld texts of two evaluations can be compared where their digests were salted alike."""
    from moonbase.evals.collect import salt_of

    if not (source / "private" / "salt").is_file():
        raise UserError(f"{source}: no evaluation with a salt of its own (private/salt)")
    mine = folder / "private" / "salt"
    if not mine.exists():
        make_folder(folder)
        make_folder(mine.parent).chmod(0o700)
        write_bytes(mine, salt_of(source))
        mine.chmod(0o600)
    elif mine.read_bytes() != salt_of(source):
        raise UserError(f"{folder}: has a salt of its own already; choose another folder (--out)")


def summarise(folder: Path) -> dict[str, Any]:
    """Compute all figures of `folder` from its records, and write results and both reports."""
    from moonbase.evals.figures import Table, figures_of
    from moonbase.evals.proof.levels import levelled, levels_of
    from moonbase.evals.proof.seal import verdicts
    from moonbase.evals.report import write_reports
    from moonbase.evals.suite import suite_of

    suite = suite_of(folder)
    table = Table.read(folder / "records.jsonl")
    levels = levels_of(folder)
    figures, judged = levelled(figures_of(suite, table), table, levels), verdicts(suite, table, levels)
    results = {"schema": RESULTS_SCHEMA, "suite": suite.name,
               "figures": [figure.model_dump(mode="json") for figure in figures],
               "hypotheses": judged}
    write_text(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    reports = write_reports(folder)
    return {"folder": str(folder), "suite": suite.name, "rows": rows_of(figures), "report": str(reports[0]),
            "verdicts": judged}


def rows_of(figures: Sequence[Any]) -> list[dict[str, Any]]:
    """What `--json` prints: metric, value, low, high, n of every figure, and what tells them apart."""
    return [{"metric": figure.metric, "value": figure.value, "low": figure.low, "high": figure.high, "n": figure.n,
             "unscored": figure.unscored, "abstained": figure.abstained, "errors": figure.errors,
             "model": figure.model, "condition": figure.condition, "level": figure.level, "id": figure.id,
             "method": figure.method, "member": figure.spec.params.get("member", ""), "text": figure.text,
             "function": figure.spec.function} for figure in figures]


def seal_folder(folder: Path, key: Path | None, new_key: Path | None, *, publish: bool, out: Path | None,
                sigstore: bool = False) -> dict[str, Any]:
    """Seal `folder` with an existing key, or with one that is made first; with `sigstore` sign it once more under the
    caller's public identity."""
    from moonbase.evals.proof.seal import seal
    from moonbase.evals.proof.signing import generate_key, load_key, public_text

    if new_key is not None:
        generate_key(new_key)
    signing_key = key or new_key
    assert signing_key is not None
    bundle = seal(folder, signing_key, publish=publish, out=out)
    if sigstore:
        from moonbase.evals.proof.sigstore import countersign

        countersign(bundle)
    return {"bundle": str(bundle), "public key": public_text(load_key(signing_key)),
            "to check it": f"moonbase verify {bundle} --key {signing_key}.pub"}


def challenge_bundle(bundle: Path, n: int, model: str, key: Path, nonce: str, sealed_model: str | None,
                     data: Path | None) -> dict[str, Any]:
    """Run samples of a bundle again; the signed answer is written into it."""
    from moonbase.evals.proof.challenge import challenge, check_counter_statement
    from moonbase.evals.run import inspect_name

    path = challenge(bundle, n, inspect_name(model), key, nonce=nonce, sealed_model=sealed_model, data=data)
    outcome = check_counter_statement(bundle, path.read_bytes())
    return {"counter-statement": str(path), "agrees": outcome.agrees, "outcome": outcome.words}


def compare_folders(folders: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Models of several evaluations side by side; `out`: a folder for the page of it."""
    from moonbase.evals.comparison import compare
    from moonbase.evals.side_by_side import write_comparison

    found = compare(folders)
    page = {} if out is None else {"report": str(write_comparison(found, folders, out))}
    return found.as_json() | page


def fine_tuning_difference(base: Path, tuned: Sequence[Path], *, doses: Sequence[float] | None = None,
                           out: Path | None = None) -> dict[str, Any]:
    """What fine-tuning changed. `doses`: of the checkpoints, in their order; `out`: a folder for the page of it."""
    from moonbase.evals.fine_tuning import diff
    from moonbase.evals.side_by_side import write_fine_tuning

    found = diff(base, tuned, doses=doses)
    page = {} if out is None else {"report": str(write_fine_tuning(found, [base, *tuned], out))}
    return found.as_json() | page


def commit_suite(suite_name: str, key: Path, out: Path, randomness_source: str | None, limit: int | None,
                 ) -> dict[str, Any]:
    """A signed promise of problems; the secret stays in the folder, for its owner only."""
    from moonbase.evals.fresh import commitment
    from moonbase.evals.suite import load_suite

    configuration = commitment.configuration_of(load_suite(suite_name), limit)
    make_folder(out)
    opening = commitment.Opening.new()
    envelope = commitment.commit(configuration, opening, key, randomness_source=randomness_source)
    path = commitment.write(out, commitment.COMMITMENT, envelope)
    opening.write(out / commitment.OPENING)
    return {"publish now": str(path), "keep secret until the run is over": str(out / commitment.OPENING),
            "then": f"moonbase eval {suite_name} --commitment {out} --model MODEL"
                    f"{'' if limit is None else f' --limit {limit}'}"
                    f"{'' if randomness_source is None else ' --public-randomness DRAW'}"}


def reveal_suite(committed: Path, folder: Path, key: Path, public_randomness: str | None) -> dict[str, Any]:
    """Open the promise beside the finished evaluation, and check every item against it."""
    from moonbase.evals.fresh import commitment
    from moonbase.evals.suite import read_plan

    try:
        promise = (committed / commitment.COMMITMENT).read_bytes()
    except OSError as error:
        raise UserError(f"{committed / commitment.COMMITMENT}: {error.strerror}") from None
    if not (folder / commitment.REVEAL).exists():
        opening, plan = commitment.Opening.read(committed / commitment.OPENING), read_plan(folder)
        if plan.get("seed") != commitment.effective_seed(opening, plan["models"], public_randomness):
            # A reveal is written once, and tells the secret.
            raise UserError(f"{folder}: its seed does not follow from this promise, its models and the draw "
                            f"{public_randomness!r}; nothing was revealed")
        envelope = commitment.reveal(promise, opening, plan["models"], key,
                                     public_randomness=public_randomness)
        commitment.write(folder, commitment.COMMITMENT, promise)
        commitment.write(folder, commitment.REVEAL, envelope)
    found = commitment.check(folder, public_randomness=public_randomness)
    return {"folder": str(folder), "ok": not found,
            "findings": [f"{finding.where}: {finding.text}" for finding in found]}


def make_key(path: Path) -> dict[str, Any]:
    """A new key pair."""
    from moonbase.evals.proof.signing import generate_key

    return {"private key, keep it": str(path), "public key": generate_key(path), "to hand out": f"{path}.pub"}
