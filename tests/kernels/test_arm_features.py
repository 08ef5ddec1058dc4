"""Which ARM features are found: what Linux and macOS say of processors, and what numba is told."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from numba.core import codegen

from edge_kernels import machine

# Bits of AT_HWCAP and AT_HWCAP2 by their names in /proc/cpuinfo. Source: Linux, arch/arm64/include/uapi/asm/hwcap.h.
HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 "
    "sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
HWCAP2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16"
)
BOARDS = {
    "Raspberry Pi 3": ("fp asimd evtstrm crc32 cpuid", ""),
    "Raspberry Pi 5": (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "dotprod",
    ),
    "Graviton 3": (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 "
        "sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16",
        "dotprod i8mm",
    ),
    "one with i8mm for SVE alone": ("fp asimd asimddp sve sve2 svei8mm", "dotprod"),
}
"""What /proc/cpuinfo says on machines, and the features that count."""


class Linux:
    """A C library on a machine with these features."""

    def __init__(self, features: str) -> None:
        names, entries = features.split(), {16: HWCAP.split(), 26: HWCAP2.split()}
        assert set(names) <= {name for bits in entries.values() for name in bits}

        def getauxval(entry: int) -> int:
            bits = entries.get(entry, [])
            return sum(1 << bits.index(name) for name in names if name in bits)

        self.getauxval = getauxval


@pytest.mark.parametrize("board", BOARDS)
def test_linux_says_what_the_processor_has(board):
    listed, expected = BOARDS[board]
    assert machine.arm_features("linux", Linux(listed)) == frozenset(expected.split())


class Mac:
    """A C library on a Mac where these numbers are known."""

    def __init__(self, numbers: dict[bytes, int]) -> None:
        self.numbers = numbers

    def sysctlbyname(self, key, value, size, new, new_size):
        assert size._obj.value == 8
        if key not in self.numbers:
            return -1
        value._obj.value = self.numbers[key]
        size._obj.value = 4
        return 0


@pytest.mark.parametrize(
    "numbers, expected",
    [
        ({b"hw.optional.arm.FEAT_DotProd": 1, b"hw.optional.arm.FEAT_I8MM": 0}, {"dotprod"}),  # M1
        ({b"hw.optional.arm.FEAT_DotProd": 1, b"hw.optional.arm.FEAT_I8MM": 1}, {"dotprod", "i8mm"}),  # M2
        ({}, set()),
    ],
)
def test_macos_says_what_the_processor_has(numbers, expected):
    assert machine.arm_features("darwin", Mac(numbers)) == expected


@pytest.mark.parametrize("system", ["linux", "darwin", "win32", "freebsd14"])
def test_a_system_that_does_not_say_gives_nothing(system):
    assert machine.arm_features(system, SimpleNamespace()) == frozenset()


@pytest.fixture
def on_arm(monkeypatch):
    """A processor with dotprod, of which LLVM lists what it lists on a Raspberry Pi 5; gives what numba is set to."""
    told: list[str | None] = []
    settings = SimpleNamespace(CPU_FEATURES=None, ENABLE_AVX=1)

    def used():
        """As numba: read once, when it starts."""
        if not told:
            chosen = settings.CPU_FEATURES
            told.append(codegen.get_host_cpu_features() if chosen is None else chosen)
        return "aarch64-unknown-linux-gnu", "cortex-a76", told[0]

    target = SimpleNamespace(target_context=SimpleNamespace(codegen=lambda: SimpleNamespace(magic_tuple=used)))
    monkeypatch.setattr(machine, "_IS_ARM", True)
    monkeypatch.setattr(machine, "arm_features", lambda: frozenset({"dotprod"}))
    monkeypatch.setattr(codegen, "get_host_cpu_features", lambda: "+neon,+crc,-sve")
    monkeypatch.setattr(machine, "cpu_target", target)
    monkeypatch.setattr(machine.numba, "config", settings)
    return SimpleNamespace(settings=settings, start=used)


def test_numba_is_told_what_llvm_misses(on_arm):
    assert machine.cpu_features.__wrapped__() == {"neon", "crc", "dotprod"}
    assert on_arm.settings.CPU_FEATURES == "+neon,+crc,-sve,+dotprod"


@pytest.mark.parametrize("chosen, expected", [("", {"neon"}), ("+neon,+i8mm", {"neon", "i8mm"})])
def test_what_the_user_chose_is_left_alone(on_arm, chosen, expected):
    on_arm.settings.CPU_FEATURES = chosen
    assert machine.cpu_features.__wrapped__() == expected
    assert chosen == on_arm.settings.CPU_FEATURES


def test_numba_that_has_started_makes_code_without(on_arm, caplog):
    """LLVM would end the process at an instruction it was not told of."""
    on_arm.start()
    with caplog.at_level(logging.WARNING, "edge_kernels"):
        assert machine.cpu_features.__wrapped__() == {"neon", "crc"}
    assert "has dotprod, but numba was used before" in caplog.text
    assert "NUMBA_CPU_FEATURES=+neon,+crc,-sve,+dotprod" in caplog.text
    assert on_arm.settings.CPU_FEATURES is None


@pytest.mark.parametrize("module", ["linear.float32", "linear.int8", "attention.kv_cache", "arrays", "compile"])
def test_numba_is_told_before_any_module_starts_it(module):
    """A program may import any of them first; numba reads what it is told once."""
    program = f"""
        from edge_kernels import machine
        machine._IS_ARM, machine.arm_features = True, lambda: frozenset({{"dotprod"}})
        import edge_kernels.{module}
        assert "dotprod" in machine.cpu_features()
        assert machine.numba.config.CPU_FEATURES.endswith(",+dotprod")
    """
    unset = {name: value for name, value in os.environ.items() if name != "NUMBA_CPU_FEATURES"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=unset, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "numba was used before" not in done.stderr


def test_this_processor_is_asked_as_well():
    """Everywhere: on x86 the bits mean other things, and are not looked at."""
    assert machine.arm_features() <= {"dotprod", "i8mm"}
    if not machine._IS_ARM:
        assert not machine.cpu_features() & {"dotprod", "i8mm", "neon"}
