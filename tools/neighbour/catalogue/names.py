"""Names and numbers of others: where a person reads them, and where a program adds them up."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from protocol.commands import Command
from tools.neighbour.attack import Attacker, attack
from tools.serving.processes import PROJECT
from tools.wire import tensor

LOGS = "names in the log"
CAPTURES = "captures that are damaged"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _check_log(a: Attacker, forged: str) -> None:
    """No control characters, and no line that a client made up."""
    log = Path(a.where.log).read_text(errors="replace")
    if _CONTROL.search(log):
        a.found("a control character of a client's is in the log")
    if any(line.startswith(forged) for line in log.splitlines()):
        a.found("a line of the log is a client's")


def _fail_with(a: Attacker, name: bytes) -> None:
    wire, handle, base = a.buffer(4096)
    leaf = tensor(1, (8,), handle, base)
    node = wire.op_of(2, "ADD", (9,), (handle, base + 64), 1, 1)
    node["name"] = name
    wire.send(Command.GRAPH_COMPUTE, wire.graph([node], [leaf]))
    while wire.socket.recv(4096):
        pass


@attack(LOGS)
def names_with_line_breaks(a: Attacker) -> None:
    """A node that fails, named with line breaks and a made-up line"""
    _fail_with(a, b"x\r\nforged\n\x0b\x0c")
    _check_log(a, "forged")


@attack(LOGS)
def names_that_paint(a: Attacker) -> None:
    """A node that fails, named with escape sequences and a bell"""
    _fail_with(a, b"\x1b]0;title\x07\x1b[2J\x1b[31m\x9b31m")
    _check_log(a, "title")


@attack(LOGS)
def names_that_turn_around(a: Attacker) -> None:
    """A node that fails, named with marks for right-to-left text and bytes that are no text"""
    _fail_with(a, "\u202etxt\u2066".encode() + b"\xff\xfe\xc3")
    _check_log(a, "txt")


@attack(LOGS)
def names_of_weights_that_do_not_fit(a: Attacker) -> None:
    """Uploads behind a buffer's end, whose tensors are named with line breaks"""
    wire, handle, base = a.buffer(64)
    leaf = tensor(1, (64,), handle, base, name=b"w\nforged\x1b[1m")
    wire.post(Command.SET_TENSOR, {"tensor": leaf, "offset": 0, "cache_flag": 0}, bytes(256))
    while wire.socket.recv(4096):
        pass
    _check_log(a, "forged")


def _dump(a: Attacker, make: Callable[[Path], None], *options: str) -> None:
    """Have a file read by tools.dump: it may refuse it, in a sentence and in time."""
    path = a.scratch / f"capture-{os.getpid()}"
    make(path)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tools.dump", str(path), *options],
            cwd=PROJECT, capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        a.found(f"tools.dump takes more than {time.monotonic() - started:.0f} s")
        return
    if "Traceback" in done.stderr:
        a.found(f"tools.dump: {done.stderr.strip().splitlines()[-1]}")


def _block(kind: int, body: bytes, size: int | None = None) -> bytes:
    length = 12 + len(body) if size is None else size
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


_SECTION = _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
_INTERFACE = _block(1, struct.pack("<HHI", 1, 0, 65535))


@attack(CAPTURES, once=True)
def capture_of_short_blocks(a: Attacker) -> None:
    """pcapng blocks of packets that are shorter than their own heads"""
    for kind in (2, 3, 6):
        for size in (0, 4, 8, 16):
            content = _SECTION + _INTERFACE + _block(kind, bytes(size))
            _dump(a, lambda path, content=content: _write(path, content))  # type: ignore[misc]
            if a.over:
                return


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@attack(CAPTURES, once=True)
def capture_that_is_cut(a: Attacker) -> None:
    """Compressed captures that end too early, or have a bit turned over"""
    whole = gzip.compress((_SECTION + _INTERFACE) * 500)
    for content in (whole[: len(whole) // 2], whole[:-6], whole[:12], _turned(whole)):
        _dump(a, lambda path, content=content: _write(path, content))  # type: ignore[misc]


def _turned(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


@attack(CAPTURES, once=True)
def capture_of_no_length(a: Attacker) -> None:
    """pcapng blocks whose lengths are 0, 3, or longer than any file"""
    for size in (0, 3, 12, 0xFFFFFFF0):
        content = _SECTION + _INTERFACE + _block(6, bytes(32), size) * 3
        _dump(a, lambda path, content=content: _write(path, content), "--stats")  # type: ignore[misc]
