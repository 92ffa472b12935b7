"""Shared fixtures. Real data is read from a folder outside the repository; tests that need it say so when it is absent.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before torch loads OpenMP: test processes share the cores, and threads that spin while they wait starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Whoever starts the tests in the background of a shell has Ctrl-C ignored, and so has every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine must not fail a test: what takes long is measured by `moonbase bench`.
hypothesis.settings.register_profile("moonbase", deadline=None,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("moonbase")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data: $MOONBASE_SHARED, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("MOONBASE_SHARED", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data is absent: {folder} (set MOONBASE_SHARED)")
    return folder


@pytest.fixture(scope="session")
def kimi_folder(shared_data: Path) -> Path:
    """The published vocabulary of Kimi K2.5 and its settings."""
    folder = shared_data / "kimi-k25-tokenizer"
    if not (folder / "tiktoken.model").is_file():
        pytest.skip(f"the published vocabulary is absent: {folder}")
    return folder


@pytest.fixture(scope="session")
def kimi(kimi_folder: Path) -> Any:
    """Its `moonbase.data.Tokenizer`."""
    from moonbase.data import load_tokenizer

    return load_tokenizer(kimi_folder)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny shapes gain nothing from many threads, and a fixed number keeps sums in one order.

    Anew for every test: what one of them sets is not for the next.
    """
    import torch

    torch.set_num_threads(1)
