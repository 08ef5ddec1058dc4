"""What a start costs, counted rather than timed: nothing heavy at import, nothing compiled twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    heavy = (
        "{'numpy', 'numba', 'llama_cpp', 'tokenizers', 'jinja2', 'PIL', 'gguf', 'edge_kernels', 'edge_converters'}"
    )
    assert python(f"import sys, edge_runtime; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_no_torch_and_no_transformers():
    code = (
        "import sys; from edge_runtime import Model; "
        "import edge_converters, edge_kernels.linear.float32, edge_runtime.cli.program; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert python(code) == "[]"


ASK = f"""
from pathlib import Path
from edge_runtime import Model
from edge_kernels.compile import cache_statistics
with Model.load("demo") as model:
    content = [Path({str(EXAMPLE)!r}), "What does it say?"]
    print(model.chat([{{"role": "user", "content": content}}], greedy=True))
print(*cache_statistics())
"""


def test_a_second_process_compiles_nothing(tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (python(ASK, **cache).splitlines() for _ in range(2))
    assert first[0] == second[0] == "CAFE"
    assert int(first[1].split()[1]) > 0, "the first process must have compiled"
    assert second[1].split()[1] == "0", "the second process compiled something again"
    assert int(second[1].split()[0]) > 0
