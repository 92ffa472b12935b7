"""`python -m moonbase` is the `moonbase` command."""

from __future__ import annotations

from moonbase.cli import main

if __name__ == "__main__":
    main()
