"""The chat in a terminal: a loop of questions, pictures and a few commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edge_runtime import console
from edge_runtime.documents import describe
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.image import load_image
from edge_runtime.messages import VideoPart
from edge_runtime.model import Model
from edge_runtime.video import VideoOptions
from edge_runtime.video_arguments import is_video, look_at

HELP = """\
/image FILE   add a picture, a document or a video to the next question
/think        switch reasoning on or off
/clear        forget the conversation
/help         show this list
/exit         leave (so does Ctrl-D); Ctrl-C ends an answer"""


class Chat:
    """One conversation.

    Parameters
    ----------
    messages : what precedes it (a system prompt, or nothing).
    options : arguments of `Model.chat`.
    video : what is looked at of videos.
    """

    def __init__(
        self, model: Model, messages: list[Any], options: dict[str, Any], video: VideoOptions | None = None
    ) -> None:
        self._video = video or VideoOptions()
        self._model, self._opening, self._options = model, list(messages), dict(options)
        self._messages = list(messages)
        self._pictures: list[Path | VideoPart] = []
        self._interactive = sys.stdin.isatty()

    def loop(self, pictures: Sequence[Path | VideoPart]) -> None:
        """Ask and answer until the input ends."""
        for picture in pictures:
            self._add_picture(str(picture.source if isinstance(picture, VideoPart) else picture))
        if self._interactive:
            self._load_line_editing()
            console.note(f"Chat with {self._model.name}; /help lists the commands.")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if self._command(line) == "exit":
                    return
            elif line:
                self._ask(line)

    @staticmethod
    def _load_line_editing() -> None:
        """Arrow keys and history, where the system has readline."""
        try:
            import readline  # noqa: F401 - importing it changes input()
        except ImportError:
            console.note("Line editing is not available here (no readline).")

    def _read(self) -> str | None:
        try:
            return input("> " if self._interactive else "").strip()
        except EOFError:
            if self._interactive:
                click.echo(err=True)
            return None
        except KeyboardInterrupt:
            click.echo(err=True)
            console.note("Ctrl-D or /exit leaves the chat.")
            return ""

    def _command(self, line: str) -> str:
        """Obey one command; returns its name."""
        name, _, argument = line[1:].partition(" ")
        if name in ("exit", "quit", "bye"):
            return "exit"
        if name == "image":
            self._add_picture(argument.strip().strip("\"'"))
        elif name == "think":
            self._options["thinking"] = not self._options.get("thinking")
            console.note(f"Reasoning is {'on' if self._options['thinking'] else 'off'}.")
        elif name == "clear":
            self._messages, self._pictures = list(self._opening), []
            console.note("The conversation is forgotten.")
        else:
            console.note(HELP if name == "help" else f"There is no command /{name}.\n{HELP}")
        return name

    def _add_picture(self, name: str) -> None:
        """Check a picture now, so that the mistake is told where it was made."""
        if not name:
            console.note("/image needs a file: /image photo.jpg")
            return
        path = Path(name).expanduser()
        try:
            if is_video(path):
                video = VideoPart(path, self._video)
                found = look_at(video)
                self._pictures.append(video)
                console.note(f"{found} goes with the next question.")
                return
            what = describe(path, self._options)
            if what is None:
                width, height = load_image(path, pixel_limit=self._options["pixel_limit"]).size
                what = f"{width} x {height}"
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            return
        self._pictures.append(path)
        console.note(f"{path.name} ({what}) goes with the next question.")

    def _ask(self, question: str) -> None:
        turn = {"role": "user", "content": [*self._pictures, question]}
        try:
            answer = console.answer(self._model, [*self._messages, turn], self._options | {"follow_up": True})
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            return
        except KeyboardInterrupt:  # before there was an answer to end: pictures or a video were being read
            console.note("Stopped.")
            return
        self._pictures = []
        self._messages += [turn, {"role": "assistant", "content": answer.answer}]
