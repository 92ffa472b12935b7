"""What was trained in INT4 is what is served: through the command line and the engine, from the exported folder and
from the run itself; and two processes train as one."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

import moonbase
from moonbase import cli
from moonbase.data import Corpus, PackedStream
from moonbase.engine import Engine
from moonbase.model import Transformer
from moonbase.model.quantized_experts import QuantizedExperts
from moonbase.recipe import Recipe, load_recipe
from moonbase.train.assembly import make_trainer
from moonbase.train.callbacks.checkpoints import resume
from tests.engine.tiny import Bytes
from tests.train.test_parallel import LOSS, free_port
from tests.train.test_qat import WIDE
from tests.train.tiny import ONE, metrics, run, tensors, write_yaml

TOKENS = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(4))
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def convert(*arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["convert", *map(str, arguments)])
    assert left.value.code == 0


@torch.no_grad()
def logprobs(model: Transformer) -> torch.Tensor:
    """Of every token but the first, by the form that trains."""
    return model(TOKENS[None])[0, :-1].log_softmax(-1).gather(1, TOKENS[1:, None]).flatten()


@pytest.fixture(scope="module")
def trained(texts: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, three of them in INT4."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    file = write_yaml(folder, texts, tokenizer, model=WIDE, qat__start_step=1, steps=4, optimizer__lr=0.05)
    run(load_recipe(str(file)), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_what_is_served_is_what_was_trained(precision: str, tolerance: float, trained: Path, tmp_path: Path) -> None:
    """Log-probabilities under fake quantisation, and the engine's from words that were never multiplied out."""
    dtype, checkpoint = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], trained / "checkpoints/step-000004"
    plan = load_recipe(str(trained / "config.yaml"), [f"precision={precision}"])
    trainer = make_trainer(plan, ONE, PackedStream(Corpus.open(trained / "corpus"), "train", 32, 4, plan.seed))
    resume(trainer, checkpoint)
    expected, masters = logprobs(trainer.model), moonbase.load(checkpoint, device="cpu", dtype=dtype)
    for name, parameter in masters.named_parameters():
        parameter.data.copy_(trainer.masters.named[name])
    convert(trained, tmp_path / "int4", "--format", "hf-int4", "--dtype", precision)
    scores = []
    for source in (tmp_path / "int4", trained):
        model = moonbase.load(source, device="cpu", dtype=dtype, keep_int4="auto")
        assert sum(isinstance(module, QuantizedExperts) for module in model.modules()) == 1
        scores.append(torch.tensor(Engine(model, Bytes()).score(TOKENS.tolist()).logprobs))
        difference = (scores[-1] - expected).abs().max()
        assert difference < tolerance
        assert difference < 0.5 * (logprobs(masters) - expected).abs().max(), "not what the masters would say"
    assert torch.equal(*scores), "the run's masters are quantised to the words of the folder"


@pytest.mark.parametrize(("rule", "divisor"), [(None, 7), ("absmax/7.5", 7.5)])
def test_the_rule_on_the_command_line(rule: str | None, divisor: float, trained: Path, tmp_path: Path) -> None:
    """Without it the run's own."""
    convert(trained, tmp_path / "int4", "--format", "hf-int4", *(["--int4-rule", rule] if rule else []))
    master = tensors(trained / "checkpoints" / "step-000004")[EXPERT]
    scale = tensors(tmp_path / "int4")[EXPERT + "_scale"]
    assert torch.equal(scale, (master.unflatten(1, (-1, 32)).abs().amax(-1) / divisor).bfloat16())


@pytest.mark.multiprocess
def test_two_processes_train_as_one(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order now and then move a weight across the middle between two steps of its grid. Until then
    losses agree to single roundings."""
    recipe = load_recipe(str(trained / "config.yaml"), ["micro_batch_size=2"])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Forked, they need not load everything again.
    forked = multiprocessing.get_context("fork")
    both = [forked.Process(target=_one_of_two, args=(recipe, tmp_path / "two", rank)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    one, two = metrics(trained), metrics(tmp_path / "two")
    assert [line["int4"] for line in two] == [line["int4"] for line in one] == [False, True, True, True]
    assert [line["loss"] for line in two[:2]] == pytest.approx([line["loss"] for line in one[:2]], rel=LOSS)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=20 * LOSS)
    last = "checkpoints/step-000004"
    ours, theirs = (tensors(folder / last) for folder in (trained, tmp_path / "two"))
    assert (ours[EXPERT] - theirs[EXPERT]).norm() < 1e-3 * ours[EXPERT].norm()


def _one_of_two(recipe: Recipe, folder: Path, rank: int) -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    run(recipe, folder)
