"""moonbase: the Kimi K2 / K2.5 system in one readable package.

`moonbase.load`, `moonbase.Engine` and every room (`moonbase.data`, `moonbase.optim`, ...) are found on first use, so
that `import moonbase` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moonbase.engine import Engine as Engine
    from moonbase.loading import load as load

__version__ = "0.1.0"

_HOMES = {"Engine": "moonbase.engine", "load": "moonbase.loading"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import pkgutil

    rooms = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted({*_HOMES, "__version__", *(name for name in rooms if not name.startswith("_"))})
