"""The chat's line in a terminal: keys in, a message out; prompt_toolkit underneath.

Enter sends, unless `\"\"\"` is open; what is pasted stays one message. The arrow keys go through earlier messages, of
earlier chats too. Knows the names of commands, but not what they do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from edge_runtime.cli.file_names import names_in
from edge_runtime.system.atomic_files import write_whole
from edge_runtime.system.user_folders import user_folder

if TYPE_CHECKING:
    from prompt_toolkit.output import Output

NO_HISTORY = "EDGE_RUNTIME_NOHISTORY"
"""Environment variable: with any value, messages of chats are not kept."""
MAX_KEPT = 1000
MAX_KEPT_CHARACTERS = 10_000
"""A longer message, a pasted file perhaps, is not kept for the next chat."""
_MARK = '"""'
_WORD_ENDS = " \t\n"


def history_file() -> Path:
    """Where messages of chats are kept for the arrow keys."""
    return user_folder(lambda: platformdirs.user_state_dir("edge-runtime")) / "chat_history"


class KeptHistory(History):
    """Earlier messages, in a file that its owner alone can read; a file that cannot be written keeps nothing.

    Parameters
    ----------
    path : one message a line, as JSON strings, oldest first.
    """

    def __init__(self, path: Path, *, keeps: bool = True) -> None:
        super().__init__()
        self._path, self.keeps = path, keeps

    def load_history_strings(self) -> Iterable[str]:
        """Newest first; none while nothing is kept."""
        return reversed(self._read()) if self.keeps else []

    def _read(self) -> list[str]:
        try:
            lines = self._path.read_text("utf-8", "replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines[-MAX_KEPT:]:
            try:
                found.append(str(json.loads(line)))
            except ValueError:  # half a line of a full disk
                continue
        return found

    def store_string(self, string: str) -> None:
        """Append one message; the oldest ones go when there are too many."""
        if not self.keeps or len(string) > MAX_KEPT_CHARACTERS:
            return
        line = json.dumps(string) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            kept = self._read()
            if len(kept) >= MAX_KEPT:
                self._rewrite([*kept[-MAX_KEPT // 2 :], string])
                return
            with open(self._path, "a", encoding="utf-8", opener=_owner_only) as file:
                file.write(line)
        except OSError:
            return

    def _rewrite(self, messages: Sequence[str]) -> None:
        write_whole(self._path, "".join(json.dumps(text) + "\n" for text in messages).encode(), mode=0o600)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Words(Completer):
    """Completes commands, what they are followed by, and paths of files.

    Parameters
    ----------
    commands : what may follow a command, by its name without the slash; empty if a text or a file does.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Completions of the word before the cursor."""
        text = document.text_before_cursor
        first, blank, rest = text.partition(" ")
        if text.startswith("/") and not blank:
            for name in sorted(self._commands):
                if name.startswith(text[1:]):
                    yield Completion(f"/{name}", -len(text))
        elif text.startswith("/") and " " not in rest and (follow := self._commands.get(first[1:])):
            yield from (Completion(word, -len(rest)) for word in follow if word.startswith(rest))
            return
        yield from _paths(text)


def _paths(text: str) -> Iterator[Completion]:
    """Files and folders whose path the last word begins; blanks in them are escaped."""
    word = _last_word(text)
    if not word:
        return
    plain = word.replace("\\ ", " ") if os.name != "nt" else word
    folder, name = os.path.split(plain)
    for found in sorted(names_in(Path(os.path.expanduser(folder or ".")))):  # noqa: PTH111 - a text, as typed
        if not found.startswith(name) or (found.startswith(".") and not name):
            continue
        path = os.path.join(folder, found)  # noqa: PTH118 - keeps `~` and `./`
        end = "/" if os.path.isdir(os.path.expanduser(path)) else ""  # noqa: PTH111, PTH112
        shown = path.replace(" ", "\\ ") if os.name != "nt" else path
        yield Completion(shown + end, -len(word), display=found + end)


def _last_word(text: str) -> str:
    start = len(text)
    while start and (text[start - 1] not in _WORD_ENDS or text[start - 2 : start - 1] == "\\"):
        start -= 1
    return text[start:]


class LineEditor:
    """Reads messages from a terminal, with history and completion.

    Parameters
    ----------
    commands : see `Words`.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self.history = KeptHistory(history_file(), keeps=not os.environ.get(NO_HISTORY))
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation=lambda _width, _number, _wrapped: ". ",
            history=self.history,
            completer=Words(commands),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            reserve_space_for_menu=0,
            enable_open_in_editor=False,
            key_bindings=_keys(),
            output=_output(),
        )

    def read(self) -> str:
        """One message, without the `\"\"\"` around it.

        Raises
        ------
        EOFError
            Ctrl-D on an empty line.
        KeyboardInterrupt
            Ctrl-C.
        """
        return unquoted(self._session.prompt())


def unquoted(text: str) -> str:
    """A message without blanks around it and the marks that made several lines one."""
    text = text.strip()
    if text.startswith(_MARK):
        text = text[len(_MARK) :].removesuffix(_MARK).strip()
    return text


def _is_open(text: str) -> bool:
    """Whether a message begins with the mark and does not end with it yet."""
    text = text.strip()
    return text.startswith(_MARK) and not (len(text) >= 2 * len(_MARK) and text.endswith(_MARK))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if _is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _output() -> Output:
    """The terminal that shows the line: stderr's, if it is one, for stdout may be a file that takes the answers."""
    from prompt_toolkit.output import create_output

    stream: TextIO = sys.stderr if sys.stderr.isatty() else sys.stdout
    # Nothing here needs the cursor's position; asking for it warns on terminals that do not answer.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    return create_output(stdout=stream)
