"""`moonbase eval`, `compare`, `diff-ft`, `seal`, `verify`, `challenge`, `commit` and `reveal`: evaluation's verbs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moonbase.cli_results import deliver
from moonbase.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
_SUITES = ("agent-harm", "capability", "contamination", "cyber-knowledge", "fresh", "over-refusal",
           "over-refusal-pairs", "paired-politics", "paired-states", "refusal", "swarm")
"""For completion; the room itself is loaded when a verb runs."""


def add_verbs(app: typer.Typer) -> None:
    """Register them."""
    app.command(name="eval", epilog=_EVAL_EXAMPLES)(evaluate)
    app.command(epilog="Examples:  moonbase compare runs/eval/base runs/eval/tuned\n\n"
                       "  moonbase compare a-bundle b-bundle c-bundle --json")(compare)
    app.command(name="diff-ft", epilog="Examples:  moonbase diff-ft runs/eval/base runs/eval/tuned\n\n"
                                       "  moonbase diff-ft base step-100 step-200 step-300")(diff_ft)
    app.command(epilog="Examples:  moonbase seal runs/eval/quickstart --new-key my.key\n\n"
                       "  moonbase seal runs/eval/quickstart --key my.key --publish")(seal)
    app.command(epilog="Examples:  moonbase key my.key")(key)
    app.command(epilog="Examples:  moonbase verify runs/eval/quickstart-bundle\n\n"
                       "  moonbase verify a-bundle --key publisher.pub --json")(verify)
    app.command(epilog="Examples:  moonbase challenge a-bundle --model path/to/weights --n 20 --key my.key "
                       "--nonce 2026-11-22-nist-beacon-3f9a2c11")(challenge)
    app.command(epilog="Examples:  moonbase commit fresh --key my.key --out commitment")(commit)
    app.command(epilog="Examples:  moonbase reveal commitment runs/eval/fresh --key my.key")(reveal)


_EVAL_EXAMPLES = (
    "Examples:  moonbase eval --list\n\n"
    "  moonbase eval fresh --model runs/quickstart\n\n"
    "  moonbase eval over-refusal --model runs/quickstart --model openai/gpt-5.2 --data my/public-sets\n\n"
    "  moonbase eval paired-politics --model replay/paired-politics:gpt-4.1 --data my/public-sets --json")


def _complete_suite(incomplete: str) -> list[str]:
    return [name for name in _SUITES if name.startswith(incomplete)]


_Suite = Annotated[str | None, typer.Argument(
    metavar="SUITE", help="Name of a suite, or a YAML file of one's own.", autocompletion=_complete_suite,
    show_default=False)]
_Models = Annotated[list[str] | None, typer.Option(
    "--model", metavar="MODEL", show_default=False,
    help="A run folder, a checkpoint folder, preset:NAME, replay/DATASET:NAME, or any name of Inspect's "
         "(openai/..., anthropic/..., vllm/...). Several: the option again.")]
_Data = Annotated[Path | None, typer.Option(
    help="Folder with your own copies of public sets; each is checked against its digest.", envvar="MOONBASE_SHARED",
    show_default="none")]
_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="What `moonbase eval` wrote, or a bundle.")]
_Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `moonbase seal` wrote.")]


_Page = Annotated[Path | None, typer.Option(help="Folder for a page of it, in English and Chinese.",
                                            show_default="none")]
_Randomness = Annotated[str | None, typer.Option(
    help="The public draw whose source the commitment names.", show_default="none")]


def evaluate(
    suite: _Suite = None,
    models: _Models = None,
    out: Annotated[Path | None, typer.Option(help="Folder; an interrupted evaluation in it goes on.",
                                             show_default="runs/eval/SUITE-TIME")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many items of each task, the same for every model.",
                                              show_default="all")] = None,
    seed: Annotated[int | None, typer.Option(help="Of fresh problems, of orders and of samples.",
                                             show_default="0, or what a commitment settles")] = None,
    data: _Data = None,
    commitment: Annotated[Path | None, typer.Option(help="Fresh problems as promised: the folder that `moonbase "
                                                         "commit` wrote.", show_default="none")] = None,
    public_randomness: _Randomness = None,
    judges: Annotated[list[str] | None, typer.Option(
        "--judge", metavar="MODEL", show_default="those of the suite",
        help="A model that labels answers beside the rules; the option again for another.")] = None,
    roles: Annotated[list[str] | None, typer.Option(
        "--role", metavar="ROLE=MODEL", show_default="none", help="A model that grades or plays a user.")] = None,
    price: Annotated[list[str] | None, typer.Option(
        metavar="MODEL=IN,OUT", show_default="no costs", help="Dollars for a million tokens in and out.")] = None,
    model_args: Annotated[list[str] | None, typer.Option(
        "--model-arg", metavar="NAME=VALUE", show_default="none",
        help="What Inspect hands to the models' provider, such as a router's pin.")] = None,
    salt_from: Annotated[Path | None, typer.Option(
        help="An evaluation of a suite that withholds texts, to be compared with this one.",
        show_default="a salt of its own")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="Of every model; with 0 a challenge can "
                                                                            "expect the same texts.",
                                                      show_default="the model's")] = None,
    max_connections: Annotated[int | None, typer.Option(min=1, help="Requests at a time.",
                                                        show_default="Inspect's")] = None,
    list_: Annotated[bool, typer.Option("--list", help="What there is, what runs offline here, and what needs what.")]
    = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models on a suite; every number gets its interval, its counts and a level of proof.

    Writes records, results, a report in English and in Chinese and Inspect's own logs. Hazardous sets are never part of
    moonbase: they are read from your own copies, and their texts stay out of records and reports.
    """
    if list_:
        deliver(as_json, lambda: _list(data), _show_list)
        return
    if suite is None:
        raise UserError("eval: name a suite; `moonbase eval --list` shows them")
    from moonbase.evals.evaluation import evaluate as run_evaluation

    if commitment is not None and seed is not None:
        raise UserError("eval: the seed of a promised evaluation follows from its commitment; leave --seed out")
    folder = out or Path("runs/eval") / f"{Path(suite).stem}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    deliver(as_json, lambda: run_evaluation(
        suite, models or [], folder, seed=seed or 0, limit=limit, data=data, commitment=commitment,
        public_randomness=public_randomness, judges=judges or [], roles=_pairs("--role", roles),
        price={name: _dollars(name, dollars) for name, dollars in _pairs("--price", price).items()},
        max_connections=max_connections, salt_from=salt_from, temperature=temperature,
        model_args={model: _values("--model-arg", model_args) for model in models or []} if model_args else None),
        _show_rows)


def _values(option: str, given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE, where a value may be JSON."""
    import json

    values: dict[str, Any] = {}
    for name, text in _pairs(option, given).items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE of an option that may be there several times."""
    for text in given or []:
        if "=" not in text:
            raise UserError(f"{option} {text}: write NAME=VALUE")
    return dict(text.split("=", 1) for text in given or [])


def _dollars(model: str, text: str) -> list[float]:
    try:
        dollars = [float(part) for part in text.split(",")]
    except ValueError:
        dollars = []
    if len(dollars) != 2 or not all(0 <= amount < float("inf") for amount in dollars):
        raise UserError(f"--price {model}={text}: write two amounts, in and out, such as 0.6,2.5")
    return dollars


def _list(data: Path | None) -> dict[str, Any]:
    from moonbase.evals.suite import list_suites

    return {"rows": [{"suite": one.suite, "task": one.task, "offline": one.offline, "metric": one.metric,
                      "needs": list(one.needs), "missing": list(one.missing), "source": one.source,
                      "about": one.about} for one in list_suites(data)]}


def _show_list(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("suite", "task", "offline here", "metric", "needs"):
        table.add_column(column, overflow="fold")
    before = None
    for row in result["rows"]:
        missing = [f"missing: {what}" for what in row["missing"]]
        table.add_row(row["suite"] if row["suite"] != before else "", row["task"], "yes" if row["offline"] else "no",
                      row["metric"], "; ".join(missing or row["needs"]))
        before = row["suite"]
    Console().print(table)


_HEADLINES = ("mean", "proportion", "rate", "difference", "paired_difference")
_MOST_ROWS = 24


def _show_rows(result: dict[str, Any]) -> None:
    """The figures over all conditions, then the verdicts; the rest is in the report."""
    from rich.console import Console
    from rich.table import Table

    rows = [row for row in result["rows"] if not row.get("condition", {}).keys() - {"task"}
            and row.get("function", "difference") in _HEADLINES and not row.get("member")]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "what", "value", "n", "left out"):
        table.add_column(column, overflow="fold")
    for row in rows[:_MOST_ROWS]:
        left_out = [f"{row[name]} {name}" for name in ("unscored", "abstained", "errors") if row.get(name)]
        what = str(row.get("id", "")).replace(f"/{row.get('model')}/", ": ")
        table.add_row(str(row.get("model", "")), what, str(row.get("text", row["value"])), str(row["n"]),
                      ", ".join(left_out))
    Console().print(table)
    if len(result["rows"]) > len(rows[:_MOST_ROWS]):
        print(f"{len(result['rows']) - len(rows[:_MOST_ROWS])} more figures: --json, and in the report")
    for verdict in result.get("verdicts", ()):
        print(verdict["text"])
    for note in result.get("notes", ()):
        print(note)
    for name in ("folder", "report"):
        if result.get(name):
            print(f"{name}: {result[name]}")


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="A B [C ...]", help="Evaluations or bundles of one suite.")],
    out: _Page = None,
    as_json: AsJson = False,
) -> None:
    """Compare models item by item: paired differences, and a verdict for each hypothesis stated beforehand.

    Evaluations are aligned by item, sample and condition; where two asked different things under one id, that is an
    error. Verdicts: better, worse, equivalent, undecided.
    """
    from moonbase.evals.evaluation import compare_folders

    deliver(as_json, lambda: compare_folders(folders, out), _show_rows)


def diff_ft(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Evaluation of the model before fine-tuning.")],
    tuned: Annotated[list[Path], typer.Argument(metavar="TUNED ...", help="Of it afterwards; several checkpoints in "
                                                                          "order make a dose curve.")],
    doses: Annotated[str | None, typer.Option(metavar="A,B,...", help="Of the checkpoints, in their order: steps, "
                                                                      "tokens, whatever was increased.",
                                              show_default="from the names, else the order")] = None,
    out: _Page = None,
    as_json: AsJson = False,
) -> None:
    """What fine-tuning changed: capability kept? refusals kept? over-refusal changed?"""
    from moonbase.evals.evaluation import fine_tuning_difference

    deliver(as_json, lambda: fine_tuning_difference(base, tuned, doses=_numbers("--doses", doses), out=out),
            _show_changes)


def _show_changes(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("question", "task", "checkpoint", "change", "answer", "because"):
        table.add_column(column, overflow="fold")
    for row in result["rows"]:
        table.add_row(row["question"], row["task"], row["dose"], row["text"], row["answer"], row["reason"])
    Console().print(table)
    print(*result["notes"], sep="\n")
    if result.get("report"):
        print(f"report: {result['report']}")


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write numbers with commas between them, such as 100,200,300") from None


def seal(
    folder: _Folder,
    key: Annotated[Path | None, typer.Option(help="Private key (Ed25519) to sign with.", show_default=False)] = None,
    new_key: Annotated[Path | None, typer.Option(help="Make a key here and sign with it.", show_default=False)] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Refuse what no stranger could check: a changed checkout, "
                                                            "texts that the suite withholds.")] = False,
    out: Annotated[Path | None, typer.Option(help="The bundle.", show_default="FOLDER-bundle")] = None,
    sigstore: Annotated[bool, typer.Option("--sigstore", help="Sign once more under your public identity: needs a "
                                                              "network, and becomes public.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn an evaluation into a signed bundle: a chain of records, a manifest, every figure with its level of proof."""
    if (key is None) == (new_key is None):
        raise UserError("seal: --key FILE signs with a key, --new-key FILE makes one; name one of them")
    from moonbase.evals.evaluation import seal_folder

    deliver(as_json, lambda: seal_folder(folder, key, new_key, publish=publish, out=out, sigstore=sigstore),
            _show_facts)


def key(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="For the private key; FILE.pub is the public one.")],
    as_json: AsJson = False,
) -> None:
    """Make a key (Ed25519) to sign promises, bundles and challenges with."""
    from moonbase.evals.evaluation import make_key

    deliver(as_json, lambda: make_key(path), _show_facts)


def _show_facts(result: dict[str, Any]) -> None:
    for name, value in result.items():
        print(f"{name}: {value}")


def verify(
    bundle: _Bundle,
    key: Annotated[str | None, typer.Option(help="The publisher's public key: ed25519:HEX or a .pub file.",
                                            show_default="the one in the bundle")] = None,
    data: _Data = None,
    salt: Annotated[Path | None, typer.Option(help="Salt of withheld digests, where the publisher gave it to you.",
                                              show_default="none")] = None,
    identity: Annotated[str | None, typer.Option(help="Whose Sigstore signature there must be.",
                                                 show_default="none")] = None,
    issuer: Annotated[str | None, typer.Option(help="Who vouches for that identity, a URL.",
                                               show_default="none")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle: signature, every record, every figure, every cell of every report. Exit code 1 if any differs."""
    from moonbase.evals.proof.copies import read_salt
    from moonbase.evals.proof.verify import Aids, failures
    from moonbase.evals.proof.verify import verify as check

    found: list[Any] = []

    def work() -> dict[str, Any]:
        found.extend(check(bundle, key, aids=Aids(data, read_salt(salt) if salt else b"", identity, issuer)))
        return {"bundle": str(bundle), "ok": not failures(found),
                "findings": [{"status": one.status, "check": one.check, "message": one.message} for one in found]}

    deliver(as_json, work, lambda _: print(*found, sep="\n"))
    if failures(found):
        print(f"{bundle}: {len(failures(found))} differences", file=sys.stderr)
        raise typer.Exit(1)


def challenge(
    bundle: _Bundle,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The weights to run the samples on.")],
    key: Annotated[Path, typer.Option(help="Your own private key; not the publisher's.")],
    nonce: Annotated[str, typer.Option(help="Public randomness from after the bundle was published: it picks the "
                                            "samples, so that nobody could have.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Samples.")] = 20,
    sealed_model: Annotated[str | None, typer.Option(help="The model's name in the bundle.",
                                                     show_default="the only one")] = None,
    data: _Data = None,
    as_json: AsJson = False,
) -> None:
    """Run random samples of a bundle again on open weights and sign what came out, for or against."""
    from moonbase.evals.evaluation import challenge_bundle

    deliver(as_json, lambda: challenge_bundle(bundle, n, model, key, nonce, sealed_model, data), _show_facts)


def commit(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A suite of fresh problems.")],
    key: Annotated[Path, typer.Option(help="Private key to sign with.")],
    out: Annotated[Path, typer.Option(help="Folder: commitment.dsse.json to publish now, opening.json to keep.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task, as the evaluation will have it.",
                                              show_default="all")] = None,
    randomness_source: Annotated[str | None, typer.Option(
        help="A public draw of the future that will be mixed in, such as a round of a beacon.",
        show_default="none")] = None,
    as_json: AsJson = False,
) -> None:
    """Promise, before any model is named, which problems will be asked: generator, configuration and a secret seed."""
    from moonbase.evals.evaluation import commit_suite

    deliver(as_json, lambda: commit_suite(suite, key, out, randomness_source, limit), _show_facts)


def reveal(
    commitment: Annotated[Path, typer.Argument(metavar="COMMITMENT", help="The folder that `moonbase commit` wrote.")],
    folder: _Folder,
    key: Annotated[Path, typer.Option(help="The key that signed the commitment.")],
    public_randomness: _Randomness = None,
    as_json: AsJson = False,
) -> None:
    """Reveal the seed of a finished evaluation and check that every item follows from it. Exit code 1 if not."""
    from moonbase.evals.evaluation import reveal_suite

    result = deliver(as_json, lambda: reveal_suite(commitment, folder, key, public_randomness), _show_facts)
    if not result["ok"]:
        raise typer.Exit(1)
