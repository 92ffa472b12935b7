"""The speedrun on made-up losses, the log that several processes share, and real runs of a tiny network."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from moonbase import bench
from moonbase.bench import card, speedrun
from moonbase.bench import speedrun_plan as planning
from moonbase.bench.speedrun_log import RunLog, losses_of
from moonbase.bench.speedrun_plan import BASELINE, CHALLENGER, Plan, Reached, Run
from moonbase.bench.speedrun_result import findings, line_of
from moonbase.data import PackedStream, prepare_corpus
from moonbase.errors import UserError
from moonbase.train.assembly import make_trainer
from tests.bench.tiny import TRAINING, drawn_texts, preset_file
from tests.train.tiny import ONE

PLAN = Plan(400, (0.001, 0.002, 0.004), (0, 1, 2))
Law = Callable[[Run], float]


def law(best: dict[str, float], factor: float, noise: float = 0.0) -> Law:
    """8 - log(steps), the challenger's steps worth `factor`, and a parabola over the logarithm of the rate."""
    def loss(run: Run) -> float:
        worth = run.steps * (factor if run.optimizer == CHALLENGER else 1.0)
        draw = random.Random(repr(run)).gauss(0, noise) if noise else 0.0
        return 8 - math.log(worth) + 0.1 * math.log2(run.rate / best[run.optimizer]) ** 2 + 0.01 * run.seed + draw

    return loss


def play(plan: Plan, loss: Law, one_at_a_time: bool = False) -> dict[Run, float]:
    known: dict[Run, float] = {}
    while missing := planning.needed(plan, known):
        assert not set(missing) & known.keys() and len(set(missing)) == len(missing)
        known |= {run: loss(run) for run in (missing[:1] if one_at_a_time else missing)}
    return known


def record(run: Run, loss: float | None, **more: Any) -> dict[str, Any]:
    return {**run._asdict(), "loss": loss, "recipe": "r", "corpus": "c", "tokens_per_step": 1000,
            "step_seconds": 0.5 if run.optimizer == BASELINE else 0.6, "seconds": 10.0, "skipped_steps": 0,
            "clipped_heads": 0, "corpus_tokens": 10**6, "losses": [9.0] * run.steps, "machine": "a machine",
            "commit": "0123456789", "versions": {"python": "3"}, **more}


def test_the_plan_finds_a_known_factor() -> None:
    loss = law({BASELINE: 0.002, CHALLENGER: 0.004}, 1.6)
    known = play(PLAN, loss)
    assert known == play(PLAN, loss, one_at_a_time=True), "who comes when changes nothing"
    assert len(planning.imagined(PLAN)) == len(known) + 3, "its guess lets both grids go on once, and refines them"
    assert planning.tuned_rates(PLAN, known) == {BASELINE: 0.002, CHALLENGER: 0.004}
    assert {run.rate for run in known if run.optimizer == CHALLENGER} == {0.001, 0.002, 0.004, 0.008}, "extended once"
    assert {(run.steps, run.seed) for run in known if run.rate == 0.002 and run.optimizer == BASELINE} == {
        (400, 0), (400, 1), (400, 2)}
    targets = planning.targets(PLAN, known)
    assert targets == {seed: pytest.approx(8 - math.log(400) + 0.01 * seed) for seed in (0, 1, 2)}
    for seed, target in targets.items():
        found = planning.points(PLAN, known, seed)
        assert set(found) == {200, 283}, "where it was tuned, and the next length, which reaches the target"
        assert planning.reached(found, target) == Reached(pytest.approx(400 / 1.6), "="), "the law is a line"


@pytest.mark.parametrize(("factor", "lengths", "relation"), [
    (2.5, {200, 141}, "="), (9.0, {200, 141, 100}, "<"), (0.9, {200, 283, 400, 566}, "="),
    (0.5, {200, 283, 400, 566}, ">")])
def test_lengths_go_on_until_the_target_lies_between(factor: float, lengths: set[int], relation: str) -> None:
    known = play(PLAN, law({BASELINE: 0.002, CHALLENGER: 0.002}, factor))
    for seed, target in planning.targets(PLAN, known).items():
        assert set(planning.points(PLAN, known, seed)) == lengths
        amount, seen = planning.reached(planning.points(PLAN, known, seed), target)
        assert seen == relation
        assert amount == (pytest.approx(400 / factor) if seen == "=" else min(lengths) if seen == "<" else max(lengths))


def test_reached_between_hand_made_points() -> None:
    assert planning.reached({100: 4.0, 400: 2.0}, 3.0) == Reached(pytest.approx(200), "="), "half of the logarithm"
    noisy = {100: 4.0, 200: 2.9, 400: 3.1, 800: 2.5}
    assert planning.reached(noisy, 3.0) == Reached(pytest.approx(400 * 2 ** (1 / 6)), "="), "the last crossing"
    assert planning.reached(noisy, 4.0) == Reached(100, "<") and planning.reached(noisy, 2.0) == Reached(800, ">")
    assert planning.reached({100: math.inf, 200: 2.0}, 3.0) == Reached(200, "<")


def test_a_grid_ends_where_its_best_rate_lies_inside() -> None:
    def grid(best: float) -> dict[float, float]:
        known = play(Plan(100, (1.0, 2.0, 4.0), (0,)), law({BASELINE: best, CHALLENGER: 2.0}, 1.5))
        return planning.rate_grid(Plan(100, (1.0, 2.0, 4.0), (0,)), BASELINE, known)[0]

    assert sorted(grid(2.0)) == [1, 2, 4] and sorted(grid(0.25)) == [0.125, 0.25, 0.5, 1, 2, 4]
    endless = grid(1e9)
    assert max(endless) == 128 and len(endless) == 8 and planning.at_the_edge(endless)
    assert sorted(grid(2 * 2**0.1)) == [1, 2, 4], "a thousandth of a nat is not worth a run"
    between = grid(2 * 2**0.25)
    assert sorted(between) == [1, 2, 2.83, 4], "the middle of the best two on a logarithmic scale"
    del between[2.83]
    assert planning.left_by_the_grid(between) == pytest.approx(0.1 * 0.25**2), "the parabola is one"
    uneven = grid(2 * 2**0.4)
    assert planning.best_rate(uneven) == 2.83
    assert planning.left_by_the_grid(uneven) == pytest.approx(0.1 * (math.log2(2.83 / 2) - 0.4) ** 2)
    assert planning.left_by_the_grid(endless) is None
    gave_up = {1.0: 3.0, 2.0: 2.0, 4.0: math.inf}
    assert planning.best_rate(gave_up) == 2.0 and planning.left_by_the_grid(gave_up) is None


def test_the_table_and_the_card(tmp_path: Path) -> None:
    known = play(PLAN, law({BASELINE: 0.002, CHALLENGER: 0.002}, 1.6, noise=0.01))
    records = [record(run, loss) for run, loss in known.items()]
    found = findings(PLAN, records, "pico", 1000)
    assert json.dumps(found, allow_nan=False) and found["complete"] and "not finished" not in found["verdict"]
    rows = {row["unit"]: row for row in found["rows"] if row["unit"] != "nats per token"}
    targets = planning.targets(PLAN, known)
    steps = [planning.reached(planning.points(PLAN, known, seed), sum(targets.values()) / 3).amount
             for seed in (0, 1, 2)]
    tokens, seconds = rows["M tokens"], rows["s"]
    assert tokens["values"] == pytest.approx([each * 1e-3 for each in steps]) and tokens["peer"] == pytest.approx(0.4)
    assert seconds["values"] == pytest.approx([each * 0.6 for each in steps]) and seconds["peer"] == pytest.approx(200)
    factors = [row for row in found["rows"] if row["unit"] == "x"]
    logs = [math.log(400 / planning.reached(planning.points(PLAN, known, seed), targets[seed]).amount)
            for seed in (0, 1, 2)]
    low, high = stats.t.interval(0.95, 2, loc=sum(logs) / 3, scale=stats.sem(logs))
    assert [factors[0][key] for key in ("ours", "low", "high")] == pytest.approx(
        [math.exp(each) for each in (sum(logs) / 3, low, high)])
    assert factors[1]["ours"] == pytest.approx(factors[0]["ours"] * 0.5 / 0.6), "a step takes longer"
    assert f"{factors[0]['ours']:.2f} times [{factors[0]['low']:.2f}, " in found["verdict"]
    assert all(line_of(row) for row in found["rows"]) and found["machine"] == "a machine"
    written = card.write({"name": "speedrun pico", "command": "x", **found}, tmp_path / "speedrun.md")
    assert all(path.stat().st_size for path in written)
    # Half way there is a table, too, and a picture; and nothing is claimed where the target was never reached.
    for count in (0, 1, 4, len(records) - 1):
        assert findings(PLAN, records[:count], "pico", 1000)["verdict"].startswith("not finished")
    known = play(PLAN, law({BASELINE: 0.002, CHALLENGER: 0.002}, 0.5))
    found = findings(PLAN, [record(run, loss) for run, loss in known.items()], "pico", 1000)
    assert "not reached by the longest run for 3 seeds" in found["verdict"] and "cannot be held" in found["verdict"]


HOLDER = """
import sys, time
from pathlib import Path
from moonbase.bench.speedrun_log import RunLog
with RunLog(Path(sys.argv[1])).claim("run") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_log_of_several_processes(tmp_path: Path) -> None:
    log, other = RunLog(tmp_path / "log"), RunLog(tmp_path / "log")
    first, second = (record(Run(BASELINE, 0.1, 4, seed), 2.0 + seed, losses=[]) for seed in (0, 1))
    assert log.records() == []
    log.append(first)
    with open(log.path, "ab") as file:
        file.write(json.dumps(second).encode()[:50])  # died in the middle of a line
    other.append(second)
    other.append({**second, "loss": None, "corpus": "another"})
    assert log.records()[:2] == [first, second] and losses_of(log.records())[Run(BASELINE, 0.1, 4, 1)] == math.inf
    assert log.of(lambda run: "r", "c") == [first, second] and log.of(lambda run: "changed", "c") == []
    assert log.corpora() == ["another", "c"]
    with log.claim("run") as mine, other.claim("run") as theirs, other.claim("other") as free:
        assert (mine, theirs, free) == (True, False, True)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(log.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        with log.claim("run") as mine:
            assert not mine
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with log.claim("run") as mine:
        assert mine, "the dead hold nothing"


# --- a tiny network ---------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of `measure`; the schedule of the bench warms up for as long as these runs last."""
    return {"preset": preset_file(tmp_path, {}, optimizer={"lr": 0.1}, **TRAINING), "out": tmp_path / "out", "steps": 2,
            "seeds": (3,), "overrides": ("schedule.warmup_steps=1",), "kind": "cpu", "data": drawn_texts(tmp_path)}


def test_runs_are_made_once_and_go_on(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Run] = []
    train = speedrun.Runner._train

    def counted(self: speedrun.Runner, run: Run) -> dict[str, Any] | None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(run)
        return train(self, run)

    monkeypatch.setattr(speedrun.Runner, "_train", counted)
    with pytest.raises(KeyboardInterrupt):
        speedrun.measure(**settings)
    path = settings["out"] / "runs.jsonl"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    monkeypatch.setattr(speedrun.Runner, "_train", lambda self, run: made.append(run) or train(self, run))
    found = speedrun.measure(**settings)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert found["complete"] and len(made) == len(set(made)) == len(records), "none is made twice"
    assert all(len(each["losses"]) == each["steps"] and each["step_seconds"] > 0 for each in records)
    assert json.dumps(found, allow_nan=False) and found["rows"][-1]["unit"] == "nats per token"
    # All there: nothing is trained, and the corpus is not asked for, on another kind of device either.
    monkeypatch.setattr(speedrun, "_open_corpus", lambda *arguments: pytest.fail("needs no corpus"))
    monkeypatch.setattr(speedrun, "FIELDS", {"cpu": (), "cuda": ()})
    assert speedrun.measure(**settings)["rows"] == found["rows"]
    assert speedrun.measure(**settings | {"kind": "cuda"})["rows"] == found["rows"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_filled_anew_is_a_fresh_one(precision: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever ran before, a run is what `make_trainer` makes of its recipe; with masters of their own, too."""
    overrides = (*settings["overrides"], f"precision={precision}")
    run = speedrun.Speedrun(settings["preset"], 3, overrides=overrides, kind="cpu")
    corpus = prepare_corpus(settings["data"], None, 512, tmp_path / "corpus")
    with speedrun.Console(quiet=True) as console:
        runner = speedrun.Runner(run, RunLog(tmp_path / "log"), corpus, math.inf, console)
        first, second = Run(BASELINE, 0.05, 4, 1), Run(CHALLENGER, 0.02, 3, 5)
        runner._train(first)
        reused = runner._train(second)
    recipe = run.recipe(second)
    assert (recipe.steps, recipe.seed, recipe.optimizer.lr, recipe.optimizer.name) == (3, 5, 0.02, "muonclip")
    fresh = make_trainer(recipe, ONE, PackedStream(corpus, "train", 32, 4, 5))
    assert reused["losses"] == [round(fresh.train_step()["loss"], 4) for _ in range(3)]
    for name, value in fresh.weights().items():
        assert torch.equal(value, runner.trainer.weights()[name]), name


def test_no_run_begins_that_would_not_end(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedrun, "SETUP_SECONDS", {"cpu": 3600})
    started = time.monotonic()
    found = speedrun.measure(**settings, minutes=30)
    assert not found["complete"] and found["rows"] == [] and time.monotonic() - started < 20
    assert not (settings["out"] / "runs.jsonl").exists()


def test_a_run_that_somebody_makes_is_left_to_them(settings: dict[str, Any], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    run = speedrun.Speedrun(settings["preset"], 3, kind="cpu")
    corpus, log = prepare_corpus(settings["data"], None, 512, tmp_path / "corpus"), RunLog(tmp_path / "log")
    monkeypatch.setattr(speedrun.Runner, "_train", lambda self, run: record(
        run, 1.0, recipe=self.speedrun.digest(run), corpus=self.digest))
    with speedrun.Console(quiet=True) as console:
        runner = speedrun.Runner(run, log, corpus, math.inf, console)
        missing = planning.needed(run.plan, {})[:2]
        names = [f"{runner.digest}-{run.digest(each)}" for each in missing]
        other = RunLog(log.folder)
        with other.claim(names[0]):
            assert runner._make_one(missing) == (True, True) and list(losses_of(runner.records())) == missing[1:]
            with other.claim(names[1]):
                assert runner._make_one(missing) == (False, True), "to be waited for"
            runner.deadline = 0.0
            assert runner._make_one(missing[1:]) == (True, False), "is there already"
        assert runner._make_one(missing[:1]) == (False, False), "no time"
        runner.deadline = math.inf
        monkeypatch.setattr(speedrun, "_POLL_SECONDS", 0.0)
        assert not planning.needed(run.plan, losses_of(runner.go_on()))


def test_what_determines_a_run_names_it(settings: dict[str, Any]) -> None:
    def digest(**changed: Any) -> str:
        chosen = {"preset": settings["preset"], "steps": 3, "overrides": ("schedule.warmup_steps=1",), "kind": "cpu"}
        return speedrun.Speedrun(**chosen | changed).digest(Run(CHALLENGER, 0.02, 3, 5))

    same = [digest(), digest(steps=4), digest(rates=(1.0, 2.0, 4.0)), digest(overrides=(
        "schedule.warmup_steps=1", "name=other", "validation_batches=2"))]
    other = [digest(kind="cuda"), digest(overrides=()), digest(overrides=("schedule.warmup_steps=1", "batch_size=8"))]
    assert len(set(same)) == 1 and len({*same, *other}) == 4


def test_only_a_speedrun_takes_several_calls(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bench int4 takes no minutes and no out"):
        bench.run("int4", minutes=1.0, out=tmp_path)
    for minutes in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="bench speedrun: minutes are more than 0, not"):
            bench.run("speedrun", minutes=minutes, out=tmp_path)
