"""Who is let in: by network, certificate, token; and a tunnel is as good as a plain socket."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import trustme

from client.backend import Backend
from client.connection import Connection, connect, connect_any
from client.errors import ConnectionLost
from client.tunnel import SecretError, client_context, read_token, server_context
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from protocol.token import encode_token, token_size
from rpc_server.limits import ServerLimits
from rpc_server.net.admission import Admission
from rpc_server.observability.metrics import ServerStats
from rpc_server.options import parse_options
from tests.server.process import ServerProcess, Wire, running
from tests.split.cluster import status
from tests.split.weights import content, values, weight

HOST = "127.0.0.1"
TOKEN = b"a token that nobody can guess"


# -- networks


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("10.1.2.3", True),
        ("10.2.0.1", False),
        ("192.168.7.9", True),
        ("192.168.7.10", False),
        ("::ffff:10.1.2.3", True),
        ("::ffff:10.9.9.9", False),
        ("fd00::1", True),
        ("fe80::1%eth0", True),
        ("2001:db8::1", False),
        ("?", False),
    ],
)
def test_networks(address: str, allowed: bool) -> None:
    networks = parse_options(["--allow", "10.1.0.0/16,192.168.7.9,fd00::/8, fe80::/10"]).allow
    admission = Admission(networks, ServerLimits(), ServerStats())
    assert admission.admit(address, "client") is allowed


@pytest.mark.parametrize("text", ["10.0.0.1/8", "hostname", "10.0.0.0/33", "1.2.3"])
def test_what_is_no_network(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--allow", text])
    assert "is no list of addresses or networks" in capsys.readouterr().err


def test_others_are_closed() -> None:
    with running("--allow", "127.0.0.2,127.0.1.0/24") as server:
        for _ in range(3):
            with Wire(server.port, hello=False) as wire:
                assert wire.closed_by_server()
        server.wait_for(r"WARNING client \d+ \(127\.0\.0\.1:\d+\): refused, its address .* --allow")
        assert server.log.count("refused") == 1
        address = (HOST, server.port)
        with socket.create_connection(address, 10, ("127.0.0.2", 0)) as friend:
            friend.sendall(struct.pack("<BQ", Command.HELLO, 24) + bytes(24))
            assert len(friend.recv(8)) == 8


# -- TLS and the token


class Secrets:
    """Files for servers and clients, all made for the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, trustme.CA()
        names = ("ca.pem", "server.pem", "client.pem", "token")
        self.ca, self.server, self.client, self.token = (folder / name for name in names)
        self.authority.cert_pem.write_to_path(str(self.ca))
        certificate = self.authority.issue_cert(HOST, "localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(self.server))
        mine = self.authority.issue_cert("client@example.org")
        mine.private_key_and_cert_chain_pem.write_to_path(str(self.client))
        self.token.write_bytes(TOKEN + b"\n")

    def options(self, *more: str) -> list[str]:
        return ["--threads", "1", "--tls-port", "0", "--tls-cert", str(self.server), *more]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    return Secrets(tmp_path_factory.mktemp("secrets"))


class SecureServer:
    """A server with a TLS port."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        found = process.wait_for(r"endpoint, TLS  : \S+:(\d+) \((.*)\)")
        self.port, self.asks = int(found[1]), found[2]


@contextlib.contextmanager
def secured(secrets: Secrets, *options: str) -> Iterator[SecureServer]:
    with running(*secrets.options(*options)) as process:
        yield SecureServer(process)
        assert TOKEN.decode() not in process.log
        assert "PRIVATE" not in process.log
        assert "Traceback" not in process.log, process.log
        assert "never retrieved" not in process.log, process.log


@pytest.fixture(scope="module")
def guarded(secrets: Secrets) -> Iterator[SecureServer]:
    """A server that asks for the token."""
    with secured(secrets, "--token-file", str(secrets.token)) as server:
        yield server


async def check_computes(connection: Connection) -> None:
    b = await Backend.open(connection)
    x = await b.tensor(GgmlType.F32, (4,), [1, 2, 3, 4])
    assert (await b.compute(b.graph.scale(x, 2.0))).ravel().tolist() == [2, 4, 6, 8]


async def test_both_ports_serve(guarded: SecureServer, secrets: Secrets) -> None:
    assert guarded.asks == "token"
    tls = client_context(secrets.ca)
    async with await connect(HOST, guarded.port, tls=tls, token=TOKEN) as secure:
        await check_computes(secure)
        # Plain llama.cpp is served as ever.
        async with await connect(HOST, guarded.process.port) as plain:
            await check_computes(plain)
        await check_computes(secure)


async def _room(b: Backend, size: int) -> Tensor:
    leaf = b.graph.new_tensor(GgmlType.I8, (size,))
    await b.allocate([leaf])
    return leaf


async def test_large_things_go_through(guarded: SecureServer, secrets: Secrets) -> None:
    """Much more than a tunnel holds, in both directions at the same time."""
    tls = client_context(secrets.ca)
    data = np.random.default_rng(1).integers(0, 256, 24 << 20, np.uint8)
    async with await connect(HOST, guarded.port, tls=tls, token=TOKEN) as connection:
        b = await Backend.open(connection)
        x, y = await _room(b, len(data)), await _room(b, len(data))
        await connection.set_tensor(x, data.data)
        _, got = await asyncio.gather(
            connection.set_tensor(y, data[::-1].copy().data), connection.get_tensor(x)
        )
        assert (got == data).all()
        assert ((await connection.get_tensor(y)) == data[::-1]).all()


async def test_wrong_tokens(guarded: SecureServer, secrets: Secrets) -> None:
    tls = client_context(secrets.ca)
    for token in (TOKEN + b"x", TOKEN[:-1], b"x" * 1024):
        with pytest.raises(ConnectionLost, match="refused the token"):
            await connect(HOST, guarded.port, tls=tls, token=token)
    with pytest.raises(ConnectionLost):
        await connect(HOST, guarded.port, tls=tls)
    await asyncio.to_thread(
        guarded.process.wait_for, r"refused, its token is another one|refused, it showed no token"
    )
    async with await connect(HOST, guarded.port, tls=tls, token=TOKEN) as connection:
        await check_computes(connection)


def say_nothing(sock: socket.socket) -> None:
    pass


def speak_plainly(sock: socket.socket) -> None:
    sock.sendall(struct.pack("<BQ", Command.HELLO, 24) + bytes(24))


def speak_garbage(sock: socket.socket) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("talk", [say_nothing, speak_plainly, speak_garbage])
def test_what_is_no_tls(secrets: Secrets, talk: Callable[[socket.socket], None]) -> None:
    with (
        secured(secrets, "--handshake-timeout", "1", "--max-clients", "2") as server,
        Wire(server.process.port) as other,
    ):
        # More than --max-clients, one after the other: each gives its place back.
        for _ in range(3):
            with socket.create_connection((HOST, server.port), 10) as sock:
                talk(sock)
                with contextlib.suppress(ConnectionError):
                    while sock.recv(4096):
                        pass
        server.process.wait_for("refused, (TLS|no TLS handshake)")
        assert other.call(Command.GET_ALIGNMENT, {"device": 0}).alignment


def test_a_token_that_does_not_come(secrets: Secrets) -> None:
    # In which the handshake of TLS has to be over.
    options = ("--handshake-timeout", "2", "--token-file", str(secrets.token))
    with secured(secrets, *options) as server:
        context = client_context(secrets.ca)
        with (
            socket.create_connection((HOST, server.port), 10) as sock,
            context.wrap_socket(sock, server_hostname=HOST) as secure,
        ):
            secure.sendall(encode_token(TOKEN)[:9])
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert secure.recv(1) == b""
        server.process.wait_for("refused, no TLS handshake and token in time")


@pytest.mark.slow
async def test_without_a_token_any_tls_client_will_do(secrets: Secrets) -> None:
    with secured(secrets) as server:
        assert server.asks == "no token"
        tls = client_context(secrets.ca)
        # Ours with a token that nobody asked for, and llama.cpp through a TLS client.
        for token in (TOKEN, None):
            async with await connect_any(HOST, server.port, tls=tls, token=token) as connection:
                await check_computes(connection)


async def test_client_certificates(secrets: Secrets) -> None:
    with secured(secrets, "--tls-ca", str(secrets.ca)) as server:
        tls = client_context(secrets.ca, secrets.client)
        async with await connect(HOST, server.port, tls=tls) as connection:
            await check_computes(connection)
        with pytest.raises((ConnectionLost, OSError)):
            await connect(HOST, server.port, tls=client_context(secrets.ca))


async def test_a_server_that_nobody_vouches_for(guarded: SecureServer) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(HOST, guarded.port, tls=client_context(), token=TOKEN)


async def test_what_a_client_in_a_tunnel_had_is_freed(
    guarded: SecureServer, secrets: Secrets
) -> None:
    tls = client_context(secrets.ca)
    connection = await connect(HOST, guarded.port, tls=tls, token=TOKEN)
    await connection.alloc_buffer(12345)
    connection.abort()
    await asyncio.to_thread(guarded.process.wait_for, r"disconnected; freed 1 buffers")


@pytest.mark.slow
async def test_limits_hold_in_a_tunnel(secrets: Secrets) -> None:
    """One that takes no answers, and one that stops in the middle of a message."""
    with secured(secrets, "--stall-timeout", "1") as server:
        tls = client_context(secrets.ca)
        async with await connect(HOST, server.port, tls=tls) as connection:
            await connection.send_raw(struct.pack("<BQ", Command.GRAPH_COMPUTE, 1000))
            await asyncio.wait_for(connection.wait_closed(), 20)
        await asyncio.to_thread(
            server.process.wait_for, r"a message does not go on for 1 s \(--stall-timeout\)"
        )


# -- a split over TLS


@pytest.mark.parametrize("mode", ["row", "tensor"])
async def test_a_coordinator_and_its_workers(
    guarded: SecureServer, secrets: Secrets, mode: str
) -> None:
    parts = f"tls://{HOST}:{guarded.port},local"
    options = ["--split", parts, "--tensor-split", "1,1", "--split-mode", mode, "--threads", "1"]
    options += ["--split-ca", str(secrets.ca), "--split-token-file", str(secrets.token)]
    shape = (256, 512)
    with running(*options) as coordinator:
        async with await connect(HOST, coordinator.port, split=True) as connection:
            b = await Backend.open(connection)
            data = content(GgmlType.F32, shape)
            w = await weight(b, GgmlType.F32, shape, data)
            x = await b.tensor(GgmlType.F32, (256, 1), values(1, 256, seed=1))
            y = b.graph.mul_mat(w, x)
            plan = await b.prepare(y)
            for seed in range(20):
                given = values(1, 256, seed=seed)
                await b.upload(x, given)
                await plan.run()
                expected = given @ np.frombuffer(data, np.float32).reshape(512, 256).T
                np.testing.assert_allclose(
                    (await b.download(y)).reshape(1, 512), expected, rtol=1e-4, atol=1e-4
                )
            assert (await status(b)).parts[0].exchanges >= 20
        assert TOKEN.decode() not in coordinator.log


@pytest.mark.slow
def test_a_coordinator_that_is_refused(guarded: SecureServer, secrets: Secrets) -> None:
    from tests.server.test_command_line import start

    parts = f"tls://{HOST}:{guarded.port},local"
    done = start("--split", parts, "--split-ca", str(secrets.ca), GGML_RPC_SPLIT_TOKEN="x" * 20)
    assert done.returncode == 1
    assert re.search(rf"error: worker {HOST}:{guarded.port}: .*refused the token", done.stderr)
    done = start("--split", parts)
    assert done.returncode == 1
    assert re.search(rf"error: worker {HOST}:{guarded.port}: .*CERTIFICATE", done.stderr)


# -- secrets


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"  " + TOKEN + b"\n")
    assert read_token(path, "NONE") == TOKEN
    monkeypatch.setenv("SOME_TOKEN", TOKEN.decode())
    assert read_token(None, "SOME_TOKEN") == TOKEN
    assert read_token(None, "NONE") is None
    path.write_bytes(b"short")
    with pytest.raises(SecretError, match="16 to 1024 bytes, this one 5") as caught:
        read_token(path, "NONE")
    assert "short" not in str(caught.value)
    with pytest.raises(SecretError, match="can't read"):
        read_token(tmp_path / "none", "NONE")
    assert token_size(encode_token(TOKEN)[:6]) == len(TOKEN)
    assert token_size(struct.pack("<BQ", Command.HELLO, 24)[:6]) is None


def test_certificates_that_are_none(secrets: Secrets) -> None:
    with pytest.raises(SecretError, match="can't use"):
        server_context(secrets.token, None)
    with pytest.raises(SecretError, match="No such file"):
        client_context(secrets.folder / "none")


async def test_a_token_is_for_tls_only(guarded: SecureServer) -> None:
    with pytest.raises(ValueError, match="inside of TLS only"):
        await connect(HOST, guarded.process.port, token=TOKEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-port", "0"], "--tls-port and --tls-cert need each other"),
        (["--token-file", "x"], "are for --tls-port"),
        (["--split", "hostA", "--split-ca", "x"], "are for tls:// in --split"),
    ],
)
def test_options_that_belong_together(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(options)
    assert message in capsys.readouterr().err


async def test_a_drained_tunnel_gets_its_answer(secrets: Secrets) -> None:
    with running(*secrets.options()) as process:
        server = SecureServer(process)
        tls = client_context(secrets.ca)
        async with await connect(HOST, server.port, tls=tls) as connection:
            await check_computes(connection)
            started = time.monotonic()
            assert await asyncio.to_thread(process.stop) == 0
            assert time.monotonic() - started < 8


async def test_the_half_open_keep_nobody_out(secrets: Secrets) -> None:
    """Neither a client of the plain port, which they are not counted with, nor more than a few."""
    with contextlib.ExitStack() as held:
        server = held.enter_context(secured(secrets, "--max-clients", "4"))
        for _ in range(20):
            held.enter_context(socket.create_connection((HOST, server.port), 10))
        server.process.wait_for("refused, too many others are in their TLS handshake")
        with Wire(server.process.port) as other:
            assert other.call(Command.GET_ALIGNMENT, {"device": 0}).alignment
