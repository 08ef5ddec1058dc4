"""edge-runtime ps | stop: the models in the memory of a running server, asked as Ollama's clients ask."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.command import Command
from edge_runtime.errors import EndpointError
from edge_runtime.store.names import LATEST, plain_name, visible

if TYPE_CHECKING:
    from edge_runtime.remote.address import Address

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 11434
KEY_VARIABLE = "EDGE_RUNTIME_API_KEY"
TIMEOUT_S = 10.0
"""A server that is busy answers these requests at once all the same."""
EVERYWHERE = {"0.0.0.0": DEFAULT_HOST, "[::]": "[::1]"}
"""Addresses to listen on, in the place of those to connect to."""


def host_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--host`, or what Ollama's clients use."""
    return click.option(
        "--host",
        metavar="ADDRESS",
        help=f"Server; also from EDGE_RUNTIME_HOST or OLLAMA_HOST; its key: {KEY_VARIABLE}.  "
        f"[{DEFAULT_HOST}:{DEFAULT_PORT}]",
    )(command)


@click.command("ps", cls=Command)
@host_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def list_running(host: str | None, as_json: bool) -> None:
    """List the models in the memory of a running server."""
    from edge_runtime.cli import terminal as console

    server = address_of(host)
    models = _loaded(server)
    if as_json:
        click.echo(json.dumps(models, ensure_ascii=False))
        return
    if not models:
        console.note(f"The server at {server.host} has no model in memory.")
    names = [visible(str(model.get("name"))).removesuffix(LATEST) for model in models]
    width = max(map(len, names), default=0)
    for name, model in zip(names, models, strict=True):
        size = f"{_number(model.get('size')) / 1e9:.2f} GB"
        context = f"{_number(model.get('context_length')):.0f} tokens"
        click.echo(f"{name:<{width}}  {size}  {context}  {_until(model.get('expires_at'))}")


@click.command("stop", cls=Command)
@click.argument("word", required=False, metavar="[MODEL]")
@click.option("-m", "--model", metavar="MODEL", help="The same as the argument.")
@host_option
def stop(word: str | None, model: str | None, host: str | None) -> None:
    """Unload a model from the memory of a running server; without MODEL, all of them.

    Answers that are being generated end first. The server goes on; Ctrl-C in its terminal ends it.
    """
    from edge_runtime.cli.model_words import one_model

    name, server = one_model(word, model), address_of(host)
    loaded = [str(each.get("name")) for each in _loaded(server)]
    wanted = loaded if name is None else [each for each in loaded if _same(each, name)]
    if name is not None and not wanted:
        there = f"; in memory: {', '.join(map(_short, loaded))}" if loaded else ", which has no model in memory"
        raise EndpointError(f"{visible(name)[:80]} is not in the memory of the server at {server.host}{there}.")
    for each in wanted:
        _ask(server, "POST", "/api/generate", {"model": each, "keep_alive": 0, "stream": False})
        click.echo(f"{_short(each)} stopped")
    if not wanted:
        from edge_runtime.cli import terminal as console

        console.note(f"The server at {server.host} has no model in memory.")


def address_of(host: str | None) -> Address:
    """The server that was named, or that of the environment, or the usual one.

    Raises
    ------
    MessageError
        When it is no address.
    """
    from edge_runtime.remote.address import parse_address

    text = host or os.environ.get("EDGE_RUNTIME_HOST") or os.environ.get("OLLAMA_HOST") or DEFAULT_HOST
    scheme, mark, rest = text.strip().rstrip("/").rpartition("://")
    rest = f"{DEFAULT_HOST}{rest}" if rest.startswith(":") else rest
    name, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]"):
        name, port = rest, "" if mark else str(DEFAULT_PORT)
    name = EVERYWHERE.get(name, name)
    return parse_address(f"{scheme or 'http'}://{name}" + (f":{port}" if port else ""), os.environ.get(KEY_VARIABLE))


def _loaded(server: Address) -> list[Mapping[str, Any]]:
    found = _ask(server, "GET", "/api/ps")
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise EndpointError(
            f"The server at {server.host} answers /api/ps with something else than models; expected edge-runtime "
            "or Ollama: check --host."
        )
    return models


def _ask(server: Address, method: str, path: str, body: Any = None) -> Any:
    """One request.

    Raises
    ------
    EndpointError
        When nobody answers, or the answer is a refusal.
    """
    import httpx2

    headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
    try:
        # A proxy of the environment is not for this machine.
        with httpx2.Client(timeout=TIMEOUT_S, trust_env=not server.is_loopback) as client:
            reply = client.request(method, f"{server.root}{path}", json=body, headers=headers)
    except httpx2.ConnectError:
        raise EndpointError(
            f"No server answers at {server.host}; start one with 'edge-runtime serve', or name another with --host."
        ) from None
    except httpx2.HTTPError as error:
        raise EndpointError(
            f"The server at {server.host} does not answer: {str(error) or type(error).__name__}; try again, or name "
            "another with --host."
        ) from None
    if reply.status_code in (401, 403):
        raise EndpointError(f"The server at {server.host} asks for a key; put it into {KEY_VARIABLE}.")
    if reply.is_error:
        raise EndpointError(f"The server at {server.host} refuses ({reply.status_code}): {_reason(reply.text)}")
    try:
        return reply.json()
    except ValueError:
        raise EndpointError(
            f"The server at {server.host} does not speak Ollama's API; expected edge-runtime or Ollama: check --host."
        ) from None


def _reason(text: str) -> str:
    try:
        found = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        found = text
    return visible(str(found).strip())[:300] or "no reason given"


def _same(loaded: str, name: str) -> bool:
    return plain_name(loaded).lower() == plain_name(name).lower()


def _short(name: str) -> str:
    return visible(name).removesuffix(LATEST)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _until(text: Any) -> str:
    """When a model is unloaded, as people say it."""
    try:
        when = datetime.datetime.fromisoformat(str(text))
        seconds = (when - datetime.datetime.now(when.tzinfo)).total_seconds()
    except (ValueError, TypeError):
        return ""
    if seconds > 365 * 86400:
        return "stays in memory"
    minutes = round(max(0, seconds) / 60)
    return f"unloaded in {minutes} minutes" if minutes != 1 else "unloaded in 1 minute"
