"""A model of an Ollama store, made in the test: used in place, checked, and refused when its manifest lies."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime import Model
from edge_runtime.cli.program import main
from edge_runtime.errors import ModelFileError
from edge_runtime.store import ollama
from edge_runtime.store.find import find_model
from support.command import refused
from support.gguf_maker import mini_decoder, mini_mmproj

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"
MODEL, PROJECTOR, TEMPLATE = (f"application/vnd.ollama.image.{name}" for name in ("model", "projector", "template"))


def blob(root: Path, data: bytes, kind: str) -> dict[str, Any]:
    """Add a blob; returns its layer."""
    digest = hashlib.sha256(data).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


def manifest(root: Path, layers: Any, *parts: str) -> Path:
    """Write a manifest as Ollama does."""
    path = root.joinpath("manifests", *(parts or ("registry.ollama.ai", "library", "mini", "latest")))
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": "sha256:" + "0" * 64,
        "size": 2,
    }
    value = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}
    path.write_text(json.dumps({**value, "config": config, "layers": layers}))
    return path


@pytest.fixture
def root(store: Path, tmp_path: Path) -> Path:
    """An Ollama store with the model `mini`."""
    root = tmp_path / "ollama"
    layers = [blob(root, mini_decoder().build(), MODEL), blob(root, mini_mmproj().build(), PROJECTOR)]
    manifest(root, [*layers, blob(root, b"{{ .Prompt }}", TEMPLATE)])
    return root


def layers_of(root: Path) -> list[dict[str, Any]]:
    (path,) = root.glob("manifests/*/*/*/latest")
    return json.loads(path.read_text())["layers"]


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and times of everything in some folders."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("name", ["mini", "mini:latest", "library/mini", "registry.ollama.ai/library/mini:latest"])
def test_files_are_used_where_they_are(root, store, name):
    before = snapshot(root)
    paths = find_model(f"ollama:{name}")
    assert paths.name == f"ollama:{name}"
    assert paths.decoder.parent == paths.mmproj.parent == root / "blobs"
    assert paths.decoder.read_bytes() == mini_decoder().build()
    assert paths.mmproj.read_bytes() == mini_mmproj().build()
    assert snapshot(root) == before
    assert not store.exists()


def test_other_places_in_the_store(root):
    manifest(root, layers_of(root), "hf.co", "org", "Mini-GGUF", "Q4_K_M")
    assert find_model("ollama:hf.co/org/Mini-GGUF:Q4_K_M").decoder.exists()
    refused(
        ["run", "-m", "ollama:org/Mini-GGUF", "Hi"], "has no model org/Mini-GGUF .*run 'ollama pull org/Mini-GGUF'"
    )


def test_from_an_ollama_store_to_an_answer(store, tmp_path):
    root, folder = tmp_path / "ollama", resources.files("edge_runtime").joinpath("demo")
    decoder = blob(root, folder.joinpath("ggml-model-Q4_K_M.gguf").read_bytes(), MODEL)
    mmproj = blob(root, folder.joinpath("mmproj-model-q8_0.gguf").read_bytes(), PROJECTOR)
    manifest(root, [decoder, mmproj], "registry.ollama.ai", "me", "demo", "v1")
    before = snapshot(root)
    with Model.load("ollama:me/demo:v1") as model:
        answer = model.chat([{"role": "user", "content": [EXAMPLE, "What does it say?"]}], greedy=True)
    assert (str(answer), answer.model) == ("CAFE", "ollama:me/demo:v1")
    assert snapshot(root) == before


def test_pulling_checks_and_remembers(root, store):
    before = snapshot(root)
    run = CliRunner().invoke
    assert run(main, ["pull", "ollama:mini"]).stdout.startswith("ollama:mini  in the Ollama store")
    assert "ollama:mini" in run(main, ["list"]).stdout
    assert str(root / "blobs") in run(main, ["show", "ollama:mini"]).stdout
    assert sum(size for path, (size, _) in snapshot(store).items()) < 1000, "nothing was copied"
    assert "removed" in run(main, ["rm", "ollama:mini"]).stdout
    assert "ollama" not in run(main, ["list"]).stdout
    assert snapshot(root) == before


def test_a_changed_blob_is_found_out_by_pulling(root):
    path = find_model("ollama:mini").decoder
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(["pull", "ollama:mini"], "has the checksum sha256:.*, which is not the one in its name")


DIGESTS = ["../../../etc/passwd", "sha256:../../etc/passwd", "sha256-" + "0" * 64, "sha256:" + "0" * 63, "", None, 5]
DIGESTS += ["sha256:" + "0" * 63 + "G", "sha256:" + "A" * 64, "sha256:" + "0" * 64 + "\n", "md5:" + "0" * 64, ["x"]]


@pytest.mark.parametrize("digest", DIGESTS, ids=repr)
def test_digests_that_are_none(root, digest):
    decoder, mmproj, _ = layers_of(root)
    manifest(root, [{**decoder, "digest": digest}, mmproj])
    refused(["run", "-m", "ollama:mini", "Hi"], "expected sha256: with 64 hexadecimal digits")


def without(kind: str, layers: list[Any]) -> list[Any]:
    return [layer for layer in layers if layer["mediaType"] != kind]


MANIFESTS = {
    "no projector": (lambda layers: without(PROJECTOR, layers), "0 layers of type 'projector'.*cannot read pictures"),
    "no model": (lambda layers: without(MODEL, layers), "0 layers of type 'model'"),
    "two models": (lambda layers: layers + layers[:1], "2 layers of type 'model'.* too many"),
    "no list": (lambda layers: {"a": 1}, "has no list of layers"),
    "odd layers": (lambda layers: ["x", None, 7], "0 layers of type 'model'"),
    "another size": (lambda layers: [{**layers[0], "size": 5}, *layers[1:]], "bytes, expected 5 bytes"),
    "a size in words": (lambda layers: [{**layers[0], "size": "5"}, *layers[1:]], "expected sha256:"),
    "no such blob": (lambda layers: [{**layers[0], "digest": "sha256:" + "0" * 64}, *layers[1:]], "is missing"),
}


@pytest.mark.parametrize(("change", "reason"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifests_that_are_wrong(root, change, reason):
    manifest(root, change(layers_of(root)))
    refused(["run", "-m", "ollama:mini", "Hi"], reason)


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b'"text"', b"\xff", b" " * (1 << 21)], ids=range(6))
def test_manifests_that_are_none(root, raw):
    manifest(root, []).write_bytes(raw)
    refused(["run", "-m", "ollama:mini", "Hi"], "has no list of layers")


def test_blobs_that_are_no_models_are_refused_before_llama_cpp(root):
    file = mini_decoder()
    file.tensors["output_norm.weight"].offset = 1 << 62
    manifest(root, [blob(root, file.build(), MODEL), layers_of(root)[1]])
    refused(["run", "-m", "ollama:mini", "Hi"], "cut short or its header is wrong")
    refused(["pull", "ollama:mini"], "cut short or its header is wrong")


NAMES = st.text(alphabet="./\\:~ab\0 -_", max_size=20)


@given(NAMES)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leaves_the_store(root, name):
    """Beside the store lies a manifest that a name with `..` would reach."""
    outside = root.parent / "x" / "a" / "b"
    outside.mkdir(parents=True, exist_ok=True)
    (outside / "latest").write_text(json.dumps({"layers": layers_of(root)}))
    with pytest.raises(ModelFileError):
        ollama.find(name)
