"""The configuration blocks against the published files and against transformers."""

from __future__ import annotations

import json
from pathlib import Path

from compressed_tensors.quantization import QuantizationConfig

from moonbase.checkpoint import read_config
from moonbase.checkpoint.quantization import Quantization, quantization_block, read_quantization
from moonbase.presets import preset_config


def test_published_kimi_k25_configuration(shared_data: Path) -> None:
    folder = shared_data / "kimi-k25-tokenizer"
    # The preset stops on [EOS] as well as on <|im_end|>, which alone is named here.
    preset = preset_config("kimi-k2.5").model_copy(update={"eos_token_id": 163586})
    assert read_config(folder) == preset
    assert read_quantization(folder) == Quantization("int4", group=32)
    published = json.loads((folder / "config.json").read_text())["text_config"]["quantization_config"]
    assert quantization_block("hf-int4") == published


def test_int4_block_is_valid_for_compressed_tensors() -> None:
    block = QuantizationConfig.model_validate(quantization_block("hf-int4"))
    weights = block.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric, weights.strategy) == (4, 32, True, "group")


def test_eh_proj_is_named_where_there_is_one() -> None:
    with_mtp, without = quantization_block("hf-int4", mtp=True), quantization_block("hf-int4")
    assert set(with_mtp["ignore"]) - set(without["ignore"]) == {"re:.*eh_proj.*"}


def test_plain_folders_have_none(written) -> None:
    assert read_quantization(written("k2")[1]) is None
    assert quantization_block("hf") is None
