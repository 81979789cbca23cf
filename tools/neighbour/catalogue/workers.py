"""What a coordinator suffers from its clients, and from what says that it is a worker."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.types import GgmlType, row_size
from tools.neighbour.attack import MIB, Attacker, attack
from tools.serving.processes import HOST, Process, ProgramError, own_command
from tools.wire import tensor

OWN_MEMORY = "a coordinator's own memory"
NUMBERS = "a worker's numbers"
SLOW_WORKERS = "a worker that answers slowly, or not at all"
DIALECT = DIALECTS[0]

_BIG = 64 * MIB


@attack(OWN_MEMORY, server="coordinator")
def ones_written_on_a_coordinator(a: Attacker) -> None:
    """BUFFER_CLEAR with ones of all the memory that a coordinator offers"""
    wire, handle, _ = a.buffer(_BIG)
    wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 1})


@attack(OWN_MEMORY, server="coordinator")
def copies_on_a_coordinator(a: Attacker) -> None:
    """COPY_TENSORs all over a coordinator's buffer"""
    wire, handle, base = a.buffer(_BIG)
    low, high = (tensor(i, (4 * MIB,), handle, base + 16 * i * MIB) for i in (0, 1))
    for src, dst in ((low, high), (high, low)) * 4:
        wire.call(Command.COPY_TENSOR, {"src": src, "dst": dst})


@attack(OWN_MEMORY, server="coordinator")
def results_on_a_coordinator(a: Attacker) -> None:
    """A graph that writes 32 MiB of a coordinator's buffer"""
    wire, handle, base = a.buffer(_BIG)
    leaf = tensor(1, (4 * MIB,), handle, base)
    node = wire.op_of(2, "SCALE", (4 * MIB,), (handle, base + 32 * MIB), 1)
    wire.run([node], [leaf])


@attack(OWN_MEMORY, server="coordinator")
def weights_announced_and_not_sent(a: Attacker) -> None:
    """Uploads of weights of 16 MiB that stop after their first bytes"""
    for _ in range(4):
        wire, handle, base = a.buffer(_BIG)
        weight = tensor(1, (4096, 1024), handle, base, name=b"blk.0.ffn_up.weight")
        head = codec(DIALECT.commands[Command.SET_TENSOR].request).build(
            {"tensor": weight, "offset": 0, "cache_flag": 0}
        )
        wire.socket.sendall(struct.pack("<BQ", Command.SET_TENSOR, len(head) + 16 * MIB) + head)
        wire.socket.sendall(bytes(100))
    time.sleep(min(0.3, a.seconds))


@attack(OWN_MEMORY, server="coordinator")
def weights_of_any_shape(a: Attacker) -> None:
    """Weights that overlap one another and what was there, uploaded and read back"""
    wire, handle, base = a.buffer(_BIG)
    for n in range(1, 6):
        ne = (256 * n, 64 * n)
        size = row_size(GgmlType.F32, ne[0]) * ne[1]
        name = f"blk.{n}.attn_q.weight".encode()
        weight = tensor(1, ne, handle, base + 4096 * n, name=name)
        content = bytes([n]) * size
        wire.set_tensor(weight, content)
        if wire.get_tensor(weight, size) != content:
            a.found("a weight reads back as other bytes")


Answers = Mapping[Command, dict[str, Any]]
_SOUND: Answers = {
    Command.HELLO: {"major": 7, "minor": 0, "patch": 0, "conn_caps": bytes(24)},
    Command.DEVICE_COUNT: {"device_count": 1},
    Command.GET_ALIGNMENT: {"alignment": 64},
    Command.GET_MAX_SIZE: {"max_size": 1 << 62},
    Command.GET_DEVICE_MEMORY: {"free_mem": 1 << 30, "total_mem": 1 << 30},
}


class _FakeWorker:
    """Answers as a worker does when a coordinator starts, but for what is ``changed``."""

    def __init__(self, changed: Answers, pace: float = 0.0) -> None:
        self._answers = {**_SOUND, **changed}
        self._pace = pace
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> _FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError, KeyError), connection:
            stream = connection.makefile("rb")
            while head := stream.read(9):
                number, size = struct.unpack("<BQ", head)
                stream.read(size)
                command = Command(number)
                answer = codec(DIALECT.commands[command].response).build(self._answers[command])
                for byte in struct.pack("<Q", len(answer)) + answer:
                    connection.sendall(bytes([byte]))
                    time.sleep(self._pace)


def _coordinator(a: Attacker, changed: Answers, pace: float = 0.0, *options: str) -> None:
    """A coordinator is started on a worker: it serves, or says in a sentence why it doesn't."""
    with _FakeWorker(changed, pace) as worker:
        command = own_command(
            0, "--threads", "1", "--split", f"{HOST}:{worker.port},local",
            "--split-timeout", "2", "--split-mode", "row", *options,
        )  # fmt: skip
        with Process(command) as server:

            def started() -> bool:
                return not server.alive or "endpoint " in server.log

            try:
                server.wait_until(started, 20, "a start, or an end")
            except ProgramError:
                if server.alive:
                    a.found("a coordinator neither starts nor ends")
            if "Traceback" in server.log or "internal error" in server.log:
                a.found(f"a traceback: {server.log.strip().splitlines()[-1]}")
            if not server.alive and "error: " not in server.log:
                a.found(f"no reason is given: {server.log[-200:]!r}")


@attack(NUMBERS, once=True)
def alignment_of_three(a: Attacker) -> None:
    """A worker that aligns to 3 bytes, and one that aligns to 2^63"""
    for alignment in (3, 1 << 63):
        _coordinator(a, {Command.GET_ALIGNMENT: {"alignment": alignment}})


@attack(NUMBERS, once=True)
def more_free_than_there_is(a: Attacker) -> None:
    """A worker with 2^63 bytes free of 1, and shares by speed"""
    memory = {"free_mem": 1 << 63, "total_mem": 1}
    _coordinator(a, {Command.GET_DEVICE_MEMORY: memory}, 0.0, "--tensor-split", "auto")


@attack(NUMBERS, once=True)
def no_devices(a: Attacker) -> None:
    """A worker without devices, and one with four billion"""
    for count in (0, 0xFFFFFFFF):
        _coordinator(a, {Command.DEVICE_COUNT: {"device_count": count}})


@attack(NUMBERS, once=True)
def versions_of_no_release(a: Attacker) -> None:
    """A worker that says it speaks version 255.255.255"""
    version = {"major": 255, "minor": 255, "patch": 255, "conn_caps": bytes(24)}
    _coordinator(a, {Command.HELLO: version})


@attack(SLOW_WORKERS, once=True)
def a_worker_in_slow_motion(a: Attacker) -> None:
    """A worker that answers a byte in a third of a second"""
    _coordinator(a, {}, 0.3)


@attack(SLOW_WORKERS, once=True)
def a_worker_that_says_nothing(a: Attacker) -> None:
    """A worker that takes the connection, and a HELLO, and is silent"""
    _coordinator(a, {}, 1000.0)


@attack(SLOW_WORKERS, once=True)
def a_worker_that_hangs_up(a: Attacker) -> None:
    """A worker that ends after DEVICE_COUNT"""
    _coordinator(a, {Command.DEVICE_COUNT: {}})
