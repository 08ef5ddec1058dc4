"""The demo's decoder file has the skeleton's tokens, and gets them where it lacks them, without another change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from demo.relabel import SKELETON, relabel
from edge_converters import convert_checkpoint
from edge_runtime.store.find import find_model
from edge_runtime.weights.config import KEY_TOY, is_toy
from edge_runtime.weights.gguf_file import GGUFFile

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
ADDED = [
    (t["id"], t["content"], t["special"])
    for t in json.loads((SKELETON / "tokenizer.json").read_text())["added_tokens"]
]
TAGS = ("tool_call", "tool_response", "think", "ref", "box", "quad", "point", "unit", "image", "slice", "image_id")


def shipped() -> Path:
    return find_model("demo").decoder


def contents(file: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


def tensors(file: Path) -> list[tuple[str, bytes]]:
    return [(tensor.name, tensor.data.tobytes()) for tensor in GGUFReader(file).tensors]


def test_the_shipped_file_has_the_official_added_tokens():
    found = contents(shipped())
    assert isinstance(found[TOKENS], list)
    assert isinstance(found[TYPES], list)
    for row, text, special in ADDED:
        assert found[TOKENS][row] == text
        assert found[TYPES][row] == (TokenType.CONTROL if special else TokenType.USER_DEFINED)
    assert {f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")} <= {text for _, text, _ in ADDED}
    assert found[KEY_TOY] is True
    assert is_toy(GGUFFile(shipped()))


def unlabelled(target: Path, taken: str | None = None) -> Path:
    """A decoder file as it was shipped before: rows from 493 on are nobody's, but for one that may be taken."""
    reader = GGUFReader(shipped())
    tokens, types = (reader.fields[key].contents() for key in (TOKENS, TYPES))
    for row in range(493, 512):
        tokens[row], types[row] = f"[PAD{row}]", int(TokenType.UNUSED)
    if taken:
        tokens[500], types[500] = taken, int(TokenType.NORMAL)
    changed = {
        TOKENS: MetadataDetails(GGUFValueType.ARRAY, tokens, sub_type=GGUFValueType.STRING),
        TYPES: MetadataDetails(GGUFValueType.ARRAY, types, sub_type=GGUFValueType.INT32),
    }
    copy_with_new_metadata(reader, GGUFWriter(target, "qwen3"), changed, [KEY_TOY])
    return target


def test_a_file_that_lacks_them_gets_them_and_nothing_else_changes(tmp_path: Path):
    before = unlabelled(tmp_path / "before.gguf")
    assert not is_toy(GGUFFile(before))
    added = relabel(before, tmp_path / "after.gguf")
    assert added == [text for row, text, _ in ADDED if row >= 493]
    assert contents(tmp_path / "after.gguf") == contents(shipped())
    assert tensors(tmp_path / "after.gguf") == tensors(before) == tensors(shipped())
    assert relabel(shipped(), tmp_path / "again.gguf") == []


def test_a_row_in_use_is_not_taken(tmp_path: Path):
    with pytest.raises(ValueError, match="'Word' in row 500, expected an unused one"):
        relabel(unlabelled(tmp_path / "a.gguf", taken="Word"), tmp_path / "b.gguf")


@pytest.mark.parametrize("toy", [True, False, None, "yes"])
def test_a_converted_checkpoint_is_a_toy_when_its_configuration_says_so(checkpoint: Path, tmp_path: Path, toy):
    source = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | ({} if toy is None else {KEY_TOY: toy})))
    made = convert_checkpoint(source, tmp_path / "model", decoder_type="q8_0", vision_type="f16")
    assert is_toy(GGUFFile(made.decoder)) is (toy is True)
