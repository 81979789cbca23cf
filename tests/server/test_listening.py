"""Where the server listens, what it says of it, and ports that are about to be free."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from typing import Any

import pytest

from client.connection import connect
from rpc_server import __main__ as program
from rpc_server.net import listening
from rpc_server.net.listening import PortInUseError, is_here, listen
from tests.server.process import ServerProcess
from tools.serving.ports import free_port
from tools.serving.processes import Process, own_command

V4, V6 = "127.0.0.1", "::1"


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind((V6, 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def reaches(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 2):
        return True
    return False


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "*"])
def test_all_addresses_of_both_families(host: str) -> None:
    with ServerProcess("--host", host) as server:
        assert reaches(V4, server.port)
        assert reaches(V6, server.port)
        written = f"[::]:{server.port}" if host == "::" else f"*:{server.port}"
        assert f"endpoint       : {written}\n" in server.log
        assert f"listening on {host}, not only" in server.log
        # A client is named as its network writes its address, with --allow to go by it.
        for address, name in ((V4, r"\(127\.0\.0\.1:\d+\)"), (V6, r"\(\[::1\]:\d+\)")):
            asyncio.run(visit(address, server.port))
            server.wait_for(rf"client \d+ {name}[ :]+disconnected")


async def visit(host: str, port: int) -> None:
    async with await connect(host, port) as connection:
        await connection.alloc_buffer(64)


@needs_ipv6
def test_one_address_of_ipv6() -> None:
    with ServerProcess("--host", V6) as server:
        assert f"endpoint       : [::1]:{server.port}\n" in server.log
        assert "WARNING" not in server.log
        assert reaches(V6, server.port)
        assert not reaches(V4, server.port)


@needs_ipv6
def test_messages_have_brackets() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind((V6, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError):
            asyncio.run(listen(V6, port))


def test_a_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everywhere is then what there is; one of its addresses is an error."""
    right = socket.socket

    def without(family: int = -1, *more: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported")
        return right(family, *more)

    monkeypatch.setattr(socket, "socket", without)
    sockets = asyncio.run(listen("::", 0))
    assert [s.getsockname()[0] for s in sockets] == ["0.0.0.0"]
    for s in sockets:
        s.close()
    with pytest.raises(OSError, match="not supported"):
        asyncio.run(listen(V6, 0))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a machine as Debian's /etc/hosts has it."""
    right = asyncio.BaseEventLoop.getaddrinfo

    async def resolve(self: asyncio.BaseEventLoop, host: str, *rest: Any, **more: int) -> object:
        if host == "my-box":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
        return await right(self, host, *rest, **more)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    return "my-box"


def test_a_name_that_is_loopback(
    named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def start() -> None:
        sockets, endpoint = await program._listen(named, 0, "--port")
        assert endpoint == f"my-box:{sockets[0].getsockname()[1]}"
        for s in sockets:
            s.close()
        sockets, _ = await program._listen("localhost", 0, "--port")
        for s in sockets:
            s.close()

    asyncio.run(start())
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert "my-box is 127.0.1.1 on this machine, so no other machine can connect" in said


# -- ports


def outgoing(port: int, to: socket.socket) -> socket.socket:
    """A connection that has ``port`` at this end, without anybody listening there."""
    made = socket.socket()
    made.bind((V4, port))
    made.connect(to.getsockname())
    return made


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_port_that_a_connection_has_is_waited_for() -> None:
    port = free_port()
    with socket.create_server((V4, 0)) as other:
        connection = outgoing(port, other)
        server = Process(own_command(port))
        try:
            server.wait_for(rf"port {port} of 127\.0\.0\.1 belongs to a connection of this machine")
            reset(connection)
            server.wait_for(rf"endpoint +: 127\.0\.0\.1:{port}\n")
            assert reaches(V4, port)
        finally:
            server.stop()
            server.forget()


@pytest.mark.slow
def test_a_connection_that_lasts_is_not_waited_for_for_ever() -> None:
    port = free_port()
    said: list[str] = []
    with socket.create_server((V4, 0)) as other:
        connection = outgoing(port, other)
        with pytest.raises(PortInUseError, match="connections of other programs"):
            asyncio.run(listen(V4, port, said.append, wait=0.6))
        connection.close()
    assert len(said) == 1


@pytest.mark.parametrize("table", [True, False])
def test_a_port_of_a_server_is_not_waited_for(table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system doesn't show who listens, a connection does."""
    if not table:
        monkeypatch.setattr(listening, "_TABLES", ())
    said: list[str] = []
    with socket.create_server((V4, 0)) as taken:
        with pytest.raises(PortInUseError, match="another server"):
            asyncio.run(listen(V4, taken.getsockname()[1], said.append))
        with pytest.raises(PortInUseError, match="another server"):
            asyncio.run(listen("0.0.0.0", taken.getsockname()[1], said.append))
    assert said == []


def test_all_sockets_have_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port that the system chose for the first one may be taken at the next address."""
    right, failed = listening._socket, list[int]()

    def taken_once(address: listening.Address, port: int) -> socket.socket:
        if port and not failed:
            failed.append(port)
            raise OSError(errno.EADDRINUSE, "taken")
        return right(address, port)

    monkeypatch.setattr(listening, "_socket", taken_once)
    addresses = [(socket.AF_INET, "127.0.0.1", 0), (socket.AF_INET, "127.0.0.2", 0)]
    sockets = listening._sockets(addresses, 0, optional=False)
    assert failed
    assert len({s.getsockname()[1] for s in sockets}) == 1
    assert len(sockets) == 2
    for s in sockets:
        s.close()


@pytest.mark.parametrize(
    ("host", "own_host", "here"),
    [
        (V4, V4, True),
        ("localhost", V4, True),
        (V4, "0.0.0.0", True),
        (V4, "::", True),
        ("192.0.2.1", "0.0.0.0", False),
        ("127.0.0.2", V4, False),
        ("no-such-host.invalid", "0.0.0.0", False),
    ],
)
def test_what_is_reached_by_listening_here(host: str, own_host: str, here: bool) -> None:
    assert asyncio.run(is_here(host, 5, own_host, 5)) == here
    assert not asyncio.run(is_here(host, 6, own_host, 5))
