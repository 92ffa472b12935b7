"""The same contract with another version of Inspect: $MOONBASE_OTHER_INSPECT names a folder that has one.

    pip install --no-deps --target FOLDER inspect-ai==0.3.260
    MOONBASE_OTHER_INSPECT=FOLDER pytest tests/evals/test_providers_versions.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

CONTRACT = ("test_providers_engine.py", "test_providers_replay.py", "test_providers_provenance.py")


@pytest.mark.slow
@pytest.mark.parametrize("file", CONTRACT)
def test_the_contract_holds_with_another_inspect(file: str, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
    folder = os.environ.get("MOONBASE_OTHER_INSPECT")
    if not folder:
        pytest.skip("no other version of Inspect to test with (set MOONBASE_OTHER_INSPECT)")
    environment = {**os.environ, "PYTHONPATH": folder}
    code = "import importlib.metadata as m; print(m.version('inspect-ai'))"
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() != version("inspect-ai"), f"{folder} holds the installed version"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider",
               f"--basetemp={tmp_path / 'inner'}", str(Path(__file__).with_name(file))]  # fmt: skip
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540,
                            cwd=Path(__file__).resolve().parents[2])  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
