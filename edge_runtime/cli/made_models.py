"""Models that were created on this machine: another name for a model's files, with its own texts and options.

The server's clients make them, and `edge-runtime create` and `cp`; both keep them in the store, by the same code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_runtime.errors import ModelFileError
from edge_runtime.server.registry.places import names_folder, record_paths
from edge_runtime.store.names import plain_name, visible
from edge_runtime.system.plain_files import is_plain

NO_LIMIT = 1 << 62

if TYPE_CHECKING:
    from edge_runtime.server.registry.catalog import Catalog, Listed
    from edge_runtime.store.find import ModelPaths


def catalog_here() -> Catalog:
    """The models of this machine, as the server sees them.

    Raises
    ------
    BackendUnavailable
        When the server's libraries are not installed.
    """
    from edge_runtime.cli.server_extra import check_installed

    check_installed()
    from edge_runtime.server.registry.catalog import Catalog
    from edge_runtime.server.settings import Settings

    # Limits are for clients of a server, not for the owner of the machine.
    return Catalog(Settings(max_blob_bytes=NO_LIMIT, max_stored_bytes=NO_LIMIT, max_names=NO_LIMIT))


def made_model(name: str, store: Path | None = None) -> Listed | None:
    """The model that was created under this name; None if none was.

    Parameters
    ----------
    store : folder of the store; default: the machine's.

    Raises
    ------
    ModelFileError
        When its files are gone.
    """
    if store is None:
        from edge_runtime.store.library import Library

        store = Library().root
    name = plain_name(name)
    if not any(map(is_plain, record_paths(names_folder(store), name))):
        return None
    catalog = catalog_here()
    record = catalog.names.get(name)
    if record is None or record.hidden:
        return None
    from edge_runtime.server.errors import ModelNotFound

    try:
        return catalog.find(name)
    except ModelNotFound:
        made_from = f" (made from {visible(record.parent)[:80]})" if record.parent else ""
        raise ModelFileError(
            f"The files of {record.name}{made_from} are not all here; pull its model again, or create it anew."
        ) from None


def made_models() -> list[Listed]:
    """Every created model whose files are here; none where the server's libraries are not installed."""
    from edge_runtime.cli.server_extra import missing_modules
    from edge_runtime.store.library import Library

    if missing_modules() or not any(names_folder(Library().root).glob("*.json")):
        return []
    catalog = catalog_here()
    made = {record.name for record in catalog.names.all() if not record.hidden}
    return [listed for listed in catalog.all() if listed.name in made]


def paths_of(name: str, mmproj: Path | None = None) -> ModelPaths:
    """Files of a model by any of its names, created ones included.

    Raises
    ------
    ModelFileError
        As `find_model`.
    """
    from edge_runtime.store.find import find_model

    made = made_model(name)
    return find_model(name if made is None else made.paths, mmproj)


def begin(
    name: str, setup: dict[str, Any], request: dict[str, Any], system: str | None, *, on_server: bool
) -> tuple[str | ModelPaths, list[Any]]:
    """What to load, and what the conversation begins with: a created model has texts and options of its own.

    Parameters
    ----------
    setup, request : keyword arguments of `Model.load` and `Model.chat`; where the command line says nothing, the
        model's own are put in.
    system : the system prompt that was given.
    on_server : whether a server answers, which knows its own names.

    Raises
    ------
    ModelFileError
        When files of a created model are gone.
    """
    made = None if on_server else made_model(name)
    system = system or (made.system if made is not None else "")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    if made is None:
        return name, messages
    _apply(made, setup, request)
    return made.paths, [*messages, *(dict(message) for message in made.messages)]


def _apply(made: Listed, setup: dict[str, Any], request: dict[str, Any]) -> None:
    from edge_runtime.cli import terminal as console

    context = click.get_current_context()

    def is_given(option: str) -> bool:
        return context.get_parameter_source(option) is ParameterSource.COMMANDLINE

    if made.adapters and request["adapter"] is None:
        setup["adapters"] = dict(made.adapters)
        request["adapter"] = next(iter(made.adapters))
    for option, value in made.defaults.items():
        if option not in request:
            console.note(f"{made.name} sets {option}, which is for servers; it was not used.")
        elif not is_given(option) and not (option == "temperature" and is_given("greedy")):
            request[option] = value
