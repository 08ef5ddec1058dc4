"""What a process for untrusted files and templates gives up before it reads any: memory, network, files, programs.

Memory limits apply on Linux (and as far as macOS enforces them), everything else on Linux only, with its two
mechanisms for unprivileged processes: a seccomp filter refuses system calls (sockets, programs, other processes), and
Landlock (Linux 5.13) allows reading the files of Python and the system, and writing none. Where the kernel lacks one
of them, the other still applies. Sources: seccomp(2), landlock(7), linux/{audit,filter,seccomp,landlock}.h.

This file imports nothing from the package.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""As the kernel identifies them to a filter."""

# Refused system calls, with their numbers on x86-64 and ARM64; None where there is no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "accept": (43, 202),
    "accept4": (288, 242),
    "bind": (49, 200),
    "listen": (50, 201),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # A shared buffer that is truncated while it is read would end the reader.
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
}
_CLONE, _CLONE3 = (56, 220), 435
_CLONE_THREAD = 0x10000
_X32 = 0x40000000  # x86-64's other numbering, which would bypass the list

_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/etc/fonts", "/etc/localtime", "/sys/devices/system/cpu"),
    *("/dev/null", "/dev/urandom"),
)
"""What libraries read at run time: fonts that a PDF does not embed, the time zone, the number of CPUs."""


def limit_resources(max_bytes: int) -> bool:
    """Limit the address space of this process and forbid writing files; returns whether the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    for name, most in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, max_bytes)):
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(name, (most, most))
        except (OSError, ValueError):  # macOS accepts no limit below what is in use
            return False
    return True


def limit_time(seconds: float) -> None:
    """End this process after so much more CPU time, in case nobody is left to end it."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (until if hard == resource.RLIM_INFINITY else min(until, hard), hard))


@contextmanager
def ended_with(descriptor: int) -> Iterator[None]:
    """End this process when the other end of a pipe is closed: nobody is left to read its results.

    The kernel then sends SIGIO, whatever a library is doing; also when something is written to the pipe.
    """
    try:
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    except (ImportError, AttributeError, OSError):  # Windows
        yield
        return
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def be_killed_first() -> None:
    """Have the kernel kill this process when memory runs out, rather than the one that it works for."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def give_up_system_calls() -> bool:
    """Give up network, programs and other processes, for good; returns whether the system can."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    program = _program(_ARCHITECTURES[machine], (*_ARCHITECTURES,).index(machine))
    code = ctypes.create_string_buffer(b"".join(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    found = Program(len(program), ctypes.addressof(code))
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(set_seccomp, by_filter, ctypes.byref(found), 0, 0) == 0)


def _program(architecture: int, column: int) -> list[bytes]:
    """A filter in the kernel's classic BPF: eight bytes an instruction."""
    load, jump_equal, jump_from, jump_set, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    number_at, architecture_at, first_argument_at = 0, 4, 16
    allow, error = 0x7FFF0000, 0x00050000
    not_permitted, not_there = error | 1, error | 38

    def step(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_so, if_not, value)

    refused = [numbers[column] for numbers in _REFUSED.values()]
    program = [
        step(load, architecture_at),
        step(jump_equal, architecture, 1, 0),
        step(leave, not_permitted),
        step(load, number_at),
        step(jump_from, _X32, 0, 1),
        step(leave, not_permitted),
    ]
    for number in refused:
        if number is not None:
            program += [step(jump_equal, number, 0, 1), step(leave, not_permitted)]
    return [
        *program,
        # glibc starts threads with clone3, whose flags lie in memory, which a filter cannot see; then with clone.
        step(jump_equal, _CLONE3, 0, 1),
        step(leave, not_there),
        step(jump_equal, _CLONE[column], 0, 3),
        step(load, first_argument_at),
        step(jump_set, _CLONE_THREAD, 1, 0),
        step(leave, not_permitted),
        step(leave, allow),
    ]


def give_up_files(readable: Sequence[str] = ()) -> bool:
    """Allow reading only Python's own files and the system's, for good; returns whether the system can.

    Parameters
    ----------
    readable : further files and folders that may be read.
    """
    if sys.platform != "linux":
        return False
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # on every architecture
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(create_ruleset, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    kinds = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # bits of access to files that this kernel knows
    execute, read_file, read_folder = 1 << 0, 1 << 2, 1 << 3
    handled = struct.pack("=Q", (1 << kinds) - 1)
    ruleset = libc.syscall(create_ruleset, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    try:
        for path in dict.fromkeys((*_SYSTEM, sys.prefix, sys.base_prefix, *filter(None, sys.path), *readable)):
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            allowed = execute | read_file | (read_folder if Path(path).is_dir() else 0)
            libc.syscall(add_rule, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
        no_new_privileges = 38
        if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
            return False
        return bool(libc.syscall(restrict_self, ruleset, 0) == 0)
    finally:
        os.close(ruleset)
