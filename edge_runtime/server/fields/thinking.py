"""How much a model may reason, as the protocols express it → options of `Model.submit`."""

from __future__ import annotations

from typing import Any

from edge_runtime.server.errors import RequestError

THINKING_LEVELS: dict[str, int | None] = {"low": 256, "medium": 1024, "high": None, "max": None}
"""Reasoning tokens after which the answer starts; None: no limit. The model itself only knows on and off."""


def thinking_options(think: bool | str | None) -> dict[str, Any]:
    """Translate `think`: a switch, or a level that limits the reasoning; None is off, the model's default.

    Raises
    ------
    RequestError
        For other words.
    """
    if think is None or think is False or think == "":
        return {}
    if think is True:
        return {"thinking": True}
    if think not in THINKING_LEVELS:
        raise RequestError(f"think is {think!r}; expected true, false, or one of low, medium, high.", "think")
    return {"thinking": True, "thinking_budget": THINKING_LEVELS[think]}
