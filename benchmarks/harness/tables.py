"""Rows of texts → Markdown tables, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "–"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number, or a dash where nothing was measured."""
    return MISSING if value is None else f"{value:.{digits}f}{unit}"


def megabytes(n_bytes: float) -> str:
    """Bytes in MB of 10^6."""
    return f"{n_bytes / 1e6:,.0f}"
