"""Commands about models as Ollama's users know them, and what becomes of output that nobody takes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from edge_runtime.cli.program import main
from edge_runtime.cli.running_models import address_of
from edge_runtime.server.settings import Settings
from edge_runtime.store.find import find_model
from server.conftest import running
from support.command import refused

SIGN = Path(__file__).parents[2] / "examples" / "sign.png"


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "store"))
    for name in ("EDGE_RUNTIME_HOST", "OLLAMA_HOST", "EDGE_RUNTIME_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "store"


def test_the_demo_is_listed_and_shown():
    assert done("list").split()[0] == "demo"
    assert "built in" in done("list")
    facts = json.loads(done("show", "demo", "--json"))
    assert facts == json.loads(done("list", "--json"))[0]
    assert [Path(file["path"]) for file in facts["files"]] == [*vars(find_model("demo")).values()][1:]
    refused(["rm", "demo"], "is part of the program")


def test_a_copy_is_another_name():
    done("cp", "demo", "Mine")
    assert [line.split()[0] for line in done("list").splitlines()] == ["demo", "Mine"]
    assert json.loads(done("run", "mine", "Hi", "--json", "--max-tokens", "1"))["model"] == "Mine"
    assert "vision layers" in done("info", "mine")
    done("cp", "mine", "again")
    assert done("rm", "mine", "again").split() == ["Mine", "removed", "again", "removed"]
    assert len(done("list").splitlines()) == 1
    refused(["cp", "nothing", "x"], "not found")
    refused(["cp", "demo", "../x"], "is not allowed")
    refused(["cp", "demo", "minicpm-v-4.5"], "cannot be replaced|cannot replace")


def test_a_created_model_answers_as_its_modelfile_says(tmp_path):
    (tmp_path / "Modelfile").write_text(
        'FROM demo\nPARAMETER num_predict 2\nPARAMETER temperature 0\nSYSTEM """Be kind. Be kind. Be kind."""\n'
        "MESSAGE user Hello\nMESSAGE assistant Hi\n"
    )
    assert done("create", "short") == "short created\n"
    shown = json.loads(done("show", "short", "--json"))
    assert (shown["from"], shown["parameters"]["num_predict"]) == ("demo", 2)
    own = json.loads(done("run", "short", "Hello", "--json"))
    assert (own["completion_tokens"], own["finish_reason"]) == (2, "length")
    plain = json.loads(done("run", "Hello", "--json", "--max-tokens", "1"))
    assert own["prompt_tokens"] > plain["prompt_tokens"] + 10
    assert json.loads(done("run", "short", "Hello", "--json", "--max-tokens", "1"))["completion_tokens"] == 1
    with running(Settings(port=0)) as served:  # the same store
        names = [model["name"] for model in httpx.get(f"{served.url}/api/tags", trust_env=False).json()["models"]]
        assert "short:latest" in names


def test_a_model_is_created_from_files(tmp_path):
    paths = find_model("demo")
    (tmp_path / "sub").mkdir()
    modelfile = tmp_path / "sub" / "Modelfile"
    for lines in (
        f"FROM {paths.decoder}",
        f"FROM {paths.decoder.parent}",
        f"FROM {paths.decoder}\nFROM {paths.mmproj}",
    ):
        modelfile.write_text(lines)
        done("create", "files", "-f", str(modelfile))
        assert done("run", "files", str(SIGN), "What does it say?", "--greedy") == "CAFE\n"
        done("rm", "files")
    uploads = tmp_path / "store" / ".served" / "blobs"
    assert [*uploads.iterdir()] == [], "removed with the last name"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no FROM"),
        ("FROM ./nothing.gguf", "there is no such file"),
        ("FROM nothing", "not found"),
        ("FROM demo\nADAPTER ./x.gguf", "there is no such file"),
        ("FROM demo\nFROM minicpm-v-4.5", "expected one name"),
        ("FROM demo\nPARAMETER temperature hot", "expected a number"),
        ("FORM demo", "Line 1 of the Modelfile"),
        ("FROM demo\nADAPTER ./Modelfile", "Modelfile"),
    ],
)
def test_modelfiles_that_make_nothing(tmp_path, text, reason):
    (tmp_path / "Modelfile").write_text(text)
    refused(["create", "x"], reason)
    assert len(done("list").splitlines()) == 1


def test_a_modelfile_that_is_none(tmp_path):
    refused(["create", "x"], "Modelfile does not exist; name it with -f")
    refused(["create", "x", "-f", str(SIGN)], "is not text")
    refused(["create", "x", "-f", str(tmp_path)], "cannot be read")


# ---------------------------------------------------------------- a running server


def test_models_in_memory(monkeypatch):
    with running(Settings(port=0)) as served:
        monkeypatch.setenv("OLLAMA_HOST", served.url)
        assert "no model in memory" in run("ps").stderr
        refused(["stop", "demo"], "is not in the memory of the server.*no model in memory")
        body = {"model": "demo", "prompt": "Hi", "stream": False, "options": {"num_predict": 1}}
        assert httpx.post(f"{served.url}/api/generate", json=body, trust_env=False).status_code == 200
        assert done("ps").startswith("demo  ")
        assert json.loads(done("ps", "--json"))[0]["name"] == "demo:latest"
        refused(["stop", "hf:a/b"], "in memory: demo")
        assert done("stop", "demo") == "demo stopped\n"
        assert done("ps") == ""
        assert httpx.post(f"{served.url}/api/generate", json=body, trust_env=False).status_code == 200
        assert done("stop", "--host", served.url.removeprefix("http://")) == "demo stopped\n"


def test_a_server_with_a_key(monkeypatch):
    with running(Settings(port=0, api_key="secret")) as served:
        refused(["ps", "--host", served.url], "asks for a key; put it into EDGE_RUNTIME_API_KEY")
        monkeypatch.setenv("EDGE_RUNTIME_API_KEY", "secret")
        assert done("ps", "--host", served.url) == ""


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(["ps", "--host", f"127.0.0.1:{port}"], rf"No server answers at 127\.0\.0\.1:{port}; start one")
    refused(["stop", "--host", f"127.0.0.1:{port}"], "No server answers")
    refused(["ps", "--host", "a b"], "is no address|expected http")


@pytest.mark.parametrize(
    ("host", "root"),
    [
        (None, "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":8000", "http://127.0.0.1:8000"),
        ("host", "http://host:11434"),
        ("host:1", "http://host:1"),
        ("http://host", "http://host"),
        ("https://host/", "https://host"),
        ("[::1]", "http://[::1]:11434"),
        ("[::]:80", "http://[::1]"),
    ],
)
def test_addresses_as_ollamas_clients_write_them(host, root):
    assert address_of(host).root == root


def test_help_of_a_command():
    assert done("help") == done("--help")
    assert done("help", "run") == CliRunner().invoke(main, ["run", "--help"]).stdout
    assert done("help", "export", "ollama").startswith("Usage: ")
    result = run("help", "nope")
    assert (result.exit_code, result.stdout) == (2, "")


# ---------------------------------------------------------------- where it is printed

PRINTS = (
    ["--help"],
    ["-V"],
    ["run", "--help"],
    ["list"],
    ["show", "demo"],
    ["info", "demo"],
    ["help"],
    ["run", "Hi", "-q"],
)


@pytest.mark.skipif(os.name == "nt", reason="no such device there")
@pytest.mark.parametrize("command", PRINTS, ids=" ".join)
def test_a_full_disk_and_a_reader_that_leaves(command):
    program = [sys.executable, "-m", "edge_runtime", *command]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "edge-runtime: The answer cannot be written: No space left on device; write it elsewhere."
    )
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert ended.returncode == 141, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "rror" not in ended.stderr
