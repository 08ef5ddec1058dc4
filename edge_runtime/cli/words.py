"""Words of a command line → files, piped input and text, in order.

An answer to a question whose picture was overlooked is worse than an error. So a word is text only if it can be
nothing else:

- `-` is piped input; whatever exists under the word's name, or one that looks the same (`file_names`), is a file;
- otherwise a word **without blanks** is a missing file when it has a slash, a scheme (`rtsp://`), or a suffix of two
  letters or more (`circle.pgn`);
- otherwise an argument **with blanks** is a missing file when it starts like a path (`./`, `../`, `~/`, `/`, `C:/`),
  when the folder in front of its last slash exists, or when it ends in the suffix of a picture, document or video, or
  a misspelled one (`my holiday.jgp`);
- everything else is text: sentences with a final sign (`Is this a.png?`), `and/or`, `1/2`, `v1.2`, `e.g.`, `a.b`.

A text that mentions an existing picture, or one on the web, is refused unless that file is named, too.
`--prompt TEXT` is the way out of all of this.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import click

from edge_runtime.cli.file_names import find_named, is_there, names_in, similar_name
from edge_runtime.cli.output_level import is_quiet
from edge_runtime.cli.piped import STDIN, Piped, read_pipe, told_apart
from edge_runtime.errors import ImageError, MessageError
from edge_runtime.inputs.mistaken_paths import FILE_SUFFIXES
from edge_runtime.store.names import visible

_REFUSED_SUFFIXES = (
    *(".ai", ".arw", ".cr2", ".cr3", ".dcm", ".djvu", ".dng", ".eps", ".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2"),
    *(".doc", ".docx", ".epub", ".odp", ".odt", ".ppt", ".pptx", ".rtf", ".xls", ".xlsx"),
    *(".7z", ".aac", ".flac", ".gguf", ".m4a", ".mp3", ".ogg", ".opus", ".wav", ".zip"),
)
"""Suffixes of other files that people name; refused with a reason."""

_NO_SLIPS = (".asp", ".gov")  # one letter off, and common at the end of a sentence

WAY_OUT = "if it is a question, give it with --prompt"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "mms", "udp", "srt")
_SUFFIX = re.compile(r"[^.]\.([A-Za-z][A-Za-z0-9_~-]{1,11})$")
_PATH_START = re.compile(r"(\.{1,2}|~[^/\\\s]*|[A-Za-z]:)[/\\]|\\\\\w")
_BACKSLASHES = re.compile(r"[\w .()-]*(\\[\w .()-]+)+")
_NUMBERS = re.compile(r"[-+]?\d{1,4}([.,]\d+)?%?(/\d{1,4}([.,]\d+)?%?)+")
_OPTION = re.compile(r"[\u2010-\u2015\u2212]{1,2}-?(?P<name>[a-z][a-z-]*)(=.*)?", re.DOTALL)
_SIGNS = "\"'`()[]{}<>,;:!?.\u2026\u2018\u2019\u201c\u201d\u00ab\u00bb"
_MARKS = (
    "\u3002\uff1f\uff01\uff0c\u3001\uff1b\uff1a\u061f\u06d4"  # full stop, question mark and so on, CJK and Arabic
)
# Words with a slash that are not paths unless their folder exists.
_PAIRS = frozenset(
    re.split(
        r"\s+",
        "and/or either/or if/when on/off yes/no true/false left/right input/output n/a w/o c/o i/o km/h tcp/ip "
        "he/she she/he his/her him/her she/her he/him they/them s/he",
    )
)

Named = str | Path | Piped
"""Text, a file or folder, or what a pipe held."""


def parse_arguments(arguments: Sequence[str], others: Sequence[Path] = ()) -> list[Named]:
    """Separate files from text, in order; neighbouring texts are joined by a space, piped ones by an empty line.

    Parameters
    ----------
    others : files that were named elsewhere, which texts may mention.

    Raises
    ------
    ImageError
        When something that looks like a file does not exist, or may mean several.
    MessageError
        When a text mentions a picture that is not named, or was meant as an option.
    """
    _check_stdin_once(arguments)
    for word in arguments:
        _check_dash(word)
    parts = [_part(word) for word in arguments]
    files = [*others, *(part for part in parts if isinstance(part, Path))]
    content: list[str | Path | Piped] = []
    was_piped = False
    for word, part in zip(arguments, parts, strict=True):
        is_piped = isinstance(part, str) and part is not word
        if part is word:
            if (reason := overlooked(word, files)) is not None:
                raise MessageError(f"{reason}, or give the question with --prompt.")
        elif isinstance(part, str) and not is_quiet():
            click.secho(f"Text was read from {_source(word)}, characters: {len(part)}.", err=True, dim=True)
        if isinstance(part, str) and content and isinstance(content[-1], str):
            content[-1] += ("\n\n" if is_piped or was_piped else " ") + part
        else:
            content.append(part)
        was_piped = is_piped
    return content


def parse_words(images: Sequence[str], arguments: Sequence[str]) -> list[Named]:
    """The files of `--image`, in front, and what the arguments are (`parse_arguments`).

    Raises
    ------
    ImageError, MessageError
    """
    _check_stdin_once((*images, *arguments))
    found = [named_file(word) for word in images]
    for word, part in zip(images, found, strict=True):
        if isinstance(part, str):
            raise ImageError(f"--image {_source(word)} holds text, expected a picture, a document or a video.")
    return [*found, *parse_arguments(arguments, [part for part in found if isinstance(part, Path)])]


def named_file(word: str) -> Path | Piped | str:
    """The file that a word names, whatever it looks like, or the text of a pipe.

    Raises
    ------
    ImageError
        When there is none, or it may mean several.
    """
    found = _found(word, any_case=True)
    if found is None:
        raise ImageError(f"{why_missing(word)}.")
    return found


def _check_stdin_once(words: Sequence[str]) -> None:
    if (times := sum(word in STDIN for word in words)) > 1:
        raise ImageError(f"stdin is named {times} times, but can be read once; name it once.")


def looks_like_file(word: str) -> bool:
    """Whether a word can only be a file name, existing or not; see the rules above."""
    text = word.strip()
    if not text or "\n" in text:
        return False
    return _is_path_phrase(text) if any(c.isspace() for c in text) else _is_path_word(text)


def _is_path_word(word: str) -> bool:
    bare = word.strip(_SIGNS)
    if "://" in word or _suffix(bare) in FILE_SUFFIXES + _REFUSED_SUFFIXES:
        return True
    if bare.casefold() in _PAIRS or _NUMBERS.fullmatch(bare):
        return os.path.isdir(bare.split("/")[0])  # noqa: PTH112 - of any text
    if any(c in _MARKS for c in word):  # a sentence in a script without spaces
        return _PATH_START.match(word) is not None
    if "/" in word and "</" not in word:  # <ref>dog</ref> is a question
        return True
    return any((_PATH_START.match(word), _BACKSLASHES.fullmatch(word), _SUFFIX.search(word)))


def _is_path_phrase(text: str) -> bool:
    folder, slash, _ = text.rpartition("/")
    if _PATH_START.match(text) or (text.endswith("/") and "://" not in text):
        return True
    if text.startswith("/") and (folder or is_there("/" + text[1:].split()[0])):
        return True
    if slash and os.path.isdir(folder):  # noqa: PTH112
        return True
    suffix = _suffix(text)
    if suffix in FILE_SUFFIXES + _REFUSED_SUFFIXES:
        return True
    return suffix not in _NO_SLIPS and any(_is_slip(suffix, known) for known in FILE_SUFFIXES)


def _suffix(text: str) -> str:
    """What follows the last dot of a name, with the dot, in lower case; empty without a dot."""
    match = re.search(r"[^.\s/]\.([A-Za-z0-9]+)$", text)
    return f".{match[1].lower()}" if match else ""


def _is_slip(found: str, known: str) -> bool:
    """Whether one letter too many, too few or wrong, or two in the wrong order, make a suffix out of a known one."""
    if min(len(found), len(known)) < 4 or abs(len(found) - len(known)) > 1:  # the dot counts
        return False
    same = next(
        (i for i, (a, b) in enumerate(zip(found, known, strict=False)) if a != b), min(len(found), len(known))
    )
    a, b = found[same:], known[same:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def _part(word: str) -> str | Path | Piped:
    if not word.strip():
        return word
    is_file = looks_like_file(word)
    try:
        found = _found(word, any_case=is_file)
    except PermissionError:
        raise ImageError(
            f"The file {_short(word)} cannot be read: permission denied; check its permissions."
        ) from None
    if found is None and is_file:
        raise ImageError(f"{why_missing(word)}, or, {WAY_OUT}.")
    return word if found is None else found


def _found(word: str, *, any_case: bool) -> Path | Piped | str | None:
    """What a word names, if it exists."""
    if word in STDIN:
        return read_pipe(word)
    if re.match(r"data:[\w.+-]+/[\w.+-]+[;,]", word, re.IGNORECASE):
        from edge_runtime.inputs.image import decode_data_uri

        return told_apart(decode_data_uri(word), "the data: URI")
    for spelling in _spellings(word):
        paths = find_named(spelling, any_case=any_case)
        if len(paths) > 1:
            names = ", ".join(visible(str(path)) for path in paths)
            raise ImageError(f"{_short(word)} may mean any of {names}; name one exactly.")
        if paths:
            return _checked(paths[0], word)
    return None


def _spellings(word: str) -> list[str]:
    """A word as it is, and without what shells and browsers add to a path."""
    if word.lower().startswith("file:"):
        address = urlsplit(word)
        if address.netloc in ("", "localhost"):
            return [url2pathname(address.path) if os.name == "nt" else unquote(address.path)]
    found = [word]
    if len(word) > 2 and word[0] == word[-1] and word[0] in "\"'":
        found.append(word[1:-1])
    if "\\" in word and os.name != "nt":
        found.append(re.sub(r"\\(.)", r"\1", word))
    return found


def _checked(path: Path, word: str) -> Path | Piped | str:
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode):
        return read_pipe(str(path))
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ImageError(f"{_short(word)} is a device or a socket; expected a file, a pipe or a folder of frames.")
    if stat.S_ISDIR(mode) and not any(c in word for c in "/\\"):
        suffixes = (os.path.splitext(name)[1].lower() for name in names_in(path))  # noqa: PTH122
        if not any(suffix in FILE_SUFFIXES for suffix in suffixes):
            raise ImageError(
                f"{_short(word)} is a folder without pictures, expected a folder of frames; name the files, or, "
                f"{WAY_OUT}."
            )
    return path


def overlooked(text: str, files: Sequence[Path]) -> str | None:
    """Why a question cannot be answered from these files: it mentions another one, or one on the web; or None."""
    for token in re.split(r"[\s()\[\]<>{}\"'`|*]+", text):
        name = token.rstrip(_SIGNS)
        if _SCHEME.match(name):
            scheme = name.partition(":")[0].lower()
            if scheme in _STREAMS or _suffix(re.split("[?#]", name)[0]) in FILE_SUFFIXES:
                return f"The question mentions {_short(name)}, but nothing is fetched: download it and name the file"
        elif _suffix(name) in FILE_SUFFIXES:
            paths = find_named(name)
            if paths and not any(path.samefile(file) for path in paths for file in files):
                return f"The question mentions {_short(name)}, which exists but was not given: name it by itself"
    return None


def _check_dash(word: str) -> None:
    """Refuse an option whose dashes a word processor or a web page has changed."""
    context = click.get_current_context(silent=True)
    match = _OPTION.fullmatch(word)
    if context is None or match is None:
        return
    name = match["name"]
    option = f"-{name}" if len(name) == 1 else f"--{name}"
    if any(option in parameter.opts for parameter in context.command.params):
        raise MessageError(f"{_short(word)} starts with a typographic dash; type {option}.")


def why_missing(word: str) -> str:
    """What is wrong with a word that `looks_like_file` but is not one."""
    name = _short(word.strip())
    if "://" in word and not word.lower().startswith("file:"):
        what = "a web address" if word.lower().startswith(("http:", "https:")) else "an address"
        return f"{name} is {what}, expected a file; nothing is fetched: download it first"
    similar = similar_name(word.strip())
    hint = f", but {visible(similar)} is there" if similar else ""
    return f"The file {name} does not exist{hint}; check the path"


def _short(word: str) -> str:
    text = visible(word)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _source(word: str) -> str:
    return "stdin" if word in STDIN else _short(word)
