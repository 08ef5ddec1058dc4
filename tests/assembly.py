"""Code for machines that are not here: LLVM IR in, lines of assembly out."""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.binding as llvm
from llvmlite import ir

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


def assemble(module: ir.Module, triple: str, features: str) -> list[str]:
    """Instructions that a module compiles to on some machine."""
    module.triple = triple
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(features=features, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    lines = machine.emit_assembly(parsed).splitlines()
    return [line.split("#")[0].strip().expandtabs(1) for line in lines if line.startswith("\t") and line[1] != "."]


def spills(lines: Sequence[str]) -> list[str]:
    """Those that move vectors to or from the stack."""
    return [
        line for line in lines if ("(%rsp)" in line or "[sp" in line) and ("mm" in line or "q" in line.split()[1])
    ]
