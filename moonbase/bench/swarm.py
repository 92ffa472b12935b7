"""A swarm beside single agents on wide tasks, scripted and in simulated time: the same figures on every machine.

Every method does the same tasks of a WideWorld, tables of R rows. `ours` and `peer` are simulated seconds of the swarm
and of another method; `ratio` says how many times faster the swarm is. A row also has the other method's score,
critical steps, tokens and dollars. docs/swarm.md describes the methods and the model of latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from moonbase.agents.baselines.methods import METHODS, Method, Outcome
from moonbase.agents.worlds.wideworld import make_tasks, make_world
from moonbase.agents.worlds.world import Task, World
from moonbase.bench.rows import note, plain_row
from moonbase.report.words import compact, plural

WORLD_SEED, WORLD_PAGES, TASK_SEED = 1, 5000, 0
TASKS = {1: 4, 2: 4, 4: 4, 16: 4, 64: 3, 256: 1}
"""Rows of the table -> tasks."""
COLUMNS = 3
PUBLISHED = "3-4.5x faster at equal score (Kimi K2.5, Agent Swarm, WideSearch)"
SAME_SCORE = 1e-9
METHOD = ("Tables of R rows, made by scripted agents in simulated time: the swarm beside the method that is named. "
          f"docs/swarm.md describes both. Published: {PUBLISHED}.")


def measure(
    preset: str = "", peer: str | None = None, tasks: dict[int, int] | None = None,
    methods: Sequence[Method] = METHODS,
) -> list[dict[str, Any]]:
    """A row for every number of rows and method. `preset` and `peer` are those of other benches and mean nothing."""
    world = make_world(seed=WORLD_SEED, pages=WORLD_PAGES, grammar="test")
    rows = []
    for num_rows, count in (tasks or TASKS).items():
        made = make_tasks(world, "wide", count, TASK_SEED, rows=num_rows, columns=COLUMNS)
        note(f"R = {num_rows}: {plural(count, 'task')}, {len(methods)} methods")
        rows += compare(num_rows, world, made, methods)
    return rows


def compare(num_rows: int, world: World, tasks: Sequence[Task], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The rows of one size; `baseline` marks the fastest single agent of one call a turn whose score is not below the
    swarm's."""
    outcomes = {method.name: [method.run(world, task) for task in tasks] for method in methods}
    swarm = _means(outcomes["swarm"])
    rows = []
    for method in methods:
        means = _means(outcomes[method.name])
        rows.append(plain_row(
            f"R = {num_rows}", "simulated s", swarm["seconds"], means["seconds"], method.name, less_is_better=True,
            baseline=False, published=PUBLISHED, swarm_item_f1=swarm["item_f1"],
            **{name: means[name] for name in ("item_f1", "critical_steps", "tokens", "dollars")}))
    alone = {method.name for method in methods if method.alone}
    equal = [row for row in rows if row["peer_name"] in alone and row["item_f1"] >= swarm["item_f1"] - SAME_SCORE]
    if equal:
        min(equal, key=lambda row: row["peer"])["baseline"] = True
    return rows


def _means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {name: fmean(getattr(outcome, name) for outcome in outcomes)
            for name in ("item_f1", "critical_steps", "seconds", "tokens", "dollars")}


def show(result: dict[str, Any]) -> None:
    """One table: a section for each number of rows, a line for each method."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Wide tasks, tables of R rows; scripted agents, simulated time", title_justify="left", box=None,
                  pad_edge=False)
    for heading, justify in (("R", "right"), ("method", "left"), ("item-F1", "right"), ("steps", "right"),
                             ("seconds", "right"), ("tokens", "right"), ("dollars", "right"), ("speed-up", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    shape = None
    for row in result["rows"]:
        if row["shape"] != shape and shape is not None:
            table.add_row()
        table.add_row(
            "" if row["shape"] == shape else row["shape"].removeprefix("R = "), row["peer_name"],
            f"{row['item_f1']:.3f}", f"{row['critical_steps']:,.0f}", f"{row['peer']:,.1f}", compact(row["tokens"]),
            f"{row['dollars']:.3f}", "" if row["peer_name"] == "swarm" else f"{row['ratio']:.2f}x",
            style="bold" if row["baseline"] or row["peer_name"] == "swarm" else None)
        shape = row["shape"]
    Console(highlight=False).print(table)
    print("steps: of sub-agents side by side only the most that one takes (critical steps)")
    print("speed-up: of the swarm over this method")
    for row in result["rows"]:
        if row["baseline"]:
            print(f"{row['shape']}: {row['ratio']:.2f} times as fast as the fastest single agent with one call a turn "
                  f"and equal score ({row['peer_name']})")
    for line in (f"published: {PUBLISHED}", *result.get("files", ())):
        print(line)
