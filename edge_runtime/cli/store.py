"""edge-runtime pull | list | show | rm | export: models on this machine; the other commands about them are beside."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.command import Command
from edge_runtime.cli.made_models import catalog_here, made_model, made_models
from edge_runtime.cli.model_words import model_argument, needed_model, spelled
from edge_runtime.errors import ModelFileError
from edge_runtime.store.names import DEMO

if TYPE_CHECKING:
    from edge_runtime.server.registry.catalog import Listed
    from edge_runtime.store.library import Entry
    from edge_runtime.store.pull import Plan
    from edge_runtime.store.shipped import ShippedModel


def announce(plan: Plan) -> None:
    """Print what will be fetched."""
    from edge_runtime.cli import terminal as console

    entry = plan.entry
    width = max(len(file.path) for file in entry.files)
    lines = [entry.label if entry.label == entry.name else f"{entry.label}, {entry.name}"]
    lines += [f"  {file.path:<{width}}  {size_text(file.size)}" for file in entry.files]
    lines.append(f"  licence: {entry.licence or 'not stated; see the page of the model'}")
    to_fetch = size_text(plan.fetched) if plan.fetched else "nothing, all files are here"
    lines.append(f"  to fetch: {to_fetch}")
    console.note("\n".join(lines))


def size_text(n_bytes: int) -> str:
    """A size for people; unknown when it is 0."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB" if n_bytes else "size unknown"


@click.command("pull", cls=Command)
@model_argument
@click.option("--mmproj", metavar="FILE", help="mmproj file in the repository, or a second address.")
def pull(word: str | None, model: str | None, mmproj: str | None) -> None:
    """Fetch a model, or resume an interrupted pull.

    \b
    minicpm-v-4.5[:TYPE]     the official files, Q4_K_M or TYPE: minicpm-v-4.5:Q5_K_M
    hf:ORG/REPO[:FILE]       Hugging Face; FILE is a decoder or a part of its name: Q8_0
    ms:ORG/REPO[:FILE]       ModelScope
    ollama:NAME[:TAG]        from the Ollama store of this machine, used in place
    https://HOST/FILE.gguf   any server; #sha256=HEX at the end is checked
    """
    from edge_runtime.cli import terminal as console
    from edge_runtime.store.pull import pull as fetch

    name = needed_model(word, model)
    with console.ConvertProgress() as progress:
        entry = fetch(
            name,
            mmproj=mmproj,
            progress=progress,
            on_plan=announce,
            on_wait=cache(lambda: console.note(f"Another process is pulling {name}; waiting for it.")),  # once
        )
    click.echo(f"{entry.label}  {_state(entry)}")
    use = f"convert {entry.label} -o FOLDER" if entry.kind == "checkpoint" else f"run -m {entry.label}"
    console.note(f"Use it with: edge-runtime {use}")


@click.command("list", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def list_models(as_json: bool) -> None:
    """List the models of this machine: built in, installed with the program, pulled, and names created here."""
    from edge_runtime.cli import terminal as console
    from edge_runtime.store.library import Library
    from edge_runtime.store.shipped import shipped_models

    entries, shipped, made = Library().entries(), shipped_models(), made_models()
    if as_json:
        found = [demo_facts(), *map(_shipped_facts, shipped), *map(_facts, entries), *map(made_facts, made)]
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    rows = [(DEMO, f"{size_text(demo_facts()['size'])}  built in, a toy")]
    rows += [(model.name, f"{size_text(model.size)}  came with the installation") for model in shipped]
    rows += [(entry.label, _state(entry)) for entry in entries]
    rows += [
        (listed.name, f"{size_text(listed.size)}  created here{f' from {listed.parent}' if listed.parent else ''}")
        for listed in made
    ]
    if not entries and not shipped:
        console.note("No model was pulled yet; 'edge-runtime pull minicpm-v-4.5' fetches the official one.")
    width = max(len(name) for name, _ in rows)
    for name, state in rows:
        click.echo(f"{name:<{width}}  {state}")


@click.command("show", cls=Command)
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(word: str | None, model: str | None, as_json: bool) -> None:
    """Show where a model came from and where its files are."""
    facts = _facts_of(needed_model(word, model))
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    files = facts.pop("files")
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:<{width}}  {size_text(value) if key == 'size' else value}")
    for file in files:
        click.echo(f"{'file':<{width}}  " + "  ".join(str(value) for value in file.values() if value))


def _facts_of(name: str) -> dict[str, Any]:
    """What `show` tells of a model."""
    if name == DEMO:
        return demo_facts()
    if (made := made_model(name)) is not None:
        return made_facts(made)
    if (shipped := _shipped(name)) is not None:
        return _shipped_facts(shipped)
    return _facts_of_pulled(_entry(name))


def _facts_of_pulled(entry: Entry) -> dict[str, Any]:
    from edge_runtime.store.find import find_model
    from edge_runtime.store.library import Library

    facts = _facts(entry)
    if entry.kind == "ollama":
        paths = find_model(entry.name)
        facts["files"] = [{"path": str(path)} for path in (paths.decoder, paths.mmproj)]
    else:
        facts["folder"] = str(Library().snapshot(entry))
    return facts


@click.command("rm", cls=Command)
@click.argument("names", nargs=-1, required=True, metavar="NAME ...")
def remove(names: tuple[str, ...]) -> None:
    """Remove pulled models, and names created here. Files of Ollama stay where they are."""
    from edge_runtime.store.library import Library

    names = tuple(map(spelled, names))
    if DEMO in names:
        raise ModelFileError("demo is part of the program, expected a pulled model; it stays.")
    for shipped in filter(None, map(_shipped, names)):
        raise ModelFileError(
            f"{shipped.name} came with the installation and was not pulled; remove the folder {shipped.folder} "
            "instead."
        )
    made = [found for name in names if (found := made_model(name)) is not None]
    entries = [_entry(name) for name in names if made_model(name) is None]
    for listed in made:
        catalog_here().delete(listed.name)
        click.echo(f"{listed.name} removed")
    for entry in entries:  # after a wrong name was reported
        freed = Library().remove(entry)
        click.echo(f"{entry.label} removed, {freed / 1e6:.1f} MB freed")


@click.group("export", context_settings={"help_option_names": ["-h", "--help"]})
def export() -> None:
    """Make a model usable by other programs."""


@export.command("ollama", cls=Command)
@model_argument
@click.option("--mmproj", type=click.Path(path_type=Path), metavar="FILE", help="mmproj file, if not beside it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the Modelfile.  [.]")
@click.option("--force", is_flag=True, help="Replace an existing Modelfile.")
def export_ollama(word: str | None, model: str | None, mmproj: Path | None, output: Path | None, force: bool) -> None:
    """Write a Modelfile for Ollama: the files, the official chat template and sampling."""
    from edge_runtime.cli import terminal as console
    from edge_runtime.store.export_ollama import export_modelfile

    path = export_modelfile(needed_model(word, model), output or Path(), mmproj=mmproj, force=force)
    click.echo(path)
    console.note(f"Use it with: ollama create NAME -f {path}")


def _shipped(name: str) -> ShippedModel | None:
    """The model that came with the installation under this name, unless one was pulled under it."""
    from edge_runtime.store.library import Library
    from edge_runtime.store.names import parse_source
    from edge_runtime.store.shipped import find_shipped

    source, shipped = parse_source(name), find_shipped(name)
    entry = Library().find(source) if shipped is not None and source is not None else None
    return None if entry is not None and entry.complete else shipped


def demo_facts() -> dict[str, Any]:
    """What `show` tells of the built-in model."""
    from edge_runtime.store.find import find_model

    paths = find_model(DEMO)
    files = [{"path": str(path), "size": path.stat().st_size} for path in (paths.decoder, paths.mmproj)]
    return {
        "name": DEMO,
        "kind": "built in",
        "complete": True,
        "size": sum(path.stat().st_size for path in (paths.decoder, paths.mmproj)),
        "licence": "Apache-2.0",
        "about": "a toy to try the program out with",
        "files": files,
    }


def made_facts(listed: Listed) -> dict[str, Any]:
    """What `show` tells of a model that was created here."""
    return {
        "name": listed.name,
        "kind": "created",
        "complete": True,
        "size": listed.size,
        "licence": listed.license,
        "from": listed.parent,
        "created": listed.modified.date().isoformat(),
        "parameters": dict(listed.parameters),
        "system": listed.system,
        "files": [{"path": str(path), "size": path.stat().st_size} for path in listed.files],
    }


def _entry(name: str) -> Entry:
    from edge_runtime.store.library import Library
    from edge_runtime.store.names import parse_source, visible

    source = parse_source(name)
    entry = Library().find(source) if source is not None else None
    if entry is None:
        raise ModelFileError(
            f"No model {visible(name)[:120]!r} was pulled; 'edge-runtime list' shows those that were."
        )
    return entry


def _state(entry: Entry) -> str:
    if not entry.complete:
        return f"unfinished; 'edge-runtime pull {entry.label}' resumes"
    where = "in the Ollama store" if entry.kind == "ollama" else size_text(entry.size)
    return f"{where}  {'checkpoint  ' if entry.kind == 'checkpoint' else ''}{entry.pulled}"


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "complete": entry.complete,
        "size": entry.size,
        "licence": entry.licence,
        "revision": entry.revision,
        "pulled": entry.pulled,
        "files": [{"path": file.path, "size": file.size, "digest": file.digest} for file in entry.files],
    }


def _shipped_facts(model: ShippedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": "installed",
        "complete": True,
        "size": model.size,
        "licence": model.licence,
        "source": model.source,
        "files": [{"path": path.name, "size": path.stat().st_size} for path in model.files],
        "folder": str(model.folder),
    }


COMMANDS: tuple[click.Command, ...] = (pull, list_models, show, remove, export)
