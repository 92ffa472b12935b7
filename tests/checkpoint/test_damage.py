"""Random damage to every file of a checkpoint: one line that names it, and nothing loaded.

`test_bad_folders` has one example of every kind with its exact words; here place and kind are drawn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moonbase.checkpoint import load_weights, read_config
from moonbase.checkpoint.quantization import quantization_block
from moonbase.checkpoint.reader import Checkpoint
from moonbase.config import ModelConfig
from moonbase.errors import UserError
from tests.checkpoint.variants import SENTINEL, add_mtp, assert_same, empty_state, load, quantise_fp8, quantise_int4

INDEX = "model.safetensors.index.json"
STORAGE = ("plain", "mtp", "fp8", "int4")


@pytest.fixture(scope="module")
def sound(written, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of two shards in every storage format."""
    folders = {}
    for storage in STORAGE:
        folder = tmp_path_factory.mktemp("sound") / storage
        folders[storage] = Path(shutil.copytree(written("v3" if storage == "mtp" else "k2")[1], folder))
        {"plain": lambda folder: None, "mtp": add_mtp, "fp8": quantise_fp8, "int4": quantise_int4}[storage](folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        put_shards(folder, tensors)
    return folders


def put_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names, weight_map = sorted(tensors), {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, folder / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`place(folder)` -> a fresh copy to spoil."""
    parent = tmp_path_factory.mktemp("damaged")

    def copy(folder: Path) -> Path:
        shutil.rmtree(parent / "model", ignore_errors=True)
        return Path(shutil.copytree(folder, parent / "model"))

    return copy


def refusal(folder: Path, config: ModelConfig) -> str | None:
    """The error of loading; None where it loads. Nothing may have been filled before an error."""
    state = empty_state(config)
    try:
        load_weights(state, folder, config)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(folder) in str(error)
        assert all((tensor == SENTINEL).all() for tensor in state.values()), "something was loaded"
        return str(error)
    assert not any((tensor == SENTINEL).all() for tensor in state.values())
    return None


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGE)
def test_a_shard_cut_off_anywhere(sound, place, storage: str) -> None:
    folder, random = place(sound[storage]), Random(storage)
    config = read_config(folder)
    for path in sorted(folder.glob("*.safetensors")):
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        cuts = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1]
        for cut in cuts + [random.randrange(len(whole)) for _ in range(25)]:
            path.write_bytes(whole[:cut])
            message = refusal(folder, config)
            assert message is not None and path.name in message
        path.write_bytes(whole)
    assert refusal(folder, config) is None


@pytest.mark.parametrize("storage", STORAGE)
def test_a_flipped_bit_in_a_header_is_refused_or_means_the_same(sound, place, storage: str) -> None:
    folder, random = place(sound[storage]), Random(storage)
    config, right = read_config(folder), load(folder)
    path = min(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[random.randrange(end)] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        if refusal(folder, config) is None:
            assert_same(load(folder), right)
        else:
            refused += 1
    assert refused > 120


def grown(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.flatten(), tensor.flatten()[:1]])


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: tensor.shape[0] // 2].clone()


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one more": grown,
    "half": half,
    "empty": lambda tensor: tensor[:0].clone(),
    "one more dimension": lambda tensor: tensor[None].clone(),
    "bytes": lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8),
    "doubles": lambda tensor: torch.zeros(tensor.shape, dtype=torch.float64),
    "other fp8": lambda tensor: torch.zeros(tensor.shape, dtype=torch.float8_e5m2),
}


@given(storage=st.sampled_from(STORAGE), damage=st.sampled_from(["missing", "renamed", "surplus", *CHANGES]),
       number=st.integers(0, 10**6))
@settings(max_examples=100, derandomize=True)
def test_any_tensor_missing_surplus_or_misshapen(sound, place, storage: str, damage: str, number: int) -> None:
    folder = place(sound[storage])
    config, tensors = read_config(folder), tensors_of(folder)
    # The copies of embedding and head in the multi-token-prediction module may be left out.
    names = sorted(name for name in tensors if not (damage == "missing" and name.startswith("model.layers.4.")
                                                    and name.split(".", 3)[3] in ("embed_tokens.weight",
                                                                                  "shared_head.head.weight")))
    name = names[number % len(names)]
    if damage == "missing":
        del tensors[name]
    elif damage == "renamed":
        tensors[name + "s"] = tensors.pop(name)
    elif damage == "surplus":
        tensors[name + ".extra"] = tensors[name].clone()
    else:
        tensors[name] = CHANGES[damage](tensors[name])
    put_shards(folder, tensors)
    message = refusal(folder, config)
    assert message is not None
    # Where a part of a quantised weight is gone, the weight is named.
    assert name in message or (damage in ("missing", "renamed") and name.rsplit("_", 1)[0] in message), message


def test_a_tensor_in_two_shards(sound, place) -> None:
    random = Random(0)
    for storage in STORAGE:
        folder = place(sound[storage])
        config = read_config(folder)
        one, two = sorted(folder.glob("*.safetensors"))
        for _ in range(5):
            first, second = load_file(one), load_file(two)
            name = random.choice(sorted(first))
            save_file(second | {name: first[name]}, two)
            message = refusal(folder, config)
            assert message is not None and f"tensor {name} is in both {one.name} and {two.name}" in message
            save_file(second, two)
        assert refusal(folder, config) is None


@pytest.mark.parametrize("header", [
    b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000,
    b'{"a\\nb": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    b'{"a\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, ' + b"9" * 4200 + b"]}}",
    b'{"a": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": 5, "shape": [0], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": "", "data_offsets": "ab"}}', b'{"a": null}', b"null", b"",
], ids=lambda header: header[:20].decode())
def test_hostile_headers(sound, place, header: bytes) -> None:
    folder = place(sound["plain"])
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    message = refusal(folder, read_config(folder))
    assert message is not None and f"{path.name}: corrupt safetensors header" in message and len(message) < 1000


# --- index ------------------------------------------------------------------------------------------------------------

NO_SHARDS: list[Any] = ["model-00003-of-00002.safetensors", "../outside/model-00001-of-00002.safetensors", "..", ".",
                        "", "/etc/passwd", "sub/model.safetensors", "a\0b", "a\nb", "\ud800", "x" * 5000, 5, None,
                        ["a"], {}]


@pytest.mark.parametrize("file", NO_SHARDS, ids=lambda file: ascii(file)[:40])
def test_the_index_names_no_shard_of_this_folder(sound, place, file: Any) -> None:
    folder = place(sound["plain"])
    # A whole checkpoint beside it must not be taken instead.
    shutil.copytree(folder, folder.parent / "outside", dirs_exist_ok=True)
    config, content = read_config(folder), json.loads((folder / INDEX).read_text())
    for name in Random(ascii(file)).sample(sorted(content["weight_map"]), 3):
        changed = {"weight_map": content["weight_map"] | {name: file}}
        (folder / INDEX).write_text(json.dumps(changed))
        assert refusal(folder, config) is not None


def test_the_index_and_the_shards_disagree(sound, place) -> None:
    folder, random = place(sound["fp8"]), Random(0)
    config, weight_map = read_config(folder), json.loads((folder / INDEX).read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    for _ in range(20):
        name = random.choice(sorted(weight_map))
        other = files[1 - files.index(weight_map[name])]
        dropped = {key: file for key, file in weight_map.items() if key != name}
        for changed in (dropped, weight_map | {name: other}, weight_map | {name + ".extra": other}):
            (folder / INDEX).write_text(json.dumps({"weight_map": changed}))
            message = refusal(folder, config)
            assert message is not None and name in message
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"line\nbreak": files[0]}}))
    assert "no name of a tensor" in (refusal(folder, config) or "")


@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_json_cut_off_or_with_a_changed_byte(sound, place, file: str) -> None:
    """Cut off is always refused. A changed byte can make another valid number; it never makes a traceback."""
    folder, random = place(sound["int4"]), Random(file)
    whole = (folder / file).read_bytes()
    outcomes = set()
    for _ in range(60):
        (folder / file).write_bytes(whole[: random.randrange(len(whole.rstrip()))])
        assert complaint(folder) is not None
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] = random.randrange(256)
        (folder / file).write_bytes(damaged)
        outcomes.add(complaint(folder) is None)
    assert False in outcomes


def complaint(folder: Path) -> str | None:
    """What reading the configuration and checking the folder against it ends with; None where both go well."""
    try:
        Checkpoint(folder, read_config(folder))
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(folder) in str(error)
        return str(error)
    return None


# --- configuration ----------------------------------------------------------------------------------------------------

NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
           "first_k_dense_replace", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
           "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group",
           "topk_group", "routed_scaling_factor", "num_nextn_predict_layers", "rms_norm_eps", "max_position_embeddings")
WRONG: list[Any] = ["x", "", [], [1], {}, {"a": 1}, True, -1, float("nan"), float("inf")]
FIXED: dict[str, Any] = {"hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": True, "moe_layer_freq": 2,
                         "scoring_func": "softmax", "topk_method": "greedy", "model_type": "llama",
                         "rope_interleave": False, "num_key_value_heads": 1, "sliding_window": 128,
                         "a_new_field": 1}
# These are found wrong by what depends on them.
FOUND_BY = {"num_attention_heads": "num_key_value_heads", "q_lora_rank": "q_"}


def put_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_the_configuration_is_something_else(sound, place, name: str) -> None:
    folder = place(sound["plain"])
    whole = (folder / "config.json").read_text()
    for value in WRONG + ([None, 1.5] if name not in ("q_lora_rank", "routed_scaling_factor", "rms_norm_eps") else []):
        put_config(folder, **{name: value})
        message = complaint(folder)
        assert message is not None and FOUND_BY.get(name, name) in message, (name, value, message)
        (folder / "config.json").write_text(whole)
    assert complaint(folder) is None


@pytest.mark.parametrize("name", FIXED)
def test_an_unsupported_field_is_named(sound, place, name: str) -> None:
    folder = place(sound["plain"])
    for value in (FIXED[name], ["x"], {"a": 1}):
        put_config(folder, **{name: value})
        message = complaint(folder)
        assert message is not None and name in message, (name, value, message)


@pytest.mark.parametrize("changes", [
    {"rope_type": "linear"}, {"rope_type": ["yarn"]}, {"rope_type": 5}, {"factor": "x"}, {"factor": 0.5},
    {"mscale": [1]}, {"beta_fast": -1}, {"original_max_position_embeddings": 1.5}, {"attention_factor": 3.0},
    {"truncate": False},
], ids=str)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_an_unsupported_rope_is_named(sound, place, field: str, changes: dict[str, Any]) -> None:
    folder = place(sound["plain"])
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    put_config(folder, **({"rope_parameters": None} | {field: rope | changes}))
    message = complaint(folder)
    name = next(iter(changes))
    # Files say `rope_type` or, older ones, `type`.
    assert message is not None and name.removeprefix("rope_") in message, message


ODD: list[Any] = ["x", [], [1], [True, 128], [128.0, 128], {"a": []}, {"a": {"weights": None}}, True, -8, 1.5, 2**80]


@pytest.mark.parametrize("storage", ["fp8", "int4"])
def test_no_type_in_the_quantisation_is_a_traceback(sound, place, storage: str) -> None:
    """Every leaf replaced; what does not say how weights are stored (targets, observers) may be anything."""
    folder, irrelevant = place(sound[storage]), ("ignore", "targets", "dynamic", "observer", "block_structure")
    block = quantization_block(f"hf-{storage}")
    assert block is not None

    def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        return [place for name, value in values.items()
                for place in [(*path, name), *(leaves(value, (*path, name)) if isinstance(value, dict) else [])]]

    for *parents, leaf in leaves(block):
        for value in ODD:
            changed = json.loads(json.dumps(block))
            inner = changed
            for parent in parents:
                inner = inner[parent]
            if inner[leaf] == value:
                continue
            inner[leaf] = value
            put_config(folder, quantization_config=changed)
            message = complaint(folder)
            if not leaf.startswith(irrelevant):
                assert (message is not None and leaf in message) or "group" in (message or ""), (leaf, value, message)
    put_config(folder, quantization_config=block | {"transform_config": {"config_groups": {"u": {}}}})
    assert storage == "fp8" or "transform_config" in (complaint(folder) or "")
    put_config(folder, quantization_config=block)
    assert complaint(folder) is None
