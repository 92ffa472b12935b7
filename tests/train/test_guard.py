"""Bad steps are thrown away whole, counted, and not put up with for ever."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moonbase.cli import main
from moonbase.errors import TrainingStopped
from moonbase.recipe import GuardConfig, Recipe
from moonbase.train.guard import Guard
from moonbase.train.trainer import Trainer
from tests.train.tiny import checkpoints, facts, go_on, metrics, run

NAN, INF = math.nan, math.inf


def test_what_is_not_a_number_is_skipped() -> None:
    guard = Guard(GuardConfig())
    assert guard.reason_to_skip(2.0, 1.0) is None
    assert guard.reason_to_skip(NAN, 1.0) == "the loss is nan"
    assert guard.reason_to_skip(2.0, INF) == "the gradient norm is inf"
    assert guard.bad_steps == 2
    assert guard.reason_to_skip(2.0, 1.0) is None and guard.bad_steps == 0


def test_a_spike_is_known_once_enough_has_been_seen() -> None:
    guard = Guard(GuardConfig(spike_factor=4.0))
    for number in range(Guard.WARMUP):
        assert guard.reason_to_skip(2.0, 1.0 + 100 * (number == 3)) is None
    assert guard.reason_to_skip(2.0, 3.9) is None
    reason = guard.reason_to_skip(2.0, 4.2)
    assert reason == "gradient norm 4.2 is over 4x the usual 1"
    assert Guard(GuardConfig(spike_factor=None)).reason_to_skip(2.0, 1e30) is None


def test_a_lasting_change_of_level_is_no_spike_for_ever() -> None:
    guard = Guard(GuardConfig())
    for _ in range(Guard.WINDOW):
        guard.reason_to_skip(2.0, 1.0)
    refused = [guard.reason_to_skip(2.0, 10.0) is not None for _ in range(50)]
    assert refused == [True] * Guard.MOST_SPIKES + [False] * (50 - Guard.MOST_SPIKES)


def test_norms_that_rise_early_do_not_end_a_run() -> None:
    """Seen in a real run: eight times the norm within ten steps of the warm-up's end, and back again."""
    guard = Guard(GuardConfig())
    norms = [1.3] * 17 + [11.2, 7.7, 6.3, 6.9, 8.8, 8.5, 8.0, 9.9, 9.8, 7.9, 6.0, 4.0] + [1.5] * 40
    assert [guard.reason_to_skip(6.0, norm) for norm in norms] == [None] * len(norms)


def test_it_gives_up_after_so_many_in_a_row() -> None:
    guard = Guard(GuardConfig(max_bad_steps=3))
    for loss in (NAN, NAN, 2.0, NAN, NAN):
        guard.reason_to_skip(loss, 1.0)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row were unusable; .* the loss is nan") as told:
        guard.reason_to_skip(NAN, 1.0)
    assert "stage=continue init=RUN/checkpoints/step-N --out NEW" in str(told.value)


def test_its_state_survives_json() -> None:
    guard, twin = Guard(GuardConfig()), Guard(GuardConfig())
    for number in range(100):
        guard.reason_to_skip(2.0, 1.0 + number / 7)
    guard.reason_to_skip(NAN, NAN)
    twin.load_state(json.loads(json.dumps(guard.state())))
    assert twin.state() == guard.state() and twin.norms.maxlen == Guard.WINDOW
    assert twin.reason_to_skip(2.0, 50.0) == guard.reason_to_skip(2.0, 50.0)


# --- in the loop ------------------------------------------------------------------------------------------------------


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step may change, as copies."""
    state = {**trainer.weights(), **trainer.optimizer.named_state()[0]}
    state |= {f"copy of {name}": value for name, value in trainer.model.named_parameters()}
    return {name: value.detach().clone() for name, value in state.items()}


def spoil(steps: set[int], how: str, seen: dict[int, tuple[Any, Any]] | None = None) -> Callable[[Trainer], None]:
    """For `on_ready`: make these steps bad, and keep what they changed."""

    def ready(trainer: Trainer) -> None:
        step, loss = trainer.train_step, trainer.model.loss

        def bad_loss(*args: Any, **kwargs: Any) -> Any:
            losses = loss(*args, **kwargs)
            if trainer.step + 1 not in steps or not torch.is_grad_enabled():
                return losses
            factor = {"nan loss": NAN, "inf loss": INF, "spike": 1e4}.get(how, 1.0)
            loss_sum = losses.loss_sum * factor
            if how == "nan gradient":
                loss_sum.register_hook(lambda gradient: gradient * NAN)
            return losses._replace(loss_sum=loss_sum)

        def watched() -> dict[str, Any]:
            before = everything(trainer)
            record = step()
            if seen is not None:
                seen[trainer.step] = (before, everything(trainer))
            return record

        trainer.model.loss, trainer.train_step = bad_loss, watched

    return ready


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["nan loss", "inf loss", "nan gradient"])
def test_a_skipped_step_changes_no_bit(
    how: str, precision: str, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    seen: dict[int, tuple[Any, Any]] = {}
    plan = recipe(steps=5, precision=precision)
    result = run(plan, tmp_path / "run", on_ready=spoil({3}, how, seen))
    assert result["status"] == "finished"
    before, after = seen[3]
    assert all(after[name].equal(before[name]) for name in before)
    assert not all(seen[4][1][name].equal(seen[4][0][name]) for name in before)
    assert all(value.isfinite().all() for value in seen[5][1].values())
    lines = metrics(tmp_path / "run")
    assert ["skipped" in line for line in lines] == [False, False, True, False, False]
    assert lines[2]["update_rms"] == 0 and lines[2]["clipped_heads"] == [0, 0]
    assert lines[2]["loss"] is None if "loss" in how else lines[2]["grad_norm"] is None
    assert [line["tokens"] for line in lines] == [128 * number for number in range(1, 6)]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_spike_is_skipped_in_the_loop(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "WARMUP", 16)
    run(recipe(steps=20), tmp_path / "run", on_ready=spoil({19}, "spike"))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "skipped" in line] == [19] and "usual" in lines[18]["skipped"]


def test_giving_up_leaves_the_run_intact_and_says_why(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = recipe(steps=9, guard__max_bad_steps=3, checkpoint__every_steps=2)
    with pytest.raises(TrainingStopped, match="3 steps in a row were unusable"):
        run(plan, tmp_path / "run", on_ready=spoil({4, 5, 6, 7}, "nan loss"))
    found = facts(tmp_path / "run")
    assert found["status"] == "failed" and "3 steps in a row" in found["reason"] and found["next_commands"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert checkpoints(tmp_path / "run") == ["step-000002", "step-000004"]

    monkeypatch.setattr(Guard, "reason_to_skip", lambda *_: (_ for _ in ()).throw(TrainingStopped("enough of it")))
    with pytest.raises(SystemExit) as left:
        main(["train", str(tmp_path / "run"), "--resume"])
    assert left.value.code == 1 and capsys.readouterr().err.splitlines()[-1] == "moonbase: error: enough of it"
    monkeypatch.undo()
    # What made the steps bad is gone; the count of bad steps was saved with the checkpoint.
    assert go_on(tmp_path / "run")["status"] == "finished"
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 10))
