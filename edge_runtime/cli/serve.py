"""edge-runtime serve: options in, a running server out; the server is imported only when it runs."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_runtime.cache.disk import DEFAULT_LIMIT_BYTES, usable_folder
from edge_runtime.cli.command import INTERRUPTED
from edge_runtime.cli.model_words import spelled
from edge_runtime.cli.option_groups import SERVING, GroupedCommand
from edge_runtime.cli.options import LOW_MEMORY, nice_option
from edge_runtime.cli.server_extra import check_installed

if TYPE_CHECKING:
    from edge_runtime.server.settings import Settings

COUNT: dict[str, Any] = {"type": click.IntRange(1), "metavar": "N"}
SECONDS: dict[str, Any] = {"type": click.FloatRange(0, min_open=True), "metavar": "S"}
SIZE: dict[str, Any] = {"type": click.FloatRange(0, min_open=True)}


@click.command("serve", cls=GroupedCommand, groups=SERVING)
@click.argument("words", nargs=-1, metavar="[MODEL ...]")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Listen here.  [127.0.0.1: this machine alone]")
@click.option("--port", type=click.IntRange(0, 65535), default=11434, metavar="N", help="[11434, as Ollama]")
@click.option("-m", "--model", "models", multiple=True, metavar="MODEL", help="The same as MODEL; may be repeated.")
@click.option("--api-key", envvar="EDGE_RUNTIME_API_KEY", metavar="KEY", help="Key that clients must send.")
@click.option("--cors", "cors_origins", multiple=True, metavar="ORIGIN", help="Allow web pages of this origin.")
@click.option("--allow-host", "allowed_hosts", multiple=True, metavar="NAME", help="Another name of this server.")
@click.option(
    "--allow-url", multiple=True, metavar="HOST", help="Host that requests may fetch pictures and models from."
)
@click.option("--keep-alive", default="5m", metavar="TIME", help="How long an unused model stays loaded.  [5m]")
@click.option("--max-memory", **SIZE, metavar="GB", help="Maximum for all loaded models.  [free memory]")
@click.option("--queue", "max_queue", **COUNT, default=64, help="Maximum requests, running and waiting.  [64]")
@click.option("--queue-per-client", "max_queue_per_client", **COUNT, help="Of these, per address.  [7/8 of --queue]")
@click.option("--upstream", metavar="URL", help="Hand over what exceeds the queue; key: EDGE_RUNTIME_UPSTREAM_KEY.")
@click.option("--connections", "max_connections", **COUNT, default=512, help="Maximum connections.  [512]")
@click.option(
    "--connections-per-client",
    "max_connections_per_client",
    **COUNT,
    help="Of these, per address.  [3/4 of --connections]",
)
@click.option(
    "--patience", "body_timeout_s", **SECONDS, default=30, help="Time allowed to clients slower than...  [30]"
)
@click.option("--min-rate", "min_bytes_per_s", **COUNT, default=1024, help="...this many bytes per second.  [1024]")
@click.option("--timeout", "request_timeout_s", **SECONDS, default=1800, help="Time limit of a request.  [1800]")
@click.option("--grace", "grace_s", **SECONDS, default=30, help="Time for running answers at shutdown.  [30]")
@click.option("--max-body", **SIZE, default=64, metavar="MB", help="Maximum size of a request.  [64]")
@click.option(
    "--max-bodies", **SIZE, metavar="MB", help="Of all requests together.  [4 of --max-body, 1/8 of free memory]"
)
@click.option("--max-values", **COUNT, default=100_000, help="Maximum JSON values in a request.  [100000]")
@click.option("--max-depth", **COUNT, default=200, help="Maximum nesting of a request.  [200]")
@click.option("--max-messages", **COUNT, default=10_000, help="Maximum messages in a request.  [10000]")
@click.option("--max-parts", **COUNT, default=1000, help="Maximum parts of a message.  [1000]")
@click.option("--max-images", **COUNT, default=64, help="Maximum pictures in a request.  [64]")
@click.option(
    "--decode-timeout", "decode_timeout_s", **SECONDS, default=30, help="Per picture, page or video frame.  [30]"
)
@click.option("--max-pixels", **COUNT, default=64_000_000, help="Maximum pixels per picture.  [64 million]")
@click.option("--max-video", **SIZE, default=128, metavar="MB", help="Maximum size of a video or document.  [128]")
@click.option("--max-frames", "max_video_frames", **COUNT, default=180, help="Maximum frames of a video.  [180]")
@click.option("--max-pages", **COUNT, default=100, help="Maximum pages of a document.  [100]")
@click.option("--max-tokens", **COUNT, default=32_768, help="Maximum tokens of an answer.  [32768]")
@click.option(
    "-c", "--ctx", "n_ctx", **COUNT, help="Context length in tokens.  [8192; low memory: 4096; or what fits]"
)
@click.option("-t", "--threads", "n_threads", **COUNT, help="Threads; at most the processors.  [physical cores]")
@nice_option
@click.option("--exact", is_flag=True, help="Compute as the official float32 code.")
@click.option(
    "--kv-type", type=click.Choice(["f16", "q8_0", "q4_0"]), metavar="TYPE", help="KV cache.  [f16; low memory: q8_0]"
)
@click.option("--low-memory", is_flag=True, help=LOW_MEMORY)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    envvar="EDGE_RUNTIME_CACHE_DIR",
    metavar="DIR",
    help="Cache computed prompts and encoded pictures here.  [the user's cache]",
)
@click.option("--no-cache-dir", "keeps_nothing", is_flag=True, help="Do not cache them on disk.")
@click.option(
    "--cache-limit", **SIZE, metavar="GB", default=DEFAULT_LIMIT_BYTES / 2**30, help="Maximum size of DIR.  [4]"
)
@click.option(
    "--max-store", **SIZE, default=256, metavar="GB", help="Size at which pulls and uploads are refused.  [256]"
)
@click.option("--max-names", **COUNT, default=1000, help="Maximum models that clients create.  [1000]")
@click.option("--max-files", **SIZE, default=8, metavar="GB", help="Size of all files for batches.  [8]")
@click.option("--max-file", **SIZE, default=200, metavar="MB", help="Size of one of them.  [200]")
@click.option("--tools", type=click.Choice(["auto", "off"]), default="auto", help="off: no model claims tools.")
@click.option("--force", is_flag=True, help="Load models even if memory seems insufficient.")
def serve(**options: Any) -> None:
    """Answer clients of Ollama and of OpenAI, and show a page in the browser.

    Models are loaded on demand, each MODEL at once. Clients may name the demo, these, and any pulled model.

    \b
    edge-runtime serve minicpm-v-4.5
    OLLAMA_HOST=http://127.0.0.1:11434 ollama list
    """
    source = click.get_current_context().get_parameter_source("cache_dir")
    if options["keeps_nothing"] and source is ParameterSource.COMMANDLINE:
        raise click.UsageError("--cache-dir and --no-cache-dir were both given; give one of them.")
    check_installed()
    caught = run(settings_of(options))
    if caught == signal.SIGINT:
        sys.exit(INTERRUPTED)


def settings_of(options: dict[str, Any]) -> Settings:
    """Settings of a server from the options of the command.

    Raises
    ------
    EdgeRuntimeError
        When a value is invalid.
    """
    from edge_runtime.cache.caches import usual_folder
    from edge_runtime.server.ollama.options import keep_alive_seconds
    from edge_runtime.server.settings import MEGABYTE, Settings

    options["models"] = tuple(dict.fromkeys(map(spelled, (*options.pop("words"), *options["models"]))))
    if options.pop("keeps_nothing"):
        options["cache_dir"] = None
    elif options["cache_dir"] is None:
        options["cache_dir"] = usual_folder()
    else:
        usable_folder(options["cache_dir"])
    load = {
        name: options.pop(name)
        for name in ("n_ctx", "n_threads", "exact", "kv_type", "low_memory", "cache_dir", "force")
    }
    load["cache_limit"] = max(1, int(options.pop("cache_limit") * 2**30))
    memory, keep_alive = options.pop("max_memory"), keep_alive_seconds(options.pop("keep_alive"))
    bodies = options.pop("max_bodies")
    settings = Settings(
        max_body_bytes=int(options.pop("max_body") * MEGABYTE),
        max_stored_bytes=int(options.pop("max_store") * 2**30),
        max_files_bytes=max(1, int(options.pop("max_files") * 2**30)),
        max_file_bytes=max(1, int(options.pop("max_file") * MEGABYTE)),
        max_bodies_bytes=None if bodies is None else int(bodies * MEGABYTE),
        max_video_bytes=int(options.pop("max_video") * MEGABYTE),
        max_loaded_bytes=None if memory is None else int(memory * 1e9),
        keep_alive_s=300.0 if keep_alive is None else keep_alive,
        load=load,
        **options,
    )
    return settings.checked()


def run(settings: Settings) -> int | None:
    """Serve until a signal ends the process; returns that signal."""
    import asyncio

    from edge_runtime.server.app import create_app
    from edge_runtime.server.middleware.stack import warnings_for
    from edge_runtime.server.running import serve as serve_app
    from edge_runtime.server.state import server_of

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("edge_runtime.server").setLevel(logging.INFO)
    app = create_app(settings)
    for warning in warnings_for(settings):
        click.secho(f"WARNING: {warning}", err=True, fg="red", bold=True)
    model = server_of(app).catalog.default
    return asyncio.run(serve_app(app, settings, lambda address, server: _announce(address, settings, model)))


def _announce(address: str, settings: Settings, model: str) -> None:
    """Print the server's address, and how to use it."""
    header = ' -H "Authorization: Bearer KEY"' if settings.api_key is not None else ""
    question = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
    click.echo(
        f"edge-runtime serves {address}; Ctrl-C ends it.\n"
        f"  in a browser:   {address}\n"
        f"  for OpenAI's:   base_url={address}/v1\n"
        f"  for Ollama's:   OLLAMA_HOST={address}\n"
        f"  curl {address}/api/chat{header} -d '{question}'"
    )
    sys.stdout.flush()
