"""What the finished runs of a speedrun say: rows of a table, a verdict in words, and the curves of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from moonbase.bench import speedrun_plan as planning
from moonbase.bench.rows import plain_row
from moonbase.bench.speedrun_log import losses_of
from moonbase.bench.speedrun_plan import BASELINE, CHALLENGER, Plan, Reached, Run
from moonbase.report.words import compact, duration, plural

NAMES = {BASELINE: "AdamW", CHALLENGER: "MuonClip"}
PUBLISHED_FACTOR = 1 / 0.52
"""Muon takes about 52% of AdamW's training arithmetic for the same loss (Moonlight)."""
_SMOOTHED_STEPS = 9
"""Losses of single batches are averaged over so many for the picture."""

Record = dict[str, Any]


def findings(plan: Plan, records: Sequence[Record], name: str, tokens_per_step: int) -> dict[str, Any]:
    """What a bench's `measure` returns: title, rows, method, verdict, curves; machine, commit and versions are those of
    the runs."""
    losses = losses_of(list(records))
    missing = planning.needed(plan, losses)
    result: dict[str, Any] = {
        "title": f"Time to loss, {NAMES[CHALLENGER]} and {NAMES[BASELINE]}",
        "rows": [*_target_rows(plan, records, losses, name, tokens_per_step), *_tuning_rows(plan, losses)],
        "complete": not missing, "curves": _curves(plan, records, losses, tokens_per_step),
        "seed": ", ".join(map(str, plan.seeds))}
    result["verdict"] = _verdict(result["rows"], len(missing), plan)
    result["method"] = f"{result['verdict']}.\n\n{_method(plan, records, losses)}"
    if records:
        last = records[-1]
        machines, commits = (list(dict.fromkeys(record[key] for record in records)) for key in ("machine", "commit"))
        result |= {"machine": " and ".join(machines), "versions": last["versions"],
                   "commit": commits[0] if len(commits) == 1 else ", ".join(str(commit)[:7] for commit in commits)}
    return result


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(shape: str, unit: str, ours: float | None, peer: float | None = None, *, compared: bool = True,
         **more: Any) -> dict[str, Any]:
    """Less is better in all units; a ratio there is as far as the two are `compared`."""
    row = plain_row(shape, unit, ours, peer, NAMES[BASELINE], less_is_better=True, **more)
    return row if compared else row | {"ratio": None}


def _target_rows(plan: Plan, records: Sequence[Record], losses: Mapping[Run, float], name: str,
                 tokens_per_step: int) -> list[dict[str, Any]]:
    """Tokens and seconds to the baseline's mean loss; then how often the challenger's fit into the baseline's, each
    seed held to its own loss, which is where the noise of both sides is in."""
    own = planning.targets(plan, losses)
    if own is None:
        return []
    known = {seed: planning.points(plan, losses, seed) for seed in plan.seeds}
    if not all(known.values()):
        return []
    rates = planning.tuned_rates(plan, losses)
    seconds = {key: {seed: _step_seconds(records, key, rates[key], seed) for seed in plan.seeds} for key in rates}
    mean = sum(own.values()) / len(own)
    together = {seed: planning.reached(known[seed], mean) for seed in plan.seeds}
    alone = {seed: planning.reached(known[seed], own[seed]) for seed in plan.seeds}
    shape = f"{name} to {mean:.4f} nats a token held out"
    rows = [
        _amount_row(f"{shape}: tokens", "M tokens", [
            Reached(each.amount * tokens_per_step / 1e6, each.relation) for each in together.values()],
            [plan.steps * tokens_per_step / 1e6] * len(own)),
        _amount_row(f"{shape}: time", "s", [
            Reached(each.amount * seconds[CHALLENGER][seed], each.relation) for seed, each in together.items()],
            [plan.steps * seconds[BASELINE][seed] for seed in plan.seeds])]
    for what, cost in (("tokens", lambda key, seed: 1.0), ("time", lambda key, seed: seconds[key][seed])):
        factors = [Reached(plan.steps * cost(BASELINE, seed) / (each.amount * cost(CHALLENGER, seed)), each.relation)
                   for seed, each in alone.items()]
        rows.append(_factor_row(f"{name}: {NAMES[BASELINE]}'s {what} over {NAMES[CHALLENGER]}'s, same loss, by seed",
                                factors))
    rows.append(_row(f"{name}: a step of {tokens_per_step:,} tokens", "ms", median(seconds[CHALLENGER].values()) * 1e3,
                     median(seconds[BASELINE].values()) * 1e3))
    best = {key: [losses.get(Run(key, rates[key], plan.steps, seed)) for seed in plan.seeds] for key in rates}
    if None not in best[CHALLENGER]:
        rows.append(_row(f"{name}: held-out loss after {plan.steps} steps", "nats per token",
                         sum(best[CHALLENGER]) / len(own), mean))
    return rows


def _step_seconds(records: Sequence[Record], optimizer: str, rate: float, seed: int) -> float:
    return median(record["step_seconds"] for record in records
                  if (record["optimizer"], record["rate"], record["seed"]) == (optimizer, rate, seed))


def _amount_row(shape: str, unit: str, ours: Sequence[Reached], peer: Sequence[float]) -> dict[str, Any]:
    """Tokens or seconds with their mean; without interval where some seed has only a bound."""
    bounds = {each.relation for each in ours} - {"="}
    values = [each.amount for each in ours]
    mean, low, high = _interval(values)
    if bounds:
        shape, low, high = f"{shape} ({_bound_words(ours)})", None, None
    return _row(shape, unit, mean, sum(peer) / len(peer), low=low, high=high, n=len(values), values=values,
                bounded=bool(bounds))


def _factor_row(shape: str, factors: Sequence[Reached]) -> dict[str, Any]:
    """A geometric mean with Student's interval of the logarithms."""
    values = [each.amount for each in factors]
    mean, low, high = (None if each is None else math.exp(each)
                       for each in _interval([math.log(value) for value in values]))
    bounds = {each.relation for each in factors} - {"="}
    if bounds:
        shape, low, high = f"{shape} ({_bound_words(factors)})", None, None
    return _row(shape, "x", mean, low=low, high=high, n=len(values), values=values, bounded=bool(bounds))


def _bound_words(amounts: Sequence[Reached]) -> str:
    count = {relation: sum(each.relation == relation for each in amounts) for relation in "<>"}
    words = {"<": "reached by the shortest run", ">": "not reached by the longest run"}
    return "a bound: " + ", ".join(f"{words[relation]} for {plural(number, 'seed')}"
                                   for relation, number in count.items() if number)


def _interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    from moonbase.evals.statistics import mean_interval

    interval = mean_interval(values)
    return interval.value, interval.low, interval.high


def _tuning_rows(plan: Plan, losses: Mapping[Run, float]) -> list[dict[str, Any]]:
    """A row per rate that was tried for either; the lengths differ, so the two are not compared."""
    grids = {key: {rate: loss for rate, loss in planning.rate_grid(plan, key, losses)[0].items()
                   if math.isfinite(loss)} for key in planning.OPTIMIZERS}
    steps = " and ".join(f"{NAMES[key]} {plan.tuning_steps(key)} steps" for key in reversed(planning.OPTIMIZERS))
    return [_row(f"rate {compact(rate)}, {steps}, seed {plan.seeds[0]}", "nats per token", grids[CHALLENGER].get(rate),
                 grids[BASELINE].get(rate), compared=False)
            for rate in sorted({*grids[BASELINE], *grids[CHALLENGER]})]


def line_of(row: Mapping[str, Any]) -> str:
    """A row for people."""
    ours = "-" if row["ours"] is None else f"{row['ours']:.4g}"
    interval = f" [{row['low']:.4g}, {row['high']:.4g}]" if row.get("low") is not None else ""
    peer = "" if row["peer"] is None else f"; {row['peer_name']} {row['peer']:.4g}"
    ratio = "" if row["ratio"] is None else f", ratio {row['ratio']:.2f}"
    return f"{row['shape']}: {ours}{interval} {row['unit']}{peer}{ratio}"


def show(result: Mapping[str, Any]) -> None:
    """A line per row, as `moonbase bench int4` has it, and what was written."""
    for line in (*map(line_of, result["rows"]), *result.get("files", ())):
        print(line)


# --- words ------------------------------------------------------------------------------------------------------------


def _verdict(rows: Sequence[Mapping[str, Any]], missing: int, plan: Plan) -> str:
    factors = [row for row in rows if row["unit"] == "x"]
    if missing or not factors:
        return f"not finished: at least {plural(missing, 'run')} of the comparison are missing"
    words = []
    for row, what in zip(factors, ("as many tokens", "as long"), strict=True):
        interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
        note = f" ({row['shape'].rpartition('(')[2]}" if row["bounded"] else ""
        words.append(f"{row['ours']:.2f} times{interval} {what}{note}")
    return (f"{NAMES[BASELINE]}, tuned, takes {' and '.join(words)} as {NAMES[CHALLENGER]} to the same loss (95%, "
            f"{plural(len(plan.seeds), 'seed')}); {_beside_the_published(factors[0])}")


def _beside_the_published(factor: Mapping[str, Any]) -> str:
    published = f"the published {PUBLISHED_FACTOR:.2f} times (Moonlight, arithmetic)"
    if factor["low"] is None:
        return f"{published} cannot be held against it"
    if factor["low"] <= PUBLISHED_FACTOR <= factor["high"]:
        return f"{published} lies within the interval"
    return f"{published} lies {'above' if PUBLISHED_FACTOR > factor['high'] else 'below'} the interval"


def _method(plan: Plan, records: Sequence[Record], losses: Mapping[Run, float]) -> str:
    parts = []
    for key, rate in planning.tuned_rates(plan, losses).items():
        grid, _ = planning.rate_grid(plan, key, losses)
        gain = planning.left_by_the_grid(grid)
        edge = ", at the edge of what was tried" if planning.at_the_edge(grid) else ""
        finer = "" if gain is None else f"; a finer grid could gain {gain:.4f} nats"
        parts.append(f"{NAMES[key]}'s rate is {compact(rate)}, the best of "
                     f"{', '.join(map(compact, sorted(grid)))} after {plan.tuning_steps(key)} steps{edge}{finer}.")
        mine = [record for record in records if (record["optimizer"], record["rate"]) == (key, rate)]
        parts.append(f"Its {plural(len(mine), 'run')} clipped {sum(record['clipped_heads'] for record in mine)} "
                     f"attention heads and left out {sum(record['skipped_steps'] for record in mine)} steps.")
    if records:
        tokens = {record["corpus_tokens"] for record in records}
        parts.append(f"All {plural(len(records), 'run')} took {duration(sum(each['seconds'] for each in records))} on "
                     f"one corpus of {compact(max(tokens))} tokens ({records[0]['corpus']}).")
    parts.append(f"Intervals are Student's, 95%, over seeds {', '.join(map(str, plan.seeds))}, factors on a "
                 "logarithmic scale, each seed against the other optimizer's loss of the same seed. Time is the median "
                 "time of a step, everything in it, times the steps; compilation and scoring are left out.")
    return " ".join(parts)


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(plan: Plan, records: Sequence[Record], losses: Mapping[Run, float],
            tokens_per_step: int) -> dict[str, Any]:
    """target: a loss; reached: by side the M tokens to it; series: of a tuned run length the losses of batches over
    M tokens, mean and range over seeds; points: held-out losses (side, M tokens, loss); tuning: by side the rates and
    losses of the grid."""
    sides = {CHALLENGER: "ours", BASELINE: "peer"}
    own = planning.targets(plan, losses)
    found: dict[str, Any] = {
        "target": None if own is None else sum(own.values()) / len(own), "series": [], "points": [], "names": {
            side: NAMES[key] for key, side in sides.items()}, "tuning": {}, "reached": {}}
    scale = tokens_per_step / 1e6
    if own is not None:
        found["reached"]["peer"] = plan.steps * scale
        all_reached = [planning.reached(known, found["target"]) for seed in plan.seeds
                       if (known := planning.points(plan, losses, seed))]
        if len(all_reached) == len(plan.seeds) and {each.relation for each in all_reached} == {"="}:
            found["reached"]["ours"] = scale * sum(each.amount for each in all_reached) / len(all_reached)
    for key, rate in planning.tuned_rates(plan, losses).items():
        mine = [record for record in records if (record["optimizer"], record["rate"]) == (key, rate)]
        found["points"] += [[sides[key], record["steps"] * scale, record["loss"]] for record in mine
                            if record["loss"] is not None]
        for steps in sorted({record["steps"] for record in mine}):
            courses = [_smoothed(record["losses"]) for record in mine if record["steps"] == steps]
            by_step = [[value for value in values if value is not None] for values in zip(*courses, strict=True)]
            kept = [(step, values) for step, values in enumerate(by_step, 1) if values]
            found["series"].append({
                "side": sides[key], "tokens": [step * scale for step, _ in kept],
                "mean": [sum(values) / len(values) for _, values in kept],
                "low": [min(values) for _, values in kept], "high": [max(values) for _, values in kept]})
    for key, side in sides.items():
        grid = planning.rate_grid(plan, key, losses)[0]
        found["tuning"][side] = {"steps": plan.tuning_steps(key), "points": [
            [rate, loss] for rate, loss in sorted(grid.items()) if math.isfinite(loss)]}
    return found


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Means over as many steps before as after, fewer towards the ends."""
    half, found = _SMOOTHED_STEPS // 2, []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        kept = [value for value in values[place - reach:place + reach + 1] if value is not None]
        found.append(round(sum(kept) / len(kept), 5) if kept else None)
    return found
