"""Folders of the user, where there is a user with a home; services, containers and rescue systems may have none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

NOWHERE = Path(os.devnull) / "no-home-folder"
"""Nothing is in it, and not even root can create it: reading finds nothing, writing is refused by this name."""


def user_folder(find: Callable[[], str | Path]) -> Path:
    """What a function of platformdirs or `Path.home` returns; `NOWHERE` if there is no home.

    Older releases of platformdirs return a path that begins with `~` then, which would become a folder of that name.
    """
    try:
        path = Path(find())
    except RuntimeError:
        return NOWHERE
    return path if path.is_absolute() else NOWHERE
