"""What a batch is made of: an item, how items are asked, and how one that was answered is recognised.

An item's `id` says what it is about; `asked` is a fingerprint of the question, the options and the model. An answer
that is there already counts only if both are the same: an answer to another question must not pass for one to this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.errors import EdgeRuntimeError

ASKED_DIGITS = 12


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    kind: str
    """Name of the error's class."""
    reason: str
    """One or two sentences."""
    may_pass: bool = False
    """Whether the same item may succeed later: a server was away, memory was short."""

    @classmethod
    def of(cls, error: BaseException, *, may_pass: bool = False) -> Failure:
        """From an error."""
        text = str(error) if isinstance(error, EdgeRuntimeError) else f"{type(error).__name__}: {error}"
        return cls(type(error).__name__, text, may_pass)


@dataclass(frozen=True)
class Item:
    """One conversation, and the line that its answer will have."""

    id: str
    about: Mapping[str, Any]
    """Fields of its line that say what was asked about: `input`, and `page` where there are several."""
    messages: str | Sequence[Any]
    """As `Model.chat` takes them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `Model.chat`."""
    asked: str = ""
    """Fingerprint of the question."""
    failure: Failure | None = None
    """Why it cannot be asked, if that is known already."""
    number: int = 0
    """Among those of a run, from 0, without gaps."""


class Source(Protocol):
    """Where items come from."""

    total: int
    """Items, as far as is known."""

    @property
    def is_final(self) -> bool:
        """Whether `total` will not grow: every document has been opened."""

    def __iter__(self) -> Iterator[Item]:
        """All of them, from the first, each time."""


@dataclass(frozen=True)
class Asking:
    """How items are asked, unless a job says otherwise."""

    prompt: str | None = None
    """Comes after the files."""
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `Model.chat`, `preset` among them."""
    by: Any = None
    """What else decides the answers: the model's name, how videos are read. Part of the fingerprint."""

    def messages(self, parts: Sequence[Any]) -> list[Any]:
        """A conversation about these parts."""
        content = [*parts, *([self.prompt] if self.prompt else [])]
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": content}]

    def fingerprint(self, *more: Any) -> str:
        """Of the question and the options, with what else is asked; a password changes no answer."""
        options = {name: value for name, value in self.options.items() if name != "password"}
        return fingerprint(self.prompt, self.system, options, self.by, *more)


def fingerprint(*values: Any) -> str:
    """Twelve hexadecimal digits of a hash; of values of JSON, paths and dataclasses of such."""
    text = json.dumps(values, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=ASKED_DIGITS // 2).hexdigest()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value) if isinstance(value, Path) else repr(value)
