"""The command in this process: a refusal must be one sentence, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from click.testing import CliRunner

from edge_runtime.answers import TOY_NOTICE
from edge_runtime.cli.program import main


def refused(arguments: Sequence[str], reason: str, *, after_notes: bool = False) -> str:
    """Run `edge-runtime` and check its refusal against the house rules; returns the sentence.

    One line on stderr (the last one, with `after_notes`) that begins with `edge-runtime: ` and matches `reason`,
    nothing on stdout, exit code 1, and no exception but the exit. The demo may have said before that it is a toy.
    """
    result = CliRunner().invoke(main, list(arguments))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *notes, line = result.stderr.splitlines()
    assert after_notes or not {*notes} - {TOY_NOTICE}
    assert line.startswith("edge-runtime: ")
    assert re.search(reason, line), line
    return line
