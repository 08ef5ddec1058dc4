"""Installing a bundle: where it goes, what it refuses, that it leaves all or nothing and needs no network."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from bundle.conftest import make, small_model, small_runtime, small_wheels
from edge_runtime.bundle import selection
from edge_runtime.bundle.targets import own_name

PYTHON = os.path.realpath(sys.executable)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of small wheels, with a model."""
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "pack_own", small_runtime)
        wheels = small_wheels(folder / "wheels", own_name())
        make(small_model(folder / "mini"), wheels, folder / "b.tar")
    return folder / "b.tar"


@pytest.fixture
def unpacked(tmp_path: Path, bundle: Path) -> Path:
    """A copy of what is in it."""
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (top,) = (tmp_path / "unpacked").iterdir()
    return top


@cache
def without_network() -> tuple[str, ...]:
    """Begin of a command that has no network interface, not even a loopback, where the system allows that."""
    unshare = shutil.which("unshare")
    for options in ("-n", "-rn"):
        if unshare and subprocess.run([unshare, options, "true"], capture_output=True).returncode == 0:
            return unshare, options
    return ()


def run(unpacked: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`sh install.sh` where nothing but a shell and Python is at hand."""
    tools = unpacked.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("dirname", "sh", "cat"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name) or "")
    environment = {"PATH": str(tools), "PYTHON": PYTHON, "HOME": str(unpacked.parent / "home"), **variables}
    (unpacked.parent / "home").mkdir(exist_ok=True)
    command = [*without_network(), "/bin/sh", str(unpacked / "install.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")


def script(unpacked: Path) -> ModuleType:
    """install.py as a module."""
    spec = importlib.util.spec_from_file_location("bundle_install_script", unpacked / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def change(unpacked: Path, **facts: object) -> None:
    """Another manifest, its checksum left as it was."""
    path = unpacked / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def refusal(done: subprocess.CompletedProcess[str], prefix: Path) -> str:
    """The one sentence of an installation that failed and left nothing."""
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge-runtime: ")
    assert not prefix.exists()
    return line


def test_it_installs_and_runs(unpacked, tmp_path):
    """The commands it needs are a shell's and Python; it says what to try, and that runs from a read-only folder."""
    prefix = tmp_path / "a b" / "prefix"
    done = run(unpacked, prefix)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{prefix}/bin/edge-runtime run -m mini {prefix}/share/edge-runtime/sign.png" in done.stdout
    folder = prefix / "share" / "edge-runtime" / "models" / "mini"
    assert {path.name for path in folder.iterdir()} == {
        "about.json",
        "ggml-model-Q4_K_M.gguf",
        "mmproj-model-f16.gguf",
    }
    decoder = folder / "ggml-model-Q4_K_M.gguf"
    assert decoder.samefile(unpacked / "models" / "mini" / decoder.name), "no copy on the same disk"
    site = prefix / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    assert (site / "edge_kernels" / "compiled" / "avx2.o").is_file()
    assert (site / "numpy" / "__init__.py").is_file()
    assert not (site / "click").exists(), "only what is asked for"
    said = subprocess.run(
        [prefix / "bin" / "edge-runtime", "run"], check=True, capture_output=True, text=True, env={}
    )
    assert json.loads(said.stdout) == {"arguments": ["run"]}
    assert not (prefix / "tmp").exists()


def test_without_a_prefix_it_goes_home(unpacked):
    done = run(unpacked)
    assert done.returncode == 0, done.stderr
    assert (unpacked.parent / "home" / "edge-runtime" / "bin" / "edge-runtime").is_file()
    again = run(unpacked)
    assert again.returncode == 1
    assert "is there already and not empty; remove it, or name another folder" in again.stderr


def test_settings_of_pip_and_python_do_not_matter(unpacked, tmp_path):
    (tmp_path / "pip.conf").write_text("[global]\ntarget = /nowhere\nrequire-virtualenv = true\nno-binary = :all:\n")
    done = run(
        unpacked,
        tmp_path / "prefix",
        PIP_CONFIG_FILE=str(tmp_path / "pip.conf"),
        PIP_TARGET="/nowhere",
        PIP_INDEX_URL="https://index.invalid/simple",
        PYTHONPATH="/nowhere",
        PYTHONHOME="/nowhere",
        TMPDIR="/nowhere",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"python": "3.99"}, r"bundle is for CPython 3\.99; .*PYTHON=/path/to/python3\.99 .*--python"),
        ({"machine": "riscv64", "target": "linux-riscv64"}, r"the bundle is for linux-riscv64; make one"),
        ({"glibc": "9.99"}, r"has glibc [\d.]+, the bundle needs 9\.99 or newer"),
        ({"cpu_flags": ["quantum"]}, r"processor lacks quantum, .*GGML_NATIVE=OFF"),
        ({"installed_bytes": 1 << 60}, r"GB free, 115.* GB are needed"),
        ({"installed_bytes": 1}, r"bundle\.json is damaged"),
    ],
    ids=["python", "machine", "glibc", "processor", "space", "checksum"],
)
def test_another_machine_is_refused(unpacked, tmp_path, facts, reason):
    change(unpacked, **facts)
    line = refusal(run(unpacked, tmp_path / "prefix"), tmp_path / "prefix")
    assert re.search(reason, line), line


@pytest.mark.parametrize("what", ["changed", "shorter", "missing", "added", "no sums"])
def test_damaged_bundles_are_refused(unpacked, tmp_path, what):
    decoder = unpacked / "models" / "mini" / "ggml-model-Q4_K_M.gguf"
    if what == "changed":
        data = bytearray(decoder.read_bytes())
        data[-1] ^= 1
        decoder.write_bytes(data)
    elif what == "shorter":
        decoder.write_bytes(decoder.read_bytes()[:-1])
    elif what == "missing":
        decoder.unlink()
    elif what == "added":
        (unpacked / "wheels" / "numpy-99.0-py3-none-any.whl").write_bytes(b"not ours")
    else:
        (unpacked / "SHA256SUMS").unlink()
    line = refusal(run(unpacked, tmp_path / "prefix"), tmp_path / "prefix")
    words = {"changed": "is damaged", "shorter": "is damaged", "added": "is no part of the bundle"}
    assert words.get(what, "is missing") in line
    assert "unpack it again" in line


def test_a_step_that_fails_leaves_nothing(unpacked, tmp_path, monkeypatch, capsys):
    """An error and Ctrl-C in the middle: no half of an installation, and folders of others stay."""
    module = script(unpacked)
    (tmp_path / "empty").mkdir()

    def environment(prefix: Path, facts: object) -> None:
        (prefix / "bin").mkdir(parents=True)
        (prefix / "bin" / "python").symlink_to("/nowhere")

    monkeypatch.setattr(module, "make_environment", environment)
    for prefix in (tmp_path / "a" / "prefix", tmp_path / "empty"):
        for error, status in (
            (module.Refused("no"), 1),
            (OSError(28, "No space left"), 1),
            (KeyboardInterrupt(), 130),
        ):

            def fails(*args: object, error: BaseException = error) -> None:
                assert (prefix / "share").is_dir()  # noqa: B023
                raise error

            monkeypatch.setattr(module, "try_it", fails)
            with pytest.raises(SystemExit) as ended:
                module.main([str(prefix)])
            assert ended.value.code == status
            assert len(capsys.readouterr().err.strip().splitlines()) == 1
            assert not (tmp_path / "a").exists()
            assert [*(tmp_path / "empty").iterdir()] == []


def test_what_pip_says_is_told(unpacked, tmp_path):
    module = script(unpacked)
    facts = json.loads((unpacked / "bundle.json").read_text()) | {"requirement": "edge-runtime==99"}
    with pytest.raises(module.Refused, match=r"cannot be filled, and was removed again: .*edge-runtime==99"):
        module.make_environment(tmp_path / "b", facts)


def test_what_does_not_run_is_removed(unpacked, tmp_path, monkeypatch):
    module = script(unpacked)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "edge-runtime"
    for body, reason in (
        ("kill -ILL $$", "lacks an instruction that a library in the bundle uses"),
        ("echo 'libgomp.so.1: cannot open' >&2; exit 1", "does not run, and was removed again: libgomp"),
        ("exit 3", "it ended with 3"),
    ):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        with pytest.raises(module.Refused, match=reason):
            module.try_it(tmp_path, {})


def test_python_without_venv_musl_and_no_home(unpacked, monkeypatch, tmp_path):
    module = script(unpacked)
    facts = json.loads((unpacked / "bundle.json").read_text())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "venv", None)
        with pytest.raises(module.Refused, match=r"lacks the module venv; install it \(Debian: python3\.\d+-venv\)"):
            module.check_python(facts)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "confstr", lambda name: None)
        with pytest.raises(module.Refused, match=r"not glibc \(Alpine's is musl\)"):
            module.check_machine(facts)
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "nowhere"))
        with pytest.raises(module.Refused, match="There is no home folder; name the folder"):
            module.place([])
    assert module.numbers("2.36") > module.numbers("2.4") > module.numbers("")
    assert platform.machine().lower() in ("x86_64", "aarch64", "amd64", "arm64")


def test_a_library_that_the_system_lacks_is_put_beside_its_users(unpacked, tmp_path):
    module = script(unpacked)
    facts = json.loads((unpacked / "bundle.json").read_text())
    folder = module.site_packages(tmp_path, facts) / "llama_cpp" / "lib"
    folder.mkdir(parents=True)
    facts["libraries"] = {"libc.so.6": "llama_cpp/lib"}
    module.put_libraries(tmp_path, facts)
    assert [*folder.iterdir()] == [], "the system has its own"
    facts["libraries"] = {"libnowhere.so.1": "llama_cpp/lib"}
    with pytest.raises(module.Refused, match=r"lacks libnowhere\.so\.1, which llama\.cpp needs"):
        module.put_libraries(tmp_path, facts)
    (unpacked / "libraries").mkdir(exist_ok=True)
    (unpacked / "libraries" / "libnowhere.so.1").write_bytes(b"library")
    module.put_libraries(tmp_path, facts)
    assert (folder / "libnowhere.so.1").read_bytes() == b"library"


def test_the_script_without_python(unpacked, tmp_path):
    done = subprocess.run(
        ["/bin/sh", unpacked / "install.sh"],
        capture_output=True,
        text=True,
        env={"PATH": str(tools(tmp_path)), "PYTHON": "/nowhere/python3"},
    )
    assert done.returncode == 1
    version = ".".join(map(str, sys.version_info[:2]))
    assert f"There is no python3 on this machine; expected Python {version}." in done.stderr


def tools(tmp_path: Path) -> Path:
    """A folder with the one program that the script calls."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "dirname").symlink_to(shutil.which("dirname") or "")
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["-x"], ["a", "b"]])
def test_usage(unpacked, arguments):
    done = run(unpacked, *arguments)
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    assert done.stdout.startswith("Usage: sh install.sh [PREFIX]")


def test_it_is_of_python_3_6(unpacked):
    """So that it can tell people that their Python is too old: neither newer syntax nor newer annotations."""
    tree = ast.parse((unpacked / "install.py").read_text(), feature_version=(3, 6))
    notes = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation is not None]
    notes += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.returns]
    newer = {"list", "dict", "tuple", "set", "type"}
    for note in notes:
        assert not [node for node in ast.walk(note) if isinstance(node, ast.BinOp)], ast.unparse(note)
        assert not [
            node
            for node in ast.walk(note)
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in newer
        ], ast.unparse(note)
