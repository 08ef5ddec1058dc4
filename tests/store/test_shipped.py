"""Models that came with the installation: found by name, after what was pulled, and never changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_runtime.cli.program import main
from edge_runtime.errors import ModelFileError
from edge_runtime.server.registry.catalog import Catalog
from edge_runtime.server.settings import Settings
from edge_runtime.store.find import find_model
from edge_runtime.store.pull import pull
from edge_runtime.store.shipped import checked_name, find_shipped, shipped_models
from support.command import refused
from support.gguf_maker import mini_decoder, mini_mmproj

DECODER, MMPROJ = "ggml-model-Q4_K_M.gguf", "mmproj-model-f16.gguf"


def ship(prefix: Path, name: str) -> Path:
    folder = prefix / "share" / "edge-runtime" / "models" / name
    folder.mkdir(parents=True)
    (folder / DECODER).write_bytes(mini_decoder().build())
    (folder / MMPROJ).write_bytes(mini_mmproj().build())
    (folder / "about.json").write_text(json.dumps({"source": "hf:org/pair", "licence": "MIT\x1b[2J"}))
    return folder


@pytest.fixture
def prefix(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with the official model and one of another name."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    for name in ("minicpm-v-4.5", "mini"):
        ship(tmp_path / "prefix", name)
    return tmp_path / "prefix"


def test_they_are_found_by_name(prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "minicpm-v-4.5"):
        paths = find_model(name)
        assert paths.name == name
        assert paths.decoder == prefix / "share/edge-runtime/models" / name / DECODER
        assert paths.mmproj.name == MMPROJ
    assert [model.name for model in shipped_models()] == ["mini", "minicpm-v-4.5"]
    for name in ("Mini", "mini/", "./mini", "../mini", "models/mini", "mini\0", "", "minicpm-v-4.5:Q8_0"):
        with pytest.raises(ModelFileError):
            find_model(name)
    (tmp_path / "mini").mkdir()
    with pytest.raises(ModelFileError, match="holds no decoder"):  # what is there comes first
        find_model("mini")


def test_what_was_pulled_comes_first(prefix, hub, monkeypatch):
    monkeypatch.setattr("edge_runtime.store.names.ALIASES", {"pair": "hf:org/pair"})
    ship(prefix, "pair")
    assert find_model("pair").decoder.is_relative_to(prefix)
    pull("hf:org/pair")
    assert not find_model("pair").decoder.is_relative_to(prefix)


def test_list_show_and_rm(prefix):
    listed = CliRunner().invoke(main, ["list"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["demo", "mini", "minicpm-v-4.5"]
    assert all(line.endswith("came with the installation") for line in listed[1:])
    facts = json.loads(CliRunner().invoke(main, ["list", "--json"]).stdout)
    assert [(fact["name"], fact["kind"], fact["complete"]) for fact in facts] == [
        ("demo", "built in", True),
        ("mini", "installed", True),
        ("minicpm-v-4.5", "installed", True),
    ]
    shown = json.loads(CliRunner().invoke(main, ["show", "mini", "--json"]).stdout)
    assert {file["path"] for file in shown["files"]} == {DECODER, MMPROJ}
    assert shown["source"] == "hf:org/pair"
    assert shown["licence"] == "MIT\N{REPLACEMENT CHARACTER}[2J"
    assert shown["size"] == sum(file["size"] for file in shown["files"])
    refused(["rm", "mini"], r"came with the installation and was not pulled; remove the folder .*mini instead")
    assert find_shipped("mini") is not None


def test_a_server_serves_them_and_clients_cannot_delete_them(prefix):
    catalog = Catalog(Settings(max_names=3))
    assert {"demo", "mini", "minicpm-v-4.5"} <= {listed.name for listed in catalog.all()}
    with pytest.raises(Exception, match="clients cannot delete it"):
        catalog.delete("mini")


@pytest.mark.parametrize("about", [None, "", "[]", "{", '{"licence": 3}', "x" * 100_000])
def test_damaged_descriptions_do_no_harm(prefix, about):
    path = prefix / "share/edge-runtime/models/mini/about.json"
    path.unlink()
    if about is not None:
        path.write_text(about)
    found = find_shipped("mini")
    assert found is not None
    assert (found.source, found.licence) == ("", "")


def test_folders_without_both_files_are_not_listed(prefix):
    folder = prefix / "share/edge-runtime/models/mini"
    (folder / MMPROJ).unlink()
    assert [model.name for model in shipped_models()] == ["minicpm-v-4.5"]
    assert {listed.name for listed in Catalog(Settings(max_names=3)).all()} == {"demo", "minicpm-v-4.5"}
    with pytest.raises(ModelFileError, match="mmproj"):
        find_model("mini")


def test_names():
    for name in ("minicpm-v-4.5", "a", "A_1.b-c"):
        assert checked_name(name) == name
    for name in ("", "demo", "a/b", "..", "a..b", ".a", "-a", "a b", "a.", "x" * 81, "hf:a", "ä"):
        with pytest.raises(ModelFileError, match="--name"):
            checked_name(name)
