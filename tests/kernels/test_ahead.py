"""Kernels compiled ahead of time: made for any target, found, checked, loaded; on any doubt compiled as ever."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import pytest
from numba import types
from numpy.typing import NDArray
from typing_extensions import TypeAliasType

from edge_kernels import ahead, machine, shipped, targets
from edge_kernels import compile as compilation
from edge_kernels.signatures import READ_ONLY, argument_types

PACKAGE = Path(compilation.__file__).parent
KERNEL = "rows.norm._layer_norm"
ARM, X86 = 183, 62  # e_machine of ELF

NORM = """
import numpy as np
from edge_kernels.compile import cache_statistics, is_compiled
from edge_kernels.reference import operations
from edge_kernels.rows.norm import layer_norm

x = np.random.default_rng(0).standard_normal((5, 40), np.float32)
gain, bias = x[0].copy(), x[1].copy()
announced = not is_compiled("rows.norm")
found = layer_norm(x, gain, bias, 1e-6)
assert np.allclose(found, operations.layer_norm(x, gain, bias, 1e-6), atol=1e-5)
print(*cache_statistics(), announced)
"""


def run(code: str, **environment: str) -> tuple[list[str], str]:
    """What a fresh process prints, and what it says on stderr."""
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split(), done.stderr


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with its size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kernel for this machine."""
    folder = tmp_path_factory.mktemp("made")
    done = ahead.compile_target(machine.isa(), folder, only=(KERNEL,))
    assert (done.target, done.kernels, done.folder) == (machine.isa(), 1, folder / machine.isa())
    assert done.bytes == sum(file.stat().st_size for file in done.folder.iterdir())
    assert [entry.name for entry in folder.iterdir()] == [machine.isa()], "something unfinished is left"
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed: the folder of the target."""
    return shutil.copytree(made, tmp_path / "copy") / machine.isa()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], shipped.Folder | None]]:
    """Look for kernels again, in the folder above a target's."""

    def find(folder: Path) -> shipped.Folder | None:
        monkeypatch.setenv(shipped.VARIABLE, str(folder.parent))
        shipped.find.cache_clear()
        return shipped.find()

    yield find
    monkeypatch.undo()
    shipped.find.cache_clear()


def change(folder: Path, **facts: Any) -> None:
    """Change the manifest."""
    manifest = folder / shipped.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | facts))


# --- loading --------------------------------------------------------------------------------------------------


def test_a_fresh_process_loads_what_was_shipped_and_writes_nothing(folder, tmp_path):
    """Moved, and without the right to write there."""
    moved, empty = tmp_path / "elsewhere" / "kernels", tmp_path / "cache"
    moved.parent.mkdir()
    folder.parent.rename(moved)
    empty.mkdir()
    for path in [*moved.rglob("*"), moved, empty]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(tmp_path)
    printed, said = run(NORM, EDGE_RUNTIME_COMPILED=str(moved), NUMBA_CACHE_DIR=str(empty), HOME=str(empty))
    assert printed == ["1", "0", "False"]
    assert said == ""
    assert contents(tmp_path) == before


def test_a_damaged_kernel_is_compiled(folder, tmp_path):
    (folder / KERNEL).write_bytes((folder / KERNEL).read_bytes()[:-1])
    printed, said = run(NORM, EDGE_RUNTIME_COMPILED=str(folder.parent), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert printed[:2] == ["0", "1"]
    assert KERNEL in said
    assert said.rstrip().endswith("It is compiled anew.")


def test_another_specialisation_is_not_taken_for_the_shipped_one(folder, found):
    assert found(folder) is not None
    from edge_kernels.rows.norm import _layer_norm

    cache, declared = _layer_norm._cache, argument_types(_layer_norm.py_func)
    assert cache._is_shipped(declared)
    assert not cache._is_shipped((*declared[:-1], types.int32))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"format": 99}, "form 99"),
        ({"sources": "0" * 64}, "from other sources of edge_kernels"),
        ({"numba": "0.1"}, r"made for numba 0\.1, this is"),
        ({"llvmlite": "0.1"}, r"made for llvmlite 0\.1, this is"),
        ({"python": "cpython-27"}, "made for python cpython-27, this is"),
        ({"triple": "riscv64-unknown-linux-gnu"}, "made for riscv64-unknown-linux-gnu, this is"),
        ({"features": ["sse2", "flux-capacitor"]}, "need (sse2, )?flux-capacitor|need flux-capacitor"),
        ({"features": None}, "manifest.json is damaged"),
        ({"numba": 7}, "made for numba 7"),
        ({"kernels": []}, "manifest.json is damaged"),
        ({"kernels": {KERNEL: 3}}, "manifest.json is damaged"),
        ({"kernels": {KERNEL: ["x", "y"]}}, "manifest.json is damaged"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(folder, found, caplog, facts, reason):
    change(folder, **facts)
    assert found(folder) is None
    (record,) = caplog.records
    text = record.getMessage()
    assert re.search(reason, text)
    assert str(folder) in text
    assert "compiled at their first use" in text
    assert shipped.find() is None, "found out once"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"format": 1}'])
def test_a_damaged_manifest_is_told(folder, found, caplog, text):
    (folder / shipped.MANIFEST).write_bytes(text)
    assert found(folder) is None
    assert "manifest.json is damaged" in caplog.text


def test_what_is_missing_is_told(folder, found, caplog):
    other = folder.rename(folder.with_name("avx9"))
    (folder.parent / ".avx8-unfinished").mkdir()
    assert found(folder) is None
    assert f"there are none for {machine.isa()} (there are: avx9)" in caplog.text
    caplog.clear()
    other.rename(folder)
    (folder / shipped.MANIFEST).unlink()
    assert found(folder) is None
    assert "No such file" in caplog.text
    caplog.clear()
    assert found(folder.parent / "nowhere" / "x") is None
    assert "nowhere" in caplog.text


def damage(way: str, data: bytes) -> bytes:
    ways = {
        "empty": data[:0],
        "cut": data[: len(data) // 2],
        "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    }
    return ways.get(way, pickle.dumps(way))


@pytest.mark.parametrize("way", ["empty", "cut", "flipped", "another pickle"])
@pytest.mark.parametrize("listed", [False, True], ids=["", "listed"])
def test_a_damaged_file_is_told_and_never_loaded(folder, found, caplog, monkeypatch, way, listed):
    data = damage(way, (folder / KERNEL).read_bytes())
    (folder / KERNEL).write_bytes(data)
    if listed and way != "flipped":  # whoever made the digest wrote this
        change(folder, kernels={KERNEL: shipped.Entry(len(data), hashlib.sha256(data).hexdigest())})
    assert found(folder) is not None
    assert shipped.load(None, KERNEL) is None
    assert shipped.load(None, KERNEL) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(folder / KERNEL) in record.getMessage()
    assert not shipped.has_module("rows.norm")


def test_a_missing_file_is_told(folder, found, caplog):
    (folder / KERNEL).unlink()
    assert found(folder) is not None
    assert shipped.load(None, KERNEL) is None
    assert "No such file" in caplog.text


def test_off_uses_none(folder, found, monkeypatch, caplog):
    monkeypatch.setattr(shipped, "PACKAGE", folder.parent.parent)
    folder.parent.rename(folder.parent.with_name("compiled"))
    monkeypatch.setenv(shipped.VARIABLE, "")
    shipped.find.cache_clear()
    assert shipped.find() is not None, "in the package"
    monkeypatch.setenv(shipped.VARIABLE, "off")
    shipped.find.cache_clear()
    assert shipped.find() is None
    assert not caplog.records


def test_shipped_kernels_are_announced_as_compiled(folder, found, monkeypatch):
    monkeypatch.setattr(compilation, "cache_directory", lambda: None)
    found(folder)
    assert compilation.is_compiled("rows.norm")
    assert not compilation.is_compiled("linear.int8")
    assert compilation.origin() == f"1 for {machine.isa()}, compiled ahead of time: {folder}"


# --- trust ----------------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="no file owners on this system")


@posix
@pytest.mark.parametrize("place", ["folder", "above", "far above", "manifest"])
def test_nothing_that_anybody_may_write_to_is_loaded(folder, found, caplog, place):
    path = {
        "folder": folder,
        "above": folder.parent,
        "far above": folder.parents[1],
        "manifest": folder / shipped.MANIFEST,
    }[place]
    path.chmod(path.stat().st_mode | stat.S_IWOTH)
    assert found(folder) is None
    assert "anybody may write to it" in caplog.text


@posix
def test_a_kernel_that_anybody_may_write_to_is_not_loaded(folder, found, caplog):
    (folder / KERNEL).chmod(0o666)
    assert found(folder) is not None
    assert shipped.load(None, KERNEL) is None
    assert "anybody may write to it" in caplog.text


@posix
def test_a_link_is_judged_by_where_it_leads(folder, found, tmp_path, caplog):
    other = tmp_path / "other"
    other.mkdir()
    folder.parent.chmod(0o777)
    (other / machine.isa()).symlink_to(folder)
    assert found(other / machine.isa()) is None
    assert "anybody may write to it" in caplog.text


@posix
def test_code_of_other_users_and_groups_is_not_trusted():
    def status(mode: int, uid: int, gid: int) -> os.stat_result:
        return os.stat_result((mode, 0, 0, 1, uid, gid, 0, 0, 0, 0))

    own, group = os.getuid(), os.getgid()
    strangers = max(own, PACKAGE.stat().st_uid) + 1, max(group, PACKAGE.stat().st_gid) + 1
    assert shipped._distrust(status(0o40755, own, group)) == ""
    assert shipped._distrust(status(0o40755, 0, 0)) == "", "root's"
    assert shipped._distrust(status(0o40775, own, group)) == "", "umask 002"
    assert f"user {strangers[0]}" in shipped._distrust(status(0o40755, strangers[0], group))
    assert f"group {strangers[1]}" in shipped._distrust(status(0o40775, own, strangers[1]))
    assert shipped._distrust(status(0o41777, 0, 0), is_parent=True) == "", "/tmp"
    assert shipped._distrust(status(0o41777, 0, 0)) != ""
    assert shipped._distrust(status(0o40777, 0, 0), is_parent=True) != ""


# --- making ---------------------------------------------------------------------------------------------------


def object_code(folder: Path) -> bytes:
    """The object file of the kernel in a target's folder, by its name there."""
    return bytes(pickle.loads((folder / KERNEL).read_bytes())[1])


def elf_machine(code: bytes) -> int:
    assert code[:4] == b"\x7fELF"
    return int.from_bytes(code[18:20], "little")


@pytest.mark.parametrize("target", ["neon-dot", "avx512vnni"])
def test_foreign_targets_are_compiled_without_running_them(tmp_path, found, caplog, target):
    if target == machine.isa() or (target[:3] == "avx" and targets.family() != "x86_64"):
        target = "neon" if targets.family() == "x86_64" else pytest.skip("x86-64 code is made on x86-64")
    done = ahead.compile_target(target, tmp_path, only=(KERNEL,))
    code = object_code(done.folder)
    assert elf_machine(code) == (ARM if target.startswith("neon") else X86)
    done.folder.rename(tmp_path / machine.isa())  # as if it were this machine's
    if found(tmp_path / machine.isa()) is None:
        assert re.search("need .* which this processor lacks|made for aarch64-unknown-linux-gnu", caplog.text)


def test_no_path_of_this_machine_is_in_what_is_shipped(made):
    data = (made / machine.isa() / KERNEL).read_bytes() + (made / machine.isa() / shipped.MANIFEST).read_bytes()
    assert str(PACKAGE).encode() not in data


def test_a_target_is_replaced_when_the_new_one_is_finished(folder, found, monkeypatch):
    """Half of it is never seen, whatever happens."""
    before = contents(folder.parent)

    def fail(*arguments: Any) -> None:
        raise ahead.CompileError("The compiler has failed.")

    monkeypatch.setattr(ahead, "_run", fail)
    with pytest.raises(ahead.CompileError):
        ahead.compile_target(machine.isa(), folder.parent)
    assert contents(folder.parent) == before
    monkeypatch.setattr(ahead, "_run", lambda target, to, only: (to / "new").write_text("new"))
    ahead.compile_target(machine.isa(), folder.parent)
    assert [path.name for path in folder.parent.rglob("*")] == [machine.isa(), "new"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_what_cannot_be_made_is_a_sentence(tmp_path):
    with pytest.raises(ahead.CompileError, match="no target 'mmx'; there are amx, "):
        ahead.compile_target("mmx", tmp_path)
    with pytest.raises(ahead.CompileError, match=r"no kernel rows\.norm\._nothing for"):
        ahead.compile_target(machine.isa(), tmp_path, only=("rows.norm._nothing",))
    (tmp_path / "file").touch()
    with pytest.raises(ahead.CompileError, match=r"file.* cannot be written: .+\."):
        ahead.compile_target(machine.isa(), tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_compiler_that_dies_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false") or "/bin/false")
    with pytest.raises(ahead.CompileError, match=r"Compiling for .* ended with status 1: It said nothing\."):
        ahead.compile_target(machine.isa(), tmp_path)


# --- declarations ---------------------------------------------------------------------------------------------


def test_every_kernel_is_shipped_or_part_of_one_that_is():
    """A new module with kernels needs a line in `ahead`."""
    decorated = re.compile(r"^@(kernel$|callback\()", re.MULTILINE)
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if decorated.search(path.read_text("utf-8"))
    }
    called = {"linear.gguf_int8", "attention.kv_cache"}  # by `ggml_backend.compiled`, which is compiled first
    assert modules == {*ahead.MODULES, *ahead.TILED_MODULES} | called
    assert ahead.MODULES[0] == "ggml_backend.compiled"


def test_targets_are_the_instruction_sets_and_have_what_these_need():
    assert list(targets.TARGETS) == list(machine.ISAS)
    for name, needed in machine.ISAS.items():
        assert needed <= targets.TARGETS[name].features
        assert not needed & set(targets.TARGETS[name].without)


class Pair(NamedTuple):
    left: NDArray[np.int8]
    right: int


def takes(
    a: int, b: float, c: bool, d: np.float32, e: NDArray[np.uint16], f: Annotated[NDArray[Any], np.dtype(np.int32)],
    g: Annotated[NDArray[np.uint8], READ_ONLY], h: tuple[int, float], i: Pair,
) -> None:  # fmt: skip
    pass


def test_types_are_read_from_annotations():
    def vector(element: Any, **options: Any) -> Any:
        return types.Array(element, 1, "C", **options)

    assert argument_types(takes) == (
        types.int64, types.float64, types.boolean, types.float32, vector(types.uint16), vector(types.int32),
        vector(types.uint8, readonly=True), types.Tuple((types.int64, types.float64)),
        types.NamedTuple((vector(types.int8), types.int64), Pair),
    )  # fmt: skip


def test_vectors_may_be_named_by_an_alias(monkeypatch):
    """NDArray is one since NumPy 2.5, on Python 3.12 and newer."""
    scalar = TypeVar("scalar", bound=np.generic)
    meant = np.ndarray[tuple[Any, ...], np.dtype[scalar]]
    monkeypatch.setitem(globals(), "NDArray", TypeAliasType("NDArray", meant, type_params=(scalar,)))

    def aliased(a: NDArray[np.float32], b: Annotated[NDArray[np.uint8], READ_ONLY]) -> None:
        pass

    assert argument_types(aliased) == (
        types.Array(types.float32, 1, "C"), types.Array(types.uint8, 1, "C", readonly=True)
    )  # fmt: skip


def test_what_says_no_type_is_told():
    def bare(a, b: int) -> None:
        pass

    def odd(a: str) -> None:
        pass

    def untyped(a: NDArray[Any]) -> None:
        pass

    with pytest.raises(TypeError, match="bare: annotate a"):
        argument_types(bare)
    with pytest.raises(TypeError, match="says no type that kernels take"):
        argument_types(odd)
    with pytest.raises(TypeError, match="names no type of elements"):
        argument_types(untyped)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x86_64-unknown-linux-gnu", "x86_64-conda-linux-gnu"),
        ("arm64-apple-darwin23.1.0", "aarch64-apple-darwin24.0.0"),
    ],
)
def test_triples_of_one_system_are_equal(one, other):
    assert targets.system_of(one) == targets.system_of(other)


def test_triples_of_other_systems_differ():
    triples = [f"{a}-unknown-{b}" for a in ("x86_64", "aarch64") for b in ("linux-gnu", "linux-musl", "freebsd14")]
    assert len({targets.system_of(triple) for triple in triples}) == len(triples)


# --- the whole of it ------------------------------------------------------------------------------------------

ASK = textwrap.dedent(
    f"""
    from pathlib import Path
    from edge_runtime import Model
    from edge_kernels.compile import cache_statistics
    picture = Path({str(Path(__file__).parents[2] / "examples" / "sign.png")!r})
    with Model.load("demo") as model:
        content = [picture, "What does it say?"]
        print(model.chat([{{"role": "user", "content": content}}], greedy=True))
    print(*cache_statistics())
    """
)


@pytest.mark.slow
def test_the_first_picture_compiles_nothing(tmp_path):
    """Vision and the kernels inside llama.cpp, from a folder made by the command."""
    command = [sys.executable, "-m", "edge_runtime", "compile", "-o", str(tmp_path / "kernels")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"{machine.isa()}: \d+ kernels, [\d.]+ MB, \d+ s, .*\n", done.stdout)
    empty = tmp_path / "cache"
    empty.mkdir()
    places = {
        "EDGE_RUNTIME_COMPILED": str(tmp_path / "kernels"),
        "NUMBA_CACHE_DIR": str(empty),
        "EDGE_RUNTIME_KERNELS": "on",
    }
    (answer, hits, misses), said = run(ASK, **places)
    assert answer == "CAFE"
    assert misses == "0"
    assert int(hits) > 3
    assert "compiling" not in said
    assert list(empty.iterdir()) == []
