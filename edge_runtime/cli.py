"""edge-runtime run | convert | info: arguments in, exit code out.

stdout carries the answer alone; reasoning, progress and notes go to stderr. Exit codes: 0, 1 (failed, with one
sentence), 2 (wrong usage), 130 (stopped with Ctrl-C).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edge_runtime import __version__
from edge_runtime.errors import EdgeRuntimeError, ImageError
from edge_runtime.image import PIXEL_LIMIT

INTERRUPTED = 130  # what shells report for Ctrl-C

# Arguments of `run` that end like this are files, whether they exist or not.
FILE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".svg", ".tga", ".tif", ".tiff", ".webp"),
    *(".pdf", ".mp4", ".mov", ".mkv", ".avi", ".webm"),
)


class Command(click.Command):
    """A command whose known errors end with one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except EdgeRuntimeError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge-runtime")
def main() -> None:
    """Ask about pictures with MiniCPM-V 4.5 on this machine's CPU; nothing leaves it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the answer


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose and set up a model."""
    for option in reversed(
        (
            click.option(
                "-m", "--model", default="demo", show_default=True, help="demo, a folder, or a decoder file."
            ),
            click.option(
                "--mmproj", type=click.Path(path_type=Path), help="mmproj file, when not beside the decoder."
            ),
            click.option("--ctx", type=click.IntRange(1), help="Context length in tokens.  [default: 8192]"),
            click.option("--threads", type=click.IntRange(1), help="Threads.  [default: usable physical cores]"),
            click.option("--exact", is_flag=True, help="Compute as the official float32 code does (slower)."),
        )
    ):
        command = option(command)
    return command


@main.command(cls=Command)
@click.argument("arguments", nargs=-1, metavar="[FILE ...] [PROMPT]")
@model_options
@click.option("--think", is_flag=True, help="Let the model reason before it answers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--greedy", is_flag=True, help="Always take the most probable token.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Most tokens to generate."
)
@click.option("--max-slices", type=click.IntRange(1), help="Most cells per picture.  [default: the model's, 9]")
@click.option("--system", help="System prompt.")
@click.option("--temperature", type=click.FloatRange(0), help="Sampling temperature; 0 is greedy.  [default: 0.7]")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Nucleus sampling.  [default: 0.8, with --think 1]")
@click.option("--top-k", type=click.IntRange(0), help="Candidates kept.  [default: 100, with --think 50]")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    help="Penalty on generated tokens.  [default: 1.03, with --think 1]",
)
@click.option("--seed", type=click.IntRange(0), help="Repeat an answer.  [default: random]")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option("--max-pixels", type=click.IntRange(1), default=PIXEL_LIMIT, show_default=True, help="Largest picture.")
def run(arguments: tuple[str, ...], system: str | None, as_json: bool, **options: Any) -> None:
    """Answer a question about pictures, or chat.

    Arguments keep their order: pictures and text may alternate. Without text, a chat begins.

    \b
    edge-runtime run photo.jpg "What is on the sign?"
    edge-runtime run before.png after.png "What has changed?" --think
    """
    from edge_runtime import console

    content = parse_arguments(arguments)
    chatting = not any(isinstance(part, str) for part in content)
    if as_json and chatting:
        raise click.UsageError("--json needs a question: add it as the last argument.")
    model = console.load_model(**{name: options.pop(name) for name in ("model", "mmproj", "ctx", "threads", "exact")})
    request = {
        "thinking": options.pop("think"),
        "pixel_limit": options.pop("max_pixels"),
        **options,
    }
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    with model:
        if chatting:
            from edge_runtime.chat import Chat

            Chat(model, messages, request).loop([part for part in content if isinstance(part, Path)])
            return
        messages.append({"role": "user", "content": content})
        answer = console.answer(model, messages, request, quiet=as_json)
        if as_json:
            click.echo(json.dumps(asdict(answer), ensure_ascii=False))
    if answer.finish_reason == "cancelled":
        sys.exit(INTERRUPTED)


def parse_arguments(arguments: Sequence[str]) -> list[str | Path]:
    """Tell files from text, keeping the order; neighbouring texts are joined by a blank.

    A file is what exists, or what looks like a path: without blanks, and with a known suffix or beginning like a
    path.

    Raises
    ------
    ImageError
        When something that looks like a file does not exist.
    """
    content: list[str | Path] = []
    for argument in arguments:
        if _is_file(argument):
            content.append(Path(argument).expanduser())
        elif content and isinstance(content[-1], str):
            content[-1] += f" {argument}"
        else:
            content.append(argument)
    return content


def _is_file(argument: str) -> bool:
    path = Path(argument).expanduser()
    try:
        if path.is_file():
            return True
    except (OSError, ValueError):  # longer than a path can be, or with a zero byte: text
        return False
    if any(c.isspace() for c in argument):
        return False
    if argument.startswith(("http://", "https://")):
        raise ImageError(f"{argument} is a web address; expected a file: download it first, nothing is fetched.")
    looks_like_path = argument.startswith(("/", "./", "../", "~/", ".\\", "..\\")) or argument[1:3] == ":\\"
    if looks_like_path or path.suffix.lower() in FILE_SUFFIXES:
        raise ImageError(f"The file {argument} does not exist; check the path, or put a question in quotes.")
    return False


@main.command(cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the files.  [default: models/NAME]")
@click.option("--type", "decoder_type", default="q4_k_m", show_default=True, metavar="TYPE", help="Decoder type.")
@click.option("--vision-type", default="q8_0", show_default=True, metavar="TYPE", help="Type of the vision part.")
@click.option("--force", is_flag=True, help="Replace existing files.")
def convert(source: Path, output: Path | None, decoder_type: str, vision_type: str, force: bool) -> None:
    """Convert a MiniCPM-V 4.5 checkpoint (Hugging Face layout) into GGUF files.

    \b
    Decoder types: f32 f16 bf16 q8_0 q4_0 q4_k_m
    Vision types:  f32 f16 q8_0
    """
    from edge_converters import DECODER_TYPES, VISION_TYPES, convert_checkpoint
    from edge_runtime.console import ConvertProgress

    for given, known, option in (
        (decoder_type, DECODER_TYPES, "--type"),
        (vision_type, VISION_TYPES, "--vision-type"),
    ):
        if given.lower() not in known:
            raise click.UsageError(f"{option} is {given!r}; expected one of {', '.join(known)}.")
    folder = output or Path("models") / source.resolve().name
    with ConvertProgress() as progress:
        files = convert_checkpoint(
            source,
            folder,
            decoder_type=decoder_type.lower(),
            vision_type=vision_type.lower(),
            force=force,
            progress=progress,
        )
    for path in (files.decoder, files.mmproj):
        click.echo(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


@main.command(cls=Command)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str | None, as_json: bool) -> None:
    """Say what this machine offers and what was chosen; with MODEL (or a .gguf file), what is in it."""
    from edge_runtime.info import describe_machine, describe_model

    facts = describe_model(model) if model else describe_machine()
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return str(value)
