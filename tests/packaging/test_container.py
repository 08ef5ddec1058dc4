"""deploy/Containerfile and what it names: no container engine is needed, each step is compared with the project."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import click
import pytest

from edge_runtime.bundle.selection import EXTRAS
from edge_runtime.cli.program import main
from edge_runtime.server.settings import Settings
from server.conftest import running

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "Containerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


class Step(NamedTuple):
    """An instruction: RUN, COPY and others, and what follows."""

    word: str
    rest: str


def read_stages() -> list[list[Step]]:
    """Stages of the container file, each beginning with its FROM; what stands before the first FROM is one, too."""
    text = re.sub(r"(?m)^\s*#.*\n", "", FILE.read_text("utf-8")).replace("\\\n", " ")
    stages: list[list[Step]] = [[]]
    for line in filter(None, map(str.strip, text.splitlines())):
        step = Step(*line.split(maxsplit=1))
        stages += [[]] if step.word == "FROM" else []
        stages[-1].append(step)
    return stages


HEAD, BUILD, LAST = read_stages()


def of(stage: list[Step], word: str) -> list[str]:
    return [step.rest for step in stage if step.word == word]


def arguments() -> dict[str, str]:
    """Build arguments and their defaults."""
    found = (shlex.split(rest)[0].partition("=") for stage in (HEAD, BUILD) for rest in of(stage, "ARG"))
    return {name: value for name, _, value in found}


def environment(stage: list[Step]) -> dict[str, str]:
    return dict(word.split("=", 1) for rest in of(stage, "ENV") for word in shlex.split(rest))


def commands(stage: list[Step]) -> Iterator[list[str]]:
    """Each command of the RUN steps, build arguments filled in."""
    for rest in of(stage, "RUN"):
        text = re.sub(r"\$\{(\w+)\}", lambda name: arguments()[name[1]], rest)
        yield from (shlex.split(part) for part in text.split("&&"))


def parse(command: list[str]) -> None:
    """Check a command line of ours as the program does, without running it."""
    name, *words = command
    found = main.get_command(click.Context(main), name)
    assert found is not None, f"there is no command {name}"
    found.make_context(name, words)


def test_both_stages_have_one_python_that_this_project_takes():
    one, other = (of(stage, "FROM")[0] for stage in (BUILD, LAST))
    assert one == f"{other} AS build"  # the environment of the first runs in the second
    assert f"--from=build {environment(BUILD)['PATH'].partition('/bin:')[0]} " in of(LAST, "COPY")[0]
    least = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, arguments()["PYTHON"].split("."))) >= least


def test_what_is_copied_is_in_the_project_and_not_ignored():
    copied = [source for rest in of(BUILD, "COPY") for source in rest.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored
    built = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in built["packages"]:
        assert PurePosixPath(package).parts[0] in copied
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)


def test_the_first_stage_installs_the_project_and_the_usual_extras():
    (own,) = [command[-1] for command in commands(BUILD) if command[:2] == ["pip", "install"] and "[" in command[-1]]
    assert sorted(own.removeprefix(".[").removesuffix("]").split(",")) == sorted(EXTRAS)
    assert set(EXTRAS) <= set(PROJECT["optional-dependencies"])


def test_llama_cpp_is_compiled_in_the_version_that_the_project_asks_for():
    (code,) = [found[1] for rest in of(BUILD, "RUN") if (found := re.search(r'python -c "([^"]+)"', rest))]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [done.stdout.strip()] == [line for line in PROJECT["dependencies"] if line.startswith("llama-cpp-python")]


def test_kernels_are_compiled_in_the_first_stage():
    (command,) = [command[1:] for command in commands(BUILD) if command[0] == "edge-runtime"]
    parse(command)
    assert command[0] == "compile"
    assert "-o" not in command  # into the installed package, where runs find them


def test_the_last_stage_has_no_compiler_and_no_rights():
    words = {word for command in commands(LAST) for word in command}
    assert not words & {"pip", "build-essential", "gcc", "g++", "cmake"}
    (user,) = of(LAST, "USER")
    assert user.isdigit()  # a number, so that an orchestrator sees that it is not root
    assert int(user) != 0
    (made,) = [command for command in commands(LAST) if command[0] == "useradd"]
    assert made[made.index("--uid") + 1] == user
    assert made[made.index("--home-dir") + 1] == of(LAST, "VOLUME")[0]
    names = [step.word for step in LAST]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name in ("RUN", "COPY"))


def test_all_that_is_written_is_in_the_volume():
    (volume,) = of(LAST, "VOLUME")
    paths = {name: value for name, value in environment(LAST).items() if value.startswith("/") and name != "PATH"}
    assert all(PurePosixPath(value).is_relative_to(volume) for value in paths.values())
    assert {"HOME", "EDGE_RUNTIME_MODELS", "NUMBA_CACHE_DIR"} <= paths.keys()


def test_the_server_is_started_where_the_port_is_published():
    command = [*json.loads(of(LAST, "ENTRYPOINT")[0]), *json.loads(of(LAST, "CMD")[0])]
    assert command[0] in PROJECT["scripts"]
    parse(command[1:])
    assert of(LAST, "EXPOSE") == [str(Settings().port)]


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_health_check_asks_a_server_that_is_there(key: str | None):
    _, _, words = of(LAST, "HEALTHCHECK")[0].partition(" CMD ")
    _, *check = json.loads(words)
    with running(Settings(port=0, api_key=key)) as served:
        own = f"http://127.0.0.1:{Settings().port}"
        assert own in check[-1]
        asked = [part.replace(own, served.url) for part in check]
        subprocess.run([sys.executable, *asked], check=True, timeout=60)
    done = subprocess.run([sys.executable, *asked], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1  # nobody listens any more
    assert "Connection refused" in done.stderr
