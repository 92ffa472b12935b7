"""A small text to train on, a tokenizer of 512 entries, and recipes over both."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moonbase.data.tokenizer import train_tokenizer
from moonbase.recipe import Recipe, load_recipe
from tests.train.tiny import run, write_yaml


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts compute with one thread, and none of them believes to be one of several."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of uneven length over a few hundred words, a grammar that a tiny model begins to learn at once."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(300)]
    for number in range(80):
        lines = [f"def {draw.choice(words)}({draw.choice(words)}):\n    return {draw.choice(words)} + 'é{number}'\n"
                 for _ in range(draw.randint(1, 30))]
        (folder / f"{number:03}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((path.read_text(encoding="utf-8") for path in sorted(texts.iterdir())), 512).save(folder)
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path, texts: Path, tokenizer: Path) -> Callable[..., Path]:
    """`recipe_file(steps=3, optimizer__lr=0.1)` -> a YAML file."""
    return lambda **fields: write_yaml(tmp_path, texts, tokenizer, **fields)


@pytest.fixture
def recipe(recipe_file: Callable[..., Path]) -> Callable[..., Recipe]:
    """`recipe(steps=3, optimizer__lr=0.1)` -> the recipe."""
    return lambda **fields: load_recipe(str(recipe_file(**fields)))


@pytest.fixture(scope="session")
def whole(texts: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps that nothing disturbed, with a checkpoint at every third."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    file = write_yaml(folder, texts, tokenizer, checkpoint__every_steps=3, checkpoint__keep_last=9)
    run(load_recipe(str(file)), folder / "run")
    return folder / "run"
