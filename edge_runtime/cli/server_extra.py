"""Whether the libraries of the server, the extra [serve], are installed."""

from __future__ import annotations

import importlib.util

from edge_runtime.errors import BackendUnavailable

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def missing_modules() -> list[str]:
    """What the server needs and is not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def check_installed() -> None:
    """Say what is missing, and how to get it.

    Raises
    ------
    BackendUnavailable
    """
    if missing := missing_modules():
        raise BackendUnavailable(
            f"The server, and models with names of their own, need {', '.join(missing)}, which is not installed; "
            "run: pip install 'edge-runtime[serve]'"
        )
