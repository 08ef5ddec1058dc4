"""The Modelfile for Ollama: read back by a parser of its grammar, its template rendered by Go's own package.

Go is not needed to run these tests: `ollama_renderings.json` holds what `ollama_render.go` wrote about the template
of the package, together with the template's checksum. Where Go is installed, more conversations are rendered anew.
After a change of the template, `python tests/store/test_export_ollama.py` records again (needs Go).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_runtime.cli.program import main
from edge_runtime.generation.sampling import MAX_NEW_TOKENS, SamplingOptions
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.store.export_ollama import TEMPLATE
from support.command import refused
from support.gguf_maker import STRING, mini_decoder, mini_mmproj

GO = shutil.which("go")
RENDERER = Path(__file__).with_name("ollama_render.go")
RECORDED = Path(__file__).with_name("ollama_renderings.json")
TEXTS = [
    "",
    "Hi",
    "What is\nthis?",
    "  spaces  ",
    'a "quoted" {{ .Content }}',
    "Ümläut 语言 🙂",
    "<|im_end|>",
    "trail\n",
]


def conversations(seed: int, count: int) -> list[dict[str, Any]]:
    """Random conversations as Ollama hands them to a template: no two messages of one role in a row."""
    source = random.Random(seed)
    cases = []
    for _ in range(count):
        messages = [{"role": "system", "content": source.choice(TEXTS)}] if source.random() < 0.5 else []
        for number in range(source.randrange(1, 8)):
            role = "assistant" if number % 2 else "user"
            messages.append({"role": role, "content": source.choice(TEXTS)})
            if role == "assistant" and source.random() < 0.5:
                messages[-1]["thinking"] = source.choice(["Well", "a\nb"])
            if source.random() < 0.1:
                messages.append({"role": "system", "content": source.choice(TEXTS)})
        cases.append({"think": source.random() < 0.5, "messages": messages})
    return cases


def official(case: dict[str, Any]) -> str:
    """What the official template writes."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [
        {"reasoning_content" if key == "thinking" else key: value for key, value in message.items()}
        for message in case["messages"]
    ]
    return environment.from_string(OFFICIAL_CHAT_TEMPLATE).render(
        messages=messages, tools=None, add_generation_prompt=True, enable_thinking=case["think"]
    )


def rendered(cases: list[dict[str, Any]]) -> list[str]:
    """What Go writes."""
    data = json.dumps({"template": TEMPLATE, "cases": cases})
    done = subprocess.run([str(GO), "run", str(RENDERER)], input=data, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_recorded_renderings_are_the_official_prompts():
    recorded = json.loads(RECORDED.read_text("utf-8"))
    assert recorded["template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest(), "the template changed: record again"
    assert len(recorded["cases"]) == 60
    for case, text in zip(recorded["cases"], recorded["rendered"], strict=True):
        assert text == official(case)
    assert {case["think"] for case in recorded["cases"]} == {True, False}


@pytest.mark.skipif(GO is None, reason="Go is not installed; the recorded renderings are compared instead")
def test_go_renders_the_official_prompts():
    cases = conversations(2, 2000)
    for case, text in zip(cases, rendered(cases), strict=True):
        assert text == official(case)


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands of a Modelfile, by its grammar: KEYWORD value; `#` comments; values bare, in quotes, or in three."""
    commands, rest = [], text
    while rest := rest.lstrip():
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        match = re.match(
            r'([A-Za-z]+)[ \t]+(?:"""(.*?)"""|"([^"\n]*)"|([^"\n][^\n]*|))[ \t]*(?:\n|$)', rest, re.DOTALL
        )
        if match is None and rest.lower().startswith("parameter"):
            match = re.match(r'([A-Za-z]+)[ \t]+()()(\w+[ \t]+(?:"[^"\n]*"|[^"\n]+))(?:\n|$)', rest)
        assert match, f"not in the grammar: {rest[:60]!r}"
        commands.append((match[1].upper(), next(group for group in match.groups()[1:] if group is not None)))
        rest = rest[match.end() :]
    return commands


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model that Ollama could read, with a blank in its path."""
    folder = tmp_path / "my models"
    folder.mkdir()
    mini_decoder().write(folder / "decoder.gguf")
    mini_mmproj().key("clip.projector_type", STRING, "resampler").write(folder / "mmproj.gguf")
    return folder


def test_a_modelfile_reads_back(model, tmp_path):
    result = CliRunner().invoke(main, ["export", "ollama", str(model), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    path = Path(result.stdout.strip())
    assert path == tmp_path / "out" / "Modelfile"
    assert f"ollama create NAME -f {path}" in result.stderr
    commands = parse_modelfile(path.read_text("utf-8"))
    assert [value for key, value in commands if key == "FROM"] == [
        str(model / "decoder.gguf"),
        str(model / "mmproj.gguf"),
    ]
    assert [value for key, value in commands if key == "TEMPLATE"] == [TEMPLATE]
    parameters = [value.split(None, 1) for key, value in commands if key == "PARAMETER"]
    off = SamplingOptions.official(thinking=False)
    assert [value.strip('"') for key, value in parameters if key == "stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert {key: float(value) for key, value in parameters if key != "stop"} == {
        "temperature": off.temperature,
        "top_k": off.top_k,
        "top_p": off.top_p,
        "repeat_penalty": off.repetition_penalty,
        "num_predict": MAX_NEW_TOKENS,
        "num_ctx": 8192,
    }
    assert {key for key, _ in commands} == {"FROM", "PARAMETER", "TEMPLATE"}


def test_nothing_is_replaced_unasked(model, tmp_path):
    (tmp_path / "Modelfile").write_text("mine")
    refused(["export", "ollama", str(model), "-o", str(tmp_path)], "exists already; .* --force")
    assert (tmp_path / "Modelfile").read_text() == "mine"
    assert CliRunner().invoke(main, ["export", "ollama", str(model), "-o", str(tmp_path), "--force"]).exit_code == 0
    assert (tmp_path / "Modelfile").read_text().startswith("# my models, written by edge-runtime\nFROM ")


def test_what_ollama_cannot_read_is_not_exported(model, tmp_path):
    mini_mmproj().write(model / "mmproj.gguf")
    refused(["export", "ollama", str(model), "-o", str(tmp_path / "out")], "int4 blocks that only edge-runtime reads")
    refused(["export", "ollama", str(tmp_path / "none")], "neither 'demo' nor")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ['a"b', "a\nFROM x", "a\x1b[0m"])
def test_paths_that_would_break_the_grammar(model, tmp_path, name):
    moved = model.rename(tmp_path / name)
    refused(["export", "ollama", str(moved), "-o", str(tmp_path / "out")], "cannot be used in a Modelfile")
    assert not (tmp_path / "out" / "Modelfile").exists()


def test_a_file_name_that_ollama_refuses(model, tmp_path):
    (model / "decoder.gguf").rename(model / "a:b.gguf")
    refused(["export", "ollama", str(model), "-o", str(tmp_path / "out")], "a file name without colons")


def test_a_folder_that_cannot_be(model, tmp_path):
    (tmp_path / "file").write_text("")
    refused(["export", "ollama", str(model), "-o", str(tmp_path / "file")], "cannot be written")


if __name__ == "__main__":
    cases = conversations(1, 60)
    digest = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    record = {"template": digest, "cases": cases, "rendered": rendered(cases)}
    RECORDED.write_text(json.dumps(record, ensure_ascii=False, indent=0) + "\n", "utf-8")
