"""The network's configuration: published files read exactly, and everything else refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moonbase.config import ModelConfig, RopeScaling, read_json, yarn_mscale
from moonbase.errors import UserError
from moonbase.presets import load_preset, preset_config, preset_names


def published(preset: str = "kimi-k2") -> dict[str, Any]:
    """A config.json as its publisher would write it."""
    return preset_config(preset).to_hf()


@pytest.mark.parametrize(
    ("preset", "scale"),
    [("kimi-k2", 0.130861), ("deepseek-v3", 0.135234), ("kimi-k2.5", 0.144680), ("moonlight-16b", 0.072169)],
)
def test_softmax_scale(preset: str, scale: float) -> None:
    assert round(preset_config(preset).softmax_scale, 6) == scale


@pytest.mark.parametrize(("factor", "temperature"), [(1, 1.0), (32, 1.346574), (40, 1.368888), (64, 1.415888)])
def test_yarn_temperature(factor: float, temperature: float) -> None:
    assert yarn_mscale(factor, 1.0) == pytest.approx(temperature, abs=5e-7)


def test_published_k25_file_equals_the_preset(shared_data: Path) -> None:
    path = shared_data / "kimi-k25-tokenizer" / "config.json"
    if not path.is_file():
        pytest.skip(f"the published K2.5 configuration is absent: {path}")
    config, preset = ModelConfig.parse(read_json(path), source=str(path)), preset_config("kimi-k2.5")
    # Published copies disagree about the end-of-text id (163585 or 163586); the preset stops on both.
    assert config.model_copy(update={"eos_token_id": preset.eos_token_id}) == preset
    assert set(config.eos_token_ids) <= set(preset.eos_token_ids) == {163585, 163586}
    assert ModelConfig.from_folder(path.parent) == config


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_survives_the_hugging_face_file(preset: str) -> None:
    config = preset_config(preset)
    again = ModelConfig.parse(json.loads(json.dumps(config.to_hf())))
    assert again.model_copy(update={"model_type": config.model_type}) == config


@pytest.mark.parametrize("preset", [name for name in preset_names() if name != "deepseek-v3.2"])
def test_transformers_reads_what_is_written(preset: str) -> None:
    from transformers import DeepseekV3Config

    config = preset_config(preset)
    theirs = DeepseekV3Config(**config.to_hf())
    for name in ("hidden_size", "q_lora_rank", "kv_lora_rank", "n_routed_experts", "routed_scaling_factor", "n_group",
                 "topk_group", "first_k_dense_replace", "rms_norm_eps", "num_experts_per_tok", "v_head_dim"):
        assert getattr(theirs, name) == getattr(config, name), name
    # And what it writes in its own newer style is the same network to us.
    again = ModelConfig.parse(json.loads(theirs.to_json_string()))
    assert again.softmax_scale == config.softmax_scale
    assert again.rope_theta == config.rope_theta
    assert again.rope_scaling == config.rope_scaling


def test_presets_hold_the_published_values() -> None:
    k2, k25, v3 = (preset_config(name) for name in ("kimi-k2", "kimi-k2.5", "deepseek-v3"))
    assert (k2.rope_scaling.factor, k2.rope_scaling.beta_fast, k2.rms_norm_eps) == (32, 1, 1e-6)
    assert (k25.rope_scaling.factor, k25.rope_scaling.beta_fast, k25.rms_norm_eps) == (64, 32, 1e-5)
    assert (v3.rope_scaling.factor, v3.n_group, v3.topk_group, v3.first_k_dense_replace) == (40, 8, 4, 3)
    assert preset_config("moonlight-16b").q_lora_rank is None
    assert k2.max_position_embeddings == 131_072 and k25.max_position_embeddings == 262_144


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"wonderful_new_attention": 3}, "wonderful_new_attention=3"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"n_group": 7}, "n_group=7"),
        ({"n_group": 384, "topk_group": 384}, "at least two experts"),
        ({"topk_group": 2}, "topk_group=2"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok=385"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace"),
        ({"index_topk": 2048}, "index_topk"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "rope_scaling.truncate"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"q_lora_rank": -1536}, "q_lora_rank"),
        ({"index_n_heads": 0, "index_head_dim": 8, "index_topk": 8}, "index_n_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [1, True]}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"rope_scaling": {"type": "yarn", "factor": "32"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": True}}, "rope_scaling.factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"no_such\nfield": 1}, r"no_such\nfield"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "no\nsuch": 1}}, r"no\nsuch"),
        ({"num_attention_heads": "6\n4", "num_key_value_heads": 64}, r"6\n4"),
        ({"num_attention_heads": 64, "num_key_value_heads": "6\n4"}, r"6\n4"),
    ],
)
def test_what_cannot_be_represented_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.parse(published() | change, source="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert named in message
    assert "\n" not in message


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r"hidden_act.*sliding_window.*no_such_field"):
        ModelConfig.parse(published() | {"hidden_act": "gelu", "sliding_window": 5, "no_such_field": 1})
    with pytest.raises(UserError, match=r"vocab_size.*hidden_size"):
        ModelConfig.parse(published() | {"hidden_size": -1, "vocab_size": 0})


def test_a_missing_field_is_named() -> None:
    values = published()
    del values["kv_lora_rank"]
    with pytest.raises(UserError, match="kv_lora_rank: Field required"):
        ModelConfig.parse(values)


@pytest.mark.parametrize("values", [[], "text", None, 3])
def test_not_a_mapping(values: Any) -> None:
    with pytest.raises(UserError, match="expected a mapping"):
        ModelConfig.parse(values)


def test_bookkeeping_fields_are_ignored() -> None:
    extra = {"use_cache": True, "torch_dtype": "bfloat16", "auto_map": {}, "transformers_version": "4.56.2",
             "quantization_config": {"quant_method": "fp8"}, "pretraining_tp": 1, "ep_size": 1}
    assert ModelConfig.parse(published() | extra) == ModelConfig.parse(published())


def test_outer_multimodal_file_is_unwrapped() -> None:
    outer = {"model_type": "kimi_k25", "vision_config": {"patch_size": 14}, "text_config": published("kimi-k2.5")}
    assert ModelConfig.parse(outer) == ModelConfig.parse(published("kimi-k2.5"))


def test_newer_spelling_of_rope() -> None:
    values = published()
    scaling = values.pop("rope_scaling")
    theta = values.pop("rope_theta")
    kind = scaling.pop("type")
    values["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, "attention_factor": None, **scaling}
    assert ModelConfig.parse(values) == ModelConfig.parse(published())
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0}
    plain = ModelConfig.parse(values)
    assert plain.rope_scaling is None and plain.rope_theta == 5.0


def test_attention_factor_must_be_the_one_that_follows() -> None:
    """transformers multiplies by a stated factor instead of the one that it would compute: ours is the latter."""
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = published()
    equal_scales = values["rope_scaling"]
    plain = {name: value for name, value in equal_scales.items() if not name.startswith("mscale")}
    for scaling, factor in ((equal_scales, 1.0), (plain, yarn_mscale(32, 1.0))):
        config = ModelConfig.parse(values | {"rope_scaling": scaling})
        assert config.rope_scaling.attention_factor == factor
        theirs = DeepseekV3Config(**values | {"rope_scaling": dict(scaling)})
        assert ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[1] == pytest.approx(factor)
        stated = values | {"rope_scaling": {**scaling, "attention_factor": factor}}
        assert ModelConfig.parse(stated) == config
        for wrong in (factor + 0.01, "1.0"):
            stated["rope_scaling"]["attention_factor"] = wrong
            with pytest.raises(UserError, match=r"rope_scaling: attention_factor=.* is unsupported"):
                ModelConfig.parse(stated)


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096}
"""Kimi K2's, as transformers 5 spells it."""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": [YARN]}, "rope_parameters=["),
        ({"rope_parameters": []}, "rope_parameters=[]"),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn'"),
        ({"rope_parameters": False}, "rope_parameters=False"),
        ({"rope_parameters": {"factor": 32.0}}, "rope_type is missing"),
        ({"rope_parameters": {"full_attention": YARN}}, "rope_type is missing"),
        ({"rope_parameters": YARN | {"factor": "32"}}, "rope_parameters.factor"),
        ({"rope_parameters": YARN | {"type": "linear"}}, "rope_parameters.rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "rope_parameters.rope_type='default'"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 2}}, "rope_scaling.partial_rotary_factor=2"),
        ({"rope_parameters": YARN | {"rope_interleave": False}}, "rope_parameters.rope_interleave=False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": YARN}, "rope_scaling.type"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear"}}, "rope_parameters.type"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 40}}, "rope_scaling and rope_parameters disagree"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": YARN}, "disagree"),
        ({"rope_theta": 5e4, "rope_parameters": YARN | {"rope_theta": 1e4}}, "rope_parameters.rope_theta=10000.0"),
        ({"rope_theta": 5e4, "rope_scaling": YARN | {"rope_theta": 1e4}}, "rope_scaling.rope_theta=10000.0"),
    ],
)
def test_no_rotary_embedding_is_lost(change: dict[str, Any], named: str) -> None:
    plain = {name: value for name, value in published().items() if name != "rope_scaling"}
    with pytest.raises(UserError) as caught:
        ModelConfig.parse(plain | change, source="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ") and named in message and "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 50000}},
        {"rope_scaling": YARN, "rope_parameters": YARN | {"type": "yarn", "factor": 32, "rope_theta": 5e4}},
        {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5e4}},
        {"rope_scaling": YARN | {"partial_rotary_factor": 1.0, "rope_interleave": True}, "partial_rotary_factor": 1},
        {"rope_scaling": YARN | {"partial_rotary_factor": None}, "partial_rotary_factor": None},
    ],
    ids=str,
)
def test_agreeing_spellings_of_rope_are_one(change: dict[str, Any]) -> None:
    config = ModelConfig.parse(published() | change)
    assert config == preset_config("kimi-k2").model_copy(update={"model_type": config.model_type})


def test_whole_numbers_do_for_fractions_and_exponents_of_yaml_are_numbers() -> None:
    config = ModelConfig.parse(published() | {"rope_theta": 50000, "routed_scaling_factor": 3, "rms_norm_eps": "1e-6"})
    assert (config.rope_theta, config.routed_scaling_factor, config.rms_norm_eps) == (50000.0, 3.0, 1e-6)
    assert {type(value) for value in (config.rope_theta, config.routed_scaling_factor, config.rms_norm_eps)} == {float}


STATED = ("first_k_dense_replace", "q_lora_rank", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob",
          "routed_scaling_factor")


@pytest.mark.parametrize("preset", ["kimi-k2.5", "moonlight-16b"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_states_what_has_no_safe_default(preset: str, nested: bool, tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def write(values: dict[str, Any]) -> None:
        path.write_text(json.dumps({"text_config": values} if nested else values), encoding="utf-8")

    whole = published(preset)
    write(whole)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.parse(whole)
    for name in STATED:
        write({key: value for key, value in whole.items() if key != name})
        with pytest.raises(UserError, match=rf"^{path}: missing field {name} \("):
            ModelConfig.from_folder(tmp_path)
    write({key: value for key, value in whole.items() if key not in STATED})
    with pytest.raises(UserError, match="missing field " + ", ".join(STATED)):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("rank", [None, 24])
def test_what_transformers_saves_states_everything(rank: int | None, tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    DeepseekV3Config(q_lora_rank=rank).save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.q_lora_rank, config.n_group, config.topk_group, config.routed_scaling_factor) == (rank, 8, 4, 2.5)


def test_frozen_and_closed() -> None:
    config = preset_config("pico")
    with pytest.raises(ValidationError):
        config.hidden_size = 3
    with pytest.raises(ValidationError):
        RopeScaling(factor=2.0, no_such=1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b'{"a": 1,\n "b": }', "not valid JSON at line 2"), (b"\xff\xfe{}", "cannot be read"), (b"", "at line 1"),
     (b"[" * 100_000, "nested too deeply"), (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read")],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        ModelConfig.from_folder(tmp_path)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"no preset 'k3'.*kimi-k2.*pico"):
        load_preset("k3")
