"""A file of jobs → items, one for each line.

    {"id": "a", "input": "a.png", "prompt": "What is it?", "options": {"max_tokens": 16}}
    {"id": "b", "messages": [{"role": "user", "content": ["Who are you?"]}]}

`input` is a file or a list of files, in the order of the message; `prompt`, `preset` and `system` are the command's
where a line has none. Every line is read before the first is answered, so that none is refused after hours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edge_runtime.batch.files import digest
from edge_runtime.batch.items import Asking, Item
from edge_runtime.errors import EdgeRuntimeError, MessageError
from edge_runtime.options import GenerationOptions

MAX_LINE_BYTES = 256 << 20
MAX_ID = 1024
FIELDS = ("id", "input", "prompt", "preset", "system", "messages", "options")
_OURS = ("n", "prompt_ids", "reuse", "follow_up", "prompt_only", "prompt_logprobs", "adapter", "video_limits")
OPTIONS = frozenset(GenerationOptions.__dataclass_fields__) - {*_OURS, "preset", "file_limit_bytes"}
"""Options that a line may set."""


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1, one in memory at a time.

    Raises
    ------
    MessageError
        When the file cannot be read, or a line is too long.
    """
    if path.exists() and not path.is_file():
        raise MessageError(f"{path} is no file; expected one with a JSON object a line, which is read twice.")
    try:
        with path.open("rb") as file:
            yield from _lines(file, path)
    except OSError as error:
        raise MessageError(f"{path} cannot be read: {error.strerror}; check the path.") from None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(data) > MAX_LINE_BYTES:
            raise MessageError(
                f"Line {number} of {path} has more than {MAX_LINE_BYTES >> 20} MB, which is the limit; name files "
                "in it instead of holding them."
            )
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as Windows writes it
        if stripped := data.strip():
            yield number, stripped


def read_object(data: bytes, number: int, path: Path) -> dict[str, Any]:
    """The JSON object of a line; MessageError when it is none."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MessageError(
            f"Line {number} of {path} is not valid JSON ({error}); expected one object a line, in UTF-8."
        ) from None
    if not isinstance(value, dict):
        raise MessageError(f"Line {number} of {path} is {_shown(value)}; expected a JSON object.")
    return value


def has_openai_lines(path: Path) -> bool:
    """Whether the first line is one of OpenAI's batches, which has a `custom_id`; errors as of `Jobs`."""
    for number, data in raw_lines(path):
        return "custom_id" in read_object(data, number, path)
    raise MessageError(f"{path} has no lines; expected one job a line.")


class Jobs:
    """Items of a file, every line of which has been checked.

    Parameters
    ----------
    as_part : what a message holds for a file: a path, or a part for a video.

    Raises
    ------
    MessageError
        Names the line, what was found and what was expected.
    """

    is_final = True

    def __init__(self, path: Path, asking: Asking, as_part: Callable[[Path], Any]) -> None:
        self._path, self._asking, self._as_part = path, asking, as_part
        self.total = 0
        seen: dict[bytes, int] = {}
        for number, data in raw_lines(path):
            item = self._item(data, number, look=False)
            self.total += 1
            if (first := seen.setdefault(digest(item.id), number)) != number:
                raise MessageError(
                    f"Line {number} of {path} has the id {item.id[:80]!r}, as line {first}; expected one of its own."
                )
        if not self.total:
            raise MessageError(f"{path} has no lines; expected one job a line.")

    def __iter__(self) -> Iterator[Item]:
        """Read the file once more."""
        for number, data in raw_lines(self._path):
            yield self._item(data, number)

    def _item(self, data: bytes, number: int, *, look: bool = True) -> Item:
        value = read_object(data, number, self._path)
        try:
            return self._checked(value, number, look)
        except EdgeRuntimeError as error:
            raise MessageError(f"Line {number} of {self._path}: {error}") from None

    def _checked(self, value: Mapping[str, Any], number: int, look: bool) -> Item:
        if unknown := sorted(value.keys() - {*FIELDS}):
            hint = "; it belongs into options" if unknown[0] in OPTIONS else ""
            raise MessageError(f"{unknown[0]!r} is no field of a job{hint}. Expected {', '.join(FIELDS)}.")
        inputs = self._inputs(value.get("input"))
        text = {name: _text(value, name) for name in ("id", "prompt", "preset", "system")}
        options = _options(value.get("options"))
        if text["preset"] is not None:
            options["preset"] = text["preset"]
        asking = Asking(
            text["prompt"] or self._asking.prompt,
            text["system"] or self._asking.system,
            {**self._asking.options, **options},
            self._asking.by,
        )
        messages = value.get("messages")
        if messages is None:
            if not asking.prompt and asking.options.get("preset") is None:
                raise MessageError(
                    "there is no question; expected a prompt, a preset or messages, here or as an option."
                )
            messages = asking.messages([self._as_part(path) if look else path for path in inputs])
        elif not isinstance(messages, list) or not messages:
            raise MessageError(f"messages is {_shown(messages)}; expected a list of messages.")
        elif inputs or text["prompt"] or text["system"]:
            raise MessageError(
                "messages stand beside input, prompt or system; expected either, as they say the same."
            )
        GenerationOptions.of({name: option for name, option in asking.options.items() if name != "decoders"})
        name = text["id"] or f"line {number}"
        about = {} if value.get("input") is None else {"input": value["input"]}
        asked = asking.fingerprint({**value, "id": name})
        return Item(name, about, messages, asking.options, asked)

    def _inputs(self, value: Any) -> list[Path]:
        names = [value] if isinstance(value, str) else value
        if names is None:
            return []
        if not isinstance(names, list) or not all(
            isinstance(name, str) and name and "\0" not in name for name in names
        ):
            raise MessageError(f"input is {_shown(value)}; expected the path of a file, or a list of paths.")
        return [Path(name) for name in names]


def _text(value: Mapping[str, Any], name: str) -> str | None:
    found = value.get(name)
    if found is None:
        return None
    if not isinstance(found, str) or not found.strip():
        raise MessageError(f"{name} is {_shown(found)}; expected a text.")
    if name == "id" and len(found) > MAX_ID:
        raise MessageError(f"id has {len(found)} characters; expected at most {MAX_ID}.")
    return found


def _options(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MessageError(f'options is {_shown(value)}; expected an object such as {{"max_tokens": 16}}.')
    if unknown := sorted(value.keys() - OPTIONS):
        raise MessageError(f"{unknown[0]!r} is no option of a job; expected one of {', '.join(sorted(OPTIONS))}.")
    return dict(value)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return ("an object" if isinstance(value, dict) else "a list") if value else "empty"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)[:80]
