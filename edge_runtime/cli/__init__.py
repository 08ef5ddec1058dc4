"""The command `edge-runtime`: arguments in, an exit code out.

`main` is imported on demand: `edge_runtime.cli.serve` and its neighbours do not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.cli.program import main

__all__ = ["main"]


def __getattr__(name: str) -> Any:
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_runtime.cli import program

    return program.main
