"""`moonbase.load`: every kind of source, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moonbase
from moonbase.checkpoint import save_weights
from moonbase.data.tokenizer import train_tokenizer
from moonbase.errors import UserError
from moonbase.loading import load, load_tokenizer_of
from moonbase.model import Transformer
from tests.model.tiny import tiny_model

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints, the newer one of seed 2 and with a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    for seed in (1, 2):
        model = tiny_model(seed, vocab_size=320, num_nextn_predict_layers=1)
        save_weights(model, folder / "checkpoints" / f"step-{seed:06d}", model.config)
    train_tokenizer(["some words to merge, some more words"] * 9, 320).save(folder / "checkpoints" / "step-000002")
    return folder


def assert_same(one: Transformer, other: Transformer) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_folder_means_its_newest_checkpoint(run: Path) -> None:
    newest = tiny_model(2, vocab_size=320, num_nextn_predict_layers=1)
    for source in (run, str(run), run / "checkpoints", run / "checkpoints" / "step-000002"):
        model = moonbase.load(source, device="cpu")
        assert not model.training
        assert_same(model, newest)
    older = tiny_model(1, vocab_size=320, num_nextn_predict_layers=1)
    assert_same(load(run / "checkpoints" / "step-000001", device="cpu"), older)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), newest(TOKENS))


def test_dtype(run: Path) -> None:
    model = load(run, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}, "router biases are fp32 always"
    with torch.no_grad():
        assert model(TOKENS).dtype == torch.float32


def test_a_folder_that_transformers_wrote(tmp_path: Path) -> None:
    from transformers import DeepseekV3ForCausalLM

    from tests.model.tiny import hf_config

    model = tiny_model(3)
    theirs = DeepseekV3ForCausalLM(hf_config(model.config))
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path, device="cpu")(TOKENS), model(TOKENS))


def test_a_preset_is_random_and_always_the_same() -> None:
    model, again = load("preset:pico", device="cpu"), load("preset:pico", device="cpu")
    assert_same(model, again)
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert load("preset:pico", device="cpu", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("preset:kimi-k2", r"preset:kimi-k2: 4,10\d GB of random weights do not fit into the [\d,]+ GB of free memory; "
                           "take a smaller preset .*: moonbase info preset:kimi-k2"),
        ("preset:deepseek-v3.2", "index_topk"),
        ("preset:nonsense", "no preset 'nonsense'. Presets: .*pico"),
        ("preset:", "no preset ''"),
        ("no/such/folder", "no/such/folder: no such folder"),
        ("EMPTY", "neither a checkpoint .* nor a run folder"),
        ("UNFINISHED", r"no complete checkpoint \(step-000001: config.json is missing\)"),
        ("pico", "pico: a preset has no trained weights"),
        ("NO_WEIGHTS", "model.safetensors"),
    ],
)
def test_mistakes_are_one_line(source: str, says: str, run: Path, tmp_path: Path) -> None:
    if source == "UNFINISHED":
        (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    if source == "NO_WEIGHTS":
        (tmp_path / "config.json").write_bytes((run / "checkpoints/step-000001/config.json").read_bytes())
    with pytest.raises(UserError, match=says) as caught:
        load(tmp_path if source.isupper() else source)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_tokenizers(run: Path) -> None:
    tokenizer = load_tokenizer_of(run)
    assert tokenizer.decode(tokenizer.encode("some words, ünïcode")) == "some words, ünïcode"
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer_of(run / "checkpoints" / "step-000001")
    with pytest.raises(UserError, match="preset:pico: a preset has random weights and no tokenizer"):
        load_tokenizer_of("preset:pico")
