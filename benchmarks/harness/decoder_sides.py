"""The sides of benchmarks of the decoder: our kernels, and llama.cpp with its weights as they are and repacked."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.child import Child

MODULE = "benchmarks.peers.decoder_calls"
OURS = "ours"
SIDES: dict[str, dict[str, bool]] = {
    OURS: {"kernels": True, "repack": False},
    "llama.cpp": {"kernels": False, "repack": False},
    "llama.cpp, repacked": {"kernels": False, "repack": True},
}


def parser_of(description: str) -> argparse.ArgumentParser:
    """Command line that these benchmarks have in common."""
    from edge_kernels.machine import cpu_count

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("decoder", type=Path, help="GGUF file; at full size it takes 5 GB, repacked 4 GB more")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cpu_count(), help="default: physical cores")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    return parser


@contextmanager
def opened(options: argparse.Namespace, logs: Path) -> Iterator[dict[str, Child]]:
    """Every side in a process of its own; all map the same file."""
    with ExitStack() as stack:
        yield {
            side: stack.enter_context(
                Child(
                    MODULE,
                    {"decoder": str(options.decoder), "threads": options.threads, **SIDES[side]},
                    logs / f"{n}.log",
                )
            )
            for n, side in enumerate(options.sides)
        }


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Facts about where it ran."""
    from edge_kernels.machine import cpu_name, isa

    return {"threads": options.threads, "kernels": isa(), "cpu": cpu_name(), "decoder": options.decoder.name}
