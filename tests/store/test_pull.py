"""Pulls from a hub that lies or fails: what `list` shows as complete runs, all else is gone or unfinished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_runtime import Model
from edge_runtime.cli.program import main
from edge_runtime.errors import DownloadError, EdgeRuntimeError, ModelFileError, UnsupportedModelError
from edge_runtime.store import pull as pulling
from edge_runtime.store.find import find_model
from edge_runtime.store.library import Library
from edge_runtime.store.names import ALIASES
from edge_runtime.store.pull import pull
from store.conftest import DECODER, KEY, MMPROJ
from support.command import refused
from support.gguf_maker import mini_decoder, mini_mmproj
from support.hub_server import REVISION, Fault

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"
PAIR = "hf:org/pair"
FULL_NAME = f"{PAIR}:{DECODER}"


def complete() -> list[str]:
    """Names that `list` shows as usable."""
    return [entry.name for entry in Library().entries() if entry.complete]


def files(store: Path) -> list[str]:
    """All files of the store but locks."""
    return sorted(path.name for path in store.rglob("*") if path.is_file() and ".locks" not in path.parts)


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_a_pair_is_pulled_and_loads(hub, store):
    plans = []
    entry = pull(PAIR, on_plan=plans.append)
    assert (entry.name, entry.kind, entry.complete) == (FULL_NAME, "gguf", True)
    assert (entry.revision, entry.licence) == (REVISION, "apache-2.0")
    assert plans[0].fetched == sum(len(hub.files[f"org/pair/{name}"]) for name in (DECODER, MMPROJ))
    assert files(store) == [DECODER, MMPROJ, "model.json"], "no README, no parts, no caches"
    for name in (PAIR, FULL_NAME, "hf:org/pair:Q4_K_M"):
        paths = find_model(name)
        assert (paths.name, paths.decoder.name, paths.mmproj.name) == (name, DECODER, MMPROJ)
        assert paths.decoder.read_bytes() == hub.files[f"org/pair/{DECODER}"]
    with Model.load(PAIR) as model:
        assert model.chat("a", max_tokens=1, temperature=0).completion_tokens == 1


def test_the_alias_is_the_official_pair(hub, store):
    """Of a repository with all the files the official one has."""
    repository, _, decoder = ALIASES["minicpm-v-4.5"].removeprefix("hf:").partition(":")
    for name in (
        decoder,
        "Model-3.6B-F16.gguf",
        "ggml-model-Q4_0.gguf",
        "ggml-model-Q4_K_S.gguf",
        "ggml-model-Q8_0.gguf",
    ):
        hub.files[f"{repository}/{name}"] = mini_decoder().build()
    hub.files[f"{repository}/{MMPROJ}"] = mini_mmproj().build()
    result = run("pull", "minicpm-v-4.5")
    assert result.exit_code == 0, result.stderr
    assert "run -m minicpm-v-4.5" in result.stderr
    assert result.stdout.startswith("minicpm-v-4.5  0.1 MB")
    demo, pulled = run("list").stdout.splitlines()
    assert demo.startswith("demo ")
    assert "built in" in demo
    assert pulled == result.stdout.strip()
    paths = find_model("minicpm-v-4.5")
    assert (paths.name, paths.decoder.name, paths.mmproj.name) == ("minicpm-v-4.5", DECODER, MMPROJ)
    assert find_model(f"hf:{repository}").decoder == paths.decoder
    assert json.loads(run("info", "minicpm-v-4.5", "--json").stdout)["decoder"] == DECODER


def test_pulled_again_nothing_is_fetched(hub, store):
    pull(PAIR)
    asked = len(hub.bytes_requests())
    plans = []
    pull(FULL_NAME, on_plan=plans.append)
    assert plans[0].fetched == 0
    assert len(hub.bytes_requests()) == asked
    assert complete() == [FULL_NAME]


def test_the_key_is_sent_and_never_kept(hub, store):
    pull(PAIR)
    api = [headers for _, path, headers in hub.requests if path.startswith("/api/")]
    assert api[0]["authorization"] == f"Bearer {KEY}"
    assert all("authorization" not in headers for headers in hub.bytes_requests())
    for path in store.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_a_cut_pull_is_unfinished_and_the_next_completes_it(hub, store):
    hub.faults.extend([Fault(), Fault(cut_after=10_000), *[Fault(status=503)] * 9])
    with pytest.raises(DownloadError, match="pull again to resume"):
        pull(PAIR)
    assert complete() == []
    assert [entry.name for entry in Library().entries()] == [FULL_NAME]
    assert "unfinished" in run("list").stdout
    refused(["run", "-m", PAIR, "Hi"], "was not pulled|not pulled completely")
    hub.faults.clear()
    plans = []
    pull(PAIR, on_plan=plans.append)
    assert plans[0].fetched == len(hub.files[f"org/pair/{MMPROJ}"]) - 10_000, (
        "the decoder and a part are here already"
    )
    assert complete() == [FULL_NAME]
    assert files(store) == [DECODER, MMPROJ, "model.json"]


def test_an_update_keeps_the_old_version_until_the_new_one_is_whole(hub, store):
    pull(PAIR)
    old = find_model(PAIR)
    hub.files[f"org/pair/{DECODER}"] = mini_decoder(2).build()
    hub.faults.extend([Fault(cut_after=100), *[Fault(status=503)] * 9])
    with pytest.raises(DownloadError):
        pull(PAIR)
    assert find_model(PAIR) == old
    assert old.decoder.read_bytes() == mini_decoder(1).build()
    hub.faults.clear()
    hub.requests.clear()
    pull(PAIR)
    assert find_model(PAIR).decoder.read_bytes() == mini_decoder(2).build()
    assert not hub.bytes_requests(MMPROJ), "the mmproj file has not changed"
    assert not old.decoder.exists()
    assert files(store) == [DECODER, MMPROJ, "model.json"]


def test_no_space_is_told_before_anything_is_fetched(hub, store, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: usage(10**9, 0, pulling.SPARE_BYTES + 1000))
    with pytest.raises(DownloadError, match=r"needs 0\.00 GB more, .* has 0\.07 GB free; free some space"):
        pull(PAIR)
    assert not hub.bytes_requests()
    assert complete() == []


def test_the_hub_is_busy_with_its_list(hub, store):
    hub.list_faults.extend([Fault(status=429, headers={"Retry_After": "0"}), Fault(status=503)])
    assert pull(PAIR).complete
    hub.list_faults.extend([Fault(status=503)] * 20)
    with pytest.raises(DownloadError, match="hf:org/pair could not be fetched: the server answered 503, after 5"):
        pull(PAIR)


def test_a_mirror_that_lists_names_alone(hub, store):
    hub.bare = True
    assert pull(PAIR).complete
    heads = [path for method, path, _ in hub.requests if method == "HEAD"]
    assert {path.rpartition("/")[2] for path in heads} >= {DECODER, MMPROJ}
    assert all(file.digest for file in Library().entries()[0].files)


MISSING = {
    "no such repository": ("hf:org/nothing", "hf:org/nothing (does not have|refuses access)"),
    "no such decoder": ("hf:org/pair:Q8_0", f"has no decoder file 'Q8_0'; there are: {DECODER}"),
    "neither GGUF nor checkpoint": ("hf:org/text", "holds neither GGUF files nor a checkpoint"),
    "several decoders": ("hf:org/many", r"has 2 decoder files: a\.gguf, b\.gguf\. Choose one with hf:org/many:FILE"),
    "no mmproj file": ("hf:org/alone", "has no mmproj file; there are: none"),
    "no name at all": ("something", "is not something to pull; expected minicpm-v-4.5, hf:ORG/REPO"),
}


@pytest.mark.parametrize(("name", "reason"), MISSING.values(), ids=MISSING.keys())
def test_what_cannot_be_chosen(hub, store, name, reason):
    data = mini_decoder().build()
    hub.files |= {"org/text/README.md": b"Hi", "org/alone/a.gguf": data}
    hub.files |= {f"org/many/{file}": data for file in ("a.gguf", "b.gguf", MMPROJ)}
    refused(["pull", name], reason)
    assert complete() == []


def test_one_of_several_is_chosen(hub, store):
    names = ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-bf16.gguf", "mmproj-f16.gguf", "mmproj-bf16.gguf")
    for name in names:
        hub.files[f"org/many/{name}"] = (mini_mmproj() if "mmproj" in name else mini_decoder()).build()
    assert (pull("hf:org/many").decoder, pull("hf:org/many").mmproj) == ("m-Q4_K_M.gguf", "mmproj-f16.gguf")
    assert pull("hf:org/many:q8_0").decoder == "m-Q8_0.gguf"
    other = pull("hf:org/many:m-bf16.gguf", mmproj="mmproj-bf16.gguf")
    assert (other.decoder, other.mmproj) == ("m-bf16.gguf", "mmproj-bf16.gguf")
    with pytest.raises(ModelFileError, match=r"may mean any of hf:org/many:m-bf16\.gguf, .*; expected one of these"):
        find_model("hf:org/many")
    assert find_model("hf:org/many:Q8_0").decoder.name == "m-Q8_0.gguf"


def test_several_processes_at_once(hub, store):
    hub.faults.append(Fault(stall_after=20_000))
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-m", "edge_runtime", "pull", PAIR]
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert hub.stalled.wait(60)
    refused(["rm", PAIR], "is being pulled by another process")
    hub.released.set()
    ends = [child.communicate(timeout=100) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], ends
    assert any("Another process is pulling" in errors for _, errors in ends)
    assert sum("range" not in headers for headers in hub.bytes_requests(DECODER)) == 1
    assert len(hub.bytes_requests(MMPROJ)) == 1
    assert complete() == [FULL_NAME]
    assert files(store) == [DECODER, MMPROJ, "model.json"]


def test_ctrl_c_leaves_what_the_next_pull_needs(hub, store, interruptible):
    hub.faults.append(Fault(stall_after=20_000))
    command = [sys.executable, "-m", "edge_runtime", "pull", PAIR]
    with subprocess.Popen(
        command, env={**os.environ, "HF_ENDPOINT": hub.url}, stderr=subprocess.PIPE, text=True
    ) as child:
        assert hub.stalled.wait(60)
        child.send_signal(signal.SIGINT)
        errors = child.communicate(timeout=60)[1]
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert complete() == []
    assert pull(PAIR).complete


def test_from_the_hub_to_an_answer(hub, store):
    """The whole way, by the command, in processes of its own: pull, list, show, run, rm."""
    folder = resources.files("edge_runtime").joinpath("demo")
    names = ("ggml-model-Q4_K_M.gguf", "mmproj-model-q8_0.gguf")
    hub.files = {f"org/demo/{name}": folder.joinpath(name).read_bytes() for name in names}
    hub.faults.append(Fault(cut_after=1_000_000))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edge_runtime", *arguments],
            env={**os.environ, "HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
            timeout=300,
        )

    pulled = command("pull", "hf:org/demo")
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.startswith("hf:org/demo:ggml-model-Q4_K_M.gguf  7.4 MB")
    assert "licence: apache-2.0" in pulled.stderr
    assert KEY not in pulled.stdout + pulled.stderr
    demo, listed = json.loads(command("list", "--json").stdout)
    assert demo["name"] == "demo"
    assert (listed["complete"], listed["size"]) == (True, sum(map(len, hub.files.values())))
    shown = command("show", "hf:org/demo")
    assert REVISION in shown.stdout
    assert str(store) in shown.stdout
    answer = command("run", "-m", "hf:org/demo", str(EXAMPLE), "What does it say?", "--greedy")
    assert answer.stdout == "CAFE\n", answer.stderr
    removed = command("rm", "hf:org/demo")
    assert "7.4 MB freed" in removed.stdout
    assert files(store) == []
    gone = command("run", "-m", "hf:org/demo", "Hi")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "run 'edge-runtime pull hf:org/demo'" in gone.stderr


@pytest.mark.slow
def test_a_checkpoint_is_pulled_and_converted(hub, store, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.files = {f"org/Tiny-V/{path.name}": path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    hub.files |= {"org/Tiny-V/modeling.py": b"raise SystemExit", "org/Tiny-V/sub/x.safetensors": b"x"}
    result = run("convert", "hf:org/Tiny-V", "--type", "q8_0")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in Path("models/Tiny-V").iterdir()} == {
        "ggml-model-Q8_0.gguf",
        "mmproj-model-q8_0.gguf",
    }
    assert not any(name.endswith((".py", "x.safetensors")) for name in files(store))
    assert complete() == ["hf:org/Tiny-V"]
    refused(["run", "-m", "hf:org/Tiny-V", "Hi"], "is a checkpoint, expected GGUF files; run 'edge-runtime convert")
    with Model.load(tmp_path / "models" / "Tiny-V") as model:
        assert model.chat("a", max_tokens=1, temperature=0).completion_tokens == 1
    hub.requests.clear()
    assert run("convert", "hf:org/Tiny-V", "--type", "q8_0", "-o", "again").exit_code == 0
    assert not hub.requests, "what is here is converted without asking"


def test_checkpoints_come_from_where_checkpoints_are(hub, store):
    refused(["convert", "hf:org/pair"], "holds GGUF files already, expected a checkpoint", after_notes=True)
    refused(["convert", "ollama:x"], "is not a checkpoint; expected a folder, hf:ORG/REPO")


def test_addresses(hub, store, tmp_path):
    decoder, mmproj = f"{hub.url}/cdn/org/pair/{DECODER}", f"{hub.url}/cdn/org/pair/{MMPROJ}"
    entry = pull(f"{decoder}?download=true", mmproj=mmproj)
    assert (entry.name, entry.decoder, entry.mmproj) == (decoder, DECODER, MMPROJ)
    assert find_model(decoder).mmproj.read_bytes() == hub.files[f"org/pair/{MMPROJ}"]
    assert all("authorization" not in headers for _, _, headers in hub.requests), "keys of the hub are the hub's"
    Library().remove(entry)
    assert pull(decoder).mmproj == ""
    refused(["run", "-m", decoder, "Hi"], "without an mmproj file; name one with --mmproj")
    (tmp_path / "m.gguf").write_bytes(hub.files[f"org/pair/{MMPROJ}"])
    assert find_model(decoder, tmp_path / "m.gguf").mmproj == tmp_path / "m.gguf"
    refused(["pull", mmproj], "is a file of type mmproj, expected decoder", after_notes=True)
    refused(["pull", decoder, "--mmproj", decoder], "Both addresses end in")
    refused(["pull", decoder, "--mmproj", "x.gguf"], "expected a web address too")
    refused(["pull", f"{decoder}#sha256={'0' * 64}"], "arrived with the checksum", after_notes=True)


def test_modelscope(hub, store, monkeypatch, tmp_path):
    modelscope_hub = pytest.importorskip("modelscope_hub")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-not-a-key")
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setattr("modelscope_hub.get_default_config", modelscope_hub.HubConfig)
    hub.faults.append(Fault(cut_after=10_000))
    entry = pull("ms:org/pair")
    assert (entry.name, entry.complete) == (f"ms:org/pair:{DECODER}", True)
    assert all(file.digest.startswith("sha256:") for file in entry.files)
    assert find_model("ms:org/pair").decoder.read_bytes() == hub.files[f"org/pair/{DECODER}"]
    first = [headers for _, path, headers in hub.requests if "repo?" in path and "Recursive" not in path]
    assert "ms-not-a-key" in first[0]["authorization"]
    assert all("ms-not-a-key" not in str(headers) for headers in hub.bytes_requests())
    refused(["pull", "ms:org/nothing"], "could not be listed")


def test_without_modelscopes_package(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    refused(["pull", "ms:org/pair"], r"pip install 'edge-runtime\[modelscope\]'")


def test_a_damaged_record_is_not_believed(hub, store):
    entry = pull(PAIR)
    record = Library().folder(entry.name) / "model.json"
    value = json.loads(record.read_text())
    for change in (
        {"decoder": "../../../etc/passwd"},
        {"snapshot": "../.."},
        {"files": [{"path": "/etc/passwd", "size": 1, "digest": ""}]},
        {"name": "hf:org/other"},
        {"complete": 1},
        {"format": 2},
    ):
        record.write_text(json.dumps({**value, **change}))
        assert complete() == []
        with pytest.raises(ModelFileError):
            find_model(PAIR if "name" not in change else FULL_NAME)
    record.write_text("{")
    assert pull(PAIR).complete
    assert complete() == [FULL_NAME]


def test_what_somebody_removed_is_missed(hub, store):
    pull(PAIR)
    find_model(PAIR).mmproj.unlink()
    with pytest.raises(ModelFileError, match="is missing from the store; run 'edge-runtime pull hf:org/pair'"):
        find_model(PAIR)
    assert pull(PAIR).complete
    assert find_model(PAIR).mmproj.exists()


def test_links_in_the_store_are_not_followed(hub, store, tmp_path):
    entry = pull(PAIR)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "photo.png").write_bytes(b"x")
    folder = Library().folder(entry.name)
    (folder / "link").symlink_to(precious)
    decoder = find_model(PAIR).decoder
    decoder.unlink()
    decoder.symlink_to(precious / "photo.png")
    pull(PAIR)
    assert not decoder.is_symlink()
    Library().remove(entry)
    assert (precious / "photo.png").read_bytes() == b"x"
    assert not folder.exists()


def test_an_unwritable_store(hub, store):
    store.write_text("a file where the folder should be")
    refused(["pull", PAIR], "cannot be written")
    assert [line.split()[0] for line in run("list").stdout.splitlines()] == ["demo"]


def test_unknown_models_are_told_what_to_do(store):
    refused(
        ["run", "-m", "minicpm-v-4.5", "Hi"], r"minicpm-v-4\.5 was not pulled; run 'edge-runtime pull minicpm-v-4\.5'"
    )
    refused(["rm", "hf:org/pair"], "No model 'hf:org/pair' was pulled; 'edge-runtime list' shows")
    refused(["show", "nothing"], "No model 'nothing' was pulled")
    assert "edge-runtime pull minicpm-v-4.5" in run("list").stderr


def test_nothing_is_asked_offline(hub, store, monkeypatch):
    from huggingface_hub import constants

    pull(PAIR)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (PAIR, "https://host.invalid/a.gguf", "ms:org/pair"):
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
            pull(name)
    assert find_model(PAIR).decoder.exists()
    assert not hub.requests


def test_ollama_has_its_own_mmproj(store):
    refused(["pull", "ollama:x", "--mmproj", "y"], "has its own mmproj file")


def test_errors_are_of_this_package():
    assert issubclass(DownloadError, EdgeRuntimeError)
    assert issubclass(UnsupportedModelError, ModelFileError)
    assert shutil.rmtree.avoids_symlink_attacks
