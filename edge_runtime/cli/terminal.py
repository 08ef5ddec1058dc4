"""Everything a user sees in a terminal: streamed answers, dimmed reasoning, progress, notes."""

from __future__ import annotations

from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import click

from edge_runtime.cli.output_level import is_quiet, is_verbose, rates
from edge_runtime.cli.progress_line import ProgressLine, compiled_kernels
from edge_runtime.generation.grounding import check_drawing, draw_regions, save_drawing
from edge_runtime.inputs.documents import last_picture
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.messages import parse_messages

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edge_runtime.answers import Answer, AnswerStream
    from edge_runtime.engine.events import Progress
    from edge_runtime.inputs.messages import VideoPart
    from edge_runtime.model import AnyModel

_KEPT_CONTROLS = "\n\t"
PICTURE_KERNELS, PROMPT_KERNELS = "rows.norm", "linear.gguf_blocks"
"""Modules of `edge_kernels` whose machine code every picture needs, every prompt on AMX."""


def note(text: str) -> None:
    """Print a dimmed note on stderr, unless the command is quiet."""
    if is_quiet():
        return
    click.secho(text, err=True, dim=True)


def first_compile(*, pictures: bool, prompts: bool) -> list[str]:
    """Notes that the first picture or prompt on this machine takes longer; the machine code is cached."""
    from edge_kernels.compile import is_compiled

    notes = []
    if pictures and not is_compiled(PICTURE_KERNELS):
        notes.append("First picture on this machine: compiling the vision kernels, 20 to 90 seconds.")
    if prompts and not is_compiled(PROMPT_KERNELS):
        notes.append("First prompt on this machine: compiling its kernels, 10 to 40 seconds.")
    return notes


def answer(
    model: AnyModel, messages: list[Any], options: dict[str, Any], *, quiet: bool = False, label: str = ""
) -> Answer:
    """Answer, streaming to stdout; Ctrl-C ends the answer, and the text so far is returned.

    Parameters
    ----------
    quiet : print nothing on stdout, and no reasoning.
    label : start of the progress line.
    """
    progress = AnswerProgress(label)
    pictures = any(not isinstance(part, str) for message in parse_messages(messages) for part in message.parts)
    try:
        (stream,) = model.submit(messages, on_image=progress.on_image, on_look=progress.on_look, **options)
    except BaseException:
        progress.clear()
        raise
    # Not earlier: refused files compile nothing.
    compiles = [] if model.is_remote else first_compile(pictures=pictures, prompts=model.uses_amx_prefill)
    for text in compiles:
        progress.clear()
        note(text)
    stream.on_progress = progress.on_event
    printed = Printer(quiet)
    try:
        with compiled_kernels(progress.on_kernel) if compiles else nullcontext():
            _print(stream, printed, progress)
    finally:
        progress.clear()
        printed.end()
    result = stream.result()
    if is_verbose():
        note("\n".join(rates(result)))
    if result.dropped_turns:
        note(f"The context is full: the oldest {result.dropped_turns} turns of the conversation were left out.")
    return result


def _print(stream: AnswerStream, printed: Printer, progress: AnswerProgress) -> None:
    """Print an answer as it comes, to its end or to Ctrl-C."""
    progress.wait()
    try:
        for piece in stream:
            progress.clear()
            printed.write(piece.text, piece.kind)
    except KeyboardInterrupt:
        stream.cancel()
        for _ in stream:  # do not show what was computed meanwhile; wait for the end
            pass


def draw_places(answer: Answer, picture: Path | bytes, target: Path, options: dict[str, Any]) -> None:
    """Draw the places that an answer names onto a copy of its last picture.

    Parameters
    ----------
    picture : the last file of the question; for a document, the last page used.
    options : of the request.
    """
    regions = answer.regions()
    if not regions:
        note(f"The answer names no place in the picture, so {target} was not written.")
        return
    width, height = answer.pictures[-1]
    source = last_picture(picture, options, (width, height))
    save_drawing(draw_regions(load_image(source, pixel_limit=options["pixel_limit"]), regions), target)
    note(f"{target}: {len(regions)} {'place' if len(regions) == 1 else 'places'} drawn.")


def draw_storyboard(videos: Sequence[VideoPart], target: Path) -> None:
    """Draw the frames of a video in their groups."""
    from edge_runtime.cli.video_options import draw

    if len(videos) != 1:
        raise click.UsageError(f"--storyboard needs one video; {len(videos)} are named.")
    check_drawing(target)
    progress = AnswerProgress()
    try:
        draw(videos[0], target, progress.on_drawing)
    finally:
        progress.clear()
    note(f"{target}: the frames that the model sees.")


class Printer:
    """Writes pieces: the answer to stdout, reasoning dimmed to stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._kind, self._ends_line = quiet, "answer", True

    def write(self, text: str, kind: str) -> None:
        """Print one piece at once."""
        if self._quiet:
            return
        if kind == "reasoning" and is_quiet():
            return
        if kind != self._kind:
            self._break_line()
            self._kind = kind
        text = printable(text)
        if kind == "reasoning":
            click.secho(text, err=True, dim=True, nl=False)
        else:
            click.echo(text, nl=False)
        self._ends_line = text.endswith("\n") if text else self._ends_line

    def end(self) -> None:
        """Finish the last line."""
        self._break_line()

    def _break_line(self) -> None:
        if not self._ends_line:
            click.echo(err=self._kind == "reasoning")
            self._ends_line = True


def printable(text: str) -> str:
    """Drop control characters: a picture may make a model write escape sequences to the terminal."""
    return "".join(c for c in text if c in _KEPT_CONTROLS or not (ord(c) < 32 or 127 <= ord(c) < 160))


class AnswerProgress:
    """One line on stderr, on a terminal only: kernels compiled, pictures read, slices encoded, prompt read."""

    def __init__(self, label: str = "") -> None:
        self._line = ProgressLine(label)

    def wait(self) -> None:
        """Nothing is known yet but that it goes on."""
        self._line.show(self._line.text or "waiting for the first token")

    def on_kernel(self, n_compiled: int) -> None:
        """A kernel was compiled."""
        self._line.show(f"compiling kernels, {n_compiled} done")

    def on_image(self, done: int, total: int) -> None:
        """A picture was decoded."""
        if total > 1:
            self._show(f"reading pictures {done}/{total}")

    def on_look(self, share: float) -> None:
        """An index of the videos is being made."""
        self._show_share("looking through the video", share)

    def on_drawing(self, share: float) -> None:
        """A storyboard is being drawn."""
        self._show_share("drawing the storyboard", share)

    def _show_share(self, what: str, share: float) -> None:
        text = f"{what}, {share:.0%}"
        if text != self._line.text:  # reported for every packet
            self._show(text)

    def on_event(self, event: Progress) -> None:
        """The engine made progress."""
        if event.stage == "decode":
            self._show(f"reading frames {event.done}/{event.total}")
        elif event.stage == "encode":
            self._show(f"looking at {event.total} slices, {event.share:.0%}")
        elif event.done < event.total:
            self._show(f"reading the prompt, {event.total} tokens, {event.share:.0%}")

    def _show(self, text: str) -> None:
        self._line.show(text)

    def clear(self) -> None:
        """Erase the line."""
        self._line.clear()


class ConvertProgress:
    """A progress bar per stage of a conversion or file of a download, shown on a terminal only."""

    _UNITS: ClassVar = {"quantize": " tensors", "calibrate": " slices", "observe": " tokens", "report": " tensors"}

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are written, or other units of `_UNITS` are done."""
        from tqdm import tqdm

        if what != self._what:
            self._close()
            self._what, unit = what, self._UNITS.get(what, "B")
            self._bar = tqdm(
                total=total,
                desc=f"{what:<9}",
                unit=unit,
                unit_scale=unit == "B",
                disable=None,  # no bar unless stderr is a terminal
                leave=True,
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ConvertProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
