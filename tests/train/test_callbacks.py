"""Validation, checkpoints, metrics, samples, TensorBoard and progress, each against something that knows better."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole

import moonbase
from moonbase.data import Corpus
from moonbase.errors import UserError
from moonbase.recipe import Recipe
from moonbase.report.console import Console, duration
from moonbase.train.callbacks.progress import Progress
from moonbase.train.parallel import World
from moonbase.train.trainer import Callback, Trainer
from tests.train.tiny import ONE, checkpoints, content, facts, go_on, metrics, run, stop_after, tensors

Recipes = Callable[..., Recipe]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_every_line_has_the_fields_of_the_contract(whole: Path) -> None:
    lines = metrics(whole, timed=True)
    scalars = {"loss": float, "balance_loss": float, "lr": float, "grad_norm": float, "update_rms": float,
               "tokens": int, "tokens_per_second": float, "memory_bytes": int, "seconds": float}
    for number, line in enumerate(lines, 1):
        assert line["step"] == number and line["tokens"] == number * 4 * 32 and line["mfu"] is None
        assert all(type(line[name]) is kind and math.isfinite(line[name]) for name, kind in scalars.items())
        assert [type(value) for value in line["max_logit"]] == [float, float]
        assert [type(value) for value in line["clipped_heads"]] == [int, int]
        assert len(line["expert_load"]) == 1 and 1 <= line["expert_load"][0] <= 4, "8 experts, 2 of them a token"
        assert "mtp_loss" not in line and "skipped" not in line
        validated = number % 5 == 0 or number == 12
        assert ("validation_loss" in line) == ("validation_bits_per_byte" in line) == validated
        if validated:
            (share,) = line["expert_share"]
            assert len(share) == 8 and sum(share) / 8 == pytest.approx(1)
            assert max(share) == pytest.approx(line["expert_load"][0])
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(lines))
    assert all(0.1 < line["update_rms"] < 0.3 for line in lines), "Moonlight's 0.2"


def test_the_run_folder_holds_what_the_design_says(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "run.json", "report.html", "checkpoints", "corpus"} <= names
    found = facts(whole)
    assert found["status"] == "finished" and found["reason"] is None and found["started"] <= found["finished"]
    assert found["parameters"] == sum(value.numel() for value in tensors(whole / "checkpoints/step-000012").values())
    assert found["corpus"]["train"]["documents"] > 0 and found["versions"]["torch"] and found["machine"]["cpu"]
    assert found["next_commands"][0].startswith("moonbase chat ")


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 1}])
def test_bits_per_byte_against_brute_force(fields: dict, recipe: Recipes, tmp_path: Path) -> None:
    """Every held-out document through the plain model, piece by piece as the rows cut it, and its bytes counted."""
    folder = tmp_path / "run"
    result = run(recipe(steps=3, **fields), folder)
    model, corpus = moonbase.load(folder), Corpus.open(folder / "corpus")
    nats = num_bytes = num_tokens = 0.0
    for document in range(corpus.validation.num_documents):
        ids = torch.from_numpy(corpus.validation.read(document).astype("int64"))
        for start in range(0, len(ids) - 1, 32):
            piece = ids[start : start + 33]
            with torch.no_grad():
                logits = model(piece[None, :-1])[0].double()
            nats -= logits.log_softmax(-1).gather(1, piece[1:, None]).sum().item()
            num_tokens += len(piece) - 1
            num_bytes += len(corpus.tokenizer.decode_bytes([int(i) for i in piece[1:] if i != corpus.eos_id]))
    assert result["validation_loss"] == pytest.approx(nats / num_tokens, rel=1e-5)
    assert result["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert facts(folder)["results"]["validation_loss"] == result["validation_loss"]


def test_the_result_is_the_last_point_of_the_chart(recipe: Recipes, tmp_path: Path) -> None:
    """Two batches on the way, all held-out text at the end; nothing else of the last line changes."""
    plan, seen = recipe(steps=5, validate_every=2), []

    def ready(trainer: Trainer) -> None:
        trainer.callbacks.append(Witness())

    class Witness(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            seen.append(dict(record))

    result = run(plan, tmp_path / "run", on_ready=ready)
    line = metrics(tmp_path / "run", timed=True)[-1]
    changed = {name for name in line if line[name] != seen[-1][name]}
    assert changed == {"validation_loss", "validation_bits_per_byte"} and line.keys() == seen[-1].keys()
    assert all(line[name] == result[name] == facts(tmp_path / "run")["results"][name] for name in changed)


def test_the_result_is_measured_on_so_much_text_and_no_more(
    whole: Path, recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus.open(whole / "corpus")
    most = len(corpus.validation_text()) // 2
    monkeypatch.setattr("moonbase.train.callbacks.validation.FINAL_BYTES", most)
    seen: list[int] = []

    def ready(trainer: Trainer) -> None:
        validation = trainer.callbacks[0]
        measure = validation.measure_final
        validation.measure_final = lambda trainer, progress: measure(trainer, lambda what, done: seen.append(done))

    run(recipe(steps=1), tmp_path / "run", on_ready=ready)
    text = len(corpus.validation_text(most))
    first = [corpus.tokenizer.decode_bytes(corpus.validation.read(int(number))[:1].tolist())
             for number in corpus.validation_order(most)]
    assert seen == sorted(seen) and seen[-1] == text - len(b"".join(first)), "nothing predicts a document's first token"


def test_ctrl_c_is_heard_between_the_batches_of_the_result(recipe: Recipes, tmp_path: Path) -> None:
    """The last checkpoint is there by then; the measurement is made up for when the run resumes."""
    folder, saved = tmp_path / "run", []

    def ready(trainer: Trainer) -> None:
        validation = trainer.callbacks[0]
        sums, measure = validation._sums, validation.measure_final

        def impatient(trainer: Trainer, progress: Any) -> Any:
            def stopping(*arguments: Any) -> Any:
                saved.append(checkpoints(folder))
                trainer.stop("asked by a test")
                return sums(*arguments)

            validation._sums = stopping
            return measure(trainer, progress)

        validation.measure_final = impatient

    plan = recipe(steps=2)
    stopped = run(plan, folder, on_ready=ready)
    assert saved == [["step-000002"]], "one batch, and after the checkpoint"
    assert (stopped["status"], stopped["reason"], stopped["step"]) == ("stopped", "asked by a test", 2)
    assert facts(folder)["results"] == {} and "validation_loss" in metrics(folder)[-1]
    result = go_on(folder)
    assert result["status"] == "finished" and metrics(folder)[-1]["validation_loss"] == result["validation_loss"]


def test_the_number_of_micro_batches_does_not_change_what_is_measured(recipe: Recipes, tmp_path: Path) -> None:
    for micro in (4, 1):
        run(recipe(steps=1, micro_batch_size=micro, schedule__warmup_steps=0, optimizer__lr=1e-12),
            tmp_path / str(micro))
    four, one = (metrics(tmp_path / str(micro))[0]["validation_loss"] for micro in (4, 1))
    assert one == pytest.approx(four, rel=1e-6)


def test_validation_changes_nothing_in_training(whole: Path, recipe: Recipes, tmp_path: Path) -> None:
    """Same weights, momenta, router biases and loads whether it happens at every step or only after the last."""
    for every in (1, 10**6):
        run(recipe(validate_every=every), tmp_path / str(every))
    last = Path("checkpoints/step-000012")
    assert content(tmp_path / "1" / last) == content(tmp_path / "1000000" / last) == content(whole / last)
    for a, b in zip(metrics(tmp_path / "1"), metrics(tmp_path / "1000000"), strict=True):
        assert all(a[name] == b[name] for name in ("loss", "expert_load", "max_logit", "grad_norm"))
        assert "validation_loss" in a
    biases = {name: value for name, value in tensors(tmp_path / "1" / last).items() if name.endswith("correction_bias")}
    # Twelve steps of ±0.001, less the mean over the experts: no bias can have moved further.
    assert biases and all(0 < value.abs().max() <= 12 * 0.002 for value in biases.values())


def test_held_out_text_is_never_trained_on(whole: Path) -> None:
    corpus = Corpus.open(whole / "corpus")
    trained, held_out = ({corpus.tokenizer.decode_bytes(split.read(number).tolist())
                          for number in range(split.num_documents)} for split in (corpus.train, corpus.validation))
    assert trained and held_out and not trained & held_out


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_newest_few_are_kept(recipe: Recipes, tmp_path: Path) -> None:
    run(recipe(steps=7, checkpoint__every_steps=2, checkpoint__keep_last=3), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-000004", "step-000006", "step-000007"]


def test_time_passes_by_a_clock_that_never_goes_back(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every N minutes of the monotonic clock; what the wall clock does is no concern."""
    clock = {"now": 1000.0}
    monkeypatch.setattr("moonbase.train.callbacks.checkpoints.time.monotonic", lambda: clock["now"])
    monkeypatch.setattr("time.time", lambda: 5e9 - clock["now"])

    def ready(trainer: Any) -> None:
        step = trainer.train_step

        def slow() -> dict[str, Any]:
            clock["now"] += 25.0
            return step()

        trainer.train_step = slow

    run(recipe(steps=7, checkpoint__every_minutes=1.0, checkpoint__keep_last=9), tmp_path / "run", on_ready=ready)
    assert checkpoints(tmp_path / "run") == ["step-000003", "step-000006", "step-000007"]


def test_a_checkpoint_is_a_model_for_everyone(whole: Path) -> None:
    """moonbase.load and transformers give the same logits, and the same ids for a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = whole / "checkpoints/step-000012", "def abc(d):\n    return 'é7'\n"
    ours, theirs = moonbase.load(whole), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, peer = Corpus.open(whole / "corpus").tokenizer, AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text)
    assert peer(text, add_special_tokens=False)["input_ids"] == ids and peer.decode(ids) == text
    assert theirs.config.eos_token_id == tokenizer.eos_id == peer.eos_token_id
    with torch.no_grad():
        assert torch.allclose(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-4)


def test_training_goes_on_from_the_weights_of_another_run(whole: Path, recipe: Recipes, tmp_path: Path) -> None:
    plan = recipe(steps=1, stage="continue", init=str(whole), schedule__warmup_steps=0)
    run(plan, tmp_path / "next")
    first, last = metrics(tmp_path / "next")[0], metrics(whole)
    assert first["loss"] < last[0]["loss"] - 0.5, "not from random weights"
    other = recipe(steps=1, stage="continue", init=str(whole), model={**plan.model.to_hf(), "moe_intermediate_size": 8})
    with pytest.raises(UserError, match="moe_intermediate_size differ from the recipe's model"):
        run(other, tmp_path / "other")


# --- samples, TensorBoard, progress -----------------------------------------------------------------------------------


def test_samples_are_what_the_sampler_said(recipe: Recipes, tmp_path: Path) -> None:
    from moonbase.engine import Engine, Sampling

    def make_sampler(model: Any, tokenizer: Any) -> Callable[[list[str]], list[str]]:
        return lambda prompts: Engine(model, tokenizer).generate(prompts, Sampling(max_tokens=4))

    plan = recipe(steps=5, sample_every=2, sample_prompts=["def ", "\n\"é"])
    run(plan, tmp_path / "run", make_sampler=make_sampler)
    lines = (tmp_path / "run/samples.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("===")] == [
        f"=== step {step} | temperature 0.0" for step in (2, 4, 5)]
    assert [json.loads(line[4:]) for line in lines if line.startswith(">>> ")] == ["def ", "\n\"é"] * 3
    model, corpus = moonbase.load(tmp_path / "run"), Corpus.open(tmp_path / "run/corpus")
    expected = make_sampler(model, corpus.tokenizer)(["def ", "\n\"é"])
    assert [json.loads(line[4:]) for line in lines if line.startswith("... ")][-2:] == expected
    without = run(plan, tmp_path / "without")
    assert without["status"] == "finished" and not (tmp_path / "without/samples.txt").exists()
    last = Path("checkpoints/step-000005")
    assert content(tmp_path / "run" / last) == content(tmp_path / "without" / last), "sampling does not touch training"


def test_a_prompt_that_cannot_be_continued_does_not_cost_the_run(recipe: Recipes, tmp_path: Path) -> None:
    from moonbase.engine import Engine

    result = run(recipe(steps=2, sample_prompts=[""]), tmp_path / "run",
                 make_sampler=lambda model, tokenizer: Engine(model, tokenizer).generate)
    assert result["status"] == "finished" and checkpoints(tmp_path / "run") == ["step-000002"]


def test_several_processes_say_that_they_draw_no_samples(recipe: Recipes) -> None:
    from moonbase.train.callbacks.sampling import Sampling

    notes: list[str] = []
    for size, prompts in ((1, ["a"]), (2, []), (2, ["a"])):
        trainer = type("Trainer", (), {"world": World(0, size, ONE.device), "recipe": recipe(sample_prompts=prompts)})
        Sampling(None, None, notes.append).on_start(trainer)
    assert len(notes) == 1 and "no samples while several processes train" in notes[0]


def test_tensorboard_gets_the_same_numbers(recipe: Recipes, tmp_path: Path) -> None:
    reason = "the package tensorboard is not installed"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    plan = recipe(steps=4, tensorboard=True)
    run(plan, tmp_path / "run", on_ready=stop_after(3))
    go_on(tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = metrics(tmp_path / "run")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.value for event in events.Scalars("max_logit/largest")] == pytest.approx(
        [max(line["max_logit"]) for line in lines])


def test_without_tensorboard_its_wish_is_a_mistake(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard=true needs the package tensorboard"):
        run(recipe(steps=1, tensorboard=True), tmp_path / "run")
    assert facts(tmp_path / "run")["status"] == "failed"


def shown(width: int = 300) -> tuple[Console, io.StringIO]:
    console, text = Console(), io.StringIO()
    console.rich = RichConsole(file=text, width=width, highlight=False)
    return console, text


def test_progress_shows_what_one_wants_to_know(recipe: Recipes) -> None:
    console, text = shown()
    progress = Progress(console)
    trainer = type("Trainer", (), {"step": 0, "recipe": recipe(steps=4)})
    progress.on_start(trainer)
    record = {"step": 4, "loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.31, "max_logit": [1.0, 17.25],
              "expert_load": [1.5, 2.25], "validation_loss": 2.0, "validation_bits_per_byte": 1.125,
              "skipped": "the loss is nan"}
    progress.on_step(trainer, record)
    words = text.getvalue()
    for part in ("4/4", "loss 2.500", "12,346 tokens/s", "31% MFU", "largest logit 17.2", "busiest expert 2.25x",
                 "step 4: held-out loss 2.000, 1.125 bits per byte", "step 4 skipped: the loss is nan"):
        assert part in words, part


def test_the_time_left_is_that_of_the_steps_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run measures from where it began, not from step 0."""
    clock = {"now": 100.0}
    monkeypatch.setattr("moonbase.report.console.time.monotonic", lambda: clock["now"])
    console, text = shown()
    for done in (90, 91, 92):
        console("training", done, 100)
        clock["now"] += 10.0
    assert "92/100" in text.getvalue() and text.getvalue().rstrip().endswith(f"{duration(80)} left")
