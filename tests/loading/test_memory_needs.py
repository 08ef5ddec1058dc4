"""What a model will need, what is free, and what happens when the one exceeds the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_runtime import Model, NotEnoughMemoryError
from edge_runtime.loading.load import _smaller_types
from edge_runtime.loading.memory_needs import Needs, estimate_memory
from edge_runtime.loading.memory_plan import Setup, Wishes, choose_setup
from edge_runtime.store.find import find_model
from edge_runtime.system.memory import available_bytes
from edge_runtime.weights.gguf_file import GGUFFile

GB = 10**9


def needs(setup: Setup) -> Needs:
    """Of a model of full size, in round numbers."""
    kv_cache = setup.n_ctx * {"f16": 147_456, "q8_0": 78_336}[setup.kv_type]
    vision, compute = (GB // 4, 0) if setup.low_memory else (GB, GB // 10)
    return Needs(5 * GB, kv_cache, compute, vision, in_turns=setup.low_memory)


def wishes(**asked: Any) -> Wishes:
    asked = {"longest": 40960, "kv_type": "f16", "low_kv_type": "q8_0", "least_kv_type": "q8_0", **asked}
    return Wishes(**asked)


@pytest.fixture
def free(monkeypatch):
    """Set the free memory."""
    return lambda n_bytes: monkeypatch.setattr(
        "edge_runtime.loading.memory_plan.available_bytes", lambda: int(n_bytes)
    )


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (20 * GB, Setup(8192, "f16")),
        (6.9 * GB, Setup(4096, "f16")),
        (6.5 * GB, Setup(2048, "f16")),
        (6.3 * GB, Setup(4096, "q8_0", low_memory=True)),
        (5.2 * GB, Setup(2048, "q8_0", low_memory=True)),
    ],
)
def test_what_is_chosen_shrinks_with_the_memory_and_is_told_in_a_line(free, caplog, n_bytes, expected):
    free(n_bytes)
    assert choose_setup(needs, "m", wishes()) == expected
    lines = [record.getMessage() for record in caplog.records]
    if expected == Setup(8192, "f16"):
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(f"m is loaded with {expected.flags}, about {needs(expected).total / 1e9:.1f} GB: ")
    assert f"{n_bytes / 1e9:.1f} GB are free, and --ctx 8192 --kv-type f16 would take 7.3 GB" in line


def test_no_context_is_longer_than_the_model_knows(free):
    free(20 * GB)
    assert choose_setup(needs, "m", wishes(longest=512)) == Setup(512, "f16")
    assert wishes(longest=512, low_memory=True).setups() == [Setup(512, "q8_0", low_memory=True)]


def test_what_was_asked_for_is_kept(free):
    free(20 * GB)
    assert choose_setup(needs, "m", wishes(low_memory=True)) == Setup(4096, "q8_0", low_memory=True)
    assert choose_setup(needs, "m", wishes(low_memory=True, n_ctx=8192)) == Setup(8192, "q8_0", low_memory=True)
    free(6.8 * GB)
    assert choose_setup(needs, "m", wishes(n_ctx=8192)) == Setup(8192, "q8_0", low_memory=True)
    asked = wishes(n_ctx=8192, low_kv_type="f16")
    assert choose_setup(needs, "m", asked) == Setup(8192, "f16", low_memory=True)
    with pytest.raises(NotEnoughMemoryError, match=r"KV cache for 16384 tokens 2.4.*6.8 GB are free"):
        choose_setup(needs, "m", wishes(n_ctx=16384, low_kv_type="f16"))
    assert choose_setup(needs, "m", wishes(n_ctx=16384), force=True) == Setup(16384, "f16")


@pytest.mark.parametrize(
    ("n_bytes", "asked", "advice"),
    [
        (6.8 * GB, {"n_ctx": 40960}, "what would fit: --ctx 4096 --kv-type f16 needs about 6.7 GB"),
        (5.6 * GB, {"n_ctx": 8192}, "what would fit: --low-memory --ctx 4096 --kv-type q8_0 needs about 5.3 GB"),
        (
            5.2 * GB,
            {"low_kv_type": "f16", "kv_type": "f16"},
            "--low-memory --ctx 2048 --kv-type q8_0 needs about 5.2 GB",
        ),
        (4.7 * GB, {}, "the same model in IQ4_XS needs about 4.4 GB with --low-memory --ctx 2048 --kv-type q8_0"),
        (4.0 * GB, {}, "the same model in IQ3_M needs about 3.8 GB with"),
        (3.0 * GB, {}, "nothing would fit here, not even IQ3_M, which needs about 3.8 GB with"),
    ],
)
def test_a_refusal_names_what_would_fit(free, n_bytes, asked, advice):
    free(n_bytes)
    smaller = [("Q4_K_S", int(4.9 * GB)), ("IQ4_XS", int(4.25 * GB)), ("IQ3_M", int(3.62 * GB))]
    with pytest.raises(NotEnoughMemoryError) as caught:
        choose_setup(needs, "m", wishes(**asked), other_types=smaller)
    assert advice in str(caught.value)
    assert str(caught.value).endswith("; close other programs, or pass --force.")


def test_smaller_types_are_told_from_the_header(exact_folder):
    """Largest first, without the table that is not held in memory, as the needs have it."""
    (path,) = (path for path in exact_folder.glob("*.gguf") if "mmproj" not in path.name)
    file = GGUFFile(path)
    found = _smaller_types(file)
    sizes = [n_bytes for _, n_bytes in found]
    assert sizes == sorted(sizes, reverse=True)
    assert {"F16", "Q4_K_M", "IQ3_M"} <= {mix for mix, _ in found}
    assert sizes[0] < path.stat().st_size - file.tensors["token_embd.weight"].n_bytes


def test_its_own_type_is_no_smaller_one():
    """The file has more bytes than its tensors: a vocabulary."""
    found = {mix for mix, _ in _smaller_types(GGUFFile(find_model("demo").decoder))}
    assert "Q4_K_M" not in found
    assert "IQ3_M" in found


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
    # A prompt reads a few rows of the table of embeddings, and every token all the rest.
    assert small.weights == file.path.stat().st_size - file.tensors["token_embd.weight"].n_bytes
    # 36 layers of 8 heads of 128 in float16 are 147,456 bytes; here there are 3 layers of 2 heads of 16 numbers twice
    layers, heads = file.get("qwen3.block_count", int), file.get("qwen3.attention.head_count_kv", int)
    assert small.kv_cache == 1000 * layers * heads * 2 * file.get("qwen3.attention.key_length", int) * 2


def group(folder: Path, version: int, limit: int | str, used: int, cached: int) -> None:
    """Write what the system says of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    lines = f"anon {used - cached}\nactive_file {cached // 4}\ninactive_file {cached - cached // 4}\n"
    if version == 1:  # its first lines are without the groups inside, its usage is with them
        lines = lines.replace(str(cached // 4), "7") + f"total_inactive_file {cached}\ntotal_active_file 0\n"
    (folder / "memory.stat").write_text(lines)


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_what_is_free(tmp_path: Path, version: int):
    """That of the process, wherever it lies below the mounted folder, and those around it."""
    root = tmp_path if version == 2 else tmp_path / "memory"
    own = tmp_path / "own"
    own.write_text("12:cpu,cpuacct:/other\n4:memory:/a/b\n0::/a/b\n")
    group(root, version, "max", 5 * GB, 0)
    machine = psutil.virtual_memory().available
    assert abs(available_bytes(tmp_path, own) - machine) < GB
    group(root / "a", version, 1_000_000, 900_000, 400_000)
    assert available_bytes(tmp_path, own) == 500_000  # what is cached of files is given back
    group(root / "a" / "b", version, 600_000, 400_000, 100_000)
    assert available_bytes(tmp_path, own) == 300_000
    group(root / "a" / "b", version, "max", 400_000, 100_000)
    assert available_bytes(tmp_path, own) == 500_000
    own.write_text("4:memory:/elsewhere\n0::/elsewhere\n")
    assert abs(available_bytes(tmp_path, own) - machine) < GB


@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_mounted_group_is_its_own(tmp_path: Path, version: int):
    """The path is that of the host, and leads nowhere inside."""
    own = tmp_path / "own"
    own.write_text("4:memory:/docker/0123\n0::/docker/0123\n")
    group(tmp_path if version == 2 else tmp_path / "memory", version, 1_000_000, 900_000, 400_000)
    assert available_bytes(tmp_path, own) == 500_000
    assert available_bytes(tmp_path, tmp_path / "nowhere") == 500_000


def test_a_group_that_is_slowed_down_is_full(tmp_path: Path):
    group(tmp_path, 2, 1_000_000, 300_000, 0)
    (tmp_path / "memory.high").write_text("700000\n")
    assert available_bytes(tmp_path, tmp_path / "nowhere") == 400_000


def test_a_group_without_room_has_none(tmp_path: Path):
    group(tmp_path, 2, 1000, 2000, 0)
    assert available_bytes(tmp_path, tmp_path / "nowhere") == 0
