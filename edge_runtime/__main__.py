"""`python -m edge_runtime` is the command `edge-runtime`."""

from edge_runtime.cli import main

if __name__ == "__main__":
    main(prog_name="edge-runtime")
