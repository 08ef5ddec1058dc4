"""What shared libraries need, against the linker's own word; damaged ones."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import llama_cpp
import pytest

from edge_runtime.bundle.elf import needs

LIBRARIES = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*.so"))


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_same_as_readelf(path):
    """Binutils come with every compiler."""
    said = subprocess.run(["readelf", "-dVW", path], check=True, capture_output=True, text=True).stdout
    found = needs(path.read_bytes())
    assert found is not None
    assert [*found.libraries] == re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    assert [found.folders] == re.findall(r"\(RUNPATH\).*\[(.*)\]", said)
    # "needs" section only: what the library itself defines is no need
    versions = re.findall(r"Name: GLIBC_([\d.]+)", said)
    assert found.glibc == max(tuple(map(int, version.split("."))) for version in versions)


def test_damaged_files_need_nothing_or_are_none():
    whole = LIBRARIES[0].read_bytes()
    draw = random.Random(1)
    assert needs(b"") is None
    assert needs(b"MZ" + whole) is None
    for length in (6, 63, 64, 200, 5000):
        assert needs(whole[:length]) in (None, needs(whole[:length]))
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(8):  # in the headers, which say where everything is
            damaged[draw.randrange(16, 1000)] = draw.randrange(256)
        found = needs(bytes(damaged))
        assert found is None or len(found.libraries) < 10_001
