"""The file: what it holds, that it is whole or not there, and that the same makes the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from bundle.conftest import ISAS, make
from edge_runtime.bundle import make as module
from edge_runtime.bundle.targets import own_name
from edge_runtime.cli.program import main
from edge_runtime.errors import BundleError, ModelFileError
from support.command import refused


def members(path: Path) -> dict[str, bytes]:
    """Contents by name, without the top folder."""
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
        assert len({info.name.split("/")[0] for info in infos}) == 1
        assert all(info.isfile() and info.uid == info.gid == 0 and info.mtime == 315532800 for info in infos)
        return {info.name.partition("/")[2]: archive.extractfile(info).read() for info in infos}


def test_what_it_holds(tmp_path, wheels, model):
    made = make(model, wheels, tmp_path / "b.tar")
    inside = members(tmp_path / "b.tar")
    assert [*inside][-1] == "SHA256SUMS"
    sums = dict(reversed(line.split("  ")) for line in inside.pop("SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in inside.items()}
    assert json.loads(inside["bundle.json"]) == made.manifest
    assert made.manifest["target"] == own_name()
    assert made.manifest["cpu_flags"] == ["avx", "avx2", "pni"]
    assert made.manifest["kernels"] == ISAS
    assert made.manifest["model"]["name"] == "mini"
    for name in ("ggml-model-Q4_K_M.gguf", "mmproj-model-f16.gguf"):
        assert inside[f"models/mini/{name}"] == (model / name).read_bytes()
    assert inside["licences/model/LICENSE"] == b"the licence of the model\n"
    assert inside["licences/click-" + made_version(inside, "click") + "/LICENSE"] == b"the licence of click\n"
    assert b"numpy" in inside["licences/README.txt"]
    assert {"README.txt", "install.sh", "install.py", "sign.png"} <= inside.keys()
    assert f"sh edge-runtime-{made.manifest['edge-runtime']}-{own_name()}" in inside["README.txt"].decode()
    assert made.notes == ["Its llama.cpp runs on processors with avx, avx2, pni."]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def made_version(inside: dict[str, bytes], name: str) -> str:
    (wheel,) = (path for path in inside if path.startswith(f"wheels/{name}-"))
    return wheel.split("-")[1]


def test_the_same_makes_the_same_bytes(tmp_path, wheels, model):
    make(model, wheels, tmp_path / "one.tar")
    os.utime(model / "LICENSE", (1, 1))
    make(model, wheels, tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_the_demo_is_in_the_package(tmp_path, wheels):
    made = make("demo", wheels, tmp_path / "b.tar")
    assert made.manifest["model"] is None
    assert not [name for name in members(tmp_path / "b.tar") if name.startswith("models/")]


def test_names_of_models(tmp_path, wheels, model):
    made = make(model, wheels, tmp_path / "a.tar", name="other-name_2.0")
    assert made.manifest["model"]["name"] == "other-name_2.0"
    for name in ("demo", "a b", "../x", "", ".hidden", "x" * 81, "a/b", "hf:a/b"):
        with pytest.raises(ModelFileError, match="--name"):
            make(model, wheels, tmp_path / "b.tar", name=name or "\0")
    with pytest.raises(ModelFileError, match="name of a model on a hub"):
        make(model, wheels, tmp_path / "b.tar", name="minicpm-v-4.5")
    (model / "mmproj-model-f16.gguf").rename(model / "vision.gguf")
    made = make(model / "ggml-model-Q4_K_M.gguf", wheels, tmp_path / "c.tar", mmproj=model / "vision.gguf")
    assert made.manifest["model"]["files"] == ["model.gguf", "mmproj.gguf", "about.json"]


def test_without_kernels_it_says_so(tmp_path, wheels, model):
    made = make(model, wheels, tmp_path / "b.tar", kernels=())
    assert made.manifest["kernels"] == []
    assert any("no compiled kernels" in note for note in made.notes)
    assert not [name for name in members(tmp_path / "b.tar") if name.endswith(".o")]


def test_kernels_are_of_this_python(tmp_path, wheels, model):
    with pytest.raises(BundleError, match=r"belong to one version of Python, and this is not 3\.99"):
        make(model, wheels, tmp_path / "b.tar", python="3.99", kernels=["avx2"])


def test_kernels_that_were_compiled_before_are_taken(tmp_path, monkeypatch):
    """The real command of compiling, told that there are some; and names of none."""
    from edge_kernels import ahead, shipped
    from edge_kernels.machine import isa
    from edge_kernels.targets import TARGETS
    from edge_runtime.cli.bundle import compile_kernels

    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    (tmp_path / "compiled" / isa()).mkdir(parents=True)
    (tmp_path / "compiled" / isa() / "manifest.json").write_text("{}")
    compiled: list[str] = []

    def compile_target(name: str, folder: Path) -> None:
        compiled.append(name)
        (folder / name).mkdir()

    monkeypatch.setattr(ahead, "compile_target", compile_target)
    (tmp_path / "one").mkdir()
    assert compile_kernels(own_name(), None, tmp_path / "one") == [isa()]
    assert compiled == [isa()], "a damaged manifest is no manifest"
    monkeypatch.setattr(shipped, "read_folder", lambda path: path)
    (tmp_path / "two").mkdir()
    assert compile_kernels(own_name(), None, tmp_path / "two") == [isa()]
    assert compiled == [isa()]
    assert (tmp_path / "two" / isa() / "manifest.json").read_text() == "{}"

    other = next(name for name in ("linux-aarch64", "linux-x86_64") if name != own_name())
    of_other = [name for name, each in TARGETS.items() if f"linux-{each.family}" == other]
    monkeypatch.undo()
    monkeypatch.setattr(ahead, "compile_target", compile_target)
    (tmp_path / "three").mkdir()
    assert compile_kernels(other, None, tmp_path / "three") == of_other
    assert compile_kernels(other, (), tmp_path / "three") == []
    for name in ("avx3", isa()):
        with pytest.raises(BundleError, match=rf"--kernels is '{name}'; for {other} expected all, none, or any of"):
            compile_kernels(other, (name,), tmp_path / "three")


def test_an_existing_file_stays(tmp_path, wheels, model):
    (tmp_path / "b.tar").write_bytes(b"mine")
    with pytest.raises(BundleError, match="exists already; add --force"):
        make(model, wheels, tmp_path / "b.tar")
    with pytest.raises(BundleError, match="is a folder"):
        make(model, wheels, tmp_path)
    assert (tmp_path / "b.tar").read_bytes() == b"mine"


def test_a_failure_leaves_nothing(tmp_path, wheels, model, monkeypatch):
    """Whatever fails in the middle: no part of a bundle, no folders."""

    def fails(*args: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    for name in ("_fill", "look_into"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(BundleError, match=r"b\.tar cannot be written: the disk is full"):
                make(model, wheels, out / "b.tar")
        assert [*out.iterdir()] == []


def test_a_model_that_shrinks_while_it_is_read(tmp_path, wheels, model, monkeypatch):
    decoder = model / "ggml-model-Q4_K_M.gguf"
    original = module.Archive._add

    def add(self, name, file, size, mode, source):
        if source == str(decoder):  # its size was looked at
            os.truncate(decoder, size - 1)
        original(self, name, file, size, mode, source)

    monkeypatch.setattr(module.Archive, "_add", add)
    with pytest.raises(BundleError, match=r"ggml-model-Q4_K_M\.gguf became shorter while it was read"):
        make(model, wheels, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


COPY = """\
import resource, sys
from pathlib import Path
from edge_runtime.bundle.archive import Archive
with open("/dev/null", "wb") as file:
    archive = Archive(file, "top")
    archive.add("big", Path(sys.argv[1]))
    archive.close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for n_bytes in (0, 1 << 28):
        (tmp_path / "big").write_bytes(b"")
        os.truncate(tmp_path / "big", n_bytes)  # takes no space
        done = subprocess.run(
            [sys.executable, "-c", COPY, tmp_path / "big"], check=True, capture_output=True, text=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 50_000, "kilobytes"


def test_the_command_says_what_is_wrong(tmp_path):
    refused(["bundle", "-o", str(tmp_path / "b.tar"), "-m", "nowhere"], "neither 'demo' nor an existing folder")
    refused(["bundle", "-o", str(tmp_path / "b.tar"), "--target", "plan9"], "expected --target linux-x86_64")
    refused(["bundle", "-o", str(tmp_path / "b.tar"), "--extra", "all"], "--extra is 'all'")
    assert CliRunner().invoke(main, ["bundle"]).exit_code == 2
    assert [*tmp_path.iterdir()] == []
