"""What a model will need, what is free, and what happens when the one exceeds the other."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from edge_runtime import Model, NotEnoughMemoryError
from edge_runtime.loading.memory_needs import Needs, choose_context, estimate_memory
from edge_runtime.system.memory import available_bytes

GB = 10**9


def needs(n_ctx: int) -> Needs:
    return Needs(weights=5 * GB, kv_cache=n_ctx * 147_456, compute=0, vision=GB)


@pytest.fixture
def free(monkeypatch):
    """Set the free memory."""
    return lambda n_bytes: monkeypatch.setattr(
        "edge_runtime.loading.memory_needs.available_bytes", lambda: int(n_bytes)
    )


def test_the_default_context_shrinks_with_the_memory(free):
    for n_bytes, expected in ((20 * GB, 8192), (6.8 * GB, 4096), (6.4 * GB, 2048)):
        free(n_bytes)
        assert choose_context(needs, "m", None, 40960) == expected
    assert choose_context(needs, "m", None, 512) == 512


def test_a_context_that_was_asked_for_does_not(free):
    free(6.8 * GB)
    with pytest.raises(NotEnoughMemoryError, match=r"about 7.2 GB .*KV cache for 8192 tokens 1.2.*6.8 GB are free"):
        choose_context(needs, "m", 8192, 40960)
    assert choose_context(needs, "m", 8192, 40960, force=True) == 8192


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(exact_folder, free, monkeypatch):
    free(1000)
    monkeypatch.setattr(
        "edge_runtime.decoder.llama_context.load_model", lambda *_, **__: pytest.fail("it was loaded")
    )
    with pytest.raises(NotEnoughMemoryError, match="--force"):
        Model.load(exact_folder)
    monkeypatch.undo()
    free(1000)
    with Model.load(exact_folder, force=True, n_ctx=512) as model:
        assert model.n_ctx == 512


def test_the_reckoning_grows_with_what_it_should(exact_model):
    file, encoder = exact_model.engine.decoder.file, exact_model.engine.encoder
    small, large = (estimate_memory(file, encoder, n, exact=False) for n in (1000, 2000))
    assert large.kv_cache == 2 * small.kv_cache
    assert estimate_memory(file, encoder, 1000, exact=True).kv_cache == 2 * small.kv_cache
    assert estimate_memory(file, encoder, 1000, exact=True).vision > small.vision
    assert small.weights == file.path.stat().st_size
    # 36 layers of 8 heads of 128 in float16 are 147,456 bytes; here there are 3 layers of 2 heads of 16 numbers twice
    layers, heads = file.get("qwen3.block_count", int), file.get("qwen3.attention.head_count_kv", int)
    assert small.kv_cache == 1000 * layers * heads * 2 * file.get("qwen3.attention.key_length", int) * 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_what_is_free(tmp_path: Path, version: int):
    if version == 2:
        folder, limit, used = tmp_path, "max", "current"
    else:
        folder, limit, used = tmp_path / "memory", "limit_in_bytes", "usage_in_bytes"
    folder.mkdir(exist_ok=True)
    (folder / f"memory.{limit}").write_text("1000000\n")
    (folder / f"memory.{used}").write_text("900000\n")
    (folder / "memory.stat").write_text("anon 500000\nactive_file 100000\ninactive_file 300000\n")
    assert available_bytes(tmp_path) == 500_000  # what is cached of files is given back
    (folder / f"memory.{limit}").write_text("max\n")
    assert abs(available_bytes(tmp_path) - psutil.virtual_memory().available) < GB
