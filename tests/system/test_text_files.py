"""JSON and text with the byte order marks that Windows editors and shells write, wherever a person's file is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edge_converters.sources.checkpoint import Checkpoint
from edge_converters.sources.lora import read_lora
from edge_runtime.cli.run_checks import read_schema
from edge_runtime.errors import CheckpointError, MessageError
from edge_runtime.server.ollama.modelfile import parse_modelfile
from edge_runtime.system.text_files import decode_text, parse_json, read_text

SCHEMA = {"type": "object", "properties": {"ä": {"type": "string"}}}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_schema_is_read_in_any_encoding(tmp_path, encoding):
    text = json.dumps(SCHEMA, ensure_ascii=False)
    (tmp_path / "s.json").write_bytes(text.encode(encoding))
    assert read_schema(str(tmp_path / "s.json")) == SCHEMA
    assert read_schema("\ufeff" + text) == SCHEMA
    assert parse_json(text.encode(encoding)) == SCHEMA


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_both_byte_orders(mark):
    assert decode_text(("\ufeff" + "ä€").encode(mark)) == "ä€"


@pytest.mark.parametrize("raw", [b"\xff\xfe{", b"\xef\xbb\xbf", b"{\xe9}", b"", b"[" * 100_000, b"\xff\xfe\0\0\x01"])
def test_invalid_json_is_refused_in_one_sentence(tmp_path, raw):
    (tmp_path / "s.json").write_bytes(raw)
    with pytest.raises(MessageError, match=r"is not valid JSON|cannot be read: .* can't decode"):
        read_schema(str(tmp_path / "s.json"))


def test_a_schema_is_found_under_a_name_that_looks_the_same(tmp_path):
    (tmp_path / "my\u00a0schema.json").write_text("{}")
    assert read_schema(str(tmp_path / "my schema.json")) == {}


def marked_copy(source: Path, target: Path, encoding: str) -> Path:
    """A copy of a folder whose JSON and text files were saved by a Windows editor."""
    shutil.copytree(source, target)
    for path in (*target.glob("*.json"), *target.glob("*.txt"), *target.glob("*.jinja")):
        path.write_bytes(path.read_text("utf-8").replace("\n", "\r\n").encode(encoding))
    return target


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_checkpoint_is_read_as_before(checkpoint, tmp_path, encoding):
    plain, marked = Checkpoint(checkpoint), Checkpoint(marked_copy(checkpoint, tmp_path / "c", encoding))
    assert marked.config == plain.config
    assert marked.preprocessor == plain.preprocessor
    assert set(marked.tensors) == set(plain.tensors), "its index, too"
    for name in ("merges.txt", "chat_template.jinja"):
        assert marked.text(name) == plain.text(name)
    for path in checkpoint.glob("*.json"):
        assert marked.json(path.name) == plain.json(path.name)


def test_the_settings_of_a_lora(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(json.dumps({"peft_type": "OTHER"}).encode("utf-8-sig"))
    with pytest.raises(CheckpointError, match="is of peft_type 'OTHER'"):
        read_lora(tmp_path, {})


def test_lines_end_alike(tmp_path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(tmp_path / "t") == "a\nb\nc\n"


def test_a_modelfile():
    assert parse_modelfile("\ufeffFROM demo\r\nSYSTEM Hi\r\n").sources == ["demo"]
