"""A bundle, installed and asked where there is neither network nor compiler: times, and what is compiled.

    python tools/try_bundle.py BUNDLE.tar

What enters: a bundle for this machine. What leaves: a line for each case. Every step runs in a network namespace
without any interface (Linux, as root or where users may make namespaces), with a shell and Python alone in its PATH.
The question is about a picture that the demo reads; of another model, any answer counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

PROGRAMS = ("sh", "dirname")
# How many kernels were loaded and compiled, as the program itself counts.
ASK = """\
import json, sys
from edge_kernels.compile import cache_statistics
from edge_runtime.cli.program import main
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    loaded, compiled = cache_statistics()
    print(f"kernels: {loaded} loaded, {compiled} compiled", file=sys.stderr)
"""


class Place:
    """A machine without network and compiler, in a folder.

    Parameters
    ----------
    folder : for all that is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder, folder / "prefix"
        (folder / "bin").mkdir()
        for name in PROGRAMS:
            (folder / "bin" / name).symlink_to(_program(name))
        (folder / "bin" / "python3").symlink_to(os.path.realpath(sys.executable))

    def run(self, *command: object, before: str = "", user: int = 0, **variables: str) -> tuple[str, str, float]:
        """Run a command there.

        Parameters
        ----------
        before : what a shell does first, as root of the namespace.
        user : number of the user there; others than 0 have no entry in the list of users.

        Returns
        -------
        said, notes, seconds : stdout, stderr and time; the program ends here if the command fails.
        """
        variables["PATH"] = str(self.folder / "bin")
        settings = [f"{name}={value}" for name, value in variables.items()]
        script = f'umask 022; {before} exec {_program("env")} -i "$@"'
        shell = [
            _program("unshare"),
            f"--map-user={user}" if user else "-r",
            "-nm",
            _program("sh"),
            "-ec",
            script,
            "sh",
        ]
        place = self.folder / "elsewhere"
        place.mkdir(exist_ok=True)
        begin = time.perf_counter()
        done = subprocess.run([*shell, *settings, *map(str, command)], capture_output=True, text=True, cwd=place)
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            sys.exit(f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        if left := [*place.iterdir()]:
            sys.exit(f"{command[0]} left {left[0].name} in the folder it was started in.")
        return done.stdout, done.stderr, seconds

    def ask(self, what: str, model: str, **settings: str | int) -> None:
        """Ask about the picture; prints a line."""
        picture = self.prefix / "share" / "edge-runtime" / "sign.png"
        question = ["run", "-m", model, picture, "What does it say?", "--greedy", "--max-tokens", "32"]
        said, notes, seconds = self.run(self.prefix / "bin" / "python", "-c", ASK, *question, **settings)  # type: ignore[arg-type]
        *lines, counted = notes.splitlines()
        print(f"{what:<44} {seconds:6.2f} s  {said.strip()!r}  {counted}", flush=True)
        for line in lines:
            print(f"    {line}")


def _program(name: str) -> str:
    return shutil.which(name) or sys.exit(f"There is no {name} here (Debian: util-linux, coreutils).")


def main() -> None:
    """Install the bundle and ask it in every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="try-bundle-") as name:
        folder = Path(name)
        place = Place(folder)
        with tarfile.open(arguments.bundle) as archive:
            archive.extractall(folder / "unpacked", filter="data")
        (top,) = (folder / "unpacked").iterdir()
        for home in ("home", "shut", "full"):
            (folder / home).mkdir()
        said, notes, seconds = place.run("/bin/sh", top / "install.sh", place.prefix, HOME=str(folder / "home"))
        print(f"{said}{notes}installed in {seconds:.1f} s")
        models = place.prefix / "share" / "edge-runtime" / "models"
        model = next((path.name for path in models.iterdir()), "demo") if models.is_dir() else "demo"

        shut, full = folder / "shut", folder / "full"
        mount = f"{_program('mount')} -t tmpfs"
        make_shut = f"{mount} -o ro none {shut};"
        # 32 KB are left, so that folders and small files can be made.
        make_full = f"{mount} -o size=64k none {full}; head -c 32k /dev/zero > {full}/file;"
        place.ask("first answer", model, HOME=str(folder / "home"))
        place.ask("second answer", model, HOME=str(folder / "home"))
        for compiling, settings in (("", {}), (", compiling", {"EDGE_RUNTIME_COMPILED": "off"})):
            place.ask(f"read-only home{compiling}", model, HOME=str(shut), before=make_shut, **settings)
            place.ask(f"full disk as home{compiling}", model, HOME=str(full), before=make_full, **settings)
            place.ask(f"no home, a user without a name{compiling}", model, user=54321, **settings)
            place.ask(f"a home that is not there{compiling}", model, HOME="/nowhere/at/all", user=54321, **settings)


if __name__ == "__main__":
    main()
