"""A typed name → the file it means, although several spellings look the same.

File names hold characters that nobody types: macOS puts a narrow no-break space (U+202F) before "PM" in the names of
screenshots and decomposes names (NFD), chat programs put direction marks before them, and word processors and web
pages change quotes, dashes and spaces in copied text. Folding makes all of these equal.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from pathlib import Path

MAX_NAME_CHARACTERS = 4096
"""Longer texts are not paths on any system."""

_QUOTES = {ord(c): "'" for c in "\u2018\u2019\u201a\u201b\u2032\u02bc\u0060\u00b4"}
_QUOTES |= {ord(c): '"' for c in "\u201c\u201d\u201e\u201f\u2033"}
_MINUS = "\u2212"
_VARIATIONS = range(0xFE00, 0xFE10)  # select between forms of one character


def folded(name: str) -> str:
    """A name without differences that nobody sees: NFKC, one kind of space, quote and dash, nothing invisible."""
    text = unicodedata.normalize("NFKC", name.translate(_QUOTES))
    kept = (c for c in text if unicodedata.category(c) != "Cf" and ord(c) not in _VARIATIONS)
    dashes = "".join("-" if c == _MINUS or unicodedata.category(c) == "Pd" else c for c in kept)
    return " ".join(dashes.split())


def is_there(path: str | Path) -> bool:
    """Whether something has this name; raises PermissionError if a folder on the way is not accessible."""
    try:
        os.stat(path)  # noqa: PTH116 - takes names that are no paths, too
    except PermissionError:
        raise
    except (OSError, ValueError):  # ValueError: a zero byte
        return False
    return True


def find_named(word: str, *, any_case: bool = False) -> list[Path]:
    """Paths that a word may mean: the one of exactly this name, or those that look the same.

    Parameters
    ----------
    any_case : accept names in another case (`IMG.JPG` for `img.jpg`) if there is none in this case.

    Returns
    -------
    paths : none, one, or several that look the same.

    Raises
    ------
    PermissionError
        When a folder on the way is not accessible.
    """
    if not word or len(word) > MAX_NAME_CHARACTERS:
        return []
    whole = Path(os.path.expanduser(word))  # noqa: PTH111 - Path's raises for the user of "~50 apples"
    if is_there(whole):
        return [whole]
    if "\0" in word or "\n" in word:
        return []
    found = [Path(whole.anchor)]
    for part in whole.parts[1 if whole.anchor else 0 :]:
        found = [path for folder in found for path in _inside(folder, part, any_case)]
    return found


def _inside(folder: Path, name: str, any_case: bool) -> list[Path]:
    if is_there(folder / name):
        return [folder / name]
    wanted = folded(name)
    names = names_in(folder)
    found = [other for other in names if wanted and folded(other) == wanted]
    if not found and any_case:
        found = [other for other in names if wanted and folded(other).casefold() == wanted.casefold()]
    return [folder / other for other in sorted(found)]


def names_in(folder: Path) -> list[str]:
    """Names in a folder; none if it cannot be listed."""
    try:
        return os.listdir(folder)  # noqa: PTH208 - names are all that is wanted
    except (OSError, ValueError):
        return []


def similar_name(word: str) -> str | None:
    """A file in the same folder with a similar name; None if there is none."""
    path = Path(os.path.expanduser(word))  # noqa: PTH111
    names = names_in(path.parent)
    stem = folded(path.stem).casefold()
    same = sorted(name for name in names if folded(Path(name).stem).casefold() == stem)
    near = same or difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return str(path.parent / near[0]) if near else None
