"""No command asks the network for anything unless it is told to: `pull`, `--endpoint`, names of a hub to convert."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.store.pull import pull
from store.conftest import hub, store  # noqa: F401 - fixtures

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"

# Python tells its audit hooks of every use of a socket, wherever in a library it is. A child process, such as those
# that decode files, is told by its environment to have the hook, too.
HOOK = """\
import os, socket, sys
USES = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
        "socket.gethostbyaddr", "socket.getnameinfo")
def hook(event, arguments):
    if event in USES and not (arguments and getattr(arguments[0], "family", None) == getattr(socket, "AF_UNIX", -1)):
        with open(os.environ["USES_OF_THE_NETWORK"], "a") as file:
            file.write(f"{event} {arguments[1:]!r} of {sys.argv}\\n")
        raise PermissionError(f"{event} is forbidden in this test")
sys.addaudithook(hook)
"""
RUN = """\
import json, socket, sys
from edge_runtime.cli.program import main
for arguments in json.load(sys.stdin):
    print("##", arguments[0], flush=True)
    sys.argv = ["edge-runtime", *arguments]
    try:
        main(arguments, standalone_mode=False)
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
print("## control", flush=True)
sys.argv = ["control"]
try:
    socket.getaddrinfo("localhost", 80)
except PermissionError:
    print("refused")
"""


@pytest.mark.slow
def test_commands_use_no_network(tmp_path, checkpoint, hub, store):  # noqa: F811
    """Everything that people do with what is on their machine."""
    pull("hf:org/pair")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    commands = [
        ["list"],
        ["show", "hf:org/pair"],
        ["info"],
        ["info", "demo"],
        ["info", "hf:org/pair"],
        ["run", str(EXAMPLE), "What does it say?", "--greedy", "--max-tokens", "8"],
        ["run", "Who are you?", "--max-tokens", "2"],
        ["convert", str(checkpoint), "-o", str(tmp_path / "converted"), "--type", "q8_0"],
        ["batch", str(EXAMPLE), "-p", "What does it say?", "-o", str(tmp_path / "out.jsonl"), "--max-tokens", "2"],
        ["export", "ollama", "hf:org/pair", "-o", str(tmp_path)],
        ["rm", "hf:org/pair"],
    ]
    uses = tmp_path / "uses"
    place = [str(tmp_path / "hook"), *(path for path in sys.path if path)]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.endswith("_PROXY")},
        "PYTHONPATH": os.pathsep.join(place),
        "USES_OF_THE_NETWORK": str(uses),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(commands), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("## ")[1:]
    assert [text.split()[0] for text in said] == [*(command[0] for command in commands), "control"]
    assert "CAFE" in said[5]
    assert said[-1] == "control\nrefused\n", "the hook sees and forbids"
    (control,) = uses.read_text().splitlines()
    assert control.startswith("socket.getaddrinfo ")
    assert control.endswith("of ['control']")
