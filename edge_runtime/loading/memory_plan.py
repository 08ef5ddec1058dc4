"""Which context, KV type and mode a model is loaded with, so that it fits the memory; or what would fit instead.

The choices come in order of preference, and the first that fits is taken. What the user asked for is in all of them;
where that leaves none that fits, the refusal names a setting and a type of the same model that would, with numbers
from the files' headers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edge_runtime.decoder.options import DEFAULT_CONTEXT
from edge_runtime.errors import NotEnoughMemoryError
from edge_runtime.loading.memory_needs import Needs
from edge_runtime.system.memory import available_bytes

logger = logging.getLogger("edge_runtime")

CONTEXTS = (DEFAULT_CONTEXT, DEFAULT_CONTEXT // 2, DEFAULT_CONTEXT // 4)
LOW_MEMORY_CONTEXTS = CONTEXTS[1:]


@dataclass(frozen=True)
class Setup:
    """What may be chosen to fit the memory."""

    n_ctx: int
    kv_type: str
    low_memory: bool = False

    @property
    def flags(self) -> str:
        """The options that ask for it."""
        return "--low-memory " * self.low_memory + f"--ctx {self.n_ctx} --kv-type {self.kv_type}"


@dataclass(frozen=True)
class Wishes:
    """What the user asked for, and what stands in for the rest."""

    longest: int
    """Context that the model was trained for."""
    kv_type: str
    """What keys and values are stored in where nothing was asked."""
    low_kv_type: str
    """The same in low memory."""
    least_kv_type: str
    """What takes least and still works, for advice."""
    n_ctx: int | None = None
    low_memory: bool = False

    def setups(self) -> list[Setup]:
        """What may be chosen, in order of preference."""
        found = []
        for low in (True,) if self.low_memory else (False, True):
            contexts = (self.n_ctx,) if self.n_ctx else LOW_MEMORY_CONTEXTS if low else CONTEXTS
            kv_type = self.low_kv_type if low else self.kv_type
            found += [Setup(min(n, self.longest), kv_type, low) for n in contexts]
        return list(dict.fromkeys(found))


def choose_setup(
    needs: Callable[[Setup], Needs],
    name: str,
    wishes: Wishes,
    *,
    force: bool = False,
    other_types: Sequence[tuple[str, int]] = (),
) -> Setup:
    """Choose a setup that fits into memory; a line in the log tells of any but the first choice.

    Parameters
    ----------
    needs : setup → needs.
    name : of the model, for messages.
    force : take the first choice even if it does not fit.
    other_types : smaller types of the same decoder with the bytes that they hold in memory, the largest first.

    Raises
    ------
    NotEnoughMemoryError
        With the numbers, and with what would fit.
    """
    setups, free = wishes.setups(), available_bytes()
    chosen = setups[0] if force else next((each for each in setups if needs(each).total <= free), None)
    if chosen is None:
        raise NotEnoughMemoryError(_refusal(needs, name, wishes, free, other_types))
    if chosen != setups[0]:
        logger.warning(
            "%s is loaded with %s, about %s GB: %s GB are free, and %s would take %s GB.",
            name, chosen.flags, _gb(needs(chosen).total), _gb(free), setups[0].flags, _gb(needs(setups[0]).total),
        )  # fmt: skip
    return chosen


def _refusal(
    needs: Callable[[Setup], Needs], name: str, wishes: Wishes, free: int, other_types: Sequence[tuple[str, int]]
) -> str:
    tried = wishes.setups()
    least = min(tried, key=lambda setup: needs(setup).total)
    parts = needs(least)
    return (
        f"{name} needs about {_gb(parts.total)} GB of memory with {least.flags} (weights {_gb(parts.weights)}, "
        f"KV cache for {least.n_ctx} tokens {_gb(parts.kv_cache)}, vision {_gb(parts.vision)}, "
        f"buffers {_gb(parts.compute)}), {_gb(free)} GB are free; "
        f"{_what_would_fit(needs, wishes, free, other_types)}; close other programs, or pass --force."
    )


def _what_would_fit(
    needs: Callable[[Setup], Needs], wishes: Wishes, free: int, other_types: Sequence[tuple[str, int]]
) -> str:
    smallest = Setup(min(CONTEXTS[-1], wishes.longest), wishes.least_kv_type, low_memory=True)
    found = []
    for setup in [*replace(wishes, n_ctx=None).setups(), smallest]:
        if needs(setup).total <= free:
            found.append(f"{setup.flags} needs about {_gb(needs(setup).total)} GB")
            break
    asked = min(wishes.setups(), key=lambda setup: needs(setup).total)
    for setup in dict.fromkeys((asked, smallest)):
        whole = {kind: replace(needs(setup), weights=n_bytes).total for kind, n_bytes in other_types}
        fitting = [kind for kind, n_bytes in whole.items() if n_bytes <= free]
        if fitting:
            found.append(f"the same model in {fitting[0]} needs about {_gb(whole[fitting[0]])} GB with {setup.flags}")
            break
    if found:
        return "what would fit: " + ", or ".join(found)
    if other_types:
        kind, n_bytes = min(other_types, key=lambda each: each[1])
        least = replace(needs(smallest), weights=n_bytes).total
        return f"nothing would fit here, not even {kind}, which needs about {_gb(least)} GB with {smallest.flags}"
    return "nothing would fit here"


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f}"
