"""Names of files, folders and patterns → files, in a fixed order, without any twice.

A folder stands for the pictures, documents and videos in it and in folders below, by their suffixes; so does a
pattern. A file that is named itself is taken whatever it is called. What is left out is counted, not forgotten. The
names of one folder are in memory at a time, and twelve bytes for every file.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from edge_runtime.errors import ImageError

DIGEST_BYTES = 12


def digest(text: str) -> bytes:
    """What stands for a name in a set of millions."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


class Files:
    """The files that words stand for; can be walked through several times.

    Parameters
    ----------
    words : paths and patterns.
    suffixes : of the files that folders and patterns stand for, in lower case.
    """

    def __init__(self, words: Sequence[str], suffixes: Collection[str]) -> None:
        self._words, self._suffixes = words, frozenset(suffixes)
        self.left_out: Counter[str] = Counter()
        """Files of folders and patterns that were passed over in the last walk, by their suffix or kind."""

    def __iter__(self) -> Iterator[Path]:
        """Walk.

        Raises
        ------
        ImageError
            When a word stands for nothing, or a folder cannot be read.
        """
        self.left_out.clear()
        seen: set[bytes] = set()
        for word in self._words:
            is_empty = True
            for path in self._of_word(word):
                is_empty = False
                key = digest(os.path.abspath(path))  # noqa: PTH100 - without following links
                if key not in seen:
                    seen.add(key)
                    yield path
            if is_empty:
                raise ImageError(self._nothing(word))

    def _nothing(self, word: str) -> str:
        others = f" It holds other files ({', '.join(sorted(self.left_out))})." if self.left_out else ""
        return (
            f"{word!r} stands for no picture, document or video; expected one, or a folder or pattern with some."
            f"{others} Files of other names are read when they are named one by one."
        )

    def _of_word(self, word: str) -> Iterator[Path]:
        path = Path(os.path.expanduser(word))  # noqa: PTH111 - Path's raises for the user of "~50"
        try:
            found = path.stat()
        except (OSError, ValueError):
            if not glob.has_magic(word):
                raise ImageError(
                    f"The file {word[:200]!r} does not exist; check the path. A question is given with --prompt."
                ) from None
            yield from self._matching(path)
            return
        if stat.S_ISDIR(found.st_mode):
            yield from self._below(path)
        elif stat.S_ISREG(found.st_mode):
            yield path
        else:
            raise ImageError(f"{word[:200]!r} is a pipe or a device; expected files, which can be read again.")

    def _matching(self, pattern: Path) -> Iterator[Path]:
        """What a pattern stands for, as in shells: hidden names only if it says so, no links to folders in `**`."""
        parts = pattern.parts
        first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        shows_hidden = any(part.startswith(".") for part in parts[first:])
        folder = Path(*parts[:first])
        try:
            found = sorted(folder.glob(str(Path(*parts[first:]))))
        except (ValueError, NotImplementedError) as error:
            raise ImageError(
                f"{str(pattern)[:200]!r} is no pattern: {error}; expected one such as '**/*.png'."
            ) from None
        for path in found:
            if not shows_hidden and any(part.startswith(".") for part in path.parts[len(folder.parts) :]):
                self.left_out["hidden"] += 1
            else:
                yield from self._wanted(path)

    def _wanted(self, path: Path) -> Iterator[Path]:
        if path.is_dir():
            yield from self._below(path)
        elif path.suffix.lower() not in self._suffixes or not path.is_file():
            self.left_out[path.suffix.lower() or "without a suffix"] += 1
        else:
            yield path

    def _below(self, folder: Path) -> Iterator[Path]:
        """Files of a folder and those below, by name."""
        try:
            with os.scandir(folder) as found:
                entries = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in found)
        except OSError as error:
            raise ImageError(
                f"The folder {folder} cannot be read: {error.strerror}; check its permissions, or name the files."
            ) from None
        for name, is_folder, is_link in entries:
            if name.startswith("."):
                self.left_out["hidden"] += 1
            elif is_folder and is_link:
                self.left_out["links to folders"] += 1  # which may lead back here
            elif is_folder:
                yield from self._below(folder / name)
            else:
                yield from self._wanted(folder / name)
