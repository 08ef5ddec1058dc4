"""Names: the same model in any case, kept as they were first written; what deletion and copies may and may not do."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import ollama
import pytest

from edge_runtime.errors import ModelFileError
from edge_runtime.server.errors import ModelNotFound, NotAllowed, RequestError
from edge_runtime.server.registry.catalog import Catalog
from edge_runtime.server.registry.names import Names, Record
from edge_runtime.server.settings import Settings
from edge_runtime.store.find import find_model
from edge_runtime.store.library import Library
from edge_runtime.store.names import ALIASES, plain_name
from server.test_ollama_client import DEMO_FILES, PULLED, hub, names, own

__all__ = ["hub", "own"]

QUESTION = {"model": "", "messages": [{"role": "user", "content": "Hi"}], "stream": False}


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    return Catalog(Settings())


SPELLINGS = [
    "demo",
    "Demo",
    "DEMO",
    "dEmO:latest",
    "demo:LATEST",
    "DEMO:Latest",
    "library/Demo",
    "LIBRARY/demo:latest",
]
SPELLINGS += ["registry.ollama.ai/library/demo", "Registry.Ollama.AI/library/DEMO:latest", " demo "]


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_demo_in_any_case(catalog, name):
    assert catalog.find(name) == catalog.find("demo")
    catalog.copy(name, "mine")
    assert catalog.find("mine").files == catalog.find("demo").files
    with pytest.raises(NotAllowed):
        catalog.delete(name)
    with pytest.raises(RequestError, match="cannot replace"):
        catalog.copy("mine", name.strip())


@pytest.mark.parametrize("name", ["demo2", "dem", "demo:other", "demo :latest", "ＤＥＭＯ", "demo/demo"])
def test_other_names_are_other_models(catalog, name):
    with pytest.raises(ModelNotFound):
        catalog.find(name)


def test_a_made_model_keeps_its_first_spelling(catalog):
    catalog.copy("demo", "MyModel:V2")
    assert catalog.find("mymodel:v2").name == "MyModel:V2"
    catalog.copy("demo", "MYMODEL:v2")  # again, not another one
    assert [listed.name for listed in catalog.all()] == ["demo", "MyModel:V2"]
    catalog.delete("mymodel:V2")
    assert [listed.name for listed in catalog.all()] == ["demo"]
    with pytest.raises(ModelNotFound):
        catalog.find("MyModel:V2")


def test_records_of_older_versions_are_found(tmp_path):
    """They lie by the digest of the name in its case."""
    root = tmp_path / "names"
    root.mkdir()
    record = {"format": 1, "name": "Mine", "base": "demo"}
    old = root / f"{hashlib.sha256(b'Mine').hexdigest()}.json"
    old.write_text(json.dumps(record))
    stored = Names(root)
    assert [each.name for each in stored.all()] == ["Mine"]
    for name in ("Mine", "mine", "MINE"):
        found = stored.get(name)
        assert (found is not None) == (name == "Mine")  # other spellings once it was written anew
    stored.put(Record("Mine", base="demo", system="x"))
    assert len([*root.glob("*.json")]) == 1
    assert all(stored.get(name) is not None for name in ("Mine", "mine", "MINE"))
    stored.remove("mINE")
    assert not [*root.glob("*.json")]


def test_replies_repeat_the_spelling_of_the_client(client):
    for name in ("Demo", "DEMO:latest"):
        body = {**QUESTION, "model": name, "options": {"num_predict": 2}}
        assert client.post("/api/chat", json=body).json()["model"] == name
        streamed = client.post("/api/chat", json={**body, "stream": True}).text.splitlines()
        assert {json.loads(line)["model"] for line in streamed} == {name}
        generated = client.post("/api/generate", json={**body, "messages": None, "prompt": "Hi"})
        assert generated.json()["model"] == name
        assert client.post("/api/show", json={"model": name}).status_code == 200
        assert client.get(f"/v1/models/{name}").status_code == 200
        openai = client.post("/v1/chat/completions", json={**QUESTION, "model": name, "max_tokens": 2})
        assert (openai.status_code, openai.json()["model"]) == (200, name)
        anthropic = client.post("/v1/messages", json={**QUESTION, "model": name, "max_tokens": 2})
        assert (anthropic.status_code, anthropic.json()["model"]) == (200, name)
        assert client.post("/tokenize", json={"content": "a", "model": name}).status_code == 200


def test_two_models_of_the_owner_cannot_have_one_name(tmp_path, monkeypatch):
    """The second one could not be reached, and the first would answer in its place."""
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    folders = [tmp_path / "a" / "Sign", tmp_path / "b" / "sign"]
    for folder in folders:
        folder.mkdir(parents=True)
        for file in DEMO_FILES:
            shutil.copy(file, folder)
    with pytest.raises(ModelFileError, match="Two models would be called sign"):
        Catalog(Settings(models=tuple(map(str, folders))))
    assert Catalog(Settings(models=(str(folders[0]), str(folders[0])))).find("SIGN").name == "Sign"


# --- pulled models -------------------------------------------------------------------------------------------------


def test_pulled_models_in_any_case(own):
    own.pull("HF:org/demo")
    spelled = [PULLED.upper(), "hf:ORG/demo", "hf.co/Org/Demo", "HF.CO/org/demo", f"HF:Org/Demo:{DEMO_FILES[0].name}"]
    for name in spelled:
        assert own.show(name).details.format == "gguf", name
    before = names(own)
    own.pull(PULLED.replace("org/demo", "ORG/Demo"))  # here already, so that nothing is asked of the hub
    assert names(own) == before
    own.copy("hf:ORG/DEMO", "mine")
    own.delete(PULLED.upper())
    assert names(own) == {"demo:latest", "mine:latest"}


def test_a_deleted_base_is_not_found(own, tmp_path):
    """Its files stay as long as a copy needs them, but under no name of their own."""
    own.pull("hf:org/demo")
    own.copy(PULLED, "mine")
    own.delete(PULLED)
    for name in (PULLED, "hf:org/demo", "hf.co/org/demo", PULLED.upper()):
        with pytest.raises(ollama.ResponseError, match="not found") as caught:
            own.show(name)
        assert caught.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="not found"):
            own.chat(name, [{"role": "user", "content": "Hi"}])
        with pytest.raises(ollama.ResponseError, match="not found"):
            own.delete(name)
        with pytest.raises(ollama.ResponseError, match="not found"):
            own.copy(name, "other")
        with pytest.raises(ollama.ResponseError, match="not found"):
            own.create("other", from_=name)
    assert own.show("mine").details.format == "gguf"
    own.pull("hf:org/demo")
    assert PULLED in names(own)


@pytest.mark.parametrize("alias", [*ALIASES, *(alias.upper() for alias in ALIASES)])
def test_a_copy_takes_no_alias(own, alias):
    """Whoever asks for a catalogue's model must not get another client's."""
    for make in (lambda: own.copy("demo", alias), lambda: own.create(alias, from_="demo")):
        with pytest.raises(ollama.ResponseError, match="cannot replace"):
            make()
    with pytest.raises(ollama.ResponseError, match="not found"):
        own.show(alias)


def test_an_alias_in_capitals_is_the_alias(catalog):
    for alias in ALIASES:
        assert catalog.pulled.spelled(alias.upper()) == alias
    assert catalog.pulled.spelled("HF:A/B") == "hf:A/B"
    assert plain_name("HF.co/A/B:latest") == "hf:A/B"
    assert Library(catalog.library.root).entries() == []
    assert find_model("demo").name == "demo"
