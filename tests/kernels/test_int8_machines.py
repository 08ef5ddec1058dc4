"""The int8 tiles of every instruction set: registers, machine code, and what this machine has not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import ir

from assembly import ARM, X86, assemble, spills
from edge_kernels import compile as compilation
from edge_kernels import machine
from edge_kernels.simd import int8 as simd_int8
from edge_kernels.simd.ir import TILES

pytestmark = pytest.mark.every_core


def test_every_instruction_set_has_its_tiles():
    assert set(machine.ISAS) == set(TILES) == set(simd_int8.DOT_TILES)
    for name, tile in simd_int8.DOT_TILES.items():
        if tile.instruction == "tdpbssd":  # has registers of its own
            continue
        registers = 32 if name.startswith(("amx", "avx512", "neon")) else 16
        spare = 2 if tile.instruction == "pairs" else 1
        operands = tile.vectors * {"smmla": 2, "pmaddubsw": 3}.get(tile.instruction, 1)
        assert tile.rows * tile.vectors + operands + spare <= registers


def assembly(name, triple, features):
    """Compile a tile by itself for some machine; gives what is in its loop's function."""
    tile = simd_int8.DOT_TILES[name]
    module = ir.Module()
    pointer, index = ir.IntType(8).as_pointer(), ir.IntType(64)
    kinds = [pointer, pointer, pointer, index, pointer, index]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    simd_int8.emit_dot_tile(builder, tile, *function.args)
    builder.ret_void()
    return assemble(module, triple, features)


@pytest.mark.parametrize(
    "name, triple, features, mnemonic, register",
    [
        ("avx512vnni", X86, "+avx512f,+avx512bw,+avx512vnni", "vpdpbusd", "%zmm"),
        ("avxvnni", X86, "+avx2,+fma,+avxvnni", "vpdpbusd", "%ymm"),
        ("avxvnni", X86, "+avx512f,+avx512vl,+avx512vnni", "vpdpbusd", "%ymm"),
        ("avx512", X86, "+avx512f,+avx512bw", "vpmaddwd", "%zmm"),
        ("avx512", X86, "+avx512f,+avx512bw", "vpmaddubsw", "%zmm"),
        ("avx2", X86, "+avx2,+fma", "vpmaddwd", "%ymm"),
        ("avx2", X86, "+avx2,+fma", "vpmaddubsw", "%ymm"),
        ("portable", X86, "", "pmaddwd", "%xmm"),
        ("neon-dot", ARM, "+neon,+dotprod", "sdot", ".4s"),
        ("neon-i8mm", ARM, "+neon,+i8mm", "smmla", ".4s"),
        ("neon", ARM, "+neon", "smull", ".4s"),
        ("portable", ARM, "+neon", "smull", ".4s"),
    ],
)
def test_the_tile_compiles_to_its_instruction(name, triple, features, mnemonic, register):
    """Machines that are not here: the code is made and read, not run."""
    tile = simd_int8.DOT_TILES[name]
    lines = assembly(name, triple, features)
    found = [line for line in lines if mnemonic in line.split() and register in line]
    assert len(found) >= tile.rows * tile.vectors
    assert len(spills(lines)) <= 16, "sums are spilled:\n" + "\n".join(spills(lines))


def test_the_tiles_of_amx_compile_to_their_instructions():
    lines = assembly("amx", X86, "+avx512f,+avx512bw,+avx512vnni,+amx-tile,+amx-int8")
    assert sum(line.startswith("tdpbssd") and "%tmm" in line for line in lines) == 4
    assert sum(line.startswith("tilestored") for line in lines) == 4


def run_with(isa, *command):
    environment = os.environ | {"EDGE_RUNTIME_ISA": isa, "PYTHONPATH": str(Path(machine.__file__).parent.parent)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_an_instruction_set_that_is_not_there_is_refused():
    absent = next(name for name in reversed(machine.ISAS) if not machine.ISAS[name] <= machine.cpu_features())
    for name, reason in ((absent, "this machine lacks"), ("mmx", "there is no such instruction set")):
        result = run_with(name, "-c", "import edge_kernels.linear.int8")
        assert result.returncode != 0
        assert f"EDGE_RUNTIME_ISA is {name!r}, but {reason}" in result.stderr
        assert "portable" in result.stderr


def test_the_instruction_set_is_part_of_the_cache_key():
    code = "from edge_kernels import compile, machine; print(machine.isa(), compile._cache_key())"
    name, key = run_with("portable", "-c", code).stdout.split()
    assert name == "portable"
    assert (key != compilation._cache_key()) == (machine.isa() != "portable")


OTHERS = [n for n, f in machine.ISAS.items() if f <= machine.cpu_features() and n != machine.isa()]


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_the_other_instruction_sets_of_this_machine_pass_too(isa):
    """Run the comparisons of `test_int8` once more on each."""
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "against_reference",
        str(Path(__file__).with_name("test_int8.py")),
    ]
    result = run_with(isa, *command)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
