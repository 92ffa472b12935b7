"""Recipes: presets, files and key=value overrides; every mistake is one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from moonbase.errors import UserError
from moonbase.presets import load_preset, preset_config, preset_names
from moonbase.recipe import Recipe, load_recipe, style_of


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_recipe_that_survives_its_own_file(preset: str, tmp_path: Path) -> None:
    recipe = load_recipe(preset)
    assert recipe.model == preset_config(preset)
    (tmp_path / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(tmp_path / "config.yaml")) == recipe


def test_saved_file_holds_every_field(tmp_path: Path) -> None:
    recipe = load_recipe("pico", ["compile=off", "data=[a, b]", "sample_prompts=['x: 1', 'é\\n']", "name='on'"])
    path = tmp_path / "config.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    for field in Recipe.model_fields:
        assert f"\n{field}:" in "\n" + recipe.to_yaml()


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("steps=7", "steps", 7),
        ("steps=1e3", "steps", 1000),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.lr=2.5E-4", "optimizer.lr", 2.5e-4),
        ("optimizer.qk_clip=null", "optimizer.qk_clip", None),
        ("optimizer.nesterov=false", "optimizer.nesterov", False),
        ("optimizer.adam_betas=[0.8, 0.9]", "optimizer.adam_betas", (0.8, 0.9)),
        ("compile=off", "compile", "off"),
        ("name=2024", "name", "2024"),
        ("name=1e3", "name", "1e3"),
        ("name='1e3'", "name", "1e3"),
        ("model.vocab_size=512", "model.vocab_size", 512),
        ("model.hidden_size=64", "model.hidden_size", 64),
        ("checkpoint.every_minutes=0.5", "checkpoint.every_minutes", 0.5),
        ("sample_prompts=[def, 'a=b']", "sample_prompts", ("def", "a=b")),
        ("data.tokenizer=some/folder", "data.tokenizer", "some/folder"),
    ],
)
def test_overrides_reach_their_field(override: str, path: str, value: object) -> None:
    node = load_recipe("pico", [override])
    for part in path.split("."):
        node = getattr(node, part)
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        (["data=my/texts"], ["my/texts"]),
        (["data=2024"], ["2024"]),
        (["data=[one, two]"], ["one", "two"]),
        (["data.sources=one"], ["one"]),
        (["data={sources: [{path: one, weight: 2}]}"], ["one"]),
        (["data=[one, {path: two, weight: 3}]"], ["one", "two"]),
        (["data=a=b"], ["a=b"]),
        (["data=C:\\texts"], ["C:\\texts"]),
        (["data=with space"], ["with space"]),
    ],
)
def test_data_shorthands(overrides: list[str], paths: list[str]) -> None:
    assert [source.path for source in load_recipe("pico", overrides).data.sources] == paths


@pytest.mark.parametrize("overrides", [["data=x", "data.max_bytes=9"], ["data.max_bytes=9", "data=x"]])
def test_data_overrides_do_not_undo_each_other(overrides: list[str]) -> None:
    data = load_recipe("pico", overrides).data
    assert data.max_bytes == 9 and [source.path for source in data.sources] == ["x"]


def test_the_last_override_wins() -> None:
    assert load_recipe("pico", ["steps=1", "steps=2"]).steps == 2


def test_model_by_name_and_then_a_field(tmp_path: Path) -> None:
    recipe = load_recipe("pico", ["model=nano", "model.vocab_size=512"])
    assert recipe.model.vocab_size == 512 and recipe.model.hidden_size == 1024
    (tmp_path / "r.yaml").write_text("model: pico\nsteps: 3\noptimizer: {lr: 1e-3}\ncompile: off\n", encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["model.vocab_size=512"])
    assert (recipe.steps, recipe.model.vocab_size, recipe.optimizer.lr, recipe.compile) == (3, 512, 1e-3, "off")


def test_overrides_leave_the_preset_alone() -> None:
    before = load_preset("pico")
    load_recipe("pico", ["model.vocab_size=512", "steps=3", "optimizer.lr=1"])
    assert load_preset("pico") == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stepz=3", "stepz: unknown field"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown field"),
        ("model.no_such=1", "no_such=1"),
        ("steps=abc", "steps: "),
        ("steps=1.5", "steps: "),
        ("steps=0", "steps: "),
        ("steps=true", "steps: a number is needed, found True"),
        ("steps=", "steps: "),
        ("optimizer.lr=fast", "optimizer.lr: "),
        ("optimizer.lr=-1", "optimizer.lr: "),
        ("optimizer.lr=.nan", "optimizer.lr: "),
        ("optimizer.weight_decay.peak=3", "optimizer.weight_decay: "),
        ("optimizer=3", "optimizer: a mapping of fields is needed"),
        ("optimizer.name=adam", "optimizer.name: "),
        ("optimizer.adam_betas=[0.9]", "optimizer.adam_betas"),
        ("schedule.kind=linear", "schedule.kind: "),
        ("data.sources.0.weight=2", "data.sources.0"),
        ("data=[{path: x, weight: 0}]", "data.sources.0.weight"),
        ("data.validation_fraction=0.5", "data.validation_fraction"),
        ("name=../elsewhere", "name: a plain name"),
        ("name=a/b", "name: a plain name"),
        ("micro_batch_size=3", "micro_batch_size=3"),
        ("sequence_length=100000", "sequence_length=100000"),
        ("stage=continue", "init=CHECKPOINT"),
        ("init=runs/first", "init=runs/first is for stage=continue"),
        ("stage=finetune", "stage: "),
        ("model.vocab_size=-1", "vocab_size"),
        ("model=no-such-preset", "no preset 'no-such-preset'"),
        ("model=3", "model: "),
        ("steps", "key=value"),
        ("=3", "key=value"),
        (".steps=3", "key=value"),
        ("optimizer..lr=3", "key=value"),
        ("steps.=3", "key=value"),
    ],
)
def test_wrong_overrides_are_named_in_one_line(override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("pico", [override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: [\n", "not readable YAML"),
        (b"a: b: c", "not readable YAML"),
        (b"\xff\xfe", "not readable YAML"),
        (b"? [x]\n: y", "not readable YAML"),
        (b"", "expected a mapping"),
        (b"- pico", "expected a mapping"),
        (b"steps: 3", "model: a preset name"),
        (b"model: pico\nstepz: 3", "stepz: unknown field"),
        (b"model: pico\nsteps: many", "steps: "),
        (b"model: pico\n3: 4", "3: "),
        (b"model: {hidden_size: 3}", "vocab_size: Field required"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and complaint in message and "\n" not in message


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    path, witness = tmp_path / "evil.yaml", tmp_path / "witness"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{witness}']\n", encoding="utf-8")
    with pytest.raises(UserError, match="not readable YAML"):
        load_recipe(str(path))
    with pytest.raises(UserError):
        load_recipe("pico", [f"model=!!python/object/apply:os.mkdir ['{witness}']"])
    assert not witness.exists()


@pytest.mark.parametrize("target", ["no-such", "no/such.yaml", "", ".", "x" * 300])
def test_neither_preset_nor_file(target: str) -> None:
    with pytest.raises(UserError, match=r"neither a preset \(.*pico.*\) nor a YAML file"):
        load_recipe(target)


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("stepz=3", "'steps'"),
        ("optimiser.lr=1", "'optimizer'"),
        ("optimizer.weight_decy=1", "'weight_decay'"),
        ("schedule.warmup=3", "'warmup_steps'"),
        ("lr=1e-3", "'optimizer.lr'"),
        ("every_steps=4", "'checkpoint.every_steps'"),
        ("data=[{pth: x}]", "'path'"),
        ("model.hidden_sise=32", "'hidden_size'"),
        ("model=pyco", "'pico'"),
    ],
)
def test_a_slip_of_the_pen_gets_a_suggestion(override: str, guess: str) -> None:
    with pytest.raises(UserError, match=rf"\(did you mean {guess}\?\)"):
        load_recipe("pico", [override])


@pytest.mark.parametrize(
    ("target", "guess"), [("Pico", "pico"), ("kimi_k2", "kimi-k2"), ("moonlight", "moonlight-16b")])
def test_so_does_one_in_a_presets_name(target: str, guess: str) -> None:
    with pytest.raises(UserError, match=rf"\(did you mean '{guess}'\?\)"):
        load_recipe(target)


@pytest.mark.parametrize("override", ["no_such_thing=1", "optimizer.colour=1", "data=[{q: 1, path: x}]"])
def test_what_resembles_nothing_gets_none(override: str) -> None:
    with pytest.raises(UserError, match=r"unknown field$"):
        load_recipe("pico", [override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("steps=" + "[" * 20_000, "steps: its value is nested too deeply"),
        ('name="\\ud800"', "name: "),
        ("name=", "name: "),
        ('data="a\\0b"', "data.sources.0.path: no file name holds a NUL byte"),
        ('data=""', "data.sources.0.path: "),
        ('data.tokenizer="\\ud800"', "data.tokenizer: "),
        ("seed=9223372036854775808", "seed: "),
        ("steps=2024-13-45", "steps: "),
    ],
)
def test_hostile_values_are_named_in_one_line(override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("pico", [override])
    assert named in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_word_that_looks_like_a_date_is_a_word() -> None:
    assert [load_recipe("pico", [f"name={day}"]).name for day in ("2024-02-30", "2024-02-29")] == [
        "2024-02-30", "2024-02-29"]


@pytest.mark.parametrize("content", ["[" * 100_000, "name: 2024-13-45"])
def test_hostile_files_are_named_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{path}: not readable YAML: ") as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)
    assert style_of(tmp_path) is None
    path.rename(tmp_path / "config.yaml")
    assert style_of(tmp_path) is None
