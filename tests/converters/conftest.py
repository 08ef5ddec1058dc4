"""Fixtures of the converter's tests: conversions of the tiny checkpoint, and changeable copies of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_copies import CheckpointCopy
from edge_converters import convert_checkpoint
from edge_converters.convert import Converted

Convert = Callable[[str, str], Converted]


@pytest.fixture
def copy(checkpoint: Path) -> CheckpointCopy:
    """The tiny checkpoint in memory."""
    return CheckpointCopy.of(checkpoint)


@pytest.fixture(scope="session")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """The tiny checkpoint as files of a decoder and a vision type; each pair is converted once."""
    done: dict[tuple[str, str], Converted] = {}

    def convert(decoder_type: str, vision_type: str) -> Converted:
        key = (decoder_type, vision_type)
        if key not in done:
            folder = tmp_path_factory.mktemp("-".join(key))
            done[key] = convert_checkpoint(checkpoint, folder, decoder_type=decoder_type, vision_type=vision_type)
        return done[key]

    return convert
