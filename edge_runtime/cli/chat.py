"""The chat in a terminal: a loop of questions, pictures and a few commands."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.answers import TOY_NOTICE, Answer
from edge_runtime.cli import terminal as console
from edge_runtime.cli.chat_settings import SETTINGS, SHOWN, change, described
from edge_runtime.cli.file_names import find_named, is_there
from edge_runtime.cli.piped import STDIN, Piped
from edge_runtime.cli.prompt_files import Line, split_line
from edge_runtime.cli.video_options import is_video, look_at
from edge_runtime.cli.words import looks_like_file, named_file, overlooked, why_missing
from edge_runtime.errors import EdgeRuntimeError, ImageError
from edge_runtime.inputs.documents import describe
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.video.frame_choice import VideoOptions

if TYPE_CHECKING:
    from edge_runtime.cli.line_editor import LineEditor
    from edge_runtime.model import AnyModel

HELP = """\
/image FILE   add a picture, a document or a video to the next question; so does FILE alone
/continue     continue the last answer
/think        switch reasoning on or off
/set          change a setting: /set parameter temperature 0.2, /set system TEXT, /set verbose
/show         show info, parameters or system
/clear        forget the conversation
/help, /?     show this list
/bye, /exit   leave (so does Ctrl-D); Ctrl-C ends an answer"""
TERMINAL_HELP = """
A path inside a question attaches the file. \"\"\" begins and ends a message of several lines (so does a paste); the
arrow keys go through earlier messages, Tab completes commands and files."""
COMMANDS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("image", "continue", "think", "clear", "help", "?", "exit", "quit", "bye"), ()),
    "set": SETTINGS,
    "show": SHOWN,
}


class Chat:
    """One conversation.

    Parameters
    ----------
    messages : what precedes it (a system prompt, or nothing).
    options : arguments of `Model.chat`.
    video : options for videos.
    """

    def __init__(
        self, model: AnyModel, messages: list[Any], options: dict[str, Any], video: VideoOptions | None = None
    ) -> None:
        self._video = video or VideoOptions()
        self._model, self._opening, self._options = model, list(messages), dict(options)
        self._messages = list(messages)
        self._pictures: list[Path | Piped | VideoPart] = []
        self._files: list[Path] = []
        self._doubted = ""
        self._interactive = sys.stdin.isatty()
        self._editor: LineEditor | None = None

    def loop(self, pictures: Sequence[Path | Piped | VideoPart]) -> None:
        """Ask and answer until the input ends."""
        if self._model.is_toy:
            console.note(TOY_NOTICE)
        for picture in pictures:
            self._add(picture.source if isinstance(picture, VideoPart) else picture)
        if self._interactive:
            self._open_editor()
            console.note(f"Chat with {self._model.name}; /help lists the commands.")
        while (line := self._read()) is not None:
            if line.startswith("/") and not self._is_path(line):
                if self._command(line) == "exit":
                    return
            elif line:
                self._take(line)

    @staticmethod
    def _is_path(line: str) -> bool:
        """Whether a line with a leading slash is a path, as when a file is dropped on the terminal."""
        return line[1:].partition(" ")[0] not in COMMANDS and ("/" in line[1:] or is_there(line))

    def _take(self, line: str) -> None:
        """Ask the line, or add the files it names; an ambiguous line is asked when it is entered again."""
        if any("\udc80" <= c <= "\udcff" for c in line):
            console.note("That line is not UTF-8 text, so it was not asked.")
            return
        names, reason = _names(line), overlooked(line, self._files)
        if all(looks_like_file(name) for name in names):
            try:
                sources = [self._found(name) for name in names]
            except EdgeRuntimeError as error:
                reason = str(error).removesuffix(".")
            else:
                self._add_all(sources)
                return
        if self._editor is not None and line != self._doubted:
            found = split_line(line)
            if found.names:
                self._ask_with(found)
                return
            if found.missing is not None:
                reason = why_missing(found.missing)
        if reason is not None and line != self._doubted:
            self._doubted = line
            click.echo(f"edge-runtime: {reason}, or enter the line again to ask it as it is.", err=True)
            return
        self._doubted = ""
        self._ask(line)

    def _ask_with(self, line: Line) -> None:
        """Ask a question that names files; not if one of them cannot be read."""
        known = {path.resolve() for path in self._files}
        n_before = len(self._pictures)
        for name in line.names:
            path = self._found(name)
            if isinstance(path, Path) and path.resolve() in known:
                continue  # named again: "What else is in a.png?"
            if not self._add(path):
                del self._pictures[n_before:]
                return
        if line.question:
            self._ask(line.question)

    def _open_editor(self) -> None:
        """A line with history and completion, where a terminal can show it; Emacs' shell cannot, for one."""
        if (sys.stderr.isatty() or sys.stdout.isatty()) and os.environ.get("TERM") not in ("dumb", "unknown"):
            from edge_runtime.cli.line_editor import LineEditor

            self._editor = LineEditor(COMMANDS)

    def _read(self) -> str | None:
        try:
            if self._editor is not None:
                return self._editor.read()
            if self._interactive:
                click.echo("> ", err=True, nl=False)
            return input().strip()
        except EOFError:
            if self._interactive:
                click.echo(err=True)
            return None
        except KeyboardInterrupt:
            click.echo(err=True)
            console.note("Ctrl-D or /bye leaves the chat.")
            return ""

    def _command(self, line: str) -> str:
        """Run one command; returns its name."""
        name, _, argument = line[1:].partition(" ")
        if name in ("exit", "quit", "bye"):
            return "exit"
        if name == "image":
            self._add_picture(argument.strip())
        elif name == "continue":
            self._continue()
        elif name == "think":
            self._options["thinking"] = not self._options.get("thinking")
            console.note(f"Reasoning is {'on' if self._options['thinking'] else 'off'}.")
        elif name in ("set", "show"):
            self._set_or_show(name, argument.strip())
        elif name == "clear":
            self._messages, self._pictures, self._files = list(self._opening), [], []
            console.note("The conversation is forgotten.")
        else:
            help_text = HELP + (TERMINAL_HELP if self._editor else "")
            console.note(help_text if name in ("help", "?") else f"There is no command /{name}.\n{help_text}")
        return name

    def _set_or_show(self, command: str, argument: str) -> None:
        name, _, value = argument.partition(" ")
        try:
            if command == "show":
                system = next((turn["content"] for turn in self._opening if turn["role"] == "system"), None)
                console.note(described(argument, self._model, self._options, system))
            elif name == "system" and value.strip():
                self._set_system(value.strip().removeprefix('"').removesuffix('"'))
            else:
                console.note(change(argument, self._options, self._model.limits, self._editor))
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)

    def _set_system(self, text: str) -> None:
        """Replace the system prompt, of what was said before, too."""
        turn = {"role": "system", "content": text}
        for messages in (self._opening, self._messages):
            messages[:] = [turn, *(message for message in messages if message["role"] != "system")]
        console.note("The system prompt is set.")

    def _add_picture(self, name: str) -> None:
        """Find the named files; several may be named, separated by spaces."""
        if not name:
            console.note("/image needs a file: /image photo.jpg")
            return
        try:
            sources = [self._found(word) for word in _names(name)]
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            return
        self._add_all(sources)

    def _add_all(self, sources: Sequence[Path | Piped]) -> None:
        for source in sources:
            self._add(source)

    @staticmethod
    def _found(word: str) -> Path | Piped:
        if word in STDIN:
            raise ImageError("this chat reads its questions from stdin; name a file.")
        found = named_file(word)
        if isinstance(found, str):
            raise ImageError(f"{word} holds text, expected a picture, a document or a video; write the text itself.")
        return found

    def _add(self, source: Any) -> bool:
        """Check a file now, so that an error appears where it was named; whether it was added."""
        try:
            if is_video(source):
                video = VideoPart(source, self._video)
                what = look_at(video)
                self._note_file(source)
                self._pictures.append(video)
                console.note(f"{what} goes with the next question.")
                return True
            found = describe(source, self._options)
            if found is None:
                width, height = load_image(source, pixel_limit=self._options["pixel_limit"]).size
                found = f"{width} x {height}"
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            return False
        self._note_file(source)
        self._pictures.append(source)
        console.note(f"{Path(str(source)).name} ({found}) goes with the next question.")
        return True

    def _note_file(self, source: Any) -> None:
        self._files += [source] if isinstance(source, Path) else []

    def _ask(self, question: str) -> None:
        turn = {"role": "user", "content": [*self._pictures, question]}
        answer = self._answer([*self._messages, turn])
        if answer is not None:
            self._pictures = []
            self._messages += [turn, answer.message()]

    def _continue(self) -> None:
        """Continue the last answer; the longer turn replaces it."""
        if not self._messages or self._messages[-1]["role"] != "assistant":
            console.note("There is no answer to continue yet.")
            return
        if self._pictures:
            console.note("The pictures you added are kept for the next question.")
        answer = self._answer(self._messages, continue_final_message=True)
        if answer is not None:
            self._messages[-1] = answer.message()

    def _answer(self, messages: list[Any], **options: Any) -> Answer | None:
        """Ask, and say why the answer was cut, if it was; None if there is no answer."""
        try:
            answer = console.answer(self._model, messages, self._options | {"follow_up": True} | options)
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            return None
        except KeyboardInterrupt:  # before the answer started: pictures or a video were being read
            console.note("Stopped.")
            return None
        if answer.finish_reason in ("length", "cancelled", "repetition"):
            console.note(f"The answer was cut off ({answer.finish_reason}); /continue continues it.")
        return answer


def _names(text: str) -> list[str]:
    """The names in a line: the whole line without quotes around it, or several files that all exist."""
    bare = text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" else text
    if not find_named(bare):
        with contextlib.suppress(ValueError):  # unclosed quotes
            words = [word.strip("\"'") for word in shlex.split(text, posix=os.name != "nt")]
            if len(words) > 1 and all(find_named(word) for word in words):
                return words
    return [bare]
