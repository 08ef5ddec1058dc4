"""`--endpoint`: options of commands whose model may be on a server, and the model they name, here or there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from edge_runtime.model import AnyModel
    from edge_runtime.store.find import ModelPaths

DIALECTS = ("edge-runtime", "vllm", "sglang", "llama-server", "openai")
"""As in `remote.dialects`, which is not imported for the help."""
OF_THIS_MACHINE = {
    "mmproj": "--mmproj",
    "ctx": "--ctx",
    "threads": "--threads",
    "exact": "--exact",
    "kv_type": "--kv-type",
    "low_memory": "--low-memory",
    "lora": "--lora",
    "cache_dir": "--cache-dir",
    "cache_limit": "--cache-limit",
    "force": "--force",
}
"""Options of a model that is loaded, which a server decides for itself."""
OF_ENDPOINTS = ("dialect", "retries", "answer_timeout")


@dataclass(frozen=True)
class Endpoint:
    """A server, as the command names it."""

    url: str
    model: str | None
    dialect: str | None
    retries: int
    answer_timeout_s: float


def endpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that let a server answer."""
    for option in reversed(
        (
            click.option(
                "--endpoint",
                metavar="URL",
                help="Let this server answer; its key: EDGE_RUNTIME_ENDPOINT_KEY.  [this machine]",
            ),
            click.option(
                "--dialect",
                type=click.Choice(DIALECTS),
                metavar="NAME",
                help="edge-runtime, vllm, sglang, llama-server or openai.  [what it says it is]",
            ),
            click.option("--retries", type=click.IntRange(0), default=4, metavar="N", help="Further attempts.  [4]"),
            click.option(
                "--answer-timeout",
                type=click.FloatRange(0, min_open=True),
                default=1800,
                metavar="S",
                help="Time until the server's answer begins.  [1800]",
            ),
        )
    ):
        command = option(command)
    return command


def take_endpoint(options: dict[str, Any]) -> Endpoint | None:
    """Remove the values of `endpoint_options` from a command's options; None if this machine answers.

    Raises
    ------
    click.UsageError
        When options of the one are given for the other.
    """
    url, dialect = options.pop("endpoint"), options.pop("dialect")
    retries, timeout_s = options.pop("retries"), options.pop("answer_timeout")
    context = click.get_current_context()

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, None)

    if url is None:
        for name in OF_ENDPOINTS:
            if is_given(name):
                raise click.UsageError(f"--{name.replace('_', '-')} is for a server: name it with --endpoint.")
        return None
    for name, option in OF_THIS_MACHINE.items():
        if is_given(name):
            raise click.UsageError(
                f"{option} sets up a model on this machine, but the server of --endpoint answers; leave one of "
                f"them out."
            )
    return Endpoint(url, options["model"], dialect, retries, timeout_s)


def open_model(endpoint: Endpoint | None, name: str | ModelPaths, setup: dict[str, Any]) -> AnyModel:
    """The model that answers: loaded, or on the server.

    Parameters
    ----------
    name, setup : as of `options.take_setup`; or the paths of the model.

    Raises
    ------
    EdgeRuntimeError
        As `Model.load` and `Model.connect`.
    """
    from edge_runtime.cli.progress_line import waiting
    from edge_runtime.model import Model

    if endpoint is None:
        with waiting("loading the model"):
            return Model.load(name, **setup)
    return Model.connect(
        endpoint.url,
        endpoint.model,
        dialect=endpoint.dialect,
        retries=endpoint.retries,
        first_token_s=endpoint.answer_timeout_s,
    )
