"""SIGTERM with work under way: it is finished, for a bounded time, and nobody new is let in."""

from __future__ import annotations

import signal
import socket
import struct
import time

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from tests.server.clients import Bystander, endless
from tests.server.process import ClosedError, Wire, running, sources, tensor


def test_a_graph_and_its_result_are_finished() -> None:
    with running("--threads", "1", "--drain-seconds", "30") as server, Wire(server.port) as wire:
        n, steps = 512, 6
        size = 4 * n * n
        handle, base = wire.alloc(3 * size)
        a = tensor(1, (n, n), handle, base)
        chain = [
            tensor(
                2 + i, (n, n), handle, base + size * (1 + i % 2),
                op=wire.op("MUL_MAT"), src=sources(1, 1 + i),
            )
            for i in range(steps)
        ]  # fmt: skip
        matrix = np.eye(n, dtype=np.float32) * 2
        wire.set_tensor(a, matrix.tobytes())
        wire.send(Command.GRAPH_COMPUTE, wire.graph(chain, [a]))
        fields = {"tensor": chain[-1], "offset": 0, "size": size}
        head = codec(wire.dialect.commands[Command.GET_TENSOR].request).build(fields)
        wire.send(Command.GET_TENSOR, head)
        time.sleep(0.05)
        server.child.send_signal(signal.SIGTERM)
        got = np.frombuffer(wire.answer(Command.GET_TENSOR), np.float32).reshape(n, n)
        assert (got == np.eye(n, dtype=np.float32) * 2 ** (steps + 1)).all()
        assert wire.closed_by_server()
        assert server.child.wait(60) == 0
        assert "WARNING" not in server.log, server.log


def test_an_upload_is_finished() -> None:
    with running("--threads", "1", "--drain-seconds", "30") as server, Wire(server.port) as wire:
        size = 4 << 20
        handle, base = wire.alloc(size)
        fields = {"tensor": tensor(1, (size // 4,), handle, base), "offset": 0, "cache_flag": 0}
        spec = wire.dialect.commands[Command.SET_TENSOR]
        head = codec(spec.request).build(fields)
        start = struct.pack("<BQ", Command.SET_TENSOR, len(head) + size) + head
        wire.socket.sendall(start + bytes(size // 2))
        server.child.send_signal(signal.SIGTERM)
        server.wait_for(r"1 clients have something under way; waiting 30 s")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.port), 5)
        wire.socket.sendall(bytes(size // 2))
        assert wire.closed_by_server()
        assert server.child.wait(60) == 0
        assert "hung up within" not in server.log


def test_who_is_idle_is_not_waited_for() -> None:
    with running("--threads", "1", "--drain-seconds", "30") as server, Bystander(server) as idle:
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 5
        assert idle.wire.closed_by_server()
        assert "waiting" not in server.log


@pytest.mark.parametrize("how", ["time is over", "second signal", "not at all"])
def test_the_end_of_patience(how: str) -> None:
    seconds = {"time is over": "0.4", "second signal": "60", "not at all": "0"}[how]
    options = ("--threads", "2", "--drain-seconds", seconds)
    with running(*options) as server, Wire(server.port) as wire, Bystander(server):
        wire.send(Command.GRAPH_COMPUTE, endless(wire))
        time.sleep(0.2)
        started = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        if how == "second signal":
            server.wait_for("waiting 60 s for them")
            server.child.send_signal(signal.SIGINT)
        assert server.child.wait(15) == 0
        assert time.monotonic() - started < 12
        with pytest.raises((ClosedError, OSError)):
            wire.read(1)
        assert "Traceback" not in server.log
        assert "internal error" not in server.log


@pytest.mark.slow
def test_a_client_that_takes_no_answers_is_not_waited_for_longer() -> None:
    with running("--threads", "1", "--drain-seconds", "0.5") as server, Wire(server.port) as wire:
        size = 32 << 20
        handle, base = wire.alloc(size)
        fields = {"tensor": tensor(1, (size // 4,), handle, base), "offset": 0, "size": size}
        head = codec(wire.dialect.commands[Command.GET_TENSOR].request).build(fields)
        wire.send(Command.GET_TENSOR, head)
        time.sleep(0.2)
        assert server.stop(15) == 0
