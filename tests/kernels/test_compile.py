"""Cache of machine code, CPU count, threads: what `compile`, `machine`, `threads` and `arrays` promise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import numpy as np
import pytest

from edge_kernels import arrays, machine, threads
from edge_kernels import compile as compilation

PACKAGE = Path(compilation.__file__).parent

USE_EVERYTHING = textwrap.dedent(
    """
    import numpy as np
    from edge_kernels.attention.float32 import attention
    from edge_kernels.attention.int16 import attention_int16
    from edge_kernels.compile import _kernels, cache_statistics
    from edge_kernels.linear.float32 import linear, pack_weight
    from edge_kernels.linear.int8 import linear_int8, linear_int8_quantized
    from edge_kernels.linear.int8_weights import pack_weight_int8
    from edge_kernels.signatures import argument_types
    from edge_kernels.simd.amx import HAS_TILES
    from edge_kernels.linear.int8_rows import layer_norm_quantized, quantize_rows
    from edge_kernels.rows.norm import layer_norm
    from edge_kernels.rows.patch_embed import patch_embed

    assert cache_statistics() == (0, 0), "something was compiled at import"
    for m in (7, 1):
        x, gain = np.ones((m, 40), np.float32), np.ones(40, np.float32)
        gain.flags.writeable = False
        weight, ends = pack_weight(np.ones((40, 40), np.float32)), np.array([0, m])
        linear(x, weight)
        linear(x[:, ::-1], weight, gain, gelu=True, residual=x)
        layer_norm(x, gain, gain, 1e-6)
        attention(x, x, x, 2, 1, ends, ends)
        attention_int16(x, x, x, 2, 1, ends, ends)
        patch_embed(x, weight, gain, x, np.zeros(m, np.int64))
        weight = pack_weight_int8(np.ones((40, 40), np.float32))
        linear_int8(x, pack_weight_int8(np.ones((40, 40), np.float32), factor=gain), gain)
        linear_int8(layer_norm_quantized(x[:, ::-1], 1e-6), weight, gain, gelu=True, residual=x)
        linear_int8(linear_int8_quantized(quantize_rows(x), weight, factor=gain), weight, residual=x)
        if HAS_TILES:
            from edge_kernels.attention.bf16 import attention_bf16
            from edge_kernels.linear.bf16_split import linear_split, pack_split
            from edge_kernels.attention.qkv_fused import pack_heads, self_attention

            attention_bf16(x, x, x[:, ::-1], 2, 0.5, ends, ends, fine_scores=m > 1)
            heads = pack_heads(np.ones((120, 40), np.float32), np.ones(120, np.float32), 2, 0.5, factor=gain)
            self_attention(quantize_rows(x), heads, ends)
            weight = pack_split(np.ones((40, 40), np.float32))
            linear_split(x, weight)
            linear_split(x[:, ::-1], pack_split(gain[:, None] * gain), gain, gelu=True, residual=x)
            from edge_kernels.attention.causal import attention_causal
            from edge_kernels.rows.decoder_rows import norm_and_rotate, rms_norm
            from edge_kernels.linear.gguf_blocks import BLOCK_BYTES, BlockWeight, linear_blocks, pack_gated, pack_rows

            wide, norm = np.ones((m, 256), np.float32), np.ones(256, np.float32)
            norm.flags.writeable = False
            for kind, size in BLOCK_BYTES.items():
                blocks = np.zeros(40 * size, np.uint8)
                blocks.flags.writeable = kind == "Q4_K"
                linear_blocks(pack_rows(wide[:, ::-1]), BlockWeight(blocks, kind, 40, 256))
                linear_blocks(pack_gated(wide, wide), BlockWeight(blocks, kind, 40, 256), residual=x)
            rms_norm(rms_norm(wide, norm, 1e-6), wide[0], 1e-6)
            norm_and_rotate(wide, norm, 1e-6, np.ones((m, 128), np.float32), np.zeros((m, 128), np.float32))
            new, before = np.zeros((m, 128), np.uint16), np.zeros((9 * m, 128), np.uint16)
            attention_causal(wide, new, new, 64, past=None if m == 1 else (before, before))
    many, ends = np.ones((400, 40), np.float32), np.array([0, 400])  # several blocks of queries
    attention_int16(many, many, many[:, ::-1], 2, 0.5, ends, ends)
    TILED = {"edge_kernels.linear.bf16_split"}  # `linear` imports it everywhere, and calls it where there are tiles
    usable = [kernel for kernel in _kernels if HAS_TILES or kernel.py_func.__module__ not in TILED]
    for kernel in usable:
        assert kernel.signatures == [argument_types(kernel.py_func)], "what is declared is compiled ahead of time"
    print(*cache_statistics(), len(usable))
    """
)


def run(code, **environment):
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


def test_a_second_process_compiles_nothing():
    run(USE_EVERYTHING)  # fills the cache where no test before has
    hits, misses, kernels = map(int, run(USE_EVERYTHING))
    assert misses == 0
    assert hits == kernels, "a kernel has more than one specialisation, or is not used above"


def test_importing_the_package_imports_nothing_heavy():
    assert run("import edge_kernels, sys; print('numba' in sys.modules, 'numpy' in sys.modules)") == ["False"] * 2


def test_the_cache_key_follows_every_source(tmp_path, monkeypatch):
    copy = shutil.copytree(PACKAGE, tmp_path / "copy")
    before = compilation._cache_key()
    monkeypatch.setattr(compilation, "__file__", str(copy / "compile.py"))
    assert compilation._cache_key() == before
    sources = list(copy.rglob("*.py"))
    assert {source.parent.name for source in sources} > {"simd", "linear", "attention", "rows"}
    for source in sources:
        source.write_bytes(source.read_bytes() + b"#\n")
        assert compilation._cache_key() != before
        before = compilation._cache_key()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A cache folder that cannot be made, and a temporary folder."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


def test_an_unusable_cache_folder_falls_back_to_a_private_temporary_one(places, caplog):
    directory = compilation.cache_directory.__wrapped__()
    assert directory is not None
    assert directory.is_relative_to(places / "temporary")
    assert len(caplog.records) == 1
    assert "NUMBA_CACHE_DIR" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no file owners on this system")
def test_a_temporary_folder_others_can_write_to_is_not_used(places, caplog):
    folder = places / "temporary" / f"edge-runtime-jit-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert compilation.cache_directory.__wrapped__() is None
    assert "every start compiles" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no file owners on this system")
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_machine_code_is_its_owners_whatever_the_umask(tmp_path, monkeypatch, umask):
    """It is executed: who could write there could do whatever we may."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "home" / name))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(umask)
    try:
        directory = compilation.cache_directory.__wrapped__()
    finally:
        os.umask(before)
    assert directory.is_relative_to(tmp_path / "home" / "edge-runtime")
    for folder in (directory, directory.parent, directory.parent.parent, tmp_path / "home"):
        assert folder.stat().st_mode & 0o022 == 0
    assert directory.stat().st_mode & 0o077 == 0
    directory.chmod(0o777)
    assert compilation.cache_directory.__wrapped__() != directory, "anybody may have written to it"


def test_numba_cache_dir_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert compilation.cache_directory.__wrapped__().parent == tmp_path


def test_other_numba_code_keeps_its_own_cache_folder():
    assert not numba.config.CACHE_DIR or "NUMBA_CACHE_DIR" in os.environ


# --- CPUs and threads ---------------------------------------------------------------------------------------


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path):
    write(tmp_path / "membership", "0::/a/b\n")
    write(tmp_path / "root/a/b/cpu.max", "max 100000\n")
    write(tmp_path / "root/a/cpu.max", "150000 100000\n")
    write(tmp_path / "root/cpu.max", "800000 100000\n")
    assert machine._cgroup_cpus(tmp_path / "root", tmp_path / "membership") == 1.5


def test_cgroup_v2_inside_a_container_reads_the_root(tmp_path):
    write(tmp_path / "membership", "0::/docker/0123\n")
    write(tmp_path / "root/cpu.max", "300000 100000\n")
    assert machine._cgroup_cpus(tmp_path / "root", tmp_path / "membership") == 3


def test_cgroup_v1_quota(tmp_path):
    write(tmp_path / "membership", "4:memory:/x\n3:cpu,cpuacct:/x\n1:name=systemd:/x\n")
    write(tmp_path / "root/cpu,cpuacct/x/cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "root/cpu,cpuacct/x/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "root/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "root/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert machine._cgroup_cpus(tmp_path / "root", tmp_path / "membership") == 0.5


def test_no_cgroup_is_no_limit(tmp_path):
    assert machine._cgroup_cpus(tmp_path, tmp_path / "missing") == float("inf")


def test_cpu_count_stays_within_affinity():
    assert 1 <= machine.cpu_count() <= len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True


def test_thread_count_can_be_set_and_put_back():
    default = threads.thread_count()
    try:
        threads.set_threads(1)
        with threads.parallel_region() as workers:
            assert workers == 1 == numba.get_num_threads()
    finally:
        threads.set_threads(None)
    assert threads.thread_count() == default
    for impossible in (0, -1, numba.config.NUMBA_NUM_THREADS + 1):
        with pytest.raises(ValueError, match="threads were asked for"):
            threads.set_threads(impossible)


def test_rows_view_shares_memory_where_it_can():
    wide = np.zeros((5, 20), np.float32)
    view, stride = arrays.rows_view(wide[:, 3:9])
    assert stride == 20
    assert view.size == 4 * 20 + 6
    assert np.shares_memory(view, wide)
    frozen = np.zeros((5, 20), np.float32)
    frozen.flags.writeable = False
    view, stride = arrays.rows_view(frozen)
    assert stride == 20
    assert view.flags.writeable, "numba would compile a second specialisation"
    assert view.ctypes.data == frozen.ctypes.data
