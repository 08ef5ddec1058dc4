"""One way of naming a model: the first word, or -m; and words that only look like one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_runtime.cli.model_words import model_named, spelled, take_model
from edge_runtime.cli.program import main
from edge_runtime.errors import ModelFileError
from edge_runtime.store.find import find_model
from support.command import refused

SIGN = Path(__file__).parents[2] / "examples" / "sign.png"
QUESTION = "What does it say?"


def run(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "store"))
    shutil.copy(SIGN, tmp_path / "photo.png")
    return tmp_path


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *((each, "demo") for each in ("demo", "Demo", "demo:latest")),
        *((each, "minicpm-v-4.5") for each in ("minicpm-v-4.5", "MiniCPM-V-4.5", "minicpm-v", "minicpm-v4.5")),
        *((each, "minicpm-v-4.5") for each in ("minicpm-v:4.5", "MiniCPM-V-4_5", "openbmb/minicpm-v4.5")),
        ("minicpm-v:q5_k_m", "minicpm-v-4.5:q5_k_m"),
        ("minicpm-v-4.5:Q5_K_M", "minicpm-v-4.5:Q5_K_M"),
        ("hf:a/b", "hf:a/b"),
        ("HF:a/b:Q8_0", "hf:a/b:Q8_0"),
        ("hf.co/a/b", "hf:a/b"),
        ("ms:a/b", "ms:a/b"),
        ("ollama:x", "ollama:x"),
        ("https://host/a.gguf", "https://host/a.gguf"),
        *((each, None) for each in ("", "-", "Describe", "a b", "https://host/a.png", "minicpm-v:8b", "photo.png")),
        *((each, None) for each in ("./demo", "x/demo", "llava", "nul\0byte", "~nobody/x", "é", "hf", "demo.png")),
    ],
)
def test_names_that_are_known(word, name):
    assert model_named(word) == name
    assert spelled(word) == (name or word)


def test_paths_to_models(folder):
    built_in = find_model("demo").decoder.parent
    for name in ("toy", "minicpm-v", "demo"):
        shutil.copytree(built_in, folder / name)
    (folder / "empty").mkdir()
    decoder = next(path.name for path in (folder / "toy").glob("*.gguf") if "mmproj" not in path.name)
    for word in ("toy", "./toy", "toy/", f"toy/{decoder}", str(folder / "toy"), "minicpm-v", "./demo"):
        assert model_named(word) == word
    assert model_named("demo") == "demo", "the built-in one, as find_model has it"
    assert model_named("empty") is None
    result = run("run", "./toy", "photo.png", QUESTION, "--greedy", "--json")
    assert json.loads(result.stdout)["model"] == "toy", result.stderr


def test_a_file_comes_before_a_name(folder):
    shutil.copy(SIGN, folder / "demo")
    assert model_named("demo") is None
    (folder / "demo").unlink()
    (folder / "demo").mkdir()
    assert model_named("demo") == "demo", "a folder without pictures is nothing to ask about"
    shutil.copy(SIGN, folder / "demo")
    assert model_named("demo") is None


def test_a_first_word_is_the_model():
    for words in (("demo", "photo.png", QUESTION), ("-m", "demo", "demo", "photo.png", QUESTION)):
        result = run("run", *words, "--greedy")
        assert (result.exit_code, result.stdout) == (0, "CAFE\n"), result.stderr
    assert run("run", "demo", "--greedy", stdin="Hello\n").stdout == run("run", "--greedy", "Hello").stdout
    assert json.loads(run("info", "-m", "demo", "--json").stdout) == json.loads(run("info", "demo", "--json").stdout)


@pytest.mark.parametrize("words", [["minicpm-v", "photo.png", QUESTION], ["MiniCPM-V-4.5", QUESTION], ["minicpm-v"]])
def test_a_known_model_that_is_not_here(words):
    refused(["run", *words], r"The model minicpm-v-4\.5 was not pulled; run 'edge-runtime pull minicpm-v-4\.5'")


@pytest.mark.parametrize("command", ["run", "bench", "info", "show", "pull", "export ollama"])
def test_two_models_are_one_too_many(command):
    result = run(*command.split(), "hf:a/b", "-m", "hf:a/c")
    assert result.exit_code == 2
    assert "Two models are named, hf:a/b and -m hf:a/c: leave one out" in result.stderr
    assert result.stdout == ""


def test_batch_takes_a_model_first(folder):
    result = run("batch", "demo", "photo.png", "--prompt", QUESTION, "--greedy", "-o", "out.jsonl")
    assert result.exit_code == 0, result.stderr
    (line,) = map(json.loads, (folder / "out.jsonl").read_text("utf-8").splitlines())
    assert line["answer"] == "CAFE"


@pytest.mark.parametrize(
    "words",
    [
        *(["llava", "photo.png", QUESTION], ["llava:7b", "photo.png"], ["llava"], ["llama3.2-vision", "hello"]),
        *(["gemma3:4b", "hello"], ["Qwen2.5-VL", "photo.png"], ["moondream", "photo.png"], ["Llava", QUESTION]),
        *(["minicpm-v:8b", QUESTION], ["mistral", "hello"], ["phi3", QUESTION], ["granite3.2-vision", QUESTION]),
        *(["yi:6b", QUESTION], ["foo:7b", QUESTION], ["bar-v2", "photo.png"], ["some2", "-"], ["gpt-4o", "hi"]),
    ],
)
def test_what_looks_like_a_model_is_not_asked(words):
    refused(["run", *words], r"looks like a model's name.*did you mean -m \S+\?.*--prompt")


def test_a_near_miss_is_named():
    refused(["run", "minicpm-v-4.6", "photo.png", QUESTION], r"did you mean -m minicpm-v-4\.5\?")


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["Describe", "photo.png"],
            ["Llama", "or", "alpaca?"],
            ["note:this", "is", "odd"],
            ["COVID-19", "is", "it"],
        ),
        *(
            ["3D", "printing is"],
            ["H2O", QUESTION],
            ["What's", "this"],
            ["philosophy", QUESTION],
            ["Hello"],
            ["yi", "x"],
        ),
        *(
            ["What is llava:7b?"],
            ["dolphin", "or", "whale"],
            ["solar", QUESTION],
            ["Hello", "world"],
            ["demonstrate", "x"],
        ),
    ],
)
def test_what_does_not_is_asked(words):
    assert take_model(words, None) == (None, tuple(words))


def test_the_way_out():
    assert run("run", "-p", "llava", "--max-tokens", "1").exit_code == 0
    assert take_model(["llava", "x"], "demo") == ("demo", ("llava", "x")), "the model is named"


def test_names_of_a_server_stay_as_they_are():
    assert take_model(["Hello"], "openbmb/MiniCPM-V-4_5", on_server=True) == ("openbmb/MiniCPM-V-4_5", ("Hello",))
    assert take_model(["MiniCPM-V", "Hello"], None, on_server=True) == ("MiniCPM-V", ("Hello",))


def test_a_malformed_name_says_so():
    with pytest.raises(ModelFileError, match="expected hf:ORG/REPO"):
        model_named("hf:nowhere")
    refused(["run", "hf:nowhere", QUESTION], "expected hf:ORG/REPO")


# ---------------------------------------------------------------- options of run


def test_image_names_a_file():
    for words in (["--image", "photo.png", QUESTION], [QUESTION, "--image", "photo.png"]):
        assert run("run", *words, "--greedy").stdout == "CAFE\n"
    found = json.loads(run("run", "--image", "photo.png", "--image", "photo.png", "What?", "--json").stdout)
    assert len(found["pictures"]) == 2
    assert run("run", "--image", "photo.png", "What is in photo.png?", "--max-tokens", "1").exit_code == 0
    assert run("run", "--image", "-", QUESTION, "--greedy", stdin=SIGN.read_bytes()).stdout == "CAFE\n"
    refused(["run", "--image", "missing", "What?"], "missing does not exist")
    refused(["run", "--image", "-", "-", "What?"], "stdin is named 2 times")


def test_quiet_and_verbose():
    quiet = run("run", "photo.png", QUESTION, "--greedy", "-q")
    assert (quiet.stdout, quiet.stderr) == ("CAFE\n", "")
    told = run("run", "photo.png", QUESTION, "--greedy", "-v")
    assert told.stdout == "CAFE\n"
    for label, unit in (("load", "s"), ("encode", r"s  7 slices, \S+ s per slice"), ("total", "s")):
        assert re.search(rf"^{label} +[\d.]+ {unit}$", told.stderr, re.MULTILINE), told.stderr
    assert re.search(r"^prefill +[\d.]+ s  \d+ tokens, [\d.]+ tokens/s$", told.stderr, re.MULTILINE), told.stderr
    assert re.search(r"^answer +[\d.]+ s  \d+ tokens, [\d.]+ tokens/s$", told.stderr, re.MULTILINE), told.stderr
    both = run("run", "Hi", "-q", "-v")
    assert both.exit_code == 2
    assert "give one of them" in both.stderr


def test_short_options():
    assert run("-V").stdout.startswith("edge-runtime, version ")
    assert run("run", "-t", "1", "-c", "512", "Hi", "--max-tokens", "1").exit_code == 0
    assert run("run", "-c", "0", "Hi").exit_code == 2


@pytest.mark.parametrize("command", ["run", "batch", "serve"])
def test_every_option_has_a_place_in_the_help(command):
    text = run(command, "--help").stdout
    titles = re.findall(r"^([A-Z][\w ]+):$", text, re.MULTILINE)
    assert titles[-1] == "Options"
    assert len(titles) == len({*titles}) > 4
    rest = text.split("\nOptions:\n")[1].split()
    assert [word for word in rest if word.startswith("-")] == ["-h,", "--help"]
    for parameter in main.commands[command].params:
        for option in parameter.opts:
            assert not option.startswith("-") or len(re.findall(rf"(?<![\w-]){option}\b(?!-)", text)), option
