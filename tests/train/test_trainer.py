"""The loop against a plain one, and every recipe that it must carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moonbase.data import Batch, Corpus, PackedStream
from moonbase.model import Transformer
from moonbase.ops.attention import Documents
from moonbase.optim import learning_rate
from moonbase.recipe import Recipe
from moonbase.train.assembly import fill, make_trainer
from moonbase.train.parallel import World
from moonbase.train.precision import Masters
from moonbase.train.trainer import Callback, RepeatedBatch, Trainer
from tests.train.tiny import MODEL, ONE, content, metrics, run, tensors

Recipes = Callable[..., Recipe]


@pytest.fixture(scope="session")
def corpus(whole: Path) -> Corpus:
    return Corpus.open(whole / "corpus")


def make(plan: Recipe, corpus: Corpus) -> Trainer:
    return make_trainer(plan, ONE, PackedStream(corpus, "train", plan.sequence_length, plan.batch_size, plan.seed))


def batch(plan: Recipe, corpus: Corpus) -> Batch:
    return next(PackedStream(corpus, "train", plan.sequence_length, plan.batch_size, plan.seed))


def test_a_step_against_torch_alone(recipe: Recipes, corpus: Corpus) -> None:
    """Loss, gradient norm and AdamW update of the first step, computed with torch's own parts."""
    plan = recipe(optimizer__name="adamw", optimizer__grad_clip=0.1, optimizer__qk_clip=None, balance__sequence_loss=0)
    trainer = make(plan, corpus)
    rows, twin = batch(plan, corpus), fill(Transformer(plan.model), plan, ONE)
    logits = twin(rows.tokens, rows.documents)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    oracle = torch.optim.AdamW(twin.parameters(), lr=learning_rate(1, plan.steps, 0.01, plan.schedule),
                               betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    oracle.step()
    record = trainer.train_step()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        # The first AdamW step is lr * sign(g): entries whose gradient is all rounding may differ.
        close = torch.isclose(ours, theirs, atol=1e-5, rtol=1e-4)
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_whole_batch(micro: int, recipe: Recipes, corpus: Corpus) -> None:
    """Exactly the same expert load and router bias; sums of floats within fp32 rounding."""
    plan = recipe(batch_size=6, balance__sequence_loss=0.01)
    whole, parts = make(plan, corpus), make(recipe(batch_size=6, balance__sequence_loss=0.01, micro_batch_size=micro),
                                            corpus)
    for _ in range(3):
        a, b = whole.train_step(), parts.train_step()
        for name in ("loss", "balance_loss", "grad_norm", "update_rms", "max_logit"):
            assert b[name] == pytest.approx(a[name], rel=2e-4), name
        assert a["expert_load"] == b["expert_load"] and a["tokens"] == b["tokens"]
    assert all(x.equal(y) for x, y in zip(whole._biases, parts._biases, strict=True))


def test_an_uneven_share_of_micro_batches_keeps_the_balance_loss_a_mean_over_sequences(
    recipe: Recipes, corpus: Corpus
) -> None:
    """Six sequences in parts of four: as many processes may leave such a rest."""
    plan = recipe(batch_size=6, balance__sequence_loss=0.5)
    whole, parts = make(plan, corpus), make(plan, corpus)
    parts.micro_batch_size = 4
    a, b = whole.train_step(), parts.train_step()
    assert b["balance_loss"] == pytest.approx(a["balance_loss"], rel=1e-5)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_masters_in_fp32_sum_micro_batches_without_rounding(recipe: Recipes, corpus: Corpus) -> None:
    plan = recipe(batch_size=4, micro_batch_size=1, precision="bf16")
    model = fill(Transformer(plan.model), plan, ONE)
    masters = Masters(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in masters.named.values()} == {torch.float32}
    name, parameter = next(iter(model.named_parameters()))
    for value in (1.0, 2**-9, -0.0):  # bf16 has 8 bits: 1 + 2^-9 would round to 1
        (parameter * torch.full_like(parameter, value)).sum().backward()
        assert parameter.grad is None
    assert (masters.named[name].grad == 1 + 2**-9).all()
    masters.zero_gradients()
    assert not masters.named[name].grad.any()
    with torch.no_grad():
        masters.named[name].fill_(1 / 3)
    masters.publish(0)
    assert (parameter == torch.tensor(1 / 3).bfloat16()).all()


def test_the_load_counts_every_token_once(recipe: Recipes, corpus: Corpus) -> None:
    """batch * time * experts per token, recomputed or not; the report gets shares with mean 1."""
    for recompute in ("none", "selective", "full"):
        plan = recipe(recompute=recompute)
        trainer, loads = make(plan, corpus), []
        accumulate = trainer._accumulate

        def watched(*args: Any, _accumulate=accumulate, _loads=loads) -> Any:
            totals, statistics = _accumulate(*args)
            _loads.append([layer.expert_load.sum().item() for layer in statistics if layer.expert_load.numel()])
            return totals, statistics

        trainer._accumulate = watched
        trainer.train_step()
        assert loads == [[4 * 32 * 2]]
        assert [sum(layer) / len(layer) for layer in trainer.expert_share] == pytest.approx([1.0])


def test_recomputation_is_the_identical_run(whole: Path, recipe: Recipes, tmp_path: Path) -> None:
    run(recipe(recompute="full", checkpoint__every_steps=3, checkpoint__keep_last=9), tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(whole)
    last = Path("checkpoints/step-000012")
    assert content(tmp_path / "run" / last) == content(whole / last)


def test_heads_above_tau_are_clipped_and_the_metrics_say_so(recipe: Recipes, corpus: Corpus) -> None:
    """With a tiny τ every head is clipped at every step, by γ = τ / max, and the next maximum shows it."""
    free = make(recipe(optimizer__qk_clip=None, optimizer__lr=1e-9), corpus)
    clipped = make(recipe(optimizer__qk_clip=1e-3, optimizer__lr=1e-9), corpus)
    rows = batch(free.recipe, corpus)
    free.stream = clipped.stream = RepeatedBatch(torch.cat([rows.tokens, rows.targets[:, -1:]], 1), rows.documents)
    before = clipped.train_step()
    assert before["clipped_heads"] == [2, 2] and free.train_step()["clipped_heads"] == [0, 0]
    losses = clipped.model.loss(rows.tokens, rows.targets, Documents.from_ids(rows.documents), -math.inf)
    # The other layers' weights move only the little that other layers' clips move their inputs.
    assert max(layer.max_logit.max().item() for layer in losses.statistics) == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_the_schedule_reaches_optimizer_and_metrics(kind: str, recipe: Recipes, tmp_path: Path) -> None:
    plan = recipe(steps=8, schedule__kind=kind)
    run(plan, tmp_path / "run")
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates == [learning_rate(step, 8, 0.01, plan.schedule) for step in range(1, 9)]
    assert rates[-1] == pytest.approx(0.01 if kind == "constant" else 0.001)


def test_multi_token_prediction_trains(recipe: Recipes, tmp_path: Path) -> None:
    model = {**MODEL, "num_nextn_predict_layers": 1}
    run(recipe(steps=30, model=model, schedule__kind="constant"), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert all(len(line["max_logit"]) == 3 and len(line["expert_load"]) == 2 for line in lines)
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"] - 0.5 and lines[-1]["loss"] < lines[0]["loss"] - 0.5
    stored = tensors(tmp_path / "run/checkpoints/step-000030")
    assert "model.layers.2.eh_proj.weight" in stored


def test_it_learns_in_bf16_as_in_fp32(recipe: Recipes, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        run(recipe(steps=30, precision=precision), tmp_path / precision)
    fp32, bf16 = (metrics(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert bf16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=0.01)
    assert bf16[-1]["loss"] == pytest.approx(fp32[-1]["loss"], rel=0.05) and fp32[-1]["loss"] < fp32[0]["loss"] - 1
    stored = tensors(tmp_path / "bf16/checkpoints/step-000030")
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_callbacks_come_in_their_order_and_are_closed_whatever_happens(recipe: Recipes, corpus: Corpus) -> None:
    calls: list[str] = []

    class Witness(Callback):
        def __init__(self, name: str, fails: bool = False) -> None:
            self.name, self.fails = name, fails

        def on_start(self, trainer: Trainer) -> None:
            calls.append(f"{self.name} start")

        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            calls.append(f"{self.name} {record['step']}")
            record[self.name] = True
            if self.fails and record["step"] == 2:
                raise RuntimeError("no")

        def on_end(self, trainer: Trainer) -> None:
            calls.append(f"{self.name} end")

        def on_close(self) -> None:
            calls.append(f"{self.name} close")

    trainer = make(recipe(steps=2), corpus)
    trainer.callbacks = [Witness("a"), Witness("b")]
    trainer.run()
    assert calls == ["a start", "b start", "a 1", "b 1", "a 2", "b 2", "a end", "b end", "a close", "b close"]
    calls.clear()
    trainer = make(recipe(steps=3), corpus)
    trainer.callbacks = [Witness("a", fails=True), Witness("b")]
    with pytest.raises(RuntimeError):
        trainer.run()
    assert calls == ["a start", "b start", "a 1", "b 1", "a 2", "a close", "b close"]


def test_one_process_asks_nobody(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, agreeing is free: no collective is even looked at."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: pytest.fail("a collective"))
    assert ONE.agree(True) is True and ONE.agree(False) is False and ONE.on_first(lambda: 5) == 5
    values = torch.ones(2)
    assert ONE.sum(values) is values


class Drawn(RepeatedBatch):
    """Other tokens at every step, one document a row."""

    def __init__(self, plan: Recipe) -> None:
        self.plan, self.taken = plan, 0

    def __next__(self) -> Batch:
        self.taken += 1
        shape = self.plan.batch_size, self.plan.sequence_length + 1
        generator = torch.Generator().manual_seed(self.taken)
        return RepeatedBatch(torch.randint(0, self.plan.model.vocab_size, shape, generator=generator)).batch

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def test_the_next_batch_is_read_ahead_and_restarts_know_nothing_of_it(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    plan = recipe(steps=9)
    plain, ahead = (make_trainer(plan, ONE, Drawn(plan)) for _ in range(2))

    def look_ahead() -> None:
        with monkeypatch.context() as as_on_a_gpu:
            as_on_a_gpu.setattr(ahead, "world", World(0, 1, torch.device("cuda")))
            Trainer._look_ahead(ahead)

    def both() -> list[float]:
        return [trainer.train_step()["loss"] for trainer in (plain, ahead)]

    monkeypatch.setattr(ahead, "_look_ahead", look_ahead)
    for taken in (1, 2, 3):
        one, other = both()
        assert one == other and ahead.stream.taken == taken + 1
        assert ahead.state() == plain.state() | {"seconds": ahead.seconds}
    ahead.load_state(ahead.state())
    one, other = both()
    assert one == other
    plain.stream, ahead.stream = Drawn(plan), Drawn(plan)  # nothing of the old one is left
    one, other = both()
    assert one == other
