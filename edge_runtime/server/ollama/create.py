"""Ollama's pull and create: long tasks, as iterators of progress reports in Ollama's form.

No client string is opened as a path: a model is made from names in the catalogue and digests of uploads, and every
file is checked against the rules of its format before anything loads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from edge_runtime.decoder.adapters import check_adapter
from edge_runtime.errors import ModelFileError
from edge_runtime.server.errors import ModelNotFound, NotAllowed, RequestError
from edge_runtime.server.middleware.shares import asking
from edge_runtime.server.ollama.modelfile import parse_modelfile
from edge_runtime.server.ollama.requests import CreateBody
from edge_runtime.server.registry.blobs import PREFIX, checked_digest
from edge_runtime.server.registry.catalog import Catalog
from edge_runtime.server.registry.facts import facts_of
from edge_runtime.server.registry.names import Record, checked_name
from edge_runtime.server.registry.parameters import submit_options
from edge_runtime.server.state import ServerState
from edge_runtime.store.names import ALIASES, parse_source, visible
from edge_runtime.store.pull import Plan, check_model_file, check_roles
from edge_runtime.store.pull import pull as fetch
from edge_runtime.system.addresses import Allowed
from edge_runtime.weights.gguf_file import GGUFFile

Step = dict[str, Any]
REPORT_S = 0.2
"""Between two reports of one file."""


def pullable(name: str, state: ServerState) -> str:
    """Return a name that clients may pull.

    Raises
    ------
    ModelNotFound
        When there is nothing to pull by that name.
    NotAllowed
        When it is an address on a host that the owner has not allowed.
    """
    name = state.catalog.pulled.spelled(name)
    try:
        source = parse_source(name)
    except ModelFileError as error:
        raise RequestError(str(error), "model") from None
    if source is None:
        if any(listed.name.lower() == name.lower() for listed in state.catalog.all()):
            return name  # here already
        raise ModelNotFound(
            f"{visible(name)[:120]!r} cannot be pulled: models of Ollama's registry do not run here; expected "
            f"{', '.join(ALIASES)}, hf:ORG/REPO or ms:ORG/REPO."
        )
    if source.kind == "url" and not any(each.covers(httpx2.URL(source.place)) for each in _allowed(state)):
        raise NotAllowed(
            "Models are only pulled from hubs; the owner of this server can allow hosts (--allow-url HOST:PORT)."
        )
    return name


def _allowed(state: ServerState) -> list[Allowed]:
    return [Allowed.parse(text) for text in state.settings.allow_url]


async def pull(name: str, state: ServerState) -> AsyncIterator[Step]:
    """Fetch a model.

    Raises
    ------
    DownloadError, ModelFileError
        When it cannot be fetched, or is not a model that runs here.
    EngineBusy
        When too many models are being pulled.
    """
    leave = state.pulls.take(asking())
    try:
        yield {"status": "pulling manifest"}
        if parse_source(name) is not None:
            leave, in_thread = (lambda: None), leave
            async for step in _in_thread(lambda report: _fetch(name, state, report), in_thread):
                yield step
        yield {"status": "success"}
    finally:
        leave()


def _fetch(name: str, state: ServerState, report: Callable[[Step], None]) -> None:
    digests: dict[str, str] = {}

    def plan(found: Plan) -> None:
        digests.update({file.path: file.digest for file in found.entry.files})

    def progress(path: str, done: int, total: int) -> None:
        digest = digests.get(path, "")
        label = digest.removeprefix(PREFIX)[:12] or path
        known = {"digest": digest or path, "total": total, "completed": done} if total else {}
        report({"status": f"pulling {label}", **known})

    def wait() -> None:
        report({"status": "waiting for another pull of this model"})

    entry = fetch(
        name,
        progress=progress,
        on_plan=plan,
        on_wait=wait,
        library=state.catalog.library,
        allowed=_allowed(state),
        max_bytes=state.catalog.room(),
    )
    if entry.kind == "checkpoint":
        raise ModelFileError(
            f"{entry.label} is a checkpoint, expected GGUF files; on the server's machine, run 'edge-runtime convert "
            f"{entry.label} -o FOLDER' and serve that folder."
        )
    state.catalog.unhide(entry)
    report({"status": "verifying sha256 digest"})
    report({"status": "writing manifest"})


class _Abandoned(Exception):  # noqa: N818 - nobody sees it
    """Raised in a worker when nobody reads its reports any more."""


async def _in_thread(
    work: Callable[[Callable[[Step], None]], None], on_end: Callable[[], None]
) -> AsyncIterator[Step]:
    """Run work in its own thread and yield its reports; it ends at its next report once the reader is gone.

    A download may stall for minutes, so it must not occupy threads that other requests need.

    Parameters
    ----------
    on_end : called in the event loop's thread when the worker has ended.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Step | None]()
    abandoned = threading.Event()
    latest: dict[str, tuple[float, bool]] = {}
    errors: list[BaseException] = []

    def report(step: Step) -> None:
        if abandoned.is_set():
            raise _Abandoned
        is_last = step.get("completed") == step.get("total")
        shown_at, was_last = latest.get(step["status"], (0.0, False))
        now = loop.time()
        if (is_last and not was_last) or now - shown_at >= REPORT_S:
            latest[step["status"]] = (now, is_last)
            loop.call_soon_threadsafe(queue.put_nowait, step)

    def run() -> None:
        try:
            work(report)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
            errors.append(error)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its counters with it
                loop.call_soon_threadsafe(on_end)
                loop.call_soon_threadsafe(queue.put_nowait, None)

    threading.Thread(target=run, name="edge-runtime pull", daemon=True).start()
    try:
        while (step := await queue.get()) is not None:
            yield step
        if errors:
            raise errors[0]
    finally:
        abandoned.set()


async def create(body: CreateBody, catalog: Catalog, readers: Executor) -> AsyncIterator[Step]:
    """Make a model.

    Parameters
    ----------
    readers : threads that read the files.

    Raises
    ------
    RequestError, ModelNotFound, ModelFileError
        When it cannot be made from the files here.
    """
    name = checked_name(body.wanted)
    body = _with_modelfile(body)
    if body.quantize:
        raise RequestError(
            "quantize was given, but models are quantised from checkpoints; run 'edge-runtime convert' on the "
            "server's machine.",
            "quantize",
        )
    submit_options(body.parameters)  # refuse now rather than with every request
    yield {"status": "reading model metadata"}
    loop = asyncio.get_running_loop()
    record = await loop.run_in_executor(readers, _record, body, catalog)
    if body.template and body.template.strip() != await asyncio.to_thread(_own_template, record, catalog):
        yield {"status": "storing the template for display only; prompts use the one in the model's file"}
    yield {"status": "writing manifest"}
    await asyncio.to_thread(catalog.put, record, name)
    yield {"status": "success"}


def _own_template(record: Record, catalog: Catalog) -> str:
    return facts_of(catalog.find(record.base)).template.strip() if record.base else ""


def _with_modelfile(body: CreateBody) -> CreateBody:
    """The body with the text of its Modelfile as fields; older clients send one.

    Raises
    ------
    RequestError
        When the Modelfile, or the body, names a path.
    """
    if body.path:
        raise RequestError("path was given, but requests open no files here; send the text as 'modelfile'.", "path")
    if not body.modelfile:
        return body
    found = parse_modelfile(body.modelfile)
    names = [source for source in found.sources if not _is_digest(source)]
    if len(names) > 1:
        raise RequestError(
            "The Modelfile has several FROM lines with names; expected one name, or digests of uploads."
        )
    for adapter in found.adapters:
        checked_digest(adapter.removeprefix("@"))
    digests = [source.removeprefix("@") for source in found.sources if _is_digest(source)]
    adapters = [adapter.removeprefix("@") for adapter in found.adapters]
    return body.model_copy(
        update={
            "source": body.source or (names[0] if names else None),
            "files": body.files or {f"file{i}.gguf": digest for i, digest in enumerate(digests)},
            "adapters": body.adapters or {f"adapter{i}.gguf": digest for i, digest in enumerate(adapters)},
            "template": body.template or found.template or None,
            "system": body.system or found.system or None,
            "license": body.license or found.licenses or None,
            "parameters": {**found.parameters, **(body.parameters or {})},
            "messages": body.messages or found.messages or None,
        }
    )


def _is_digest(source: str) -> bool:
    return source.removeprefix("@").startswith((PREFIX, "sha256-"))


def _record(body: CreateBody, catalog: Catalog) -> Record:
    """The new model's record, with all files checked."""
    if not body.source and not body.files:
        raise RequestError("Neither 'from' nor 'files' was given; expected a model's name or uploaded files.", "from")
    record = catalog.record_of(_base_name(body.source)) if body.source else Record("")
    roles = {role: digest for digest, role in _roles([*(body.files or {}).values()], catalog).items()}
    decoder, mmproj = roles.get("decoder", record.decoder), roles.get("mmproj", record.mmproj)
    record = replace(record, decoder=decoder, mmproj=mmproj)
    if "decoder" in roles and "mmproj" in roles:
        record = replace(record, base="")
    adapters = [checked_digest(digest) for digest in (body.adapters or {}).values()]
    adapters += [roles["adapter"]] if "adapter" in roles else []
    licence = body.license if isinstance(body.license, str) else "\n".join(body.license or [])
    record = replace(
        record,
        adapters=tuple(adapters) or record.adapters,
        parent=body.source or "",
        system=record.system if body.system is None else body.system,
        template=record.template if body.template is None else body.template,
        license=licence or record.license,
        parameters={**record.parameters, **(body.parameters or {})},
        messages=tuple(body.messages or record.messages),
        created=datetime.datetime.now(datetime.UTC).isoformat(),
    )
    _check_files(record, catalog)
    return record


def _base_name(source: str) -> str:
    if source.startswith(("/", ".", "~")) or "\\" in source:
        raise RequestError(
            "'from' looks like a path, but requests open no files here; expected a model's name, or upload the "
            "files and give their digests.",
            "from",
        )
    return source


def _roles(digests: list[str], catalog: Catalog) -> dict[str, str]:
    """Digest of each upload → `decoder`, `mmproj` or `adapter`."""
    found: dict[str, str] = {}
    for digest in map(checked_digest, digests):
        role = _role(_uploaded(digest, catalog))
        if role in found.values():
            raise RequestError(
                f"Two of the files are of type {role}, expected one decoder and one mmproj file.", "files"
            )
        found[digest] = role
    return found


def _role(path: Path) -> str:
    try:
        is_adapter = GGUFFile(path).metadata.get("general.type") == "adapter"
        return "adapter" if is_adapter else check_model_file(path)[0]
    except ModelFileError as error:
        raise RequestError(str(error), "files") from None


def _uploaded(digest: str, catalog: Catalog) -> Path:
    if not catalog.blobs.has(digest):
        raise RequestError(
            f"No upload has the digest {digest[:23]}...; send it to /api/blobs/{digest} first.", "files"
        )
    return catalog.blobs.path(digest)


def _check_files(record: Record, catalog: Catalog) -> None:
    """Check that the files of a record fit together, before anything loads them."""
    base = catalog.find(record.base) if record.base else None
    paths: dict[str, Path] = {}
    for role, digest in (("decoder", record.decoder), ("mmproj", record.mmproj)):
        if digest:
            paths[role] = _uploaded(digest, catalog)
        elif base is not None:
            paths[role] = getattr(base.paths, role)
        else:
            raise RequestError(
                f"There is no {role} file; expected both parts of the model, or 'from' with a model to take it from.",
                "files",
            )
    try:
        check_roles(paths)
        for digest in record.adapters:
            check_adapter(_uploaded(digest, catalog), GGUFFile(paths["decoder"]))
    except ModelFileError as error:
        raise RequestError(str(error), "files") from None
