"""Every option of a long command stands in one of the groups of its help."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edge_runtime.cli.option_groups import ASKING, SERVING
from edge_runtime.cli.program import main

OF_EVERY_COMMAND = {"help"}


@pytest.mark.parametrize(("command", "groups"), [("run", ASKING), ("batch", ASKING), ("serve", SERVING)])
def test_every_option_is_in_one_group(command, groups):
    found = main.commands[command]
    options = {option.name for option in found.params if isinstance(option, click.Option)} - OF_EVERY_COMMAND
    grouped = [name for names in groups.values() for name in names]
    assert options - {*grouped} == set()
    assert len(grouped) == len({*grouped}), "an option is in two groups"


def test_no_group_names_an_option_that_is_none():
    known = {option.name for name in ("run", "batch", "serve") for option in main.commands[name].params}
    assert {name for groups in (ASKING, SERVING) for names in groups.values() for name in names} <= known


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_documented_line_completes(shell):
    """What the shells' scripts ask, in click's words: the words so far, and which one is completed."""
    document = (Path(__file__).parents[2] / "docs" / "getting-started.md").read_text("utf-8")
    assert f"_EDGE_RUNTIME_COMPLETE={shell}_source edge-runtime" in document
    asked = {"COMP_WORDS": "edge-runtime run --max-s", "COMP_CWORD": "--max-s" if shell == "fish" else "2"}
    env = {"_EDGE_RUNTIME_COMPLETE": f"{shell}_complete", **asked}
    done = CliRunner().invoke(main, [], prog_name="edge-runtime", env=env)
    assert "--max-slices" in done.stdout
