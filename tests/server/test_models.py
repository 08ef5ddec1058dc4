"""Which models are in memory, and when: loaded once, pinned while used, gone in time and when room is needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime.errors import ModelFileError, NotEnoughMemoryError
from edge_runtime.server.errors import ModelNotFound, ShuttingDown
from edge_runtime.server.registry import loaded as models
from edge_runtime.server.registry.catalog import Catalog
from edge_runtime.server.registry.loaded import ModelRegistry
from edge_runtime.server.settings import Settings

GIGABYTE = 10**9


class Machine:
    """Stands for the memory and the loading of models: one gigabyte each, as many as there are."""

    def __init__(self) -> None:
        self.free, self.loads, self.closes = 10 * GIGABYTE, [], []
        self.adapters: list[Any] = []
        self.hold = threading.Event()
        self.hold.set()
        self.fail: Exception | None = None
        self.changed: set[str] = set()
        """Loaded files that were written to since."""

    def check(self, file: str) -> None:
        if file in self.changed:
            raise ModelFileError(f"{file} was written to.")

    def load(self, paths: Any, options: Any) -> Any:
        self.hold.wait(10)
        if self.fail is not None:
            raise self.fail
        if self.free < GIGABYTE:
            raise NotEnoughMemoryError("It needs 1.0 GB, 0.5 GB are free.")
        self.free -= GIGABYTE
        file = paths.decoder.name
        self.loads.append(file)
        self.adapters.append(options.adapters)
        self.changed.discard(file)
        return SimpleNamespace(close=lambda: self.close(file), check_usable=lambda: self.check(file), n_ctx=512)

    def close(self, name: str) -> None:
        self.free += GIGABYTE
        self.closes.append(name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    monkeypatch.setattr(models, "Model", machine.load)
    monkeypatch.setattr(models, "needed_bytes", lambda paths, options: GIGABYTE)
    monkeypatch.setattr(models, "available_bytes", lambda: machine.free)
    yield machine
    machine.hold.set()


class Shelf:
    """A catalogue in which every name but one is a model; `a2` has the files of `a`."""

    def find(self, name: str | None) -> Any:
        if name == "nothing":
            raise ModelNotFound("model 'nothing' not found")
        name = name or "a"
        file = Path(name[0])
        return SimpleNamespace(name=name, files=(file,), paths=SimpleNamespace(decoder=file), adapters={}, tag=name)


def registry(**settings: Any) -> ModelRegistry:
    return ModelRegistry(Settings(**settings), Shelf())  # type: ignore[arg-type]


def names(found: ModelRegistry) -> list[str]:
    return [slot.listed.name for slot in found.loaded()]


async def use(found: ModelRegistry, name: str, **options: Any) -> None:
    async with found.use(name, **options):
        pass


def test_a_model_is_loaded_once(machine):
    async def many() -> None:
        found = registry()
        await asyncio.gather(*(use(found, name) for name in ("a", "a", "a2", "b", "a")))
        assert sorted(machine.loads) == ["a", "b"]
        assert len(names(found)) == 2
        await found.close()
        assert sorted(machine.closes) == ["a", "b"]
        with pytest.raises(ShuttingDown):
            await use(found, "a")

    asyncio.run(many())


def test_who_hangs_up_leaves_the_model_to_the_others(machine):
    async def one_leaves() -> None:
        machine.hold.clear()
        found = registry()
        first, second = asyncio.create_task(use(found, "a")), asyncio.create_task(use(found, "a"))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        machine.hold.set()
        await second
        assert machine.loads == ["a"]
        await found.close()

    asyncio.run(one_leaves())


def test_a_model_that_nobody_waits_for_any_more_expires(machine):
    async def all_leave() -> None:
        machine.hold.clear()
        found = registry(keep_alive_s=0.05)
        only = asyncio.create_task(use(found, "a"))
        await asyncio.sleep(0.05)
        only.cancel()
        await asyncio.wait([only])
        machine.hold.set()
        await until(lambda: machine.closes == ["a"])
        await found.close()

    asyncio.run(all_leave())


def test_a_model_whose_files_were_written_to_is_loaded_anew(machine):
    """At once where nobody uses it; else beside the old one, which goes with its last user."""

    async def written_to() -> None:
        found = registry(models=("a",))
        await use(found, "a")
        machine.changed.add("a")
        await use(found, "a")
        assert (machine.loads, machine.closes) == (["a", "a"], ["a"])
        async with found.use("a") as old:
            machine.changed.add("a")
            async with found.use("a") as new:
                assert new.model is not old.model
                assert machine.closes == ["a"]
        await until(lambda: machine.closes == ["a", "a"])
        assert names(found) == ["a"]
        await found.close()
        assert len(machine.loads) == len(machine.closes) == 3
        assert machine.free == 10 * GIGABYTE

    asyncio.run(written_to())


async def until(condition: Any) -> None:
    """Wait until something is so; ten seconds at most."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


def test_keep_alive(machine):
    async def times() -> None:
        found = registry(keep_alive_s=300)
        async with found.use("a", 0.05):
            await asyncio.sleep(0.15)
            assert names(found) == ["a"], "a model in use stays"
        await until(lambda: not names(found))
        async with found.use("a", -1):
            pass
        (slot,) = found.loaded()
        assert (slot.timer, slot.expires_at) == (None, None)
        await use(found, "a")
        assert found.loaded()[0].expires_at is not None, "each request says it for itself"
        await found.forget(slot.listed)
        assert not names(found)
        async with found.use("b"):
            (slot,) = found.loaded()
            await found.forget(slot.listed)
            assert names(found) == ["b"]
        await until(lambda: not names(found))
        await found.close()

    asyncio.run(times())


def test_the_one_that_was_idle_longest_makes_room(machine):
    async def crowd() -> None:
        machine.free = 2 * GIGABYTE
        found = registry()
        await use(found, "a")
        await use(found, "b")
        await use(found, "a")
        await use(found, "c")
        assert machine.closes == ["b"]
        async with found.use("a"), found.use("c"):
            with pytest.raises(NotEnoughMemoryError):
                await use(found, "d")
        await use(found, "d")
        assert machine.loads == ["a", "b", "c", "d"]
        await found.close()
        assert machine.free == 2 * GIGABYTE

    asyncio.run(crowd())


def test_the_owners_limit(machine):
    async def limited() -> None:
        found = registry(max_loaded_bytes=2 * GIGABYTE)
        for name in ("a", "b", "c"):
            await use(found, name)
        assert machine.closes == ["a"]
        async with found.use("b"), found.use("c"):
            with pytest.raises(NotEnoughMemoryError, match=r"d needs about 1\.0 GB .* 2\.0 GB that the owner allows"):
                await use(found, "d")
        await found.close()

    asyncio.run(limited())


def test_memory_that_runs_short_while_loading(machine, monkeypatch):
    """What was reckoned may be too little: then loading itself says so, and room is made."""
    monkeypatch.setattr(models, "available_bytes", lambda: 100 * GIGABYTE)

    async def short() -> None:
        machine.free = GIGABYTE
        found = registry()
        await use(found, "a")
        await use(found, "b")
        assert (machine.loads, machine.closes) == (["a", "b"], ["a"])
        await found.close()

    asyncio.run(short())


def test_a_load_that_failed_is_tried_again(machine):
    async def twice() -> None:
        found = registry()
        machine.fail = ModelFileError("a.gguf is damaged.")
        failed = await asyncio.gather(use(found, "a"), use(found, "a"), return_exceptions=True)
        assert [str(error) for error in failed] == ["a.gguf is damaged."] * 2
        machine.fail = None
        await use(found, "a")
        with pytest.raises(ModelNotFound):
            await use(found, "nothing")
        await found.close()

    asyncio.run(twice())


def test_what_was_loaded_at_the_start_stays(machine):
    async def start() -> None:
        found = registry(models=("a",), keep_alive_s=0.01)
        found.catalog.owned = found.catalog.find  # type: ignore[method-assign]
        await found.preload()
        await asyncio.sleep(0.1)
        await use(found, "a")
        await asyncio.sleep(0.1)
        assert names(found) == ["a"]
        await use(found, "a", keep_alive_s=0.01)
        await until(lambda: not names(found))
        await use(found, "a")
        await asyncio.sleep(0.1)
        assert names(found) == ["a"]
        await found.close()

    asyncio.run(start())


def test_a_model_that_is_pinned_again_is_not_closed(machine):
    """Its time may be over in the step in which somebody else takes it."""

    async def often() -> None:
        found, closed_in_use = registry(), []

        async def briefly(i: int) -> None:
            await asyncio.sleep(i * 0.0005)
            async with found.use("a", 0.0):
                n_alive = len(machine.loads) - len(machine.closes)
                await asyncio.sleep(0.001)
                if n_alive < 1 or len(machine.loads) - len(machine.closes) < 1:
                    closed_in_use.append(i)

        await asyncio.gather(*(briefly(i) for i in range(300)))
        assert not closed_in_use
        await until(lambda: len(machine.closes) == len(machine.loads))
        await found.close()

    asyncio.run(often())


def test_who_comes_as_the_server_closes_loads_nothing(machine):
    async def late() -> None:
        found = registry()
        asking = asyncio.create_task(use(found, "a"))
        await asyncio.sleep(0)  # it looks the name up, in a thread
        await found.close()
        with pytest.raises(ShuttingDown):
            await asking
        assert not machine.loads

    asyncio.run(late())


def test_files_decide_what_is_the_same_model(own_store, machine):
    """Adapters are part of it; names, texts and options are not."""
    demo = Catalog(Settings()).find("demo:latest")
    assert demo.files == (demo.paths.decoder, demo.paths.mmproj)
    assert all(path.is_file() for path in demo.files)
    decoder, mmproj = demo.files
    adapter, other = Path("adapter.gguf"), Path("other.gguf")
    shelf = {
        "demo": demo,
        "copy": replace(demo, name="copy", system="Be brief.", parameters={"seed": 1}, license="MIT", parent="demo"),
        "path": replace(demo, paths=replace(demo.paths, name="path")),
        "decoder": replace(demo, paths=replace(demo.paths, decoder=other)),
        "mmproj": replace(demo, paths=replace(demo.paths, mmproj=other)),
        "adapted": replace(demo, adapters={"sha256:a": adapter}),
        "adapted copy": replace(demo, name="b", adapters={"sha256:a": adapter}),
        "adapted otherwise": replace(demo, adapters={"sha256:b": other}),
        "adapted twice": replace(demo, adapters={"sha256:a": adapter, "sha256:b": other}),
    }
    assert {name: listed.files for name, listed in shelf.items()} == {
        **dict.fromkeys(("demo", "copy", "path"), (decoder, mmproj)),
        "decoder": (other, mmproj),
        "mmproj": (decoder, other),
        **dict.fromkeys(("adapted", "adapted copy"), (decoder, mmproj, adapter)),
        "adapted otherwise": (decoder, mmproj, other),
        "adapted twice": (decoder, mmproj, adapter, other),
    }

    async def go() -> None:
        found = ModelRegistry(Settings(), SimpleNamespace(find=shelf.__getitem__))  # type: ignore[arg-type]
        for n_loads, names in enumerate(
            (("demo", "copy", "path"), ("adapted", "adapted copy"), ("adapted twice",)), 1
        ):
            for name in names:
                async with found.use(name) as use:
                    assert use.listed is shelf[name], "what it says of itself is its own"
                assert len(machine.loads) == n_loads, name
        assert machine.adapters == [{}, shelf["adapted"].adapters, shelf["adapted twice"].adapters]
        await found.close()

    asyncio.run(go())
