"""The proof that names, layouts and arithmetic agree: one checkpoint, two implementations, the same logits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers.modeling_layers import MtpModel

from moonbase.checkpoint import load_weights, read_config, save_weights
from moonbase.model import Transformer
from moonbase.model.rope import rotations
from tests.checkpoint.test_writer import disk, pretrained
from tests.checkpoint.variants import add_mtp, assert_same

TOKENS = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(3))


def imported(folder: Path, mtp: bool = False) -> Transformer:
    config = read_config(folder)
    if not mtp:
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    with torch.device("meta"):
        model = Transformer(config)
    load_weights(model, folder, config, mtp=mtp)
    return model.eval()


def greedy(logits_of, prompt: torch.Tensor, count: int) -> torch.Tensor:
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, logits_of(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def peer_mtp_logits(theirs, tokens: torch.Tensor) -> torch.Tensor:
    """[B, T-1, V] of transformers' multi-token-prediction module, read from the folder that `theirs` came from."""
    # transformers finds the module by DeepSeek-V3's layer number, 61.
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{theirs.config.num_hidden_layers}.*"]
    module = MtpModel.from_pretrained(theirs).eval()
    hidden = theirs.model(tokens[:, :-1]).last_hidden_state
    positions = torch.arange(hidden.shape[1])[None].expand(len(tokens), -1)
    return theirs.lm_head(module.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:]))


def our_mtp_logits(ours: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    hidden, _, _ = ours._hidden(tokens[:, :-1], None, None)
    rotation = rotations(ours.config, torch.arange(hidden.shape[1]))
    found, _ = ours.mtp[0](hidden, ours.model.embed_tokens(tokens[:, 1:]), *rotation)
    return ours.lm_head(found)


@torch.no_grad()
def test_logits_and_greedy_continuations(written, variant: str) -> None:
    theirs, folder = written(variant)
    ours = imported(folder)
    expected, found = theirs(TOKENS).logits, ours(TOKENS)
    assert found.dtype == torch.float32 and expected.abs().max() > 1, "logits too small to tell anything"
    assert (found - expected).abs().max() < 1e-4
    prompt = TOKENS[:, :8]
    continuation = greedy(ours, prompt, 24)
    assert torch.equal(continuation, greedy(lambda tokens: theirs(tokens).logits, prompt, 24))
    generated = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
    assert torch.equal(continuation, generated)


@torch.no_grad()
def test_our_model_written_and_read_by_transformers(written, variant: str, tmp_path: Path) -> None:
    ours = imported(written(variant)[1])
    save_weights(ours, tmp_path / "out", ours.config, max_shard_bytes=100_000)
    theirs, unexpected = pretrained(tmp_path / "out")
    assert not unexpected
    assert (ours(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["v3"], indirect=True)
def test_model_with_mtp_round_trip(written, variant: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(written(variant)[1], tmp_path / "source"))
    add_mtp(source)
    ours = imported(source, mtp=True)
    assert len(ours.mtp) == 1
    save_weights(ours, tmp_path / "out", ours.config)
    assert_same(disk(tmp_path / "out"), disk(source))
    with torch.no_grad():
        assert torch.equal(ours(TOKENS), imported(source)(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["v3"], indirect=True)
def test_mtp_logits(written, variant: str, tmp_path: Path) -> None:
    """The multi-token-prediction module against transformers' own, read from the same files."""
    source = Path(shutil.copytree(written(variant)[1], tmp_path / "source"))
    add_mtp(source)
    expected = peer_mtp_logits(pretrained(source)[0], TOKENS)
    assert expected.abs().max() > 1
    assert (our_mtp_logits(imported(source, mtp=True), TOKENS) - expected).abs().max() < 1e-4
