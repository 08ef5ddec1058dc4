"""Schemas and drawings from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime.cli.program import main
from support.command import refused

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "sign.png")
BOX = '{"const": "<box>100 200 400 800</box>"}'


def run(*arguments: str):
    return CliRunner().invoke(main, ["run", *arguments])


def test_a_schema_is_given_as_text_or_file(tmp_path):
    schema = '{"type": "object", "properties": {"word": {"enum": ["CAFE", "BAR"]}}, "required": ["word"]}'
    (tmp_path / "schema.json").write_text(schema)
    for source in (schema, str(tmp_path / "schema.json")):
        result = run(EXAMPLE, "What does it say?", "--greedy", "--schema", source)
        assert (result.exit_code, json.loads(result.stdout)) == (0, {"word": "CAFE"})
    result = run(EXAMPLE, "What does it say?", "--greedy", "--json", "--schema", schema)
    assert json.loads(json.loads(result.stdout)["answer"]) == {"word": "CAFE"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no.json", "No such file"),
        (".", "cannot be read"),
        ("{", "not valid JSON"),
        ("[1]", "No such file"),
        (EXAMPLE, "cannot be read: 'utf-8'"),
    ],
)
def test_an_invalid_schema_is_refused(source, reason):
    refused(["run", "Hi", "--schema", source], reason)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('{"not": {"pattern": "a"}}', r"\$\.not cannot be enforced"),
        ('{"const": NaN}', "not JSON data"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_the_model(source, reason):
    refused(["run", "Hi", "--schema", source], reason, after_notes=True)  # that the demo is a toy


def test_places_are_drawn_onto_a_copy_of_the_last_picture(tmp_path):
    other, target = tmp_path / "other.png", tmp_path / "out.png"
    Image.new("RGB", (50, 40), "white").save(other)
    result = run(str(other), EXAMPLE, "Where?", "--schema", BOX, "--draw", str(target))
    assert result.exit_code == 0, result.stderr
    assert "1 place drawn" in result.stderr
    with Image.open(target) as drawn, Image.open(EXAMPLE) as picture:
        difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(picture.convert("RGB"))).max(axis=2)
    rows, cols = np.nonzero(difference)
    height, width = difference.shape
    assert abs(cols.max() - 0.4 * width) < 6
    assert abs(rows.max() - 0.8 * height) < 6


def test_an_answer_without_places_writes_nothing(tmp_path):
    target = tmp_path / "out.png"
    result = run(EXAMPLE, "What does it say?", "--greedy", "--draw", str(target))
    assert (result.exit_code, result.stdout) == (0, "CAFE\n")
    assert "names no place" in result.stderr
    assert not target.exists()


def test_a_drawing_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    refused(["run", EXAMPLE, "Where?", "-m", "nothing", "--draw", str(tmp_path / "out.doc")], "suffix")
    refused(["run", EXAMPLE, "Where?", "-m", "nothing", "--draw", str(tmp_path / "no" / "out.png")], "does not exist")


@pytest.mark.parametrize("arguments", [["Hello", "--draw", "a.png"], [EXAMPLE, "--draw", "a.png"]])
def test_a_drawing_needs_a_picture_and_a_question(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "--draw needs a picture and a question" in result.stderr
