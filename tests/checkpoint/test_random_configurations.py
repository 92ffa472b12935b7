"""Random tiny configurations of every kind: transformers computes the same from what we write, and every byte returns.

Weights come from transformers' own module and its own files; it reads back our export, without remote code.
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings

from moonbase.checkpoint import read_config, save_weights
from moonbase.model import Transformer
from tests.checkpoint.configurations import (
    SETTINGS,
    TEMPERATURES,
    configurations,
    covering_choices,
    misplaced,
    misread,
    pairs_of,
    values_of,
)
from tests.checkpoint.test_logits_match_transformers import greedy, imported, our_mtp_logits, peer_mtp_logits
from tests.checkpoint.test_writer import disk, fingerprint, pretrained
from tests.checkpoint.variants import add_mtp, assert_same, hf_model

TOLERANCE = 1e-4
"""The largest difference of two fp32 logits."""
COVERING = covering_choices()


def tokens_for(values: dict[str, Any]) -> torch.Tensor:
    """[2, 48]: three times as far as the context that YaRN extends."""
    return torch.randint(0, values["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(3))


def write_source(values: dict[str, Any], folder: Path) -> None:
    """A checkpoint as transformers writes it, with the multi-token-prediction module where there is to be one."""
    hf_model(values).save_pretrained(folder)
    if values["num_nextn_predict_layers"]:
        add_mtp(folder)


def assert_varied(logits: torch.Tensor) -> None:
    """A difference anywhere must show: logits differ from token to token and from place to place."""
    assert logits.std(dim=-1).mean() > 0.5 and logits.std(dim=1).mean() > 0.3, "too even to tell anything"
    assert len(logits.argmax(-1).unique()) > 5


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    return (found - expected).abs().max().item()


@torch.no_grad()
def check_everything(values: dict[str, Any], place: Path) -> tuple[Transformer, torch.Tensor]:
    """Import, export, import, export; then both programs on the export. Returns our model and the peer's logits."""
    source, one, two = (place / name for name in ("source", "one", "two"))
    write_source(values, source)
    has_mtp = values["num_nextn_predict_layers"] > 0
    ours = imported(source, mtp=has_mtp)
    save_weights(ours, one, ours.config, max_shard_bytes=100_000)
    assert_same(disk(one), disk(source))
    again = imported(one, mtp=has_mtp)
    assert again.config == ours.config == read_config(source)
    assert_same(dict(again.state_dict()), dict(ours.state_dict()))
    save_weights(again, two, again.config, max_shard_bytes=100_000)
    assert fingerprint(one) == fingerprint(two)

    # Its grouped experts refuse odd widths.
    theirs, unexpected = pretrained(one, experts_implementation="eager")
    assert all(name.startswith(f"model.layers.{values['num_hidden_layers']}.") for name in unexpected)
    assert bool(unexpected) == has_mtp
    tokens = tokens_for(values)
    expected = theirs(tokens).logits
    assert_varied(expected)
    assert difference(again(tokens), expected) < TOLERANCE
    if has_mtp:
        expected_further = peer_mtp_logits(theirs, tokens)
        assert_varied(expected_further)
        assert difference(our_mtp_logits(again, tokens), expected_further) < TOLERANCE
    prompt = tokens[:, :8]
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
    assert torch.equal(greedy(again, prompt, 16), continued)
    return again, expected


def test_the_covering_set_holds_every_value_and_every_pair_of_values() -> None:
    found = set().union(*map(pairs_of, COVERING))
    names = list(SETTINGS)
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            assert {((name, a), (other, b)) for a, b in product(SETTINGS[name], SETTINGS[other])} <= found
    assert len(COVERING) < 40


@pytest.mark.parametrize("choice", COVERING, ids=lambda choice: "-".join(map(str, choice.values())).replace(" ", ""))
def test_every_setting_with_every_other(choice: dict[str, Any], tmp_path: Path) -> None:
    values = values_of(choice)
    ours, expected = check_everything(values, tmp_path)
    tokens = tokens_for(values)
    with torch.no_grad():
        for piece, config in misread(ours.config):
            other = Transformer(config)
            other.load_state_dict(ours.state_dict())
            assert difference(other(tokens), expected) > 10 * TOLERANCE, f"{piece} makes no difference here"
        for mistake, name, change in misplaced(ours):
            tensor = ours.state_dict()[name]
            right = tensor.clone()
            tensor.copy_(change(right))
            assert difference(ours(tokens), expected) > 10 * TOLERANCE, f"{mistake}: makes no difference here"
            tensor.copy_(right)
        assert difference(ours(tokens), expected) < TOLERANCE


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), TEMPERATURES)
def test_every_temperature_of_yarn(mscale: float, mscale_all_dim: float, tmp_path: Path) -> None:
    values = values_of(next(choice for choice in COVERING if choice["factor"] == 40))
    values["rope_scaling"] |= dict(mscale=mscale, mscale_all_dim=mscale_all_dim)
    check_everything(values, tmp_path)


@given(values=configurations())
# Without shrinking, which would build hundreds of models.
@settings(max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_any_configuration(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        check_everything(values, Path(place))
