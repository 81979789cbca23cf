"""What an address is offered after connections that say HELLO and no more, over real sockets."""

from __future__ import annotations

import re
import socket

import pytest

from protocol.commands import Command
from protocol.dialects import Dialect, find_dialects
from tests.server.process import ClosedError, ServerProcess, Wire, running

OLD = find_dialects("4.0")[0]


def accepts(dialect: Dialect, version: tuple[int, int, int] | None) -> bool:
    """llama.cpp's check of a server's version."""
    assert version is not None
    return version[0] == dialect.version[0] and version[1] <= dialect.version[1]


def _wait_for_hang_up(server: ServerProcess, before: int) -> None:
    server.wait_until(
        lambda: server.log.count("hung up right after HELLO") > before,
        60,
        "a hang-up that is logged",
    )


def start(server: ServerProcess, dialect: Dialect) -> bool:
    """Begin as llama.cpp does: HELLO, then a question on the same connection, or the end of it."""
    with Wire(server.port, dialect) as wire:
        if not accepts(dialect, wire.version):
            return False
        wire.call(Command.DEVICE_COUNT)
        return True


def starts(server: ServerProcess, dialect: Dialect) -> int:
    """How often a client has to be started; the server has to see each hang-up first."""
    for tries in range(1, 6):
        before = server.log.count("hung up right after HELLO")
        if start(server, dialect):
            return tries
        _wait_for_hang_up(server, before)
    raise AssertionError(f"never served:\n{server.log}")


@pytest.mark.parametrize(("version", "tries"), [("7.0", 1), ("4.0", 4), ("3.6", 1), ("3.0", 3)])
@pytest.mark.slow
def test_one_neighbour_hangs_up_a_thousand_times(version: str, tries: int) -> None:
    dialect = find_dialects(version)[0]
    with running("--threads", "1", "-d", "CPU", "--log-level", "debug") as server:
        assert starts(server, dialect) == tries
        warned = server.log.count("WARNING")
        assert warned == tries - 1
        for i in range(1000):
            with Wire(server.port, dialect) as neighbour:
                assert accepts(dialect, neighbour.version)
            if i % 100 == 0:
                assert start(server, dialect)
        assert start(server, dialect)
        server.wait_until(
            lambda: server.log.count("DEBUG") > 1000, 20, "all connections to be noticed"
        )
        # Of what isn't known to be a refusal nobody is warned.
        assert server.log.count("WARNING") == warned
        assert not re.search("(INFO|WARNING|ERROR) .*hung up", server.log.split("speaks", 1)[1])


def test_garbage_behind_hello_takes_nothing_from_others() -> None:
    with running("--threads", "1", "-d", "CPU") as server:
        assert starts(server, OLD) == 4
        for behind in (b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n"):
            with Wire(server.port, OLD) as neighbour:
                neighbour.socket.sendall(behind)
                assert neighbour.closed_by_server()
            with Wire(server.port, OLD) as neighbour:
                neighbour.call(Command.DEVICE_COUNT)
                neighbour.socket.sendall(behind)
                assert neighbour.closed_by_server()
            assert start(server, OLD)


def test_a_pinned_version_stays() -> None:
    with running("--threads", "1", "-d", "CPU", "--protocol", "4.0") as server:
        for _ in range(10):
            with Wire(server.port, OLD) as neighbour:
                assert neighbour.version == (4, 0, 3)
        assert start(server, OLD)
        with pytest.raises(ClosedError), Wire(server.port, find_dialects("3.6")[0]):
            pass
        with socket.create_connection(("127.0.0.1", server.port)):
            pass
        assert start(server, OLD)
