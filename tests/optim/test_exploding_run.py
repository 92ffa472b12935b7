"""The point of QK-Clip on a real, deliberately exploding run (the one of docs/figures/qk_clip.svg)."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "figures" / "qk_clip.py"


@pytest.mark.slow
def test_clip_keeps_an_exploding_run_quiet() -> None:
    train = runpy.run_path(str(SCRIPT))["train"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes a second thread costs more than it brings
    try:
        without, with_clip = train(None, 220), train(30.0, 220)
    finally:
        torch.set_num_threads(threads)
    assert max(without.max_logit) > 120
    assert max(with_clip.max_logit) < 45
    # Both learn; only the clipped run stays down once it has learnt.
    assert all(math.isfinite(loss) for loss in with_clip.loss)
    spike, quiet = max(without.loss[-70:]), max(with_clip.loss[-70:])
    assert quiet < 0.02 and spike > 5 * quiet, (spike, quiet)
