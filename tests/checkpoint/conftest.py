"""Checkpoints that transformers wrote, one of every variant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.variants import VARIANTS, hf_model, hf_values


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory):
    """`written(variant)` -> (transformers model, folder that its save_pretrained wrote), made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def write(variant: str):
        if variant not in made:
            model = hf_model(hf_values(variant))
            folder = tmp_path_factory.mktemp("hf") / variant
            model.save_pretrained(folder)
            made[variant] = (model, folder)
        return made[variant]

    return write


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(written, tmp_path: Path) -> Path:
    """A fresh copy of the k2 variant's folder, for tests that spoil it."""
    return Path(shutil.copytree(written("k2")[1], tmp_path / "k2"))
