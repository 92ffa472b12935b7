"""Quantisation-aware training: what the network computes with, where gradients go, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

import moonbase
from moonbase.checkpoint import convert
from moonbase.data import Batch, Corpus, PackedStream
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.ops.attention import Documents
from moonbase.recipe import Recipe, int4_rule_of, load_next_recipe
from moonbase.train.assembly import make_trainer
from moonbase.train.callbacks.checkpoints import resume
from moonbase.train.trainer import Trainer
from tests.train.tiny import MODEL, ONE, content, go_on, metrics, run, stop_after, tensors

Recipes = Callable[..., Recipe]
WIDE = MODEL | {"moe_intermediate_size": 32}
EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")


@pytest.fixture(scope="session")
def corpus(whole: Path) -> Corpus:
    return Corpus.open(whole / "corpus")


def make(plan: Recipe, corpus: Corpus) -> Trainer:
    return make_trainer(plan, ONE, PackedStream(corpus, "train", plan.sequence_length, plan.batch_size, plan.seed))


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """absmax/7 in groups of 32, with a gradient that passes straight through: the textbook form."""
    groups = weight.unflatten(-1, (-1, 32))
    scale = (groups.detach().abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    numbers = groups / scale
    return ((numbers + (numbers.round().clamp(-7, 7) - numbers).detach()) * scale).flatten(-2)


@pytest.mark.parametrize(("model", "dtype"), [
    (WIDE, torch.float32), (WIDE | {"num_nextn_predict_layers": 1}, torch.float32), (WIDE, torch.bfloat16),
], ids=["fp32", "with a module that looks ahead", "bf16"])
def test_loss_and_gradients_are_those_of_the_textbook(
    model: dict[str, Any], dtype: torch.dtype, recipe: Recipes, corpus: Corpus
) -> None:
    """In bf16 the copies are what INT4 makes of the fp32 masters, rounded once; the gradients are the masters'."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    plan = recipe(model=model, qat__start_step=0, optimizer__grad_clip=None, micro_batch_size=2, precision=precision)
    plain = make(recipe(model=model), corpus).model
    batch: Batch = next(PackedStream(corpus, "train", plan.sequence_length, plan.batch_size, plan.seed))
    masters = {name: parameter.detach().requires_grad_() for name, parameter in plain.named_parameters()}
    quantized = [name for name in masters if ".mlp.experts." in name]
    assert len(quantized) == 2 + 2 * len(plain.mtp)
    targets = int((batch.targets >= 0).sum())
    for rows in (slice(0, 2), slice(2, 4)):
        replaced = {name: (by_hand(master) if name in quantized else master).to(dtype)
                    for name, master in masters.items()}
        documents = Documents.from_ids(batch.documents[rows], torch.device("cpu"))
        loss = torch.func.functional_call(
            Loss(plain), {f"model_.{name}": value for name, value in replaced.items()},
            (batch.tokens[rows], batch.targets[rows], documents))
        token_loss = (loss.loss_sum + plan.mtp_loss * loss.mtp_loss_sum) / targets
        (token_loss + plan.balance.sequence_loss * loss.balance_loss / 2).backward()

    trainer = make(plan, corpus)
    gradients: dict[str, torch.Tensor] = {}
    trainer.optimizer.step = lambda **_: gradients.update(  # type: ignore[method-assign]
        {name: master.grad.clone() for name, master in trainer.masters.named.items()})
    trainer.optimizer.update_rms = lambda: torch.zeros(())  # type: ignore[method-assign]
    record = trainer.train_step()
    assert record["int4"] is True
    unquantized = make(recipe(model=model, precision=precision), corpus).train_step()
    assert record["loss"] != pytest.approx(unquantized["loss"], rel=1e-6)
    for name, parameter in masters.items():
        assert gradients[name].dtype == torch.float32
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


class Loss(torch.nn.Module):
    """The model's loss as a module's forward, which `functional_call` wants."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model_ = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, documents: Documents):
        return self.model_.loss(tokens, targets, documents, None)


def test_it_begins_at_the_chosen_step_and_touches_experts_alone(recipe: Recipes, corpus: Corpus) -> None:
    plain, late = make(recipe(model=WIDE), corpus), make(recipe(model=WIDE, qat__start_step=2), corpus)
    for step in range(4):
        for trainer in (plain, late):
            trainer.record = trainer.train_step()  # type: ignore[attr-defined]
        assert late.record["int4"] is (step >= 2)  # type: ignore[attr-defined]
        assert (late.record["loss"] == plain.record["loss"]) is (step < 2)  # type: ignore[attr-defined]
    for name, parameter in late.model.named_parameters():
        master = late.masters.named[name]
        assert torch.equal(parameter, by_hand(master) if name in EXPERTS else master) and (
            (parameter is master) is (name not in EXPERTS))


def test_a_resumed_run_is_the_same_to_the_bit(recipe: Recipes, tmp_path: Path) -> None:
    """Stopped before quantisation began, and again after."""
    plan = recipe(model=WIDE, qat__start_step=5)
    run(plan, tmp_path / "whole")
    run(plan, tmp_path / "parts", on_ready=stop_after(4))
    go_on(tmp_path / "parts", on_ready=stop_after(7))
    go_on(tmp_path / "parts")
    assert [line["int4"] for line in metrics(tmp_path / "parts")] == [False] * 5 + [True] * 7
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    last = "checkpoints/step-000012"
    assert content(tmp_path / "parts" / last) == content(tmp_path / "whole" / last)


def test_the_checkpoint_is_a_master_and_its_int4_form_is_what_was_trained(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """convert → what compressed-tensors reads → the very numbers that the last validation saw."""
    plan = recipe(model=WIDE, qat__rule="absmax/7.5", steps=3, validate_every=3)
    run(plan, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    assert int4_rule_of(tmp_path / "run") == int4_rule_of(checkpoint) == "absmax/7.5"
    monkeypatch.chdir(checkpoint.parent)
    convert(checkpoint.name, tmp_path / "int4", "hf-int4", dtype=torch.float32)

    model = moonbase.load(tmp_path / "int4")
    trainer = make_trainer(plan, ONE, PackedStream(Corpus.open(tmp_path / "run" / "corpus"), "train", 32, 4, 1))
    resume(trainer, checkpoint)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
        # Whoever loads the run computes with what was trained; training further starts from the masters.
        assert torch.equal(parameter, moonbase.load(tmp_path / "run").get_parameter(name)), name
    assert not torch.equal(trainer.masters.named[EXPERTS[0]], model.get_parameter(EXPERTS[0]))

    stored = tensors(tmp_path / "int4")
    prefix = "model.layers.1.mlp.experts.3.down_proj.weight"
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    packed = {"weight_packed": stored[prefix + "_packed"], "weight_scale": stored[prefix + "_scale"].float(),
              "weight_shape": stored[prefix + "_shape"]}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32))
    theirs = compressor.decompress(packed, scheme)["weight"]
    assert torch.equal(theirs, trainer.model.get_parameter(EXPERTS[1])[3])


def test_an_int4_checkpoint_is_a_valid_master(recipe: Recipes, tmp_path: Path) -> None:
    run(recipe(model=WIDE, steps=3), tmp_path / "run")
    convert(tmp_path / "run" / "checkpoints" / "step-000003", tmp_path / "int4", "hf-int4", dtype=torch.float32,
            int4_rule="absmax/7.5")
    for rule in ("absmax/7", "absmax/7.5", "least-error"):
        plan = recipe(model=WIDE, stage="continue", init=str(tmp_path / "int4"), qat__rule=rule)
        trainer = make_trainer(plan, ONE, PackedStream(Corpus.open(tmp_path / "run" / "corpus"), "train", 32, 4, 1))
        trainer.masters.prepare(0)
        for name in EXPERTS:
            assert torch.equal(trainer.model.get_parameter(name), trainer.masters.named[name])


def test_what_was_trained_in_int4_goes_on_in_it(recipe: Recipes, tmp_path: Path) -> None:
    run(recipe(model=WIDE, qat__start_step=1, qat__rule="least-error", steps=2), tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000002"):
        further = load_next_recipe(str(source), ["stage=continue", "data=texts", "sequence_length=32"])
        assert further.qat is not None and (further.qat.start_step, further.qat.rule) == (0, "least-error")


def test_a_run_that_had_not_begun_with_it_is_loaded_as_it_is(recipe: Recipes, tmp_path: Path) -> None:
    run(recipe(model=WIDE, qat__start_step=8), tmp_path / "run", on_ready=stop_after(8))
    stored = tensors(tmp_path / "run" / "checkpoints" / "step-000008")
    loaded = moonbase.load(tmp_path / "run").get_parameter(EXPERTS[1])
    assert torch.equal(loaded[3], stored["model.layers.1.mlp.experts.3.down_proj.weight"])


def test_a_skipped_step_does_not_put_it_off(recipe: Recipes, corpus: Corpus) -> None:
    trainer = make(recipe(model=WIDE, qat__start_step=2), corpus)
    trainer.train_step()
    trainer.guard.reason_to_skip = lambda loss, norm: "asked by a test"  # type: ignore[method-assign]
    assert trainer.train_step()["int4"] is False
    assert trainer.train_step()["int4"] is True


def test_a_start_that_is_never_reached(recipe: Recipes) -> None:
    with pytest.raises(UserError, match=r"qat\.start_step=12 lies behind the last of steps=12"):
        recipe(model=WIDE, qat__start_step=12)


def test_widths_that_groups_do_not_divide(recipe: Recipes) -> None:
    with pytest.raises(UserError, match=r"qat needs model\.moe_intermediate_size to be a multiple of 32, found 16"):
        recipe(qat__start_step=0)
