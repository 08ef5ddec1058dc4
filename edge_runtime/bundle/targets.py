"""Kinds of machines that bundles are made for: their names, and the tags of the wheels that run there."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from edge_runtime.errors import BundleError

OLDEST_GLIBC, NEWEST_GLIBC = 17, 44
"""Minor versions of glibc 2 in tags of wheels; what a bundle needs is told in its manifest."""
FETCHED_GLIBC = 28
"""Wheels are fetched for systems since 2018: Debian 10, Red Hat 8."""


@dataclass(frozen=True)
class Target:
    """A kind of machine."""

    name: str
    """linux-x86_64 or linux-aarch64."""
    python: tuple[int, int]
    """Version of CPython."""

    @property
    def machine(self) -> str:
        """As `platform.machine` names it."""
        return self.name.removeprefix("linux-")

    @property
    def platform(self) -> str:
        """Platform tag of wheels that were compiled on such a machine."""
        return f"linux_{self.machine}"

    @property
    def python_name(self) -> str:
        """Such as 3.11."""
        return ".".join(map(str, self.python))

    @property
    def is_here(self) -> bool:
        """Whether this is such a machine, and this Python the one that is meant."""
        return self.name == own_name() and self.python == sys.version_info[:2]

    def platforms(self, newest_glibc: int = NEWEST_GLIBC) -> Iterator[str]:
        """Platform tags of wheels that run there, those for older systems last."""
        yield self.platform
        for minor in range(newest_glibc, OLDEST_GLIBC - 1, -1):
            yield f"manylinux_2_{minor}_{self.machine}"
        yield f"manylinux2014_{self.machine}"


NAMES = ("linux-x86_64", "linux-aarch64")


def own_name() -> str:
    """Name of the target that this machine is; another name if it is none."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return f"{sys.platform}-{machine}"


def choose(name: str | None, python: str | None) -> Target:
    """The target that is meant; this machine and this Python where nothing is said.

    Raises
    ------
    BundleError
        When the name is none, or the version of Python is not one that this package runs on.
    """
    name = name or own_name()
    if name not in NAMES:
        raise BundleError(
            f"A bundle for {name} cannot be made; expected --target {' or '.join(NAMES)}, which is the machine that "
            "it will be installed on."
        )
    if python is None:
        return Target(name, sys.version_info[:2])
    match = re.fullmatch(r"3\.(\d{1,2})", python)
    if match is None or int(match[1]) < 11:
        raise BundleError(f"--python is {python!r}; expected 3.11 or newer, such as 3.12.")
    return Target(name, (3, int(match[1])))


def glibc_of_tag(tag: str) -> tuple[int, ...]:
    """Version of glibc that a platform tag asks for; empty if it says nothing."""
    match = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    if match:
        return int(match[1]), int(match[2])
    return {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}.get(tag.partition("_")[0], ())
