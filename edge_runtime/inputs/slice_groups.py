"""Slices that share one set of queries: what the encoder takes, already made or made when it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from edge_runtime.inputs.slicing import Slice

LoadedGroup = list[tuple[Slice, int]]
"""Slices with their temporal ids (-1: a still picture) that share one set of queries."""


class LazyGroup(ABC):
    """A group whose slices are made when they are needed."""

    @property
    @abstractmethod
    def n_patches(self) -> int:
        """Patches of all its slices."""

    @property
    @abstractmethod
    def digest(self) -> bytes:
        """Fingerprint of all that decides its visual tokens."""

    @property
    @abstractmethod
    def reading(self) -> tuple[int, int]:
        """Pictures that were read, and those that are to be: of all that is read together with this one."""

    @abstractmethod
    def __len__(self) -> int:
        """Slices."""

    @abstractmethod
    def ask(self) -> bool:
        """Have it made; True when `load` will not wait."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Wait until it is made, or the time is up."""

    @abstractmethod
    def load(self) -> LoadedGroup:
        """The group; raises why it cannot be made."""

    @abstractmethod
    def release(self) -> None:
        """It is needed no more: stop making it."""


Group = LoadedGroup | LazyGroup


STILL = -1  # temporal id of a picture without time


def n_patches(group: Group) -> int:
    """Patches of all slices of a group."""
    if isinstance(group, LazyGroup):
        return group.n_patches
    return sum(item.n_patches for item, _ in group)
