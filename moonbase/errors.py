"""The two ways a command ends badly: the user's mistake, and a passing trouble.

A user's mistake gets one clear line that names the field or file and the mend; a programmer's mistake is an assertion
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The command line prints the message as one line and exits with 2."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be read whole: names the file or the tensor."""


class TrainingStopped(Exception):
    """Training gave up for a reason that it names (too many bad steps, say). Exit code 1; the run folder is intact."""

    exit_code = 1


class TryAgain(Exception):
    """A passing trouble: the same command may work later. Exit code 75."""

    exit_code = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'steps'?)` where one of `known` looks like `word`, else nothing: the end of a complaint."""
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[close[0]]!r}?)" if close else ""
