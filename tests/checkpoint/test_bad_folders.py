"""Every way in which a checkpoint folder can be wrong: one line that names it, and nothing loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from moonbase.checkpoint import load_weights, read_config
from moonbase.checkpoint.quantization import quantization_block
from moonbase.errors import CheckpointError
from tests.checkpoint.variants import SENTINEL, assert_same, edit_config, empty_state, load, quantise_fp8, quantise_int4


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def shard(folder: Path) -> dict[str, str]:
    """Split the one file in two; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    put_index(folder, weight_map)
    return weight_map


def put_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt_shard(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\0" * 300 + content[308:])


def index_names_absent(folder: Path) -> None:
    weight_map = shard(folder)
    put_index(folder, weight_map | {"model.layers.9.ghost.weight": "model-00001-of-00002.safetensors"})


def index_lacks_one(folder: Path) -> None:
    weight_map = shard(folder)
    del weight_map["model.norm.weight"]
    put_index(folder, weight_map)


def twice(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(64)}, path)


def index_leaves_folder(folder: Path) -> None:
    put_index(folder, {name: "../x.safetensors" for name in shard(folder)})


def no_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def malformed_index(folder: Path) -> None:
    shard(folder)
    put_index(folder, ["a"])


def both(folder: Path) -> None:
    put_index(folder, {})


def pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def then(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)

    return spoil


def quantisation(**changes: object) -> Callable[[Path], None]:
    """A published quantization_config with one field changed (`a__b` reaches inside)."""
    def spoil(folder: Path) -> None:
        block = quantization_block("hf-int4" if any("config_groups" in name or name in ("format", "kv_cache_scheme")
                                                    for name in changes) else "hf-fp8")
        for name, value in changes.items():
            *path, leaf = name.split("__")
            inner = block
            for step in path:
                inner = inner[step]
            inner[leaf] = value
        edit_config(folder, quantization_config=block)

    return spoil


def fp8(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return then(quantise_fp8, rewrite(change))


def int4(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return then(quantise_int4, rewrite(change))


EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
Q = "model.layers.0.self_attn.q_a_proj.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (rewrite(lambda t: t.pop(EXPERT)), f"tensor {EXPERT} is missing"),
    "many missing": (rewrite(lambda t: [t.pop(name) for name in list(t) if ".experts." in name]),
                     "tensor model.layers.1.mlp.experts.0.gate_proj.weight is missing; .*and 45 more"),
    "surplus": (rewrite(lambda t: t.update(odd=torch.ones(1))), "tensor odd does not belong to this configuration"),
    "surplus expert": (rewrite(lambda t: t.update({EXPERT.replace(".0.", ".8."): t[EXPERT].clone()})),
                       r"experts\.8\.up_proj\.weight does not belong"),
    "transposed": (rewrite(lambda t: t.update({Q: t[Q].T.contiguous()})),
                   rf"tensor {Q} has shape \[64, 24\] instead of \[24, 64\]"),
    "integers": (rewrite(lambda t: t.update({Q: t[Q].int()})),
                 f"tensor {Q} is stored as I32 instead of BF16 or F16 or F32"),
    "doubles": (rewrite(lambda t: t.update({Q: t[Q].double()})), f"tensor {Q} is stored as F64"),
    "fp8 unannounced": (rewrite(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
                        f"tensor {Q} is F8_E4M3, but config"),
    "int4 unannounced": (then(quantise_int4, lambda f: edit_config(f, quantization_config=None)),
                         "is INT4, but config.json"),
    "fp8 without scale": (fp8(lambda t: t.pop(Q + "_scale_inv")), f"tensor {Q}_scale_inv is missing"),
    "scale without fp8": (fp8(lambda t: t.update({Q: torch.ones(24, 64)})),
                          f"tensor {Q}_scale_inv is a scale without a quantised weight"),
    "lone scale": (fp8(lambda t: t.pop(Q)), f"tensor {Q} is missing, its scale is there"),
    "fp8 scale shape": (fp8(lambda t: t.update({Q + "_scale_inv": torch.ones(2, 1)})),
                        rf"tensor {Q}_scale_inv has shape \[2, 1\] instead of \[1, 1\]"),
    "fp8 scale nan": (fp8(lambda t: t[Q + "_scale_inv"].fill_(float("nan"))),
                      f"tensor {Q}_scale_inv holds a non-finite scale"),
    "fp8 norm": (fp8(lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})),
                 "tensor model.norm.weight is F8_E4M3, only matrices can be"),
    "int4 scale inf": (int4(lambda t: t[EXPERT + "_scale"].fill_(float("inf"))),
                       f"tensor {EXPERT}_scale holds a non-finite scale"),
    "int4 without scale": (int4(lambda t: t.pop(EXPERT + "_scale")), f"tensor {EXPERT}_scale is missing"),
    "int4 packed shape": (int4(lambda t: t.update({EXPERT + "_packed": t[EXPERT + "_packed"][:, :4].clone()})),
                          rf"tensor {EXPERT}_packed has shape \[32, 4\] instead of \[32, 8\]"),
    "int4 says another shape": (int4(lambda t: t[EXPERT + "_shape"].fill_(7)),
                                rf"tensor {EXPERT}_shape says \[7, 7\] instead of \[32, 64\]"),
    "stacked misshapen": (rewrite(lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.ones(8, 3, 3)})),
                          r"mlp\.experts\.down_proj is F32 \[8, 3, 3\] instead of \[8, 64, 32\]"),
    "stacked and single": (rewrite(lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.ones(8, 64, 32)})),
                           r"experts\.0\.down_proj\.weight is stored twice"),
    "both prefixes": (rewrite(lambda t: t.update({"language_model.model.norm.weight": torch.ones(64)})),
                      r"tensor model\.norm\.weight is stored twice"),
    "missing shard": (missing_shard, r"model-00002-of-00002\.safetensors: the file is missing"),
    "truncated shard": (truncated_shard, r"model-00002-of-00002\.safetensors: truncated"),
    "corrupt shard": (corrupt_shard, r"model-00001-of-00002\.safetensors: corrupt safetensors header"),
    "index names absent": (index_names_absent,
                           r"index names tensor model\.layers\.9\.ghost\.weight, but model-00001-of"),
    "index lacks one": (index_lacks_one, r"model\.norm\.weight is in model-00002.*index does not know it"),
    "in two shards": (twice, r"tensor model\.norm\.weight is in both model-00001.* and model-00002"),
    "index leaves the folder": (index_leaves_folder, r"'\.\./x\.safetensors' is not a plain file name"),
    "no index": (no_index, r"model\.safetensors\.index\.json is missing"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a mapping of fields"),
    "index is a list": (then(shard, lambda f: (f / "model.safetensors.index.json").write_text("[]")),
                        "weight_map is missing or malformed"),
    "malformed index": (malformed_index, "weight_map is missing or malformed"),
    "index and single file": (both, "holds both model.safetensors and model.safetensors.index.json"),
    "pickles": (pickles, "only pickled weights, which are never opened"),
    "nothing": (nothing, "no weights here"),
    "unknown method": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "quant_method='awq'"),
    "odd quantization": (lambda f: edit_config(f, quantization_config="int4"),
                         "quantization_config: expected a mapping"),
    "fp8 per tensor": (quantisation(weight_block_size=None), "weight_block_size=None"),
    "fp8 static": (quantisation(activation_scheme="static"), "activation_scheme='static'"),
    "fp8 e5m2": (quantisation(fmt="e5m2"), "fmt='e5m2'"),
    "other packing": (quantisation(format="nvfp4-pack-quantized"), "format='nvfp4-pack-quantized'"),
    "8 bits": (quantisation(config_groups__group_0__weights__num_bits=8), "num_bits=8"),
    "asymmetric": (quantisation(config_groups__group_0__weights__symmetric=False), "symmetric=False"),
    "permuted": (quantisation(config_groups__group_0__weights__actorder="group"), "actorder='group'"),
    "activations": (quantisation(config_groups__group_0__input_activations={"num_bits": 8}), "input_activations="),
    "group size": (quantisation(config_groups__group_0__weights__group_size=12), "group_size=12"),
    "no groups": (quantisation(config_groups={}), "config_groups is missing or empty"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_before_anything_is_loaded(folder: Path, case: str) -> None:
    spoil, message = BAD_FOLDERS[case]
    config = read_config(folder)
    spoil(folder)
    state = empty_state(config)
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(state, folder, config)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert all((tensor == SENTINEL).all() for tensor in state.values()), "something was loaded"


def test_unknown_quantisation_is_refused_with_the_configuration(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quant_method='gptq'"):
        read_config(folder)


def test_absent_folder(tmp_path: Path, folder: Path) -> None:
    config = read_config(folder)
    with pytest.raises(Exception, match="no such f"):
        load_weights(empty_state(config), tmp_path / "absent", config)


def test_any_damage_to_a_header_is_one_clear_line(folder: Path) -> None:
    """300 random changes of the header: what is not refused is a change that means the same (a space, say)."""
    config, right = read_config(folder), load(folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    random = Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 1, 4))):
            damaged[random.randrange(end)] = random.randrange(256)
        path.write_bytes(damaged)
        state = empty_state(config)
        try:
            load_weights(state, folder, config)
        except CheckpointError as error:
            assert "\n" not in str(error)
            assert all((tensor == SENTINEL).all() for tensor in state.values())
            continue
        assert_same(state, right)
