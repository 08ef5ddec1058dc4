#!/bin/sh
# sh install.sh [PREFIX]: install into PREFIX ($HOME/edge-runtime), without network and compiler.
# All that needs to be known of this machine is asked by install.py; this only finds a Python for it.
# PYTHON=/path/to/python3 chooses one.
set -eu
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
for python in ${PYTHON:-} python@PYTHON@ python3; do
    if command -v "$python" >/dev/null 2>&1; then
        exec "$python" -I "$folder/install.py" "$@"
    fi
done
echo "edge-runtime: There is no python3 on this machine; expected Python @PYTHON@. Install it first" \
    "(Debian: apt install python@PYTHON@), or name it: PYTHON=/path/to/python@PYTHON@ sh install.sh" >&2
exit 1
