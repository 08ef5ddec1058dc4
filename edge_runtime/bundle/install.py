"""Installs a bundle: python3 install.py [PREFIX]. Part of every bundle; install.sh calls it.

What enters: the folder that this file lies in, and the place to install to. What leaves: an environment with
edge-runtime and its model there, or nothing and one sentence. It uses the standard library alone, and runs on
Python 3.6, to tell people with an old Python so.
"""

import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, Dict, List

HERE = Path(__file__).resolve().parent
CHUNK_BYTES = 1 << 20
SPARE_BYTES = 64 << 20
ILLEGAL_INSTRUCTION = -4


class Refused(Exception):  # noqa: N818 - the name says what happened
    """Why it cannot be installed: what was found, what was expected, what to do."""


def main(arguments: List[str]) -> None:
    """Install to the folder named, or to edge-runtime in the home folder."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(
            "Usage: sh install.sh [PREFIX]\n\nInstalls edge-runtime into PREFIX; $HOME/edge-runtime if none is named."
        )
        sys.exit(0 if arguments in (["-h"], ["--help"]) else 2)
    try:
        install(place(arguments))
    except Refused as error:
        print(f"edge-runtime: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"edge-runtime: {error.filename or HERE}: {error.strerror}; nothing was installed.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nedge-runtime: Stopped; nothing was installed.", file=sys.stderr)
        sys.exit(130)


def place(arguments: List[str]) -> Path:
    """Return where to install to."""
    if arguments:
        return Path(os.path.abspath(arguments[0]))
    home = os.path.expanduser("~")
    if not os.path.isdir(home):
        raise Refused("There is no home folder; name the folder to install to: sh install.sh /opt/edge-runtime")
    return Path(home) / "edge-runtime"


def install(prefix: Path) -> None:
    """Check everything that can be checked, then install."""
    try:
        facts = json.loads((HERE / "bundle.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise Refused(f"{HERE / 'bundle.json'} is missing or damaged; unpack the bundle again.") from None
    check_machine(facts)
    check_python(facts)
    check_processor(facts)
    check_place(prefix, facts)
    print(f"Checking {HERE} ...", flush=True)
    check_files()
    print(f"Installing into {prefix} ...", flush=True)
    made = [path for path in (prefix, *prefix.parents) if not path.exists()]
    try:
        make_environment(prefix, facts)
        put_libraries(prefix, facts)
        put_model(prefix, facts)
        try_it(prefix, facts)
    except BaseException:  # Ctrl-C, too: half an installation helps nobody
        remove(prefix, made)
        raise
    say_how(prefix, facts)


def check_machine(facts: Dict[str, Any]) -> None:
    """Refuse another system or architecture."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    bits = 8 * struct.calcsize("P")
    if not sys.platform.startswith("linux") or machine != facts["machine"] or bits != 64:
        raise Refused(
            f"This machine is {sys.platform} on {platform.machine()} with a Python of {bits} bits, the bundle is for "
            f"{facts['target']}; make one for this machine with 'edge-runtime bundle --target'."
        )
    try:
        name, glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except ValueError:
        name, glibc = "", ""
    if name != "glibc":
        raise Refused(
            "This system's C library is not glibc (Alpine's is musl), and the wheels in the bundle need it; install "
            "on Debian, Ubuntu, Fedora or another system with glibc."
        )
    if numbers(glibc) < numbers(facts["glibc"]):
        raise Refused(
            f"This system has glibc {glibc}, the bundle needs {facts['glibc']} or newer; make the bundle on a system "
            "as old as this one, or with wheels for it: 'edge-runtime bundle --wheels FOLDER'."
        )


def check_python(facts: Dict[str, Any]) -> None:
    """Refuse another Python, or one that cannot make environments."""
    wanted = facts["python"]
    found = "{}.{}".format(*sys.version_info[:2])
    kind = platform.python_implementation()
    if found != wanted or kind != "CPython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        free = " without a global lock" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
        raise Refused(
            f"{sys.executable} is {kind} {found}{free}, the bundle is for CPython {wanted}; name one: "
            f"PYTHON=/path/to/python{wanted} sh install.sh, or make a bundle for this one with 'edge-runtime bundle "
            f"--python {found}'."
        )
    try:
        import venv  # noqa: F401
    except ImportError:
        raise Refused(
            f"{sys.executable} lacks the module venv; install it (Debian: python{wanted}-venv) and try again."
        ) from None


def check_processor(facts: Dict[str, Any]) -> None:
    """Refuse a processor that lacks what the libraries were compiled for."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return  # the last step tries the library
    flags = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == {"x86_64": "flags", "aarch64": "Features"}.get(facts["machine"]):
            flags.update(value.split())
    missing = [flag for flag in facts["cpu_flags"] if flag not in flags]
    if flags and missing:
        raise Refused(
            f"This processor lacks {', '.join(missing)}, which the llama.cpp in the bundle was compiled for; make "
            "the bundle with a llama-cpp-python compiled for older processors (CMAKE_ARGS=-DGGML_NATIVE=OFF)."
        )


def check_place(prefix: Path, facts: Dict[str, Any]) -> None:
    """Refuse a folder that is in use, cannot be written, or has no space."""
    if prefix.exists() and (not prefix.is_dir() or any(prefix.iterdir())):
        raise Refused(f"{prefix} is there already and not empty; remove it, or name another folder.")
    if ":" in str(prefix) or "\n" in str(prefix):
        raise Refused(
            f"{str(prefix)!r} has a colon or a line break in its name, and environments cannot; name another."
        )
    parent = next(path for path in (prefix, *prefix.parents) if path.is_dir())
    if not os.access(str(parent), os.W_OK | os.X_OK):
        raise Refused(f"{parent} cannot be written to; name another folder: sh install.sh PREFIX")
    needed = facts["installed_bytes"] + SPARE_BYTES
    if facts["model"] and os.stat(str(parent)).st_dev != os.stat(str(HERE)).st_dev:
        needed += facts["model"]["bytes"]
    free = shutil.disk_usage(str(parent)).free
    if free < needed:
        raise Refused(
            f"{parent} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed; free some space, or name a "
            "folder on another disk: sh install.sh PREFIX"
        )


def check_files() -> None:
    """Compare every file with its checksum."""
    again = "copy the bundle anew and unpack it again"
    try:
        lines = (HERE / "SHA256SUMS").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        raise Refused(f"{HERE / 'SHA256SUMS'} is missing or damaged; {again}.") from None
    listed = set()
    for line in lines:
        digest, _, name = line.partition("  ")
        path = HERE / name
        if not path.is_file():
            raise Refused(f"{path} is missing; {again}.")
        if sha256(path) != digest:
            raise Refused(f"{path} is damaged: its checksum differs from the one in SHA256SUMS; {again}.")
        listed.add(name)
    for path in sorted((HERE / "wheels").iterdir()):
        if f"wheels/{path.name}" not in listed:
            raise Refused(f"{path} is no part of the bundle; remove it, or {again}.")


def make_environment(prefix: Path, facts: Dict[str, Any]) -> None:
    """Make the environment and install the wheels into it, with the pip of the bundle."""
    # Links, as on most systems: a copied python would look for its library beside itself.
    run([sys.executable, "-I", "-m", "venv", "--without-pip", "--symlinks", str(prefix)], prefix)
    temporary = prefix / "tmp"
    temporary.mkdir()
    pip = HERE / "wheels" / facts["pip"] / "pip"
    options = ["--isolated", "--no-index", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    options += ["--no-warn-script-location", "--find-links", str(HERE / "wheels")]
    run(
        [str(prefix / "bin" / "python"), "-I", str(pip), "install", *options, facts["requirement"]],
        prefix,
        TMPDIR=str(temporary),
        PIP_CONFIG_FILE=os.devnull,
    )
    shutil.rmtree(str(temporary))


def put_libraries(prefix: Path, facts: Dict[str, Any]) -> None:
    """Put libraries of the bundle beside those that need them, unless the system has its own."""
    for name, folder in facts["libraries"].items():
        if run_quietly([sys.executable, "-I", "-c", f"import ctypes; ctypes.CDLL({name!r})"]) == 0:
            continue
        source = HERE / "libraries" / name
        if not source.is_file():
            raise Refused(
                f"This system lacks {name}, which llama.cpp needs; install it first (Debian: libgomp1; Fedora: "
                "libgomp)."
            )
        shutil.copyfile(str(source), str(site_packages(prefix, facts) / folder / name))


def put_model(prefix: Path, facts: Dict[str, Any]) -> None:
    """Put a picture to try there, and the model where edge-runtime looks for it, without a copy on the same disk."""
    model = facts["model"]
    shared = prefix / "share" / "edge-runtime"
    shared.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(str(HERE / "sign.png"), str(shared / "sign.png"))
    if not model:
        return
    folder = shared / "models" / model["name"]
    folder.mkdir(parents=True)
    for name in model["files"]:
        source, target = HERE / "models" / model["name"] / name, folder / name
        try:
            os.link(str(source), str(target))
        except OSError:
            shutil.copyfile(str(source), str(target))


def try_it(prefix: Path, facts: Dict[str, Any]) -> None:
    """Load the libraries once, so that what does not work here is found now."""
    command = [str(prefix / "bin" / "edge-runtime"), "info", "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=environment()
    )
    if done.returncode == ILLEGAL_INSTRUCTION:
        raise Refused(
            "This processor lacks an instruction that a library in the bundle uses; make the bundle with a "
            "llama-cpp-python compiled for older processors (CMAKE_ARGS=-DGGML_NATIVE=OFF)."
        )
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-600:] or f"it ended with {done.returncode}"
        raise Refused(f"It was installed, but does not run, and was removed again: {reason}")


def say_how(prefix: Path, facts: Dict[str, Any]) -> None:
    """Print the command to try."""
    command = prefix / "bin" / "edge-runtime"
    option = f" -m {facts['model']['name']}" if facts["model"] else ""
    picture = prefix / "share" / "edge-runtime" / "sign.png"
    print(f'Installed. Try it:\n\n    {command} run{option} {picture} "What does it say?"\n')
    print(f"Remove it with: rm -r {prefix}")


def site_packages(prefix: Path, facts: Dict[str, Any]) -> Path:
    """Return the folder of the environment's packages."""
    return prefix / "lib" / f"python{facts['python']}" / "site-packages"


def run(command: List[str], prefix: Path, **variables: str) -> None:
    """Run a step; its last words become the sentence if it fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        env=environment(**variables),
    )
    if done.returncode != 0:
        reason = " ".join(done.stdout.split())[-600:] or f"it ended with {done.returncode}"
        raise Refused(f"{prefix} cannot be filled, and was removed again: {reason}")


def environment(**variables: str) -> Dict[str, str]:
    """Variables for a step: those of this process but for settings of pip and Python, and further ones."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    found.update(variables)
    return found


def run_quietly(command: List[str]) -> int:
    """Run a command without a word; returns its exit status."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def remove(prefix: Path, made: List[Path]) -> None:
    """Remove what was installed, and the folders that were made for it."""
    for path in prefix.iterdir() if prefix.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path), ignore_errors=True)
        else:
            path.unlink()
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return


def sha256(path: Path) -> str:
    """Checksum of a file in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            if not chunk:
                return found.hexdigest()
            found.update(chunk)


def numbers(version: str) -> List[int]:
    """2.36 as [2, 36]; an empty text, which asks for nothing, as []."""
    return [int(part) for part in version.split(".")] if version else []


if __name__ == "__main__":
    main(sys.argv[1:])
