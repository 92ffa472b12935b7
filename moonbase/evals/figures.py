"""Every number of every report: what it is computed from (`FigureSpec`), how (`FUNCTIONS`), and how it is printed.

A figure is a pure function of its specification and the records, so whoever holds both computes it again, to the
digit; `verify` does. Numbers are kept to ten significant digits, where machines agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from moonbase.errors import UserError, did_you_mean
from moonbase.evals.printing import text_of
from moonbase.evals.table import Table

if TYPE_CHECKING:
    from moonbase.evals.suite import Suite

LEVELS = ("L0 reported", "L1 re-scorable", "L2 re-generable", "L3 re-runnable", "L4 independently replicated")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FigureSpec:
    """What to compute. Columns are named as in `Table`: `task`, `model`, `group`, `condition.language`, ..."""

    id: str
    function: str
    select: dict[str, str] = Field(default_factory=dict)
    """Column to value, or to several values (`us|eu|russia`)."""
    value: str = ""
    """`score:NAME`, `label:A|B`, `vote:JUDGE=A|B`, `cost`, `output_tokens`, ..."""
    versus: dict[str, str] | None = None
    """The other side of a difference: what it overrides in `select`. The figure is select minus versus."""
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0


class Figure(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    level: int = 0
    """Index into LEVELS, told from the records; a counter-statement may raise it to 4."""
    n: int = 0
    """Answers, or pairs of a paired difference, that the value was computed from."""
    clusters: int = 0
    unscored: int = 0
    abstained: int = 0
    errors: int = 0
    """Answers that were selected and have no value, by reason; of both sides of a difference."""
    method: str = ""
    model: str = ""
    condition: dict[str, str] = Field(default_factory=dict)
    spec: FigureSpec
    note: str | None = None
    text: str = ""
    """The exact string that every English report prints; `printing.text_of` has it in the other languages, too."""
    unit: str = ""
    """`rate`, `points`, `number`, `difference`, `dollars`, `coefficient`, `share`, `effect`."""
    standard_error: float | None = None
    p_value: float | None = None
    details: dict[str, Any] = Field(default_factory=dict)
    """What else a reader may want: discordant pairs, means of both sides, numbers needed."""

    @property
    def function(self) -> str:
        return self.spec.function

    @property
    def versus(self) -> dict[str, str]:
        """The other side of a difference; empty: the figure is not one."""
        return self.spec.versus or {}


def rounded(value: float | None) -> float | None:
    """Ten significant digits: below what another machine's order of summation changes. No negative zero."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.10g}") + 0.0


def metric_of(spec: FigureSpec) -> str:
    """`params.metric`, else the name in `value`, else the function's."""
    name = spec.params.get("metric")
    return str(name) if name else spec.value.rpartition(":")[2] or spec.function


def compute(spec: FigureSpec, table: Table) -> Figure:
    """Raises UserError for a function, column or parameter that does not exist."""
    from moonbase.evals.figure_functions import FUNCTIONS, level_of

    function: Callable[..., dict[str, Any]] | None = FUNCTIONS.get(spec.function)
    if function is None:
        raise UserError(f"figure {spec.id!r}: no function {spec.function!r}{did_you_mean(spec.function, FUNCTIONS)}")
    try:
        found = function(spec, table)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"figure {spec.id!r}: {error} ({spec.function}); mend its parameters") from None
    for name in ("value", "low", "high", "standard_error", "p_value"):
        found[name] = rounded(found.get(name))
    found["details"] = {name: rounded(value) if isinstance(value, float) else value
                        for name, value in found.get("details", {}).items()}
    condition = {name.removeprefix("condition."): value for name, value in spec.select.items() if name != "model"}
    figure = Figure(id=spec.id, metric=metric_of(spec), level=level_of(spec, table), spec=spec, condition=condition,
                    model=spec.select.get("model", ""), **found)
    return figure.model_copy(update={"text": text_of(figure)})


def figures_of(suite: Suite | None, table: Table) -> list[Figure]:
    """Everything a report shows, with the suite's own hypotheses first."""
    from moonbase.evals.figure_plan import specs_of

    return [compute(spec, table) for spec in specs_of(suite, table)]


def __getattr__(name: str) -> Any:
    if name == "FUNCTIONS":
        from moonbase.evals.figure_functions import FUNCTIONS

        return FUNCTIONS
    raise AttributeError(name)
