"""Which of the named instruction sets this machine has besides its best: `python -m tests.older_isas avx2 ...`."""

from __future__ import annotations

import sys

from edge_kernels.machine import ISAS, cpu_features, isa

if __name__ == "__main__":
    print(*(name for name in sys.argv[1:] if ISAS[name] <= cpu_features() and name != isa()))
