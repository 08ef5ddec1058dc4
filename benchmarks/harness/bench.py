"""The files that sides read, and the child processes that run them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.child import Child, SideError, Skipped, environment

ROOT = Path(__file__).resolve().parents[2]
MMPROJ = {"f16": "mmproj-model-f16.gguf", "q8_0": "mmproj-model-q8_0.gguf"}
DECODER = "ggml-model-Q4_K_M.gguf"
CHECKPOINT_GB = 3.9  # one decoder layer: mtmd needs a decoder for its vocabulary


def make_files(folder: Path, tokenizer: Path | None) -> None:
    """Make the random checkpoint and its conversions unless they exist."""
    missing = [kind for kind in MMPROJ if not (folder / kind / MMPROJ[kind]).exists()]
    if not missing:
        return
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "model.safetensors.index.json").exists():
        print(f"Making a random checkpoint of {CHECKPOINT_GB} GB in {checkpoint}.", flush=True)
        given = ["--tokenizer", str(tokenizer)] if tokenizer else []
        _run(["benchmarks/make_checkpoint.py", str(checkpoint), "--gb", str(CHECKPOINT_GB), *given])
    for kind in missing:
        print(f"Converting it with --vision-type {kind}.", flush=True)
        command = ["-m", "edge_runtime", "convert", str(checkpoint), "-o", str(folder / kind)]
        _run([*command, "--type", "q4_k_m", "--vision-type", kind, "--force"])


def _run(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(None), stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed with exit code {done.returncode}.")


class Bench:
    """Starts child processes for sides, and remembers which cannot run here."""

    def __init__(self, files: Path, threads: int) -> None:
        self.files, self.threads = files, threads
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        """What each side reported when it was loaded."""

    def _spec(self, side: str) -> tuple[str, dict[str, Any]]:
        peer, _, kind = side.partition("-")
        f16 = str(self.files / "f16" / MMPROJ["f16"])
        shipped = str(self.files / "q8_0" / MMPROJ["q8_0"])
        common = {"threads": self.threads}
        if peer == "ours":
            exact = kind == "exact"
            return "ours", common | {"mmproj": f16 if exact else shipped, "exact": exact}
        if peer == "mtmd":
            decoder = str(self.files / kind / DECODER)
            return "mtmd", common | {"mmproj": str(self.files / kind / MMPROJ[kind]), "decoder": decoder}
        return f"{peer}_tower", common | {"mmproj": f16, "precision": kind, "folder": str(self.files)}

    def start(self, side: str, **options: Any) -> Child:
        """Start a side without loading anything."""
        module, given = self._spec(side)
        child = Child(f"benchmarks.peers.{module}", given | options, self.files / "logs" / f"{side}.log")
        if module == "openvino_tower":
            try:
                child.call("make")
            except BaseException:
                child.close()
                raise
            # The memory and threads that quantising took must not count for the side.
            child.close()
            child = Child(f"benchmarks.peers.{module}", given | options, self.files / "logs" / f"{side}.log")
        return child

    def load(self, side: str, **options: Any) -> Child:
        """Start a side and load its weights."""
        child = self.start(side, **options)
        try:
            self.facts[side] = child.call("load")
        except BaseException:
            child.close()
            raise
        return child

    def attempt(self, side: str, run: Callable[[], Any]) -> Any:
        """Result of `run`, or None if the side is missing or fails, which is reported once."""
        if side in self.skipped or side in self.failed:
            return None
        try:
            return run()
        except Skipped as reason:
            self.skipped[side] = str(reason)
            print(f"{side}: left out, {reason}.", flush=True)
        except SideError as error:
            self.failed[side] = str(error)
            print(f"{side}: FAILED, {error}. See {self.files / 'logs' / f'{side}.log'}.", flush=True)
        return None
