"""edge-runtime batch: files or jobs in, a file of answers out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_runtime.cli.batch_ray import check_options, runner_on_ray
from edge_runtime.cli.document_options import document_options
from edge_runtime.cli.endpoint_options import Endpoint, endpoint_options, open_model, take_endpoint
from edge_runtime.cli.model_words import take_model
from edge_runtime.cli.option_groups import ASKING, GroupedCommand
from edge_runtime.cli.options import model_options, request_options, take_request, take_setup
from edge_runtime.cli.run_checks import check_system, read_schema
from edge_runtime.cli.video_options import is_video, take_video, video_options
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.mistaken_paths import FILE_SUFFIXES
from edge_runtime.inputs.pages import ALL

if TYPE_CHECKING:
    from edge_runtime.batch.items import Asking, Source
    from edge_runtime.batch.output import Output
    from edge_runtime.model import AnyModel

MAX_AT_WORK = 48
"""Below the engine's limit of waiting requests."""
AT_WORK_ON_SERVERS = 8
MODEL_OPTIONS = frozenset(
    ("model", "mmproj", "ctx", "threads", "exact", "kv_type", "low_memory", "cache_dir", "cache_limit", "force")
)
OWN_OPTIONS = frozenset(("inputs", "jobs", "output", "ordered", "retry_failed", "parallel", "nice"))


@click.command("batch", cls=GroupedCommand, groups=ASKING)
@click.argument("inputs", nargs=-1, metavar="[MODEL] [INPUT ...]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT.jsonl", help="Answers.")
@click.option("-p", "--prompt", metavar="TEXT", help="Question about each item.")
@click.option(
    "--jobs", type=click.Path(path_type=Path), metavar="JOBS.jsonl", help="One job a line, ours or OpenAI's."
)
@click.option("--ordered", is_flag=True, help="Keep the order of the items.")
@click.option("--retry-failed", is_flag=True, help="Try items again that failed in an earlier run.")
@click.option(
    "--parallel", type=click.IntRange(1, MAX_AT_WORK), metavar="N", help="Items at work.  [twice what runs at once]"
)
@click.option("--ray", metavar="ADDRESS", help="Answer on a Ray cluster: local, auto or HOST:PORT of its head.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@model_options
@endpoint_options
@request_options
@document_options
@video_options
def batch(
    inputs: tuple[str, ...],
    output: Path,
    prompt: str | None,
    jobs: Path | None,
    ordered: bool,
    retry_failed: bool,
    parallel: int | None,
    ray: str | None,
    system: str | None,
    **options: Any,
) -> None:
    """Ask about thousands of files, one JSON line each in OUT.jsonl.

    A first word that names a model is the model, as after -m. INPUT is a file, a folder with all below it, or a
    quoted pattern such as 'scans/**/*.png'. Documents are asked about page by page. What OUT.jsonl holds is done:
    after a stop of any kind, the same command goes on. Ctrl-C ends after the items at work, a second one at once.

    A line of JOBS.jsonl has id, input, prompt, preset, system, messages and options, or is a line of OpenAI's batches
    (custom_id, method, url, body), which is answered in their form.

    Exit codes: 0 all answered; 1 some failed, or it could not go on; 130 stopped with Ctrl-C.

    \b
    edge-runtime batch scans/ --preset ocr -o out.jsonl
    edge-runtime batch '*.png' --prompt "What is on the sign?" --max-tokens 32 -o signs.jsonl
    edge-runtime batch --jobs jobs.jsonl -o out.jsonl --ordered
    edge-runtime batch scans/ --preset ocr -o out.jsonl --endpoint URL
    """
    check_system(system)
    on_server = options["endpoint"] is not None
    options["model"], inputs = take_model(inputs, options["model"], on_server=on_server)
    endpoint = take_endpoint(options)
    _check_words(inputs, jobs, prompt, output, options)
    if ray is not None:
        if endpoint is not None:
            raise click.UsageError("--ray and --endpoint were both given; give one of them.")
        check_options(ordered, parallel)
    if jobs is not None:
        from edge_runtime.batch.jobs import has_openai_lines

        if has_openai_lines(jobs):
            from edge_runtime.cli.batch_openai import answer_openai_lines

            if ray is not None or endpoint is not None:
                raise click.UsageError(
                    f"{'--endpoint' if ray is None else '--ray'} cannot be given with OpenAI's lines: give them to "
                    "/v1/batches of that server."
                )
            _check_openai_options()
            sys.exit(answer_openai_lines(jobs, output, options, ordered, retry_failed, parallel))
    how = _How(output, ordered, retry_failed, parallel, ray, endpoint)
    sys.exit(_answer(inputs, jobs, prompt, system, how, options))


@dataclass(frozen=True)
class _How:
    """Who answers, and what becomes of the answers."""

    output: Path
    ordered: bool
    retry_failed: bool
    parallel: int | None
    ray: str | None
    endpoint: Endpoint | None


def _check_words(
    inputs: tuple[str, ...], jobs: Path | None, prompt: str | None, output: Path, options: Mapping[str, Any]
) -> None:
    """Refuse combinations that mean nothing."""
    if bool(inputs) == (jobs is not None):
        raise click.UsageError("Name files or folders, or --jobs: one of them.")
    if inputs and prompt is None and options["preset"] is None:
        raise click.UsageError("There is no question: add --prompt or --preset.")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("--prompt is empty; expected a question.")
    if len(options["max_slices"] or []) > 1:
        raise click.UsageError("--max-slices takes one number here: it applies to every picture.")
    for word in (*inputs, *(() if jobs is None else (jobs,))):
        with contextlib.suppress(OSError, ValueError):
            if Path(word).samefile(output):
                raise click.UsageError(f"-o would write into {word}, which is read: name another file.")


def _check_openai_options() -> None:
    """Refuse options that the lines themselves have."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in MODEL_OPTIONS | OWN_OPTIONS and (
            context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ):
            raise click.UsageError(
                f"{parameter.opts[-1]} cannot be given with OpenAI's lines: their body says how each is answered."
            )


def _answer(
    inputs: tuple[str, ...],
    jobs: Path | None,
    prompt: str | None,
    system: str | None,
    how: _How,
    options: dict[str, Any],
) -> int:
    """Answer files or our jobs; returns the exit code."""
    from edge_runtime.batch.items import Asking
    from edge_runtime.batch.lines import line_of, read_line
    from edge_runtime.batch.output import Output
    from edge_runtime.cli.batch_run import run
    from edge_runtime.inputs.workers.pool import DecoderPool

    video = take_video(options)
    name, setup, adapter = take_setup(options)
    request = _request(options, adapter)
    server = how.endpoint and [how.endpoint.url, how.endpoint.model]
    asking = Asking(prompt, system, request, [server or name, adapter, setup["exact"], video])
    pool = DecoderPool(pixel_limit=request["pixel_limit"])

    def as_part(path: Path) -> Any:
        return VideoPart(path, video) if is_video(path) else path

    source = _source(inputs, jobs, asking, as_part, pool)
    with Output(how.output, read_line) as out, contextlib.closing(pool):
        out.open(drop_errors=how.retry_failed)
        for first in source:
            out.has(first)  # what was asked otherwise is refused before the model is loaded
            break
        if how.ray is not None:
            runner_of = runner_on_ray(how.ray, name, setup, request, inputs)
            return run(source, runner_of, lambda: None, line_of, out)
        with open_model(how.endpoint, name, setup) as model:
            _check_options(model, request)
            return _answer_with(model, pool, source, how, out)


def _answer_with(model: AnyModel, pool: Any, source: Source, how: _How, out: Output) -> int:
    """Answer by a model here or on a server; returns the exit code."""
    from edge_runtime.batch.answering import Answering, never
    from edge_runtime.batch.lines import line_of
    from edge_runtime.cli.batch_run import run_batch
    from edge_runtime.model import Model

    if isinstance(model, Model):
        _note_start(model)
        answering = Answering(model, {"decoders": pool, "gives_way": never})
        n_at_work = how.parallel or 2 * model.activity.slots
    else:
        n_at_work = how.parallel or AT_WORK_ON_SERVERS
        answering = Answering(model, n_preparing=n_at_work)
    return run_batch(source, answering, answering.cancel, line_of, out, n_at_work, ordered=how.ordered)


def _request(options: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """Keyword arguments of `Model.chat`."""
    if options["schema"] is not None:
        options["schema"] = read_schema(options["schema"])
    options["fit"] = options.pop("fit_tokens") or options["fit"]
    options["file_limit_bytes"] = sys.maxsize
    if click.get_current_context().get_parameter_source("page_limit") is ParameterSource.DEFAULT:
        options["page_limit"] = ALL  # pages are asked about one by one
    limits = options.pop("max_slices")
    options["max_slices"] = limits[0] if limits else None
    request = take_request(options, adapter, None)
    return {name: value for name, value in request.items() if name not in ("logprobs", "top_logprobs")}


def _source(
    inputs: tuple[str, ...], jobs: Path | None, asking: Asking, as_part: Callable[[Path], Any], pool: Any
) -> Source:
    from edge_runtime.batch.files import Files
    from edge_runtime.batch.inputs import Inputs
    from edge_runtime.batch.jobs import Jobs
    from edge_runtime.cli import terminal as console

    if jobs is not None:
        return Jobs(jobs, asking, as_part)
    found = Inputs(Files(inputs, FILE_SUFFIXES), asking, as_part, pool)
    if found.left_out:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(found.left_out.items()))
        console.note(f"Left out in folders and patterns, as no picture, document or video: {kinds}.")
    return found


def _check_options(model: Any, request: Mapping[str, Any]) -> None:
    """Refuse what every item would be refused for."""
    from edge_runtime.model import Model
    from edge_runtime.option_checks import checked_options
    from edge_runtime.options import GenerationOptions
    from edge_runtime.structured_output.answer_form import choose_form
    from edge_runtime.structured_output.effort import Effort

    asked = checked_options(GenerationOptions.of(request)[0], model.limits)
    if isinstance(model, Model):  # a server compiles schemas itself
        form = asked.schema, asked.json, asked.tools, asked.tool_choice, asked.thinking
        choose_form(*form, model.tokenizer, lambda: model.grammar_vocabulary, Effort())


def _note_start(model: Any) -> None:
    from edge_runtime.answers import TOY_NOTICE
    from edge_runtime.cli import terminal as console

    if model.is_toy:
        console.note(TOY_NOTICE)
    for text in console.first_compile(pictures=True, prompts=model.uses_amx_prefill):
        console.note(text)
