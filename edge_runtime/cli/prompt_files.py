"""A line of a chat → the files that are named inside it, and the question without them.

Paths come typed, dragged from a window (blanks escaped, or in quotes), with `~`, or from a browser (`file://`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from edge_runtime.cli.file_names import find_named
from edge_runtime.inputs.mistaken_paths import FILE_SUFFIXES

_TOKEN = re.compile(
    r"""'[^'\n]+'|"[^"\n]+"|(?:\\.|[^\s\\])+""" if os.name != "nt" else r"""'[^'\n]+'|"[^"\n]+"|\S+"""
)
_AROUND = ".,;:!?()[]{}<>`*\u2026\u2018\u2019\u201c\u201d\u00ab\u00bb\"'"
_STARTS = ("/", "./", "../", "~/", "file://")


@dataclass(frozen=True)
class Line:
    """A question and the names in it, in order."""

    question: str
    names: list[str]
    missing: str | None
    """The first word that can only be a picture's path, and is none; None without one."""


@dataclass(frozen=True)
class _Name:
    start: int
    end: int
    name: str


def split_line(text: str) -> Line:
    """Find the existing pictures, documents and videos that a line names.

    Names before or behind the question are taken out of it; where one stands inside, all stay, without their folders,
    so that the sentence keeps its sense.
    """
    found: list[_Name] = []
    missing = None
    for match in _TOKEN.finditer(text):
        name = _exact(match) or _bare(match)
        if name is None:
            continue
        if find_named(_path(name.name)):
            found.append(name)
        elif missing is None and name.name.startswith(_STARTS):
            missing = name.name
    return Line(_without(text, found), [_path(name.name) for name in found], missing)


def _exact(match: re.Match[str]) -> _Name | None:
    """A word that is a path with its quotes or escapes."""
    word = match[0]
    plain = word[1:-1] if word[0] in "\"'" and word[0] == word[-1] and len(word) > 2 else _unescaped(word)
    return _Name(match.start(), match.end(), plain) if _has_suffix(plain) else None


def _bare(match: re.Match[str]) -> _Name | None:
    """A path with signs of the sentence around it: `(a.png)`, `a.png?`."""
    word = match[0]
    left = len(word) - len(word.lstrip(_AROUND.replace(".", "")))
    end = len(word.rstrip(_AROUND))
    plain = _unescaped(word[left:end])
    return _Name(match.start() + left, match.start() + end, plain) if left < end and _has_suffix(plain) else None


def _unescaped(word: str) -> str:
    return word if os.name == "nt" else re.sub(r"\\(.)", r"\1", word)


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in FILE_SUFFIXES  # noqa: PTH122 - of any text


def _path(name: str) -> str:
    from urllib.parse import unquote, urlsplit

    return unquote(urlsplit(name).path) if name.lower().startswith("file:///") else name


def _without(text: str, names: list[_Name]) -> str:
    start, end, left = 0, len(text), list(names)
    while left and not text[start : left[0].start].strip():
        start = left.pop(0).end
    while left and not text[left[-1].end : end].strip():
        end = left.pop().start
    if not left:
        return text[start:end].strip()
    pieces, at = [], 0
    for name in names:
        pieces += [text[at : name.start], re.split(r"[/\\]", name.name)[-1]]
        at = name.end
    return "".join([*pieces, text[at:]]).strip()
