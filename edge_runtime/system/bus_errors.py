"""A mapped file that is truncated while it is read → a sentence on stderr before the process ends.

Reading a page of a mapped file that is no longer there raises SIGBUS, which ends the process without a word. Python
cannot handle it: its handlers run between two bytecode instructions, and the current one never ends. Nor may a
handler wait for the GIL, as the thread that was hit may belong to a kernel whose caller holds it. So the handler is a
few instructions of machine code, compiled with llvmlite, which numba brings: it looks up the address in a table,
writes a prepared text, restores the previous handler and returns; the same instruction then ends the process as
usual. It calls nothing but `write`, `sigaction` and `raise`, which POSIX allows there.

Linux and macOS. Windows does not let anybody truncate a mapped file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

MAX_RANGES = 512
"""Memory ranges that the table holds; any more get the general text."""
KEPT_TEXTS = 4
"""For each range: a handler may still be reading the previous one."""
_LOST = "was cut short while it was in use, or its disk fails"
_SI_CODE = 8  # bytes into siginfo_t, on both systems
_SI_ADDR = 24 if sys.platform == "darwin" else 16 if ctypes.sizeof(ctypes.c_void_p) == 8 else 12
_FLAGS = 0x0041 if sys.platform == "darwin" else 0x08000004  # SA_SIGINFO | SA_ONSTACK
RESTORE = (
    "Put the file back, or pull or convert it again; replace model files by renaming, never by writing into one that "
    "is in use."
)
"""What to do about a model file."""


class _Range(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("text", ctypes.c_uint64),
        ("n", ctypes.c_uint64),
    ]


class _Action(ctypes.Structure):
    """`struct sigaction`, with space for more than any system has."""

    _fields_ = (
        [
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_uint32),
            ("flags", ctypes.c_int),
            ("room", ctypes.c_char * 64),
        ]
        if sys.platform == "darwin"
        else [
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_char * 128),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
            ("room", ctypes.c_char * 64),
        ]
    )


class _Watch:
    """The table, the handler, and what must stay at its address as long as the process lives."""

    def __init__(self) -> None:
        self.ranges = (_Range * (MAX_RANGES + 1))()
        """The last one has no range: its text is for addresses that no other contains."""
        self.names: list[str] = [""] * MAX_RANGES
        self.before, self.is_told = _Action(), ctypes.c_uint32(0)
        self.models: dict[int, str] = {}
        """Model files that the general text names."""
        self.texts = [deque[bytes](maxlen=KEPT_TEXTS) for _ in range(MAX_RANGES + 1)]
        self.lock = threading.RLock()  # the garbage collector may call `remove` at any point
        self.engine, address = _machine_code(self.ranges, self.before, self.is_told)
        self.action = _Action(handler=address, flags=_FLAGS)
        self.sigaction = _libc().sigaction
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()

    def install(self) -> None:
        """Take over the signal; the current handler is called afterwards."""
        now = _Action()
        self.sigaction(signal.SIGBUS, None, ctypes.byref(now))
        if now.handler != self.action.handler:
            self.before = _copy(now, self.before)
            self.sigaction(signal.SIGBUS, ctypes.byref(self.action), None)

    def add(self, begin: int, n_bytes: int, path: Path, advice: str) -> int | None:
        """Add a range; returns its place."""
        with self.lock:
            place = next((i for i, name in enumerate(self.names) if not name), None)
            if place is not None:
                self.names[place] = str(path)
                self._write(place, f"{_shown(path)} {_LOST}; the process ends, as it cannot go on. {advice}")
                self.ranges[place].begin, self.ranges[place].end = begin, begin + n_bytes
                if advice == RESTORE:
                    self.models[place] = _shown(path)
                    self._tell_all()
            self.install()
            return place

    def remove(self, place: int) -> None:
        """Remove a range."""
        with self.lock:
            self.ranges[place].end = 0
            self.names[place] = ""
            if self.models.pop(place, None) is not None:
                self._tell_all()

    def _tell_all(self) -> None:
        names = sorted({*self.models.values()})
        files = f"one of {', '.join(names)} {_LOST}, or " if names else ""
        what = f"memory that was in use is gone: {files}there is no space for shared memory; the process ends."
        self._write(MAX_RANGES, what)

    def _write(self, place: int, what: str) -> None:
        text, entry = f"\nedge-runtime: {what}\n".encode("utf-8", "replace"), self.ranges[place]
        self.texts[place].append(text)
        address = ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p).value
        assert address is not None
        entry.n = min(entry.n, len(text))  # never past the end, whichever of the two texts a handler sees
        entry.text, entry.n = address, len(text)


def _shown(path: Path) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(path))


def _copy(source: _Action, target: _Action) -> _Action:
    ctypes.memmove(ctypes.byref(target), ctypes.byref(source), ctypes.sizeof(_Action))
    return target


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _machine_code(ranges: Any, before: _Action, is_told: ctypes.c_uint32) -> tuple[Any, int]:
    """The handler: (the object that keeps its code in memory, its address)."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    module = ir.Module("edge_runtime_bus_errors")
    module.triple = llvm.get_process_triple()
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32), pointer, pointer])
    handler = ir.Function(module, kind, "edge_runtime_on_bus_error")
    _write_handler(ir, handler, ctypes.addressof(ranges), ctypes.addressof(before), ctypes.addressof(is_told))
    with contextlib.suppress(RuntimeError):  # newer versions do it themselves
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine, engine.get_function_address(handler.name)


def _write_handler(ir: Any, handler: Any, ranges: int, before: int, is_told: int) -> None:
    """Body of `handler(signal, info, context)`; ranges, before, is_told : addresses."""
    word, i32, i8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)
    number = i32(int(signal.SIGBUS))
    names = ("entry", "looking", "next", "found", "tell", "leave", "again", "end")
    entry, looking, next_one, found, tell, leave, again, end = map(handler.append_basic_block, names)
    build = ir.IRBuilder(entry)

    def at(address: Any, kind: Any) -> Any:
        return build.inttoptr(address, kind.as_pointer())

    def member(n: int) -> Any:
        return build.load(at(build.add(place, word(8 * n)), word))

    def call(name: str, result: Any, *arguments: Any) -> None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = word(ctypes.cast(getattr(_libc(), name), ctypes.c_void_p).value)
        build.call(build.inttoptr(function, kind.as_pointer()), arguments)

    info = build.ptrtoint(handler.args[1], word)
    code = build.load(at(build.add(info, word(_SI_CODE)), i32))
    address = build.load(at(build.add(info, word(_SI_ADDR)), word))
    # On macOS the code does not say whether somebody sent the signal.
    was_sent = ir.Constant(ir.IntType(1), 0) if sys.platform == "darwin" else build.icmp_signed("<=", code, i32(0))
    build.cbranch(was_sent, leave, looking)

    build.position_at_end(looking)
    i = build.phi(word)
    place = build.add(word(ranges), build.mul(i, word(ctypes.sizeof(_Range))))
    is_inside = build.and_(
        build.icmp_unsigned("<=", member(0), address), build.icmp_unsigned("<", address, member(1))
    )
    build.cbranch(build.or_(is_inside, build.icmp_unsigned("==", i, word(MAX_RANGES))), found, next_one)
    build.position_at_end(next_one)
    i.add_incoming(word(0), entry)
    i.add_incoming(build.add(i, word(1)), next_one)
    build.branch(looking)

    # One of several threads reports; the others are hit again until the old handler is back.
    build.position_at_end(found)
    was_told = build.atomic_rmw("xchg", at(word(is_told), i32), i32(1), "seq_cst")
    build.cbranch(build.icmp_unsigned("==", was_told, i32(0)), tell, end)
    build.position_at_end(tell)
    call("write", word, i32(2), at(member(2), i8), member(3))
    build.branch(leave)

    build.position_at_end(leave)
    call("sigaction", i32, number, at(word(before), i8), ir.Constant(i8.as_pointer(), None))
    build.cbranch(was_sent, again, end)
    build.position_at_end(again)  # a signal that somebody sent does not come again by itself
    call("raise", i32, number)
    build.branch(end)
    build.position_at_end(end)
    build.ret_void()


@cache
def shared_watch() -> _Watch | None:
    """The one of this process; None where the system has no such signal."""
    if sys.platform not in ("linux", "darwin"):
        return None
    return _Watch()


def watch_memory(begin: int, n_bytes: int, path: Path, advice: str = RESTORE) -> Callable[[], None]:
    """Report on stderr when a mapped file turns out to be cut short while it is read.

    Parameters
    ----------
    begin, n_bytes : where it is mapped.
    path : named in the sentence.
    advice : the end of the sentence.

    Returns
    -------
    forget : to be called before that memory is used for something else.
    """
    watch = shared_watch()
    place = None if watch is None else watch.add(begin, n_bytes, path, advice)
    return (lambda: None) if watch is None or place is None else lambda: watch.remove(place)
