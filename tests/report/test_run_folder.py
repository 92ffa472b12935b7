from __future__ import annotations

import json

import numpy as np

from moonbase.report.run_folder import number, read_run_folder


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run_folder(folder).metrics


def test_columns(tmp_path):
    metrics = write(tmp_path, [{"step": 1, "loss": 3.0, "max_logit": [1.0, 2.0]},
                               {"step": 2, "mfu": None, "max_logit": [4.0, None, 6.0]}])
    np.testing.assert_array_equal(metrics.step, [1, 2])
    np.testing.assert_array_equal(metrics.scalars["loss"], [3.0, np.nan])
    np.testing.assert_array_equal(metrics.per_layer["max_logit"], [[1, 2, np.nan], [4, np.nan, 6]])
    assert metrics.last("loss") == 3.0 and metrics.last("mfu") is None


def test_steps_of_an_earlier_life_are_superseded(tmp_path):
    first = [{"step": step, "loss": 1.0, "skipped": "old" if step == 9 else None} for step in range(1, 11)]
    metrics = write(tmp_path, first + [{"step": step, "loss": 2.0} for step in range(6, 9)])
    np.testing.assert_array_equal(metrics.step, range(1, 9))
    np.testing.assert_array_equal(metrics.scalars["loss"], [1.0] * 5 + [2.0] * 3)
    assert metrics.skipped == ()
    assert any("went back to an earlier step 1 time, continuing at step 6" in note for note in metrics.notes)


def test_two_lines_of_one_step_are_joined(tmp_path):
    metrics = write(tmp_path, [{"step": 1, "loss": 3.0}, {"step": 1, "validation_loss": 4.0}])
    assert len(metrics) == 1 and metrics.last("loss") == 3.0 and metrics.last("validation_loss") == 4.0


def test_an_unreadable_line_in_the_middle_is_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\ngarbage\n{"step": 2, "loss": 2}\n')
    metrics = read_run_folder(tmp_path).metrics
    assert len(metrics) == 2 and "1 line of metrics.jsonl cannot be read and is left out." in metrics.notes


def test_samples_keep_line_breaks_and_what_a_crash_left(tmp_path):
    (tmp_path / "samples.txt").write_text(
        '=== step 1 | temperature 0.5\n>>> "a\\nb"\n... "c\\td"\n>>> not json\n... "cut\n>>> "no answer"\n=== step 2 |')
    blocks = read_run_folder(tmp_path).samples
    assert [block.title for block in blocks] == ["step 1, temperature 0.5"]
    pairs = [(sample.prompt, sample.continuation) for sample in blocks[0].samples]
    assert pairs == [("a\nb", "c\td"), ("not json", "cut")]


def test_number():
    assert number(3) == 3.0 and number(2.5) == 2.5
    assert all(number(value) is None for value in (True, None, "3", float("nan"), float("inf"), 10**400, [1]))
