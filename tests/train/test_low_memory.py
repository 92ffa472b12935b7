"""Training without fp32 masters, and with gradients that are freed as they are used, beside the ordinary way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.optim import grad_norm
from moonbase.recipe import Recipe, load_recipe
from moonbase.sizes import least_training_bytes, sizes, training_memory
from moonbase.train.assembly import _draw_on_device, make_trainer
from moonbase.train.callbacks.checkpoints import Checkpoints, resume
from moonbase.train.parallel import World
from moonbase.train.trainer import RepeatedBatch, Trainer
from tests.train.tiny import MODEL, ONE, TIMES

Recipes = Callable[..., Recipe]
FREED = {"gradients": "freed", "guard": {"spike_factor": None}}


def make(plan: Recipe, seed: int = 0) -> Trainer:
    size = (plan.batch_size, plan.sequence_length + 1)
    tokens = torch.randint(0, plan.model.vocab_size, size, generator=torch.Generator().manual_seed(seed))
    return make_trainer(plan, ONE, RepeatedBatch(tokens))


def test_pico_learns_as_with_fp32_masters() -> None:
    """A few steps of the preset (with fewer layers and experts) at a rate whose steps bf16 alone loses, all from the
    same bf16 weights. Compensated weights go where fp32 masters with bf16 copies go: both compute with what the exact
    weight is nearest to. Stochastic ones are right on average, so they go where fp32 weights go."""

    def gain(masters: str, precision: str) -> float:
        trainer = make(load_recipe("pico", [
            f"masters={masters}", f"precision={precision}", "batch_size=1", "sequence_length=32", "steps=5",
            "model.n_routed_experts=16", "model.vocab_size=512", "model.num_hidden_layers=2", "optimizer.lr=3e-5",
            "schedule.kind=constant", "schedule.warmup_steps=0", "balance.bias_rate=0"]))
        for name, master in trainer.masters.named.items():
            master.data.copy_(master.data.bfloat16())
            trainer.model.get_parameter(name).data.copy_(master.data)
        losses = [trainer.train_step()["loss"] for _ in range(5)]
        dtypes = {master.dtype for master in trainer.masters.named.values() if master.ndim > 1}
        assert dtypes == {torch.float32 if masters == "fp32" else torch.bfloat16}
        return losses[0] - losses[-1]

    copies, exact = gain("fp32", "bf16"), gain("fp32", "fp32")
    assert min(copies, exact) > 0.02
    assert gain("compensated", "bf16") == pytest.approx(copies, rel=0.05)
    assert gain("stochastic", "fp32") == pytest.approx(exact, rel=0.05)
    assert gain("nearest", "bf16") < 0.6 * copies


@pytest.mark.parametrize("fields", [
    {"masters": "stochastic", "precision": "bf16", "recompute": "full"}, {"masters": "compensated"},
    {"masters": "stochastic", "optimizer__name": "adamw", "precision": "bf16"},
], ids=["stochastic", "compensated, copies in fp32", "adamw"])
def test_freed_gradients_give_the_weights_that_kept_ones_give(fields: dict, recipe: Recipes) -> None:
    """Bit for bit where nothing is clipped, QK-Clip of every head included; and the norm is that of all gradients."""
    common = {**fields, "optimizer__grad_clip": None, "optimizer__qk_clip": 1e-3, "guard": {"spike_factor": None}}
    kept, freed = make(recipe(**common)), make(recipe(**common, gradients="freed"))
    alive = []
    update = freed.optimizer.update_early

    def watched(master: torch.Tensor) -> None:
        alive.append(sum(m.numel() for m in freed.masters.named.values() if m.grad is not None and m.grad.any()))
        update(master)

    freed.optimizer.update_early = watched
    for _ in range(3):
        a, b = kept.train_step(), freed.train_step()
        assert a["clipped_heads"] == b["clipped_heads"] and any(a["clipped_heads"])
        for name in ("loss", "grad_norm", "update_rms"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    for name, master in kept.masters.named.items():
        assert torch.equal(master, freed.masters.named[name]), name
    largest = max(m.numel() for m in freed.masters.named.values())
    rest = sum(m.numel() for name, m in freed.masters.named.items() if m.ndim < 3 and "embed" not in name)
    assert max(alive) <= largest + rest and len(alive) == 3 * 4


def test_clipping_by_the_last_norm(recipe: Recipes) -> None:
    """Every early gradient is scaled by the larger of the last step's norm and its own; the first step by its own."""
    limit = 1e-3
    trainer = make(recipe(masters="stochastic", optimizer__grad_clip=limit, **FREED))
    seen = []
    update = trainer.optimizer.update_early

    def watched(master: torch.Tensor) -> None:
        seen.append(grad_norm([master]).item())
        update(master)

    trainer.optimizer.update_early = watched
    first = trainer.train_step()["grad_norm"]
    assert seen == pytest.approx([limit] * 4, rel=0.02)  # bf16 rounds them
    seen.clear()
    trainer.train_step()
    assert trainer.early.last_norm != first and max(seen) < limit
    plain = make(recipe(masters="stochastic", optimizer__grad_clip=None, **FREED))
    plain.train_step()
    for name, master in trainer.masters.named.items():
        assert master.isfinite().all(), name
    assert first == pytest.approx(make(recipe(masters="stochastic")).train_step()["grad_norm"], rel=1e-4)


def test_a_loss_that_is_not_finite_changes_nothing(recipe: Recipes) -> None:
    trainer = make(recipe(masters="compensated", **FREED))
    trainer.train_step()
    before = {name: master.clone() for name, master in trainer.masters.named.items()}
    loss = trainer.model.loss

    def broken(*args: object) -> object:
        found = loss(*args)
        return found._replace(loss_sum=found.loss_sum * math.nan)

    trainer.model.loss = broken
    norm = trainer.early.last_norm
    record = trainer.train_step()
    assert "loss is nan" in record["skipped"]
    assert all(torch.equal(master, before[name]) for name, master in trainer.masters.named.items())
    trainer.model.loss = loss
    assert trainer.early.last_norm == norm and "skipped" not in trainer.train_step()


@pytest.mark.parametrize("fields", [
    {"masters": "stochastic", **FREED},
    {"masters": "compensated", "micro_batch_size": 2, "precision": "bf16"},
], ids=["stochastic, freed", "compensated, kept"])
def test_resuming_gives_the_same_bits(fields: dict, recipe: Recipes, tmp_path: Path) -> None:
    plan = recipe(optimizer__grad_clip=0.01, **fields)
    whole, again = make(plan), make(plan)
    for _ in range(2):
        whole.train_step()
    resume(again, Checkpoints(None, tmp_path, {}).save(whole))
    for _ in range(2):
        one, other = whole.train_step(), again.train_step()
        assert {**one, **dict.fromkeys(TIMES)} == {**other, **dict.fromkeys(TIMES)}
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, again.weights()[name]), name
    tensors, _ = whole.optimizer.named_state()
    for name, tensor in again.optimizer.named_state()[0].items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, name
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim > 1} == {torch.bfloat16}
    assert any(name.endswith("/residual") for name in tensors) == (plan.masters == "compensated")


@pytest.mark.parametrize(("overrides", "said"), [
    (["gradients=freed"], "needs masters=stochastic"),
    (["gradients=freed", "masters=stochastic"], "guard.spike_factor=null"),
    (["gradients=freed", "masters=stochastic", "guard.spike_factor=null", "micro_batch_size=4"], "batch_size=8"),
    (["masters=stochastic", "qat.start_step=1"], "qat quantises copies"),
    (["masters=bf16"], "masters"),
])
def test_what_a_recipe_cannot_ask_for(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("pico", overrides)


def test_several_processes_are_refused_in_one_line(recipe: Recipes) -> None:
    with pytest.raises(UserError, match="masters=stochastic is for one process"):
        make_trainer(recipe(masters="stochastic"), World(0, 2, torch.device("cpu")), RepeatedBatch(torch.zeros(4, 33)))


def test_weights_drawn_on_the_device_have_the_distribution_of_the_others(recipe: Recipes) -> None:
    plan = recipe(model={**MODEL, "n_routed_experts": 32})
    models = []
    for seed in (0, 0, 1):
        model = Transformer(plan.model)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.ndim > 1 else parameter.data
        models.append(_draw_on_device(model, seed))
    for name, one in models[0].named_parameters():
        same, other = (model.get_parameter(name) for model in models[1:])
        assert torch.equal(one, same)
        if one.ndim == 1:
            assert (one == 1).all(), name
            continue
        assert not torch.equal(one, other)
        count, deviation = one.numel(), plan.model.initializer_range
        values = one.detach().double() / deviation
        assert abs(values.mean()) < 5 / count**0.5 and abs(values.std() - 1) < 5 / (2 * count) ** 0.5 + 1e-3, name
    stack = dict(models[0].named_parameters())["model.layers.1.mlp.experts.down_proj"]
    assert not torch.equal(stack[0], stack[1])


@pytest.mark.parametrize("masters", ["fp32", "stochastic", "compensated"])
def test_memory_that_lasts_is_counted_to_the_byte(masters: str, recipe: Recipes) -> None:
    """Weights, masters, optimizer state and gradients of a trainer in bf16, storage by storage."""
    plan = recipe(masters=masters, precision="bf16", model={**MODEL, "num_nextn_predict_layers": 1})
    trainer, counted = make(plan), training_memory(plan)
    trainer.train_step()
    trainer._accumulate(next(trainer.stream), 1)
    parameters, masters_of = list(trainer.model.parameters()), trainer.masters.named
    state = [value for name, value in trainer.optimizer.named_state()[0].items() if not name.endswith("/step")]
    residuals = [value for name, value in trainer.optimizer.named_state()[0].items() if name.endswith("/residual")]
    found = {
        "weights": sum(p.nbytes for p in parameters),
        "masters": sum(m.nbytes for m in masters_of.values()) - sum(
            m.nbytes for m in masters_of.values() if any(m is p for p in parameters)),
        "second halves of the weights": sum(value.nbytes for value in residuals),
        "momentum and moments": sum(value.nbytes for value in state) - sum(value.nbytes for value in residuals),
        "gradients": sum(m.grad.nbytes for m in masters_of.values()),
    }
    assert found == {name: counted[name] for name in found}
    if masters == "fp32":
        assert least_training_bytes(plan) == 12 * sizes(plan.model).parameters
    else:
        assert least_training_bytes(plan) == sum(found.values())


def test_moonlight_fits_one_gpu_of_139_gib() -> None:
    """The published parameters at 2 + 2 bytes: 16B x 4 = 64 GB, two more for the tables' second moments."""
    plan = load_recipe("moonlight-16b")
    parts = training_memory(plan)
    assert plan.sequence_length == 8192 and sum(parts.values()) < 125 * 2**30
    tables = 2 * 163840 * 2048
    lasting = parts["weights"] + parts["momentum and moments"]
    assert lasting == pytest.approx(15_960_110_208 * 4 + 2 * tables, rel=1e-4)
    assert sum(training_memory(load_recipe("moonlight-16b", ["masters=compensated", "batch_size=1"])).values()) \
        < 125 * 2**30
    assert sum(training_memory(load_recipe("moonlight-16b", ["masters=fp32", "gradients=kept"])).values()) > 200 * 2**30
