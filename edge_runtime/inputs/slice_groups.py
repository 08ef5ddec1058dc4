"""Slices that share one set of queries: the encoder's input, already made or made on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod

from edge_runtime.inputs.slicing import Slice

LoadedGroup = list[tuple[Slice, int]]
"""Slices with their temporal ids (-1: a still picture) that share one set of queries."""


class LazyGroup(ABC):
    """A group whose slices are made on demand."""

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
        """Number of pictures read so far, and in all, of those that are read together with this one."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of slices."""

    @abstractmethod
    def ask(self) -> bool:
        """Request it; True if `load` will not wait."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Wait until it is made, or until the timeout."""

    @abstractmethod
    def load(self) -> LoadedGroup:
        """The group; raises why it cannot be made."""

    @abstractmethod
    def release(self) -> None:
        """Stop making it: it is no longer needed."""


Group = LoadedGroup | LazyGroup


STILL = -1  # temporal id of a picture without time


def n_patches(group: Group) -> int:
    """Patches of all slices of a group."""
    if isinstance(group, LazyGroup):
        return group.n_patches
    return sum(item.n_patches for item, _ in group)
