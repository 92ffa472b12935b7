"""What we write, read by transformers and compressed-tensors."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

import moonbase
from moonbase.checkpoint import load_weights, read_config, save_state, save_weights, write_weights
from moonbase.checkpoint.names import checkpoint_pieces
from moonbase.config import ModelConfig
from moonbase.errors import UserError
from moonbase.sizes import weight_bytes
from tests.checkpoint.variants import add_mtp, as_disk, assert_same, empty_state, load


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def disk(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def pretrained(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"]
    return model.eval(), report["unexpected_keys"]


TOKENS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(theirs, same_shape, folder: Path) -> None:
    """What transformers read from a quantised folder, bf16, and what we did: in bf16, and in fp32 from the same
    weights, where no token's scores are so near that rounding sends it to another expert."""
    ours = moonbase.load(folder, device="cpu", dtype=torch.bfloat16)
    expected, found = theirs(TOKENS).logits.float(), ours(TOKENS)
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.02
    exact = copy.deepcopy(same_shape)
    exact.load_state_dict({name: tensor.float() for name, tensor in theirs.state_dict().items()})
    expected = exact(TOKENS).logits
    assert expected.abs().max() > 1 and (ours.float()(TOKENS) - expected).abs().max() < 1e-4


def test_transformers_loads_it_with_identical_logits(written, variant: str, tmp_path: Path) -> None:
    model, source = written(variant)
    config = read_config(source)
    save_weights(load(source, mtp=False), tmp_path / "out", config, max_shard_bytes=100_000)
    again, unexpected = pretrained(tmp_path / "out")
    assert not unexpected
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_import_export_import_is_byte_identical(written, variant: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(written(variant)[1], tmp_path / "source"))
    if variant == "v3":
        add_mtp(source)
    config = read_config(source)
    save_weights(load(source), tmp_path / "one", config, max_shard_bytes=150_000)
    assert_same(disk(tmp_path / "one"), disk(source))
    written_config = read_config(tmp_path / "one")
    assert written_config == config
    save_weights(load(tmp_path / "one"), tmp_path / "two", written_config, max_shard_bytes=150_000)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


def test_half_precision_export(written, tmp_path: Path) -> None:
    """Loaded as fp32 and written as bf16 gives the stored bf16 back; the router's bias stays fp32."""
    model, source = written("k2")
    config = read_config(source)
    save_weights(model, tmp_path / "half", config, dtype=torch.bfloat16)
    tensors = disk(tmp_path / "half")
    assert {name for name, t in tensors.items() if t.dtype == torch.float32} == {
        name for name in tensors if name.endswith("e_score_correction_bias")}
    save_weights(load(tmp_path / "half"), tmp_path / "again", config, dtype=torch.bfloat16)
    assert fingerprint(tmp_path / "half") == fingerprint(tmp_path / "again")
    loaded, _ = pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_mtp_goes_to_the_published_names(written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(written("v3")[1], tmp_path / "source"))
    module = add_mtp(source)
    config = read_config(source)
    save_weights(load(source), tmp_path / "out", config)
    tensors = disk(tmp_path / "out")
    assert_same({name: tensors[name] for name in module}, module)
    _, unexpected = pretrained(tmp_path / "out")
    # transformers has no place for the module and passes over it; nothing else is passed over.
    assert unexpected and all(name.startswith("model.layers.4.") for name in unexpected)
    # Without the module in hand the checkpoint says that it has none.
    save_weights(load(source, mtp=False), tmp_path / "bare", config)
    assert read_config(tmp_path / "bare").num_nextn_predict_layers == 0
    assert not pretrained(tmp_path / "bare")[1]


def test_shards_and_index(written, tmp_path: Path) -> None:
    model, source = written("k2")
    config = read_config(source)
    save_weights(model, tmp_path / "out", config, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{n:05d}-of-{len(shards):05d}.safetensors"
                                                for n in range(1, len(shards) + 1)]
    assert {name: shard.name for shard in shards for name in load_file(shard)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert all(shard.stat().st_size < 70_000 for shard in shards)
    order = [piece.disk for piece in checkpoint_pieces(config)]
    assert list(index["weight_map"]) == order


@pytest.mark.parametrize("variant", ["k2", "moonlight"], indirect=True)
def test_fp8_is_what_transformers_multiplies_out(written, variant: str, tmp_path: Path) -> None:
    model, source = written(variant)
    save_weights(model, tmp_path / "fp8", read_config(source), fmt="hf-fp8")
    tensors = disk(tmp_path / "fp8")
    quantised = {name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    assert quantised == {name for name in tensors if "proj" in name and name.endswith(".weight")}
    assert tensors["lm_head.weight"].dtype == tensors["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    theirs, unexpected = pretrained(tmp_path / "fp8")
    assert not unexpected
    ours = load(tmp_path / "fp8", dtype=torch.bfloat16)
    assert_same(ours, {name: t for name, t in theirs.state_dict().items()})
    assert_same_logits(theirs, model, tmp_path / "fp8")


def test_int4_is_what_transformers_multiplies_out(written, tmp_path: Path) -> None:
    model, source = written("k2")
    save_weights(model, tmp_path / "int4", read_config(source), fmt="hf-int4")
    tensors = disk(tmp_path / "int4")
    assert all((".experts." in name) == ("weight_" in name) for name in tensors)
    theirs, unexpected = pretrained(tmp_path / "int4")
    assert not unexpected
    ours = load(tmp_path / "int4", dtype=torch.bfloat16)
    assert_same(ours, {name: t for name, t in theirs.state_dict().items()})
    assert_same_logits(theirs, model, tmp_path / "int4")


def test_int4_is_what_compressed_tensors_packs_and_unpacks(written, tmp_path: Path) -> None:
    """Every routed expert of a folder: words to weights, and the weights to the same words again."""
    model, source = written("k2")
    save_weights(model, tmp_path / "int4", read_config(source), fmt="hf-int4", int4_rule="least-error")
    values = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(values).config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    tensors, ours = disk(tmp_path / "int4"), as_disk(load(tmp_path / "int4"), read_config(source))
    names = [name for name in ours if ".experts." in name and "shared" not in name]
    assert len(names) == 2 * 8 * 3
    for name in names:
        stored = {f"weight_{part}": tensors[f"{name}_{part}"] for part in ("packed", "scale", "shape")}
        rounded = compressor.decompress(dict(stored), scheme)["weight"]
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, ours[name].bfloat16()), name
        exact = compressor.decompress(stored | {"weight_scale": stored["weight_scale"].float()}, scheme)["weight"]
        assert torch.equal(exact, ours[name]), name
        for weight in (rounded, exact):
            again = compressor.compress({"weight": weight, "weight_scale": stored["weight_scale"].to(weight.dtype)},
                                        scheme)
            assert torch.equal(again["weight_packed"], stored["weight_packed"]), name
            assert torch.equal(again["weight_shape"], stored["weight_shape"])


@pytest.mark.parametrize(("fmt", "name"), [("hf", "bf16"), ("hf-fp8", "fp8"), ("hf-int4", "int4")])
def test_sizes_foretell_every_byte(variant: str, fmt: str, name: str, written, tmp_path: Path) -> None:
    """`moonbase info` and the writer agree on what is quantised."""
    model, source = written(variant)
    save_weights(model, tmp_path / "out", read_config(source), dtype=torch.bfloat16, fmt=fmt)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in disk(tmp_path / "out").values())
    config = read_config(tmp_path / "out")
    assert stored == weight_bytes(config, name)


def test_int4_scale_rule_is_selectable(written, tmp_path: Path) -> None:
    model, source = written("k2")
    weight = as_disk(dict(model.state_dict()), read_config(source))["model.layers.1.mlp.experts.0.up_proj.weight"]
    for rule, divisor in (("absmax/7", 7), ("absmax/7.5", 7.5)):
        folder = tmp_path / str(divisor)
        save_weights(model, folder, read_config(source), fmt="hf-int4", int4_rule=rule)
        scale = disk(folder)["model.layers.1.mlp.experts.0.up_proj.weight_scale"]
        assert torch.equal(scale, (weight.unflatten(1, (2, 32)).abs().amax(-1) / divisor).bfloat16())


def test_files_beside_the_weights_and_configuration(written, tmp_path: Path) -> None:
    model, source = written("k2.5")
    (tmp_path / "tokenizer.json").write_text("{}")
    reports = []
    save_weights(model, tmp_path / "out", read_config(source), dtype=torch.bfloat16,
                 progress=lambda *report: reports.append(report),
                 extra_files={"tokenizer.json": tmp_path / "tokenizer.json", "chat_template.jinja": b"{{ x }}"})
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ x }}"
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == "bfloat16" and "quantization_config" not in values
    assert reports[-1][0] == "writing weights" and reports[-1][1] == reports[-1][2] == len(reports)


def test_nothing_is_left_after_an_error(written, tmp_path: Path) -> None:
    model, source = written("k2")
    config = read_config(source)
    broken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken["model.layers.2.mlp.experts.down_proj"][7, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.experts\.7\.down_proj\.weight holds values that"):
        save_weights(broken, tmp_path / "out", config, fmt="hf-int4")
    with pytest.raises(UserError, match=r"absent\.json"):
        save_weights(model, tmp_path / "out", config, extra_files={"a.json": tmp_path / "absent.json"})
    with pytest.raises(UserError, match="unknown format 'gguf'"):
        save_weights(model, tmp_path / "out", config, fmt="gguf")
    with pytest.raises(AssertionError, match="does not fit"):
        save_weights({}, tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_grow_leaves_nothing(written, tmp_path: Path) -> None:
    """The operating system refuses after 20 kB, as on a full disk; the checkpoint that was there before stays."""
    resource = pytest.importorskip("resource")
    model, source = written("k2")
    config = read_config(source)
    save_weights(model, tmp_path / "out", config)
    before = fingerprint(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            save_weights(model, tmp_path / "out", config, dtype=torch.bfloat16)
        with pytest.raises(UserError, match="File too large"):
            save_state(tmp_path / "out", {"a": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert before.items() <= fingerprint(tmp_path / "out").items()
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_int4_needs_whole_groups(written, tmp_path: Path) -> None:
    config = ModelConfig.parse(read_config(written("k2")[1]).model_dump() | {"moe_intermediate_size": 40})
    with pytest.raises(UserError, match="moe_intermediate_size to be a multiple of 32, found 40"):
        save_weights({"model.embed_tokens.weight": torch.ones(1)}, tmp_path / "out", config, fmt="hf-int4")


def test_replaces_an_older_checkpoint_and_writes_into_a_folder_of_others(written, tmp_path: Path) -> None:
    model, source = written("k2")
    config = read_config(source)
    save_weights(model, tmp_path / "out", config, max_shard_bytes=60_000)
    save_weights(model, tmp_path / "out", config)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "optimizer.txt").write_text("beside")
    write_weights(model, tmp_path / "mine", config)
    assert (tmp_path / "mine" / "optimizer.txt").exists()
    assert_same(disk(tmp_path / "mine"), disk(tmp_path / "out"))


def test_names_of_wrapped_modules(written, tmp_path: Path) -> None:
    """torch.compile puts `_orig_mod.` into names; files and loading do not see it."""
    model, source = written("k2")
    config = read_config(source)
    layers = {name.replace("layers.1.", "layers.1._orig_mod."): t for name, t in model.state_dict().items()}
    save_weights(layers, tmp_path / "out", config)
    assert_same(load(tmp_path / "out"), dict(model.state_dict()))
    target = {name.replace("layers.1.", "layers.1._orig_mod."): t for name, t in empty_state(config).items()}
    load_weights(target, tmp_path / "out", config)
    assert_same(target, layers)
