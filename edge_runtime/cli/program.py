"""edge-runtime run | convert | bench | info: arguments in, exit code out.

The commands of the store, the server, batches, bundles and kernels are in `cli.store`, `cli.serve`, `cli.batch`,
`cli.bundle` and `cli.compile`.

stdout carries the answer alone; reasoning, progress and notes go to stderr. Exit codes: 0, 1 (failed, with one
sentence), 2 (wrong usage), 130 (stopped with Ctrl-C), 141 (whoever read stdout has left).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.batch import batch
from edge_runtime.cli.bundle import bundle
from edge_runtime.cli.command import HELP, INTERRUPTED, Command, Program, end_quickly, set_up_streams
from edge_runtime.cli.compile import compile_kernels
from edge_runtime.cli.document_options import (
    Asked,
    answer_fields,
    answer_pages,
    document_options,
    limit_slices,
    note_fitted,
    take_documents,
)
from edge_runtime.cli.endpoint_options import endpoint_options, open_model, take_endpoint
from edge_runtime.cli.made_models import begin
from edge_runtime.cli.making_models import copy, create
from edge_runtime.cli.model_words import model_argument, one_model, take_model
from edge_runtime.cli.option_groups import ASKING, GroupedCommand
from edge_runtime.cli.options import model_options, request_options, take_request, take_setup
from edge_runtime.cli.output_level import arrange_output
from edge_runtime.cli.piped import Piped
from edge_runtime.cli.run_checks import check_output, check_stdin, check_system, is_chat, note_before, read_schema
from edge_runtime.cli.running_models import list_running, stop
from edge_runtime.cli.serve import serve
from edge_runtime.cli.store import COMMANDS, announce
from edge_runtime.cli.video_options import take_video, video_options, with_videos
from edge_runtime.cli.words import parse_words
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.version import __version__

if TYPE_CHECKING:
    from edge_runtime.answers import Answer


@click.group(cls=Program, context_settings={**HELP, "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="edge-runtime")
def main() -> None:
    """Ask about pictures with MiniCPM-V 4.5 on this machine's CPU; nothing leaves it."""
    set_up_streams()
    end_quickly()


for command_elsewhere in (
    batch,
    bundle,
    compile_kernels,
    *COMMANDS,
    copy,
    create,
    serve,
    list_running,
    stop,
):
    main.add_command(command_elsewhere)


@main.command("help", cls=Command)
@click.argument("words", nargs=-1, metavar="[COMMAND]")
@click.pass_context
def show_help(context: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command, or of the program."""
    above = context.find_root()
    for word in words:
        group = above.command
        found = group.get_command(above, word) if isinstance(group, click.Group) else None
        if found is None:
            raise click.UsageError(f"There is no command {word!r}; 'edge-runtime help' lists them.")
        above = click.Context(found, above, word, **found.context_settings)
    click.echo(above.get_help())


@main.command(cls=GroupedCommand, groups=ASKING)
@click.argument("arguments", nargs=-1, metavar="[MODEL] [FILE ...] [PROMPT]")
@model_options
@endpoint_options
@click.option("-p", "--prompt", multiple=True, metavar="TEXT", help="Question; never taken for a file.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--image", "images", multiple=True, metavar="FILE", help="Ask about this file; may be repeated.")
@request_options
@document_options
@click.option("--each-page", is_flag=True, help="Ask about each page separately.")
@video_options
@click.option(
    "--storyboard",
    type=click.Path(path_type=Path),
    metavar="OUT.png",
    help="Draw which frames go into which group.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--logprobs", type=click.IntRange(0, 20), metavar="N", help="With --json: log probabilities, with N alternatives."
)
@click.option(
    "--draw", type=click.Path(path_type=Path), metavar="OUT.png", help="Draw the places that the answer names."
)
@click.option("-q", "--quiet", is_flag=True, help="The answer alone: no notes, no progress, no reasoning.")
@click.option("-v", "--verbose", is_flag=True, help="Times and rates after the answer.")
def run(
    arguments: tuple[str, ...],
    prompt: tuple[str, ...],
    images: tuple[str, ...],
    system: str | None,
    as_json: bool,
    logprobs: int | None,
    draw: Path | None,
    storyboard: Path | None,
    **options: Any,
) -> None:
    """Answer a question about pictures, documents and videos, or chat.

    A first word that names a model is the model, as after -m; without any, the demo answers. The others keep their
    order: files and text may alternate. Without text, a chat starts. A folder of frames is a video, too. '-' and
    pipes are read: a picture, a document, a video or text.

    What exists is a file. What does not exist but has a slash, a scheme or a suffix (a sentence: the suffix of a
    picture, document or video at its end) is an error and no question; --prompt takes any text.

    \b
    edge-runtime run photo.jpg "What is on the sign?"
    edge-runtime run minicpm-v-4.5 photo.jpg "What is on the sign?"
    edge-runtime run before.png after.png "What has changed?" --think
    edge-runtime run scan.pdf --each-page --preset markdown > scan.md
    edge-runtime run photo.jpg "Where is the <ref>dog</ref>?" --draw found.png
    edge-runtime run clip.mp4 "What happens?" --end 1:30 --storyboard seen.png
    edge-runtime run photo.jpg "What is it?" --endpoint http://10.0.0.7:8000
    pdftotext report.pdf - | edge-runtime run - "Summarise this."
    """
    from edge_runtime.cli import terminal as console

    arrange_output(quiet=options.pop("quiet"), verbose=options.pop("verbose"))
    options["model"], arguments = take_model(arguments, options["model"], on_server=bool(options["endpoint"]))
    video, endpoint = take_video(options), take_endpoint(options)
    check_stdin((*images, *arguments), options["schema"])
    check_system(system)
    content = with_videos([*parse_words(images, arguments), *prompt], video)
    chatting = is_chat((*images, *arguments), content, options["preset"])
    each_page = take_documents(options, content, others=draw is not None)
    check_output(content, chatting=chatting, as_json=as_json, logprobs=logprobs, draw=draw, storyboard=storyboard)
    files = files_before(content, options, storyboard)
    name, setup, adapter = take_setup(options)
    parts = limit_slices(content, options, chatting=chatting)
    request = take_request(options, adapter, logprobs)
    paths, messages = begin(name, setup, request, system, on_server=endpoint is not None)
    with open_model(endpoint, paths, setup) as model:
        if chatting:
            from edge_runtime.cli.chat import Chat

            Chat(model, messages, request, video).loop(files)
            return
        note_before(model, content, chatting=chatting)
        if each_page:
            answer_pages(model, messages, parts, request, as_json=as_json)
            return
        messages.append({"role": "user", "content": parts})
        answer = console.answer(model, messages, request, quiet=as_json)
    finish_run(answer, content, request, as_json=as_json, draw=draw)


def files_before(content: Sequence[Asked], options: dict[str, Any], storyboard: Path | None) -> list[Any]:
    """The files of a question, once the storyboard of its video is drawn and the schema of the answer is read."""
    from edge_runtime.cli import terminal as console

    files = [part for part in content if not isinstance(part, str)]
    if storyboard is not None:
        console.draw_storyboard([part for part in files if isinstance(part, VideoPart)], storyboard)
    if options["schema"] is not None:
        options["schema"] = read_schema(options["schema"])
    return files


def finish_run(
    answer: Answer, content: Sequence[Asked], request: dict[str, Any], *, as_json: bool, draw: Path | None
) -> None:
    """Print and draw what is wanted of a finished answer besides its text; ends the program when it was stopped."""
    from edge_runtime.cli import terminal as console

    note_fitted(answer.fitted_slices)
    if as_json:
        click.echo(json.dumps(answer_fields(answer), ensure_ascii=False))
    if draw is not None:
        files = [part for part in content if isinstance(part, Path | Piped)]
        console.draw_places(answer, files[-1], draw, request)
    if answer.finish_reason == "cancelled":
        sys.exit(INTERRUPTED)


@main.command(cls=Command)
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the files.  [default: models/NAME]")
@click.option("--type", "decoder_type", metavar="TYPE", help="Decoder type.  [default: q4_k_m; AWQ: q4_1]")
@click.option("--vision-type", default="q8_0", show_default=True, metavar="TYPE", help="Type of the vision part.")
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="PATTERN=TYPE", help="Type of some tensors.")
@click.option("--vision-tensor-type", "vision_tensor_types", multiple=True, metavar="PATTERN=TYPE", help="The same.")
@click.option("--lora", type=click.Path(path_type=Path), metavar="FOLDER", help="Merge this LoRA into the weights.")
@click.option(
    "--lora-adapter", type=click.Path(path_type=Path), metavar="FOLDER", help="Write its decoder part as an adapter."
)
@click.option(
    "--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="Importance matrix of llama-imatrix."
)
@click.option(
    "--calibrate",
    "pictures",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Calibrate the types with the pictures and texts in it.",
)
@click.option("--report", is_flag=True, help="Report the error of the types, tensor by tensor.")
@click.option("--force", is_flag=True, help="Replace existing files.")
def convert(source: str, output: Path | None, report: bool, **options: Any) -> None:
    """Convert a MiniCPM-V 4.5 checkpoint (Hugging Face layout) into GGUF files.

    SOURCE is a folder, or hf:ORG/REPO or ms:ORG/REPO, which is pulled first. It may be quantised by bitsandbytes or
    AutoAWQ to 4 bits.

    \b
    Decoder types: f32 f16 bf16 q8_0 q6_k q5_k_m q4_k_m q4_k_s q4_1 q4_0 iq4_nl
                   iq4_xs q3_k_m iq3_m
    Vision types:  f32 f16 bf16 q8_0 q4_0, and int4, which llama.cpp cannot read
    """
    from edge_converters import DECODER_TYPES, VISION_TYPES, convert_checkpoint
    from edge_runtime.cli import terminal as console
    from edge_runtime.store.pull import fetch_checkpoint

    for name, known, option in (
        ("decoder_type", DECODER_TYPES, "--type"),
        ("vision_type", VISION_TYPES, "--vision-type"),
    ):
        options[name] = options[name] and options[name].lower()
        if options[name] not in (None, *known):
            raise click.UsageError(f"{option} is {options[name]!r}; expected one of {', '.join(known)}.")
    with console.ConvertProgress() as progress:
        checkpoint, name = fetch_checkpoint(source, progress, announce)
        folder = output or Path("models") / name
        files = convert_checkpoint(checkpoint, folder, report=report, progress=progress, **options)
    for line in (line for found in files.reports for line in found.lines()):
        click.echo(line)
    for path in filter(None, (files.decoder, files.mmproj, files.adapter)):
        click.echo(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    for sentence in files.notes:
        console.note(sentence)


@main.command(cls=Command)
@click.argument("word", required=False, metavar="[MODEL]")
@model_options
@click.option("--tune", "tuning", is_flag=True, help="Find the fastest settings and remember them.")
@click.option("--budget", type=click.FloatRange(1), default=120, metavar="S", help="Seconds for --tune.  [120]")
def bench(word: str | None, tuning: bool, budget: float, **options: Any) -> None:
    """Measure a model on this machine: prefill, generation, picture encoding.

    With --tune, measures threads, micro-batch, KV type and repacked weights first; the best ones are used whenever
    this model is loaded on this machine. The last line is one JSON object.
    """
    from edge_runtime.cli.bench import measure, tune_model

    options["model"] = one_model(word, options["model"])
    name, setup, _ = take_setup(options)
    facts = tune_model(name, setup["mmproj"], budget, click.echo) if tuning else {}
    facts |= measure(name, setup, click.echo)
    click.echo(json.dumps(facts))


@main.command(cls=Command)
@model_argument
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Measure a .gguf file against this checkpoint, tensor by tensor.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(word: str | None, model: str | None, source: Path | None, as_json: bool) -> None:
    """Show this machine and the choices made for it; with MODEL (or a .gguf file), its contents."""
    from edge_runtime.cli.info import describe_machine, describe_model

    model = one_model(word, model)
    if source is not None:
        _compare(model, source, as_json)
        return
    facts = describe_model(model) if model else describe_machine()
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {_plain(value)}")


def _compare(file: str | None, source: Path, as_json: bool) -> None:
    from edge_converters.output.report import report_against
    from edge_runtime.cli import terminal as console

    if file is None or not file.endswith(".gguf"):
        raise click.UsageError("--source needs a .gguf file to measure: name it as the argument.")
    with console.ConvertProgress() as progress:
        report = report_against(file, source, progress)
    if as_json:
        click.echo(json.dumps(asdict(report) | {"error": report.error}))
    else:
        click.echo("\n".join(report.lines()))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return str(value)
