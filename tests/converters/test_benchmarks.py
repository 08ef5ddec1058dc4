"""The conversion benchmark's own parts: a checkpoint like the official one, and a measurement that sees memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import make_checkpoint
from benchmarks.harness import memory
from edge_converters import convert_checkpoint
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.weights.gguf_file import GGUFFile

SMALL = {
    "HIDDEN": 256,
    "MLP": 512,
    "HEADS": 2,
    "KV_HEADS": 1,
    "VISION": 64,
    "VISION_MLP": 96,
    "VISION_LAYERS": 1,
    "VOCABULARY": 2105,
    "BASE_VOCABULARY": 2000,
    "UNK_ID": 1500,
    "SHARD_BYTES": 2_000_000,
}
MEGABYTES = 300


def test_at_full_size_it_has_the_official_checkpoints_tensors() -> None:
    shapes, n_layers = make_checkpoint.plan(17.4e9)
    assert (n_layers, len(shapes)) == (36, 849)
    assert make_checkpoint.n_bytes(shapes) == 17_391_790_560


def test_a_random_checkpoint_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(make_checkpoint, name, value)
    source = tmp_path / "source"
    source.mkdir()
    shapes, n_layers = make_checkpoint.plan(6e6)
    make_checkpoint.write_config(source, n_layers)
    make_checkpoint.write_tokenizer(source, None)
    assert make_checkpoint.write_weights(source, shapes, seed=0) > 2
    files = convert_checkpoint(source, tmp_path / "out")
    tokenizer = Tokenizer(GGUFFile(files.decoder))
    assert len(tokenizer.tokens) == 2105
    assert [tokenizer.special_ids[text] for text in ("<unk>", "<|endoftext|>", "<|im_end|>")] == [1500, 2000, 2002]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory apart")
def test_memory_of_a_child_and_its_children_is_seen() -> None:
    hold = f"b = bytearray({MEGABYTES} << 20); import time; time.sleep(0.3)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    peak, seconds = memory.watch([sys.executable, "-c", nested])
    assert peak.rss > MEGABYTES << 20
    assert peak.anon > MEGABYTES << 20
    assert peak.high_water > MEGABYTES << 20
    assert peak.rss < 2 * MEGABYTES << 20
    assert seconds > 0.3
