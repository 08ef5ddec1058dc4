"""Words of a command line → the model they name, in every command alike: the first word, or `-m`.

A first word is the model if it is the name of one that is known (the demo, an alias, a hub's or a pulled model, one
that was created here) or a path to its files; a file to ask about comes before a name. A name that is known but not
here is the model all the same: loading it says how to fetch it. What only looks like a model's name is neither asked
nor answered by another model: it is an error that asks.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from edge_runtime.cli.file_names import find_named, names_in
from edge_runtime.cli.piped import STDIN
from edge_runtime.errors import ModelFileError
from edge_runtime.store.names import ALIASES, DEMO, parse_source, plain_name, visible

_FAMILIES = (
    *(
        "llava",
        "bakllava",
        "llama",
        "codellama",
        "tinyllama",
        "gemma",
        "codegemma",
        "paligemma",
        "shieldgemma",
        "qwen",
    ),
    *("qwq", "mistral", "mixtral", "ministral", "magistral", "devstral", "pixtral", "codestral", "moondream", "phi"),
    *("granite", "minicpm", "smollm", "smolvlm", "internvl", "deepseek", "gpt-oss", "olmo", "command-r", "wizardlm"),
    *("starcoder", "nous-hermes", "chatglm", "exaone", "nemotron", "florence", "idefics", "openchat", "stablelm"),
    *("nomic-embed", "mxbai-embed", "hunyuan"),
)
_ORDINARY = (
    "aya",
    "bge",
    "dolphin",
    "ernie",
    "falcon",
    "glm",
    "gpt",
    "hermes",
    "intern",
    "kimi",
    "orca",
    "solar",
    "yi",
)
"""Families that are names or words, too: models only with a version or a tag."""
_REST = r"(?P<rest>[\d:_.-].*|vl.*|v\d.*)"
_FAMILY = re.compile(rf"({'|'.join(sorted(_FAMILIES, key=len, reverse=True))}){_REST}?")
_ORDINARY_FAMILY = re.compile(rf"({'|'.join(_ORDINARY)})-?{_REST}")
_TAGGED = re.compile(r"[a-z][\w.-]*(/[\w.-]+)*:[\w.-]+", re.IGNORECASE)
_VERSIONED = re.compile(r"[a-z]{2,}([-_]?v?\d+([._]\d+)*)([-_.:][\w.:-]*|[a-z]{0,3})", re.IGNORECASE)
_WORD = re.compile(r"\w[\w./:@+#?=&%~-]*")
_QUANTISED = ".gguf"


def model_named(word: str) -> str | None:
    """The model that a word names, as `Model.load` takes it, here or not; None if it names none.

    Raises
    ------
    ModelFileError
        When the word can only be a name, and is malformed.
    """
    if not word or word in STDIN or any(c.isspace() for c in word):
        return None
    if (path := _path_of_model(word)) is not None:
        return path if path != "" else None
    name = plain_name(word)
    if name.lower() == DEMO:
        return DEMO
    if not _WORD.fullmatch(name):
        return None
    from edge_runtime.server.registry.pulled import PulledModels
    from edge_runtime.store.library import Library

    library = Library()
    with contextlib.suppress(ModelFileError):  # a store that cannot be read: loading says so
        name = PulledModels(library).spelled(name)
    is_web = name.startswith(("https://", "http://"))
    if is_web and not re.split("[?#]", name)[0].lower().endswith(_QUANTISED):
        return None
    if parse_source(name) is not None:
        return name
    return name if _is_made(name, library.root) else None


def _path_of_model(word: str) -> str | None:
    """The word, if it is a path to a model; empty if it is one to something else; None if it is no path."""
    try:
        found = find_named(word)
        folder, colon, _ = word.rpartition(":")
        if not found and colon and len(folder) > 1 and _holds_model(Path(os.path.expanduser(folder))):  # noqa: PTH111
            return word
    except OSError:
        return ""
    if not found:
        return None
    path = found[0]
    if path.is_dir():
        if any(c in word for c in "/\\"):
            return word if _holds_model(path) else ""
        if not _holds_model(path):
            return "" if _holds_pictures(path) else None
        # As in `find_model`: a name that is known comes before a folder, which is given as ./NAME.
        return None if word == DEMO or word.partition(":")[0] in ALIASES else word
    return str(path) if path.suffix.lower() == _QUANTISED else ""


def _holds_model(folder: Path) -> bool:
    return any(name.lower().endswith(_QUANTISED) for name in names_in(folder))


def _holds_pictures(folder: Path) -> bool:
    from edge_runtime.inputs.mistaken_paths import FILE_SUFFIXES

    return any(name.lower().endswith(FILE_SUFFIXES) for name in names_in(folder))


def _is_made(name: str, store: Path) -> bool:
    """Whether a model of this name was created here, by the server or `edge-runtime create`."""
    from edge_runtime.cli.made_models import made_model

    return made_model(name, store) is not None


def spelled(name: str) -> str:
    """A model's name as `Model.load` takes it: in whatever spelling, or a path, which stays as it is."""
    with contextlib.suppress(ModelFileError):  # loading it reports what is wrong
        return model_named(name) or name
    return name


def take_model(
    words: Sequence[str], given: str | None, *, on_server: bool = False
) -> tuple[str | None, tuple[str, ...]]:
    """Take the model from the words of a command that asks, if the first one names it.

    Parameters
    ----------
    given : the model of `-m`.
    on_server : keep names as they are written: a server has its own.

    Returns
    -------
    model, words : None if none is named; what is left.

    Raises
    ------
    click.UsageError
        When two different models are named.
    ModelFileError
        When the first word looks like the name of a model that is not known.
    """
    named = model_named(words[0]) if words else None
    if named is None:
        if words and given is None:
            _check_unknown(words)
        return (given if given is None or on_server else spelled(given)), tuple(words)
    one = one_model(words[0], given, way_out=True)
    return words[0] if on_server else one, tuple(words[1:])


def one_model(positional: str | None, given: str | None, *, way_out: bool = False) -> str | None:
    """The model that was named as an argument or with `-m`; None if neither.

    Raises
    ------
    click.UsageError
        When they differ.
    """
    if positional is None or given is None:
        found = given if positional is None else positional
        return None if found is None else spelled(found)
    if spelled(positional) != spelled(given):
        text = "; if the first is part of the question, give the question with --prompt" if way_out else ""
        raise click.UsageError(
            f"Two models are named, {visible(positional)[:80]} and -m {visible(given)[:80]}: leave one out{text}."
        )
    return spelled(positional)


def needed_model(positional: str | None, given: str | None) -> str:
    """The model of a command that needs one.

    Raises
    ------
    click.UsageError
        When none is named, or two.
    """
    name = one_model(positional, given)
    if name is None:
        raise click.UsageError("No model is named: name one; 'edge-runtime list' shows those that are here.")
    return name


def _check_unknown(words: Sequence[str]) -> None:
    """Refuse a first word that was probably meant as a model."""
    word, behind = words[0], words[1:]
    if not _looks_like_model(word, behind):
        return
    near = difflib.get_close_matches(word.lower(), [DEMO, *ALIASES], n=1, cutoff=0.6)
    meant = near[0] if near else word
    raise ModelFileError(
        f"{visible(word)[:80]} looks like a model's name, but no model of this name is known here: did you mean "
        f"-m {visible(meant)[:80]}? 'edge-runtime list' shows the models that are here, 'edge-runtime pull "
        f"{next(iter(ALIASES))}' fetches the official one; if it is part of the question, give the question with "
        "--prompt."
    )


def _looks_like_model(word: str, behind: Sequence[str]) -> bool:
    from edge_runtime.cli.words import looks_like_file

    if not word or any(c.isspace() for c in word) or not word.isascii() or looks_like_file(word):
        return False
    with contextlib.suppress(OSError):
        if find_named(word):
            return False
    family = _FAMILY.fullmatch(word.lower())
    if (family and (word.islower() or family["rest"])) or _ORDINARY_FAMILY.fullmatch(word.lower()):
        return True
    # `run Describe photo.jpg`, `run room:12 is what`: words of a sentence stand beside other single words.
    is_set_off = bool(behind) and _stands_alone(behind[0])
    return is_set_off and any((family, _TAGGED.fullmatch(word), _VERSIONED.fullmatch(word)))


def _stands_alone(word: str) -> bool:
    """Whether a word behind the first is a whole question, or a file."""
    from edge_runtime.cli.words import looks_like_file

    if word in STDIN or any(c.isspace() for c in word):
        return True
    with contextlib.suppress(OSError):
        return looks_like_file(word) or bool(find_named(word))
    return False


def model_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take its model as an argument, or with `-m`: `one_model` of `word` and `model`."""
    option = click.option("-m", "--model", metavar="MODEL", help="The same as the argument.")
    return click.argument("word", required=False, metavar="[MODEL]")(option(command))
