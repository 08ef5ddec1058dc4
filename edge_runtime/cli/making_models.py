"""edge-runtime cp | create: names for models of this machine, by the code of /api/copy and /api/create."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.command import Command
from edge_runtime.cli.model_words import model_named, spelled
from edge_runtime.errors import ModelFileError
from edge_runtime.store.names import DEMO, visible
from edge_runtime.system.text_files import decode_text
from edge_runtime.weights.gguf_file import GGUFFile

if TYPE_CHECKING:
    from edge_runtime.server.ollama.modelfile import Modelfile
    from edge_runtime.server.registry.catalog import Catalog

READ_BYTES = 4 << 20
MAX_MODELFILE_BYTES = 4 << 20


@click.command("cp", cls=Command)
@click.argument("source")
@click.argument("destination")
def copy(source: str, destination: str) -> None:
    """Give a model another name; no file is copied."""
    from edge_runtime.cli.made_models import catalog_here

    catalog_here().copy(spelled(source), destination)
    click.echo(f"{source} is also called {destination}")


@click.command("create", cls=Command)
@click.argument("name")
@click.option(
    "-f", "--file", "path", type=click.Path(path_type=Path), default="Modelfile", help="Modelfile.  [Modelfile]"
)
def create(name: str, path: Path) -> None:
    """Make a model from a Modelfile: another name, with its own system prompt, parameters and adapter.

    FROM takes a model that is here or a file or folder of GGUF files, which are copied into the store; FROM,
    PARAMETER, SYSTEM, MESSAGE, ADAPTER and LICENSE count, TEMPLATE is kept for display.

    \b
    FROM minicpm-v-4.5
    PARAMETER temperature 0.2
    SYSTEM You answer in one word.
    """
    from edge_runtime.cli import terminal as console
    from edge_runtime.cli.made_models import catalog_here

    catalog = catalog_here()
    from edge_runtime.server.ollama.modelfile import parse_modelfile

    found = parse_modelfile(_text_of(path))
    asyncio.run(_create(name, found, path.parent, catalog))
    click.echo(f"{name} created")
    console.note(f"Use it with: edge-runtime run {name}")


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_MODELFILE_BYTES:
            raise ModelFileError(f"{path} has more than 4 MB, expected a Modelfile; name it with -f.")
        return decode_text(path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError(f"The Modelfile {path} does not exist; name it with -f FILE.") from None
    except OSError as error:
        raise ModelFileError(f"The Modelfile {path} cannot be read: {error.strerror or error}; check it.") from None
    except ValueError:
        raise ModelFileError(f"{path} is not text, expected a Modelfile; name it with -f FILE.") from None


async def _create(name: str, found: Modelfile, folder: Path, catalog: Catalog) -> None:
    """Store the files that the Modelfile names, and make the model."""
    from edge_runtime.cli import terminal as console
    from edge_runtime.server.ollama import create as making
    from edge_runtime.server.ollama.requests import CreateBody

    names, files = _files_of(found.sources, folder)
    if len(names) > 1 or (names and files):
        raise ModelFileError(
            f"The Modelfile is FROM {', '.join(map(visible, found.sources))[:200]}; expected one name of a model, or "
            "its files."
        )
    adapters = [_adapter(text, folder) for text in found.adapters]
    for path in (*files, *adapters):
        GGUFFile(path)  # refused before gigabytes are copied
    body: dict[str, Any] = {
        "model": name,
        "from": spelled(names[0]) if names else None,
        "files": {path.name: await _stored(path, catalog) for path in files} or None,
        "adapters": {path.name: await _stored(path, catalog) for path in adapters} or None,
        "template": found.template or None,
        "system": found.system or None,
        "license": found.licenses or None,
        "parameters": found.parameters or None,
        "messages": found.messages or None,
    }
    with ThreadPoolExecutor(1) as readers:
        async for step in making.create(CreateBody(**body), catalog, readers):
            if "template" in step["status"]:
                console.note(f"The Modelfile's template: {step['status']}.")


def _files_of(sources: Sequence[str], folder: Path) -> tuple[list[str], list[Path]]:
    """Names of models, and files, that FROM lines mean; a decoder alone brings the mmproj file beside it."""
    from edge_runtime.store.find import find_model

    paths = [_path_of(source, folder) for source in sources]
    names = [source for source, path in zip(sources, paths, strict=True) if path is None]
    files = [path for path in paths if path is not None]
    if len(files) == 1 and "mmproj" not in files[0].name.lower():
        found = find_model(files[0])
        files = [found.decoder, found.mmproj]
    return names, files


def _path_of(source: str, folder: Path) -> Path | None:
    """The path that a FROM line means; None if it is a model's name, which comes before a folder, as everywhere."""
    path = (folder / Path(source).expanduser()).absolute()
    if source.startswith(("/", "./", "../", "~", ".\\")) or source.lower().endswith(".gguf"):
        if not path.exists():
            raise ModelFileError(
                f"FROM {visible(source)[:200]}: there is no such file; paths begin at the Modelfile."
            )
        return path
    return path if path.is_dir() and model_named(source) in (None, source) and source != DEMO else None


def _adapter(text: str, folder: Path) -> Path:
    path = (folder / Path(text).expanduser()).absolute()
    if not path.is_file():
        raise ModelFileError(f"ADAPTER {visible(text)[:200]}: there is no such file; paths begin at the Modelfile.")
    return path


async def _stored(path: Path, catalog: Catalog) -> str:
    """Copy a file into the store; returns its digest."""
    from edge_runtime.server.registry.blobs import PREFIX

    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    name = PREFIX + digest.hexdigest()
    if not catalog.blobs.has(name):

        async def chunks() -> AsyncIterator[bytes]:
            for chunk in _chunks(path):
                yield chunk

        await catalog.blobs.receive(name, chunks(), path.stat().st_size)
    return name


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                yield chunk
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}; check it.") from None
