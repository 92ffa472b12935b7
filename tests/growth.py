"""Whether something takes time in proportion to its size, asked of the machine itself: it may be slow, and busy."""

from __future__ import annotations

import time
from collections.abc import Callable


def grows_with_size(work: Callable[[int], object], size: int) -> bool:
    """Whether `work(size)` takes less than 24 times the processor time of `work(size // 8)`, of several tries in one.

    What grows with the size takes 8 times as long, what grows with its square 64 times.
    """
    return any(_seconds(work, size) < 24 * _seconds(work, size // 8) for _ in range(5))


def _seconds(work: Callable[[int], object], size: int) -> float:
    start = time.process_time()
    work(size)
    return time.process_time() - start
