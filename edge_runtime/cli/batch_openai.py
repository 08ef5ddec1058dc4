"""edge-runtime batch --jobs with OpenAI's lines: answered by the server's application, in this process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from edge_runtime.cli.batch_run import run_batch
from edge_runtime.cli.options import take_setup
from edge_runtime.cli.server_extra import missing_modules
from edge_runtime.errors import BackendUnavailable

FOREVER_S = 1e8
PARALLEL = 16
MAX_LINE_BYTES = 256 << 20


def answer_openai_lines(
    jobs: Path, output: Path, options: dict[str, Any], ordered: bool, retry_failed: bool, parallel: int | None
) -> int:
    """Answer the lines of a file; returns the exit code.

    Parameters
    ----------
    options : of the command; those of the model count.

    Raises
    ------
    BackendUnavailable
        When what the server needs is not installed.
    EdgeRuntimeError
        When a line is not one of OpenAI's, or the output cannot be written.
    """
    if missing := missing_modules():
        raise BackendUnavailable(
            f"{jobs} has lines of OpenAI's batches, which the server's routes answer; they need "
            f"{', '.join(missing)}: run pip install 'edge-runtime[serve]', or write jobs with id, input and prompt."
        )
    from edge_runtime.batch.openai_lines import Application, OpenAIJobs, line_of, read_line
    from edge_runtime.batch.output import Output
    from edge_runtime.server.settings import Settings

    logging.getLogger("edge_runtime.server").setLevel(logging.WARNING)
    name, setup, adapter = take_setup(options)
    if adapter is not None:
        raise click.UsageError("--lora cannot be given with OpenAI's lines: merge the adapter, or write jobs.")
    if setup["mmproj"] is not None:
        raise click.UsageError("--mmproj cannot be given with OpenAI's lines: name a folder that holds both files.")
    settings = Settings(
        port=0,
        models=(name,),
        max_body_bytes=MAX_LINE_BYTES,
        max_bodies_bytes=64 * MAX_LINE_BYTES,
        max_pixels=options["max_pixels"],
        max_images=1000,
        request_timeout_s=FOREVER_S,
        keep_alive_s=-1.0,
        load={key: value for key, value in setup.items() if key not in ("mmproj", "adapters")},
    )
    source = OpenAIJobs(jobs, settings)
    with Output(output, read_line) as out:
        out.open(drop_errors=retry_failed)
        application = Application(settings)
        application.check_models(source)
        with application:
            return run_batch(
                source, application, application.cancel, line_of, out, parallel or PARALLEL, ordered=ordered
            )
