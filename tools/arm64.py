"""The tests on emulated 64-bit ARM: a Debian of its own in build/arm64, run by QEMU, on three kinds of processor.

    make arm64                                             sets everything up, and runs it for every processor
    .venv/bin/python tools/arm64.py setup
    .venv/bin/python tools/arm64.py check neon-dot         one of `PROCESSORS`; several may be named
    .venv/bin/python tools/arm64.py run neon-dot -- python3 -m pytest -q tests/kernels/test_int8.py

What it takes: Debian (or what is made of it), root, 3 GB, Debian's packages and PyPI's. Debian's are the emulator, a
cross-compiler, and what lies in the folder, Python among it; PyPI's are wheels for aarch64, and llama-cpp-python,
which is compiled here for there, in minutes instead of hours. So are the kernels, as `edge-runtime compile --target`
does it, where this Python has the folder's version; EDGE_RUNTIME_COMPILED=off has them compiled inside, slowly. Steps
that are done are not repeated; `rm -r build/arm64` starts again.

A processor is three things: what QEMU executes (an instruction that the processor lacks ends the program), what
Linux tells programs of it (AT_HWCAP, by QEMU), and its /proc/cpuinfo, from which LLVM takes its name (laid over the
machine's own). So kernels are chosen here as on the board. Emulation shows that results are right; it says nothing
about speed, about caches, or about the order in which a real processor's cores see each other's stores.

Mounts are in a namespace of each command and end with it. Logs are in build/arm64/logs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parents[1]
BUILD = HERE / "build" / "arm64"
ROOT, LOGS, WHEELS = BUILD / "root", BUILD / "logs", BUILD / "wheels"
KERNELS = BUILD / "kernels"
SITE = "opt/site"
SUITE, PYTHON = "bookworm", "3.11"
PROGRAMS = {
    "qemu-aarch64-static": "qemu-user-static",
    "update-binfmts": "binfmt-support",
    "debootstrap": "debootstrap",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "ninja": "ninja-build",
}
"""What is run here, and Debian's package of it."""
INSIDE = ["python3", "libgomp1", "libstdc++6"]
BINFMT = Path("/proc/sys/fs/binfmt_misc")


class Processor(NamedTuple):
    """A processor: QEMU's name of it, and what Linux writes of it in /proc/cpuinfo."""

    qemu: str
    implementer: int
    part: int
    features: str
    like: str


PROCESSORS = {
    "neon": Processor("cortex-a53", 0x41, 0xD03, "fp asimd evtstrm crc32 cpuid", "Cortex-A53: Raspberry Pi 3"),
    "neon-dot": Processor(
        "cortex-a76", 0x41, 0xD0B,
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "Cortex-A76: Raspberry Pi 5",
    ),
    "neon-i8mm": Processor(
        "max", 0x00, 0x000,
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp i8mm bf16",
        "QEMU's largest: one that LLVM knows no name of",
    ),
}  # fmt: skip
"""By the instruction set that kernels should choose there."""

TESTS = [
    "tests/kernels",
    "tests/vision",
    "tests/decoder",
    "tests/loading",
    "tests/prompt/test_build.py",
    "tests/engine/test_kernels_in_answers.py",
]
PASSED = (
    "EDGE_RUNTIME_COMPILED", "EDGE_RUNTIME_ISA", "EDGE_RUNTIME_KERNELS", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES",
    "NUMBA_NUM_THREADS",
)  # fmt: skip
"""Variables that programs inside see, too."""
QUESTION = ["examples/sign.png", "What does it say?"]
ANSWER = "CAFE"


class SetupError(Exception):
    """Something that the emulated machine needs is not to be had; says what."""


# --- setting up ---------------------------------------------------------------------------------------------


def run(*command: str | Path, **environment: str) -> None:
    """Run a command, and show it."""
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, env=os.environ | environment, cwd=HERE)


def check_host() -> None:
    """See that this is a machine which can do it; install the packages it lacks."""
    if sys.platform != "linux" or shutil.which("apt-get") is None:
        raise SetupError("This runs on Debian and what is made of it: there is no apt-get here.")
    if os.getuid() != 0:
        raise SetupError("Only root may mount and change its root folder: run it with sudo.")
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing, DEBIAN_FRONTEND="noninteractive")


def enable_emulation() -> None:
    """Let Linux start programs for ARM with QEMU, if it does not yet."""
    if not (BINFMT / "register").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    if not (BINFMT / "qemu-aarch64").exists():
        run("update-binfmts", "--enable", "qemu-aarch64")
    flags = (BINFMT / "qemu-aarch64").read_text() if (BINFMT / "qemu-aarch64").exists() else ""
    if not re.search(r"^flags: \w*F", flags, re.MULTILINE):
        raise SetupError("Linux does not start programs for ARM with a QEMU that is open already (flag F).")


def make_root() -> None:
    """Unpack Debian for arm64. Nothing is configured: that takes the emulator half an hour, and Python needs none."""
    shutil.rmtree(ROOT, ignore_errors=True)
    run(
        "debootstrap", "--foreign", "--arch=arm64", "--variant=minbase", f"--include={','.join(INSIDE)}", SUITE, ROOT,
    )  # fmt: skip
    for package in sorted((ROOT / "var/cache/apt/archives").glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as contents:
            subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", ROOT], stdin=contents.stdout, check=True)
        if contents.returncode:
            raise SetupError(f"{package} is damaged: rm -r {BUILD}, and start again.")
    for name in ("passwd", "group"):
        shutil.copy(ROOT / f"usr/share/base-passwd/{name}.master", ROOT / "etc" / name)


def requirements() -> list[str]:
    """What the package needs, llama-cpp-python aside, what that needs, and what tests need."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    own = [line for line in project["dependencies"] if not line.startswith("llama-cpp-python")]
    serving = [line for line in project["optional-dependencies"]["serve"] if not line.startswith("edge-runtime")]
    tools = [
        line for line in project["optional-dependencies"]["test"] if re.match("pytest>|hypothesis|jsonschema", line)
    ]
    return [*own, *serving, "diskcache>=5.6.1", *tools]


def install_wheels() -> None:
    """Unpack PyPI's wheels for aarch64: their own Python would take minutes to do it."""
    site = ROOT / SITE
    shutil.rmtree(site, ignore_errors=True)
    glibc = [f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)] + ["manylinux2014_aarch64"]
    platforms = [word for name in glibc for word in ("--platform", name)]
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--no-compile", "--target", site,
        "--python-version", PYTHON, "--implementation", "cp", *platforms, *requirements(),
    )  # fmt: skip


TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
"""


def build_llama_cpp() -> None:
    """Compile llama-cpp-python for any 64-bit ARM, without what it does with pictures, and unpack it."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    wanted = next(line for line in project["dependencies"] if line.startswith("llama-cpp-python"))
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    toolchain = BUILD / "toolchain.cmake"
    toolchain.write_text(TOOLCHAIN)
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", WHEELS,
        "--no-binary=llama-cpp-python", wanted,
        CMAKE_TOOLCHAIN_FILE=str(toolchain), CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF",
        _PYTHON_HOST_PLATFORM="linux-aarch64",
    )  # fmt: skip
    (wheel,) = WHEELS.glob("*.whl")
    if "aarch64" not in wheel.name:
        raise SetupError(f"{wheel.name} is not for aarch64.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(ROOT / SITE)


def compile_kernels() -> None:
    """Compile the kernels for every processor, if this Python's machine code is also theirs."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        print(f"This is not Python {PYTHON}: kernels are compiled under the emulator, which takes hours.")
        return
    shutil.rmtree(KERNELS, ignore_errors=True)
    targets = [word for name in PROCESSORS for word in ("--target", name)]
    run(sys.executable, "-m", "edge_runtime", "compile", *targets, "--output", KERNELS)


def sources_of(step: Callable[[], None]) -> str:
    """Return what a step's result depends on."""
    if step is make_root:
        return str([SUITE, *INSIDE])
    if step is compile_kernels:
        digest = hashlib.sha256()
        for source in sorted((HERE / "kernels" / "edge_kernels").rglob("*.py")):
            digest.update(source.read_bytes())
        return digest.hexdigest()
    return (HERE / "pyproject.toml").read_text()


STEPS: list[Callable[[], None]] = [make_root, install_wheels, build_llama_cpp, compile_kernels]


def setup() -> None:
    """Do what is not done yet, and all that follows it."""
    check_host()
    enable_emulation()
    BUILD.mkdir(parents=True, exist_ok=True)
    anew = False
    for step in STEPS:
        done = BUILD / f"{step.__name__}.done"
        what = sources_of(step)
        if step is compile_kernels and os.environ.get("EDGE_RUNTIME_COMPILED") == "off":
            continue
        if anew or not done.exists() or done.read_text() != what:
            anew = True
            done.unlink(missing_ok=True)
            step()
            done.write_text(what)


# --- running ------------------------------------------------------------------------------------------------

# Everything below the root folder is mounted in a namespace of this command: the sources, read-only, and what a
# process needs of the system.
ENTER = """\
set -e
cd "$ROOT"
mkdir -p src shared logs
mount --rbind /proc proc
mount --rbind /dev dev
mount --bind -o ro /sys sys
mount --bind "$CPUINFO" proc/cpuinfo
mount --bind "$HERE" src && mount -o remount,bind,ro src
if [ -d "$HERE/../shared" ]; then mount --bind "$HERE/../shared" shared && mount -o remount,bind,ro shared; fi
mount --bind "$LOGS" logs
exec chroot . /usr/bin/env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LANG=C.UTF-8 TMPDIR=/tmp \\
    QEMU_CPU="$QEMU_CPU" PYTHONPATH=/src:/src/kernels:/src/converters:/opt/site \\
    PYTHONPYCACHEPREFIX=/var/cache/python HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis $SETTINGS \\
    sh -c 'cd /src && exec "$@"' sh "$@"
"""


def describe(processor: Processor, cores: int) -> str:
    """What /proc/cpuinfo says on a machine with this processor."""
    core = (
        "processor\t: {0}\nBogoMIPS\t: 108.00\nFeatures\t: {1}\nCPU implementer\t: 0x{2:02x}\nCPU architecture: 8\n"
        "CPU variant\t: 0x0\nCPU part\t: 0x{3:03x}\nCPU revision\t: 0\n\n"
    )
    return "".join(core.format(i, processor.features, processor.implementer, processor.part) for i in range(cores))


def inside(name: str, command: Sequence[str], log: Path | None = None) -> int:
    """Run a command in the root folder, on a processor; return its exit status."""
    processor = PROCESSORS[name]
    LOGS.mkdir(parents=True, exist_ok=True)
    cpuinfo = BUILD / f"cpuinfo-{name}"
    cpuinfo.write_text(describe(processor, os.cpu_count() or 1))
    settings = {"EDGE_RUNTIME_COMPILED": f"/src/{KERNELS.relative_to(HERE)}"}
    settings |= {name: os.environ[name] for name in PASSED if name in os.environ}
    environment = {
        "ROOT": str(ROOT), "HERE": str(HERE), "LOGS": str(LOGS), "CPUINFO": str(cpuinfo), "QEMU_CPU": processor.qemu,
        "SETTINGS": " ".join(f"{name}={value}" for name, value in settings.items()),
    }  # fmt: skip
    words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", ENTER, "bash", *command]
    if log is None:
        return subprocess.run(words, env=os.environ | environment, check=False).returncode
    with log.open("a") as file:
        file.write(f"+ {' '.join(command)}\n")
        file.flush()
        return subprocess.run(
            words, env=os.environ | environment, check=False, stdout=file, stderr=subprocess.STDOUT
        ).returncode


def check(name: str) -> list[str]:
    """Run all for one processor; returns a line of the table: it, instruction set, tests, conformance, answer."""
    log = LOGS / f"{name}.log"
    LOGS.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    inside(name, ["python3", "-m", "edge_runtime", "info"], log)
    pytest = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml=/logs/{name}.xml", *TESTS]
    inside(name, pytest, log)
    conformance = []
    for path in ("exact", "quant"):
        words = ["/shared/conformance/check.py", "tests/conformance_adapter.py", "/shared/reference/fixtures"]
        if (HERE / "../shared/conformance").is_dir():
            inside(name, ["python3", *words, "--path", path], log)
    inside(name, ["python3", "-m", "edge_runtime", "run", *QUESTION], log)
    text = log.read_text()
    found = re.search(r"^kernels\W+(\S+)", text, re.MULTILINE)
    conformance = re.findall(r"^\d+ passed, \d+ failed$", text, re.MULTILINE)
    answer = text.strip().splitlines()[-1]
    return [
        PROCESSORS[name].qemu, found[1] if found else "?", counts(LOGS / f"{name}.xml"),
        " / ".join(conformance) or "not at hand", answer,
    ]  # fmt: skip


def counts(report: Path) -> str:
    """Say how many tests passed, failed and were skipped."""
    if not report.exists():
        return "did not end"
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    number = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    bad = number["failures"] + number["errors"]
    return f"{number['tests'] - bad - number['skipped']} passed, {bad} failed, {number['skipped']} skipped"


def check_all(names: Sequence[str]) -> int:
    """Run all for the processors named; print the table; 0 if everything passed."""
    lines, good = [], True
    for name in names:
        start = time.monotonic()
        line = check(name)
        good = good and line[1] == name and ", 0 failed" in line[2] and line[4] == ANSWER
        good = good and not re.search(r"passed, [1-9]", line[3])
        lines.append([*line, f"{(time.monotonic() - start) / 60:.0f} min"])
        print("|", " | ".join(lines[-1]), "|", flush=True)
    print("\nprocessor (QEMU) | instruction set | tests | conformance, exact / quant | demo | time")
    for line in lines:
        print(" | ".join(line))
    return 0 if good else 1


def main() -> int:
    """Set up, then do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["setup", "check", "run"])
    parser.add_argument("processors", nargs="*", metavar="PROCESSOR", help=", ".join(PROCESSORS))
    words = sys.argv[1:]
    command = words[words.index("--") + 1 :] if "--" in words else []
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    for name in options.processors:
        if name not in PROCESSORS:
            parser.error(f"there is no processor {name!r}: {', '.join(PROCESSORS)}.")
    if options.what == "run" and (len(options.processors) != 1 or not command):
        parser.error("run takes one processor, and a command after --.")
    try:
        setup()
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    if options.what == "run":
        return inside(options.processors[0], command)
    return check_all(options.processors or list(PROCESSORS)) if options.what == "check" else 0


if __name__ == "__main__":
    sys.exit(main())
