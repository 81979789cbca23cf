"""The connection against a scripted server: versions, order, large payloads, broken peers."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import uvloop

from client.builder.graph import GraphBuilder
from client.connection import Connection, connect
from client.errors import (
    AllocationFailed,
    ConnectionLost,
    GraphFailed,
    UnsupportedCommand,
    VersionMismatch,
)
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Dialect, find_dialects
from protocol.errors import ProtocolError
from protocol.ggml.types import GgmlType
from protocol.messages import RPC_TENSOR_DTYPE
from protocol.split import SPLIT_COMMANDS, VERSION, split_caps, with_split
from protocol.tensor import Tensor
from tests.client.scripted import Peer, scripted, talking_to

NEWEST = DIALECTS[0]
BY_NAME = {d.name: d for d in DIALECTS}


def placed(n: int, type: GgmlType = GgmlType.I8) -> Tensor:
    tensor = GraphBuilder().new_tensor(type, (n,), "some")
    tensor.place(0x1000, 0x20000)
    return tensor


async def calls(c: Connection) -> dict[Command, Any]:
    """Every command that the dialect has, once; what each returned."""
    t = placed(8)
    todo: dict[Command, Callable[[], Awaitable[Any]]] = {
        Command.DEVICE_COUNT: c.device_count,
        Command.ALLOC_BUFFER: lambda: c.alloc_buffer(123),
        Command.GET_ALIGNMENT: c.get_alignment,
        Command.GET_MAX_SIZE: c.get_max_size,
        Command.GET_DEVICE_MEMORY: c.get_device_memory,
        Command.BUFFER_GET_BASE: lambda: c.buffer_get_base(7),
        Command.BUFFER_CLEAR: lambda: c.buffer_clear(7, 9),
        Command.INIT_TENSOR: lambda: c.init_tensor(t),
        Command.GET_ALLOC_SIZE: lambda: c.get_alloc_size(t),
        Command.SET_TENSOR: lambda: c.set_tensor(t, b"12345678", cache_flag=1),
        Command.SET_TENSOR_HASH: lambda: c.set_tensor_hash(t, 2**64 - 1),
        Command.GET_TENSOR: lambda: c.get_tensor(t, 2),
        Command.MEMSET_TENSOR: lambda: c.memset_tensor(t, 3, 4),
        Command.COPY_TENSOR: lambda: c.copy_tensor(t, t),
        Command.GRAPH_COMPUTE: lambda: c.graph_compute(b"graph"),
        Command.GRAPH_RECOMPUTE: c.graph_recompute,
        Command.FREE_BUFFER: lambda: c.free_buffer(7),
    }
    assert {*todo, Command.HELLO} == set(Command) - SPLIT_COMMANDS.keys()
    results = {}
    for command, call in todo.items():
        if command in c.dialect.commands:
            results[command] = await call()
        else:
            with pytest.raises(UnsupportedCommand, match=command.name):
                await call()
    return results


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
async def test_every_command_of_every_version(dialect: Dialect) -> None:
    seen: dict[Command, tuple[Any, bytes]] = {}

    async def script(peer: Peer) -> None:
        await peer.hello()
        while head := await peer.reader.read(1):
            command = Command(head[0])
            (size,) = struct.unpack("<Q", await peer.reader.readexactly(8))
            payload = await peer.reader.readexactly(size)
            spec = dialect.commands[command]
            n = spec.request.sizeof()
            seen[command] = spec.request.parse(payload[:n]), payload[n:]
            if spec.answer is Answer.FIXED:
                size = spec.response.sizeof()
                # Increasing bytes, the last 0: a status is then a success.
                await peer.send((bytes(range(1, size)) + b"\0")[:size])
            elif spec.answer is Answer.DATA:
                await peer.send(b"abcdef")

    async with talking_to(script, dialect) as c:
        results = await calls(c)
    assert {*seen, Command.HELLO} == set(dialect.commands)
    assert bytes(results[Command.GET_TENSOR]) == b"abcdef"
    assert results[Command.ALLOC_BUFFER] == (0x0807060504030201, 0x000F0E0D0C0B0A09)
    assert seen[Command.ALLOC_BUFFER][0].size == 123
    assert (seen[Command.GET_TENSOR][0].offset, seen[Command.GET_TENSOR][0].size) == (2, 6)
    assert seen[Command.SET_TENSOR][1] == b"12345678"
    assert seen[Command.GRAPH_COMPUTE][1] == b"graph"
    assert seen[Command.SET_TENSOR_HASH][0].hash == 2**64 - 1
    sent = np.frombuffer(
        dialect.commands[Command.INIT_TENSOR].request.build(seen[Command.INIT_TENSOR][0]),
        RPC_TENSOR_DTYPE,
    )[0]
    assert sent["name"] == b"some"
    assert (sent["buffer"], sent["data"]) == (0x1000, 0x20000)


@pytest.mark.parametrize(
    ("asked", "answered", "spoken"),
    [
        ("7", (7, 0, 0), "7.0.0"),
        ("7", (7, 0, 9), "7.0.0"),
        ("5", (5, 0, 0), "5.0.0"),
        ("5.1", (5, 0, 0), "5.1.0"),
        ("4", (4, 0, 1), "4.0.1"),
        ("4.0.3", (4, 0, 1), "4.0.3"),
        ("3", (3, 6, 1), "3.6.1"),
        ("3", (3, 5, 0), "3.5.0"),
        ("3.6", (3, 0, 0), "3.6.1"),
        ("1", (1, 0, 0), "1.0.0"),
    ],
)
async def test_versions_that_go_together(
    asked: str, answered: tuple[int, int, int], spoken: str
) -> None:
    async with talking_to(
        lambda peer: peer.hello(answered), find_dialects(asked)[0], version=asked
    ) as c:
        assert c.dialect.name == spoken
        assert c.server_version == answered


@pytest.mark.parametrize(
    ("asked", "answered"), [("7", (6, 0, 0)), ("6", (7, 0, 0)), ("5", (5, 2, 0)), ("3", (3, 7, 0))]
)
async def test_versions_that_do_not(asked: str, answered: tuple[int, int, int]) -> None:
    async with scripted(find_dialects(asked)[0], lambda peer: peer.hello(answered)) as port:
        with pytest.raises(VersionMismatch) as caught:
            await connect("127.0.0.1", port, version=asked)
    assert caught.value.theirs == answered
    assert caught.value.ours == find_dialects(asked)[0].version
    assert ".".join(map(str, answered)) in str(caught.value)


async def test_a_server_that_does_not_answer_hello() -> None:
    async def silent(peer: Peer) -> None:
        await peer.reader.read()

    async with scripted(NEWEST, silent) as port:
        with pytest.raises(TimeoutError):
            await connect("127.0.0.1", port, timeout=0.05)


async def test_a_server_of_other_messages() -> None:
    async def old(peer: Peer) -> None:
        await peer.take(Command.HELLO)
        await peer.send(bytes([3, 6, 0]))

    async with scripted(NEWEST, old) as port:
        with pytest.raises(ProtocolError, match="HELLO has 3 bytes, not 28"):
            await connect("127.0.0.1", port)


async def test_requests_do_not_wait_for_answers() -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        # All three have to be there before the first is answered.
        for command in (Command.GET_ALIGNMENT, Command.GET_TENSOR, Command.GET_MAX_SIZE):
            await peer.take(command)
        await peer.answer(Command.GET_ALIGNMENT, alignment=1)
        await peer.send(b"xyz")
        await peer.answer(Command.GET_MAX_SIZE, max_size=2)

    async with talking_to(script) as c:
        first, data, last = await asyncio.gather(
            c.get_alignment(), c.get_tensor(placed(3)), c.get_max_size()
        )
        assert (first, bytes(data), last) == (1, b"xyz", 2)
        assert c.in_flight == 0


async def test_many_in_flight_keep_their_order() -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        for i in range(200):
            fields, _ = await peer.take(Command.BUFFER_GET_BASE)
            assert fields.remote_ptr == i
            await peer.answer(Command.BUFFER_GET_BASE, base_ptr=1000 + i)

    async with talking_to(script) as c:
        bases = await asyncio.gather(*map(c.buffer_get_base, range(200)))
    assert bases == [1000 + i for i in range(200)]


async def exchange_of_large_payloads() -> None:
    size = (8 << 20) + 3
    content = np.random.default_rng(5).integers(0, 256, size, np.uint8)

    async def script(peer: Peer) -> None:
        await peer.hello()
        _, data = await peer.take(Command.SET_TENSOR)
        await peer.take(Command.GET_ALIGNMENT)
        await peer.take(Command.GET_TENSOR)
        await peer.answer(Command.GET_ALIGNMENT, alignment=64)
        await peer.send(data)

    async with talking_to(script) as c:
        tensor = placed(size)
        _, alignment, back = await asyncio.gather(
            c.set_tensor(tensor, content.data), c.get_alignment(), c.get_tensor(tensor)
        )
    assert alignment == 64
    assert np.array_equal(back, content)


@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_large_payloads_both_ways_with_others_between(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    # The two loops differ in when they write, and in whose memory they keep.
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(exchange_of_large_payloads())


async def test_a_slow_server_holds_the_upload_back() -> None:
    size = 32 << 20
    proceed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.hello()
        await proceed.wait()
        _, data = await peer.take(Command.SET_TENSOR)
        assert len(data) == size

    async with talking_to(script) as c:
        upload = asyncio.create_task(c.set_tensor(placed(size), bytes(size)))
        await asyncio.sleep(0.1)
        assert not upload.done()
        assert c._transport.get_write_buffer_size() <= 1 << 20
        proceed.set()
        await upload


async def test_memory_may_change_once_it_is_uploaded() -> None:
    content = np.full(4 << 20, 7, np.uint8)

    async def script(peer: Peer) -> None:
        await peer.hello()
        _, data = await peer.take(Command.SET_TENSOR)
        assert data == b"\7" * (4 << 20)

    async with talking_to(script) as c:
        await c.set_tensor(placed(4 << 20), content.data)
        content[:] = 8


async def test_a_server_that_dies_ends_all_calls() -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.take(Command.GET_ALIGNMENT)
        await peer.take(Command.GET_MAX_SIZE)

    async with scripted(NEWEST, script) as port:
        c = await connect("127.0.0.1", port)
        results = await asyncio.gather(c.get_alignment(), c.get_max_size(), return_exceptions=True)
        assert [type(r) for r in results] == [ConnectionLost, ConnectionLost]
        assert results[0] is not results[1]
        assert "the answer to GET_ALIGNMENT" in str(results[0])
        with pytest.raises(ConnectionLost):
            await c.get_alignment()
        assert isinstance(await c.wait_closed(), ConnectionLost)


async def test_an_answer_cut_short() -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.take(Command.GET_TENSOR)
        await peer.send_raw(struct.pack("<Q", 9000) + bytes(8000))

    async with scripted(NEWEST, script) as port:
        c = await connect("127.0.0.1", port)
        with pytest.raises(ConnectionLost, match="GET_TENSOR \\(8000 of 9000 bytes\\)"):
            await c.get_tensor(placed(9000))


@pytest.mark.parametrize("size", [0, 8, 10])
async def test_an_answer_of_the_wrong_size(size: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.take(Command.GET_TENSOR)
        await peer.send(bytes(size))

    async with scripted(NEWEST, script) as port:
        c = await connect("127.0.0.1", port)
        with pytest.raises(ProtocolError, match=f"GET_TENSOR has {size} bytes, not 9"):
            await c.get_tensor(placed(9))
        with pytest.raises(ProtocolError):
            await c.get_alignment()


async def test_an_answer_that_nobody_asked_for() -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.send(b"")

    async with scripted(NEWEST, script) as port:
        c = await connect("127.0.0.1", port)
        error = await asyncio.wait_for(c.wait_closed(), 5)
        assert isinstance(error, ProtocolError)


async def test_an_abandoned_call_takes_its_answer_with_it() -> None:
    arrived = asyncio.Event()
    proceed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.take(Command.GET_TENSOR)
        arrived.set()
        await proceed.wait()
        await peer.send(bytes(100000))
        await peer.take(Command.GET_ALIGNMENT)
        await peer.answer(Command.GET_ALIGNMENT, alignment=5)

    async with talking_to(script) as c:
        download = asyncio.create_task(c.get_tensor(placed(100000)))
        await arrived.wait()
        download.cancel()
        proceed.set()
        assert await c.get_alignment() == 5


@contextlib.asynccontextmanager
async def half_way() -> AsyncIterator[tuple[Connection, asyncio.Task[None]]]:
    """A connection, and an upload that waits there: the server does not read it."""
    stop = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.hello()
        await stop.wait()

    async with scripted(NEWEST, script) as port:
        c = await connect("127.0.0.1", port)
        upload = asyncio.create_task(c.set_tensor(placed(64 << 20), bytes(64 << 20)))
        await asyncio.sleep(0.1)
        yield c, upload
        stop.set()


async def test_an_upload_cancelled_half_way_ends_the_connection() -> None:
    async with half_way() as (c, upload):
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        with pytest.raises(ConnectionLost, match="cancelled while it was being sent"):
            await c.get_alignment()


async def test_closing_ends_what_is_pending() -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.take(Command.GET_ALIGNMENT)
        assert await peer.reader.read() == b""

    async with scripted(NEWEST, script) as port:
        c = await connect("127.0.0.1", port)
        call = asyncio.create_task(c.get_alignment())
        await asyncio.sleep(0.01)
        await c.close()
        with pytest.raises(ConnectionLost, match="this client closed"):
            await call
        assert c.closed


async def test_closing_does_not_wait_for_a_server_that_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("client.connection._LINGER", 0.05)
    async with half_way() as (c, upload):
        await asyncio.wait_for(c.close(), 5)
        with pytest.raises(ConnectionLost):
            await upload


async def test_failures_that_are_answers() -> None:
    dialect = BY_NAME["1.0.0"]

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.take(Command.ALLOC_BUFFER)
        await peer.answer(Command.ALLOC_BUFFER, remote_ptr=0, remote_size=0)
        await peer.take(Command.GRAPH_COMPUTE)
        await peer.answer(Command.GRAPH_COMPUTE, result=255)

    async with talking_to(script, dialect) as c:
        with pytest.raises(AllocationFailed, match="4096"):
            await c.alloc_buffer(4096)
        with pytest.raises(GraphFailed, match="255"):
            await c.graph_compute(b"")


async def test_nothing_is_sent_that_the_version_cannot_say() -> None:
    dialect = BY_NAME["2.0.0-90"]

    async def script(peer: Peer) -> None:
        await peer.hello()
        assert await peer.reader.read() == b""

    async with talking_to(script, dialect) as c:
        with pytest.raises(UnsupportedCommand, match="no room for device = 1"):
            await c.alloc_buffer(1, device=1)
        with pytest.raises(UnsupportedCommand, match="DEVICE_COUNT is no command"):
            await c.device_count()
        with pytest.raises(ValueError, match="out of range"):
            await c.alloc_buffer(-1)
        with pytest.raises(ValueError, match="carries nothing"):
            await c.request(Command.GET_ALIGNMENT, data=b"x")
        with pytest.raises(ValueError, match="carries a graph"):
            await c.request(Command.GRAPH_COMPUTE)


async def test_raw_bytes_and_their_answer() -> None:
    async def script(peer: Peer) -> None:
        await peer.hello()
        fields, _ = await peer.take(Command.GET_ALIGNMENT)
        assert fields.device == 3
        await peer.answer(Command.GET_ALIGNMENT, alignment=16)

    async with talking_to(script) as c:
        answer = c.expect(Command.GET_ALIGNMENT)
        await c.send_raw(struct.pack("<BQ", 1, 4))
        await c.send_raw(struct.pack("<I", 3))
        assert (await answer).alignment == 16


async def test_bytes_without_a_frame_wait_for_answers_in_frames() -> None:
    dialect = with_split(NEWEST)
    waited = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.take(Command.HELLO)
        await peer.answer(Command.HELLO, major=7, minor=0, patch=0, conn_caps=split_caps())
        await peer.take(Command.GET_TENSOR)
        # A server that runs a program has the connection to itself.
        await asyncio.sleep(0.05)
        assert not peer.reader._buffer  # type: ignore[attr-defined]
        waited.set()
        await peer.send(b"\7" * 9000)
        for value in (1, 2):
            fields, _ = await peer.take(Command.SPLIT_RUN)
            assert fields.program == 5
            assert await peer.reader.readexactly(100_000) == bytes([value]) * 100_000
            await peer.send_raw(bytes([value]) * 20_000)
        await peer.take(Command.GET_ALIGNMENT)
        await peer.answer(Command.GET_ALIGNMENT, alignment=64)

    async def run(c: Connection, value: int) -> None:
        outputs = [np.zeros(8_000, np.uint8), np.zeros(12_000, np.uint8)]
        head = c.message(Command.SPLIT_RUN, device=0, program=5)
        futures = await c.exchange(
            [head, bytes([value]) * 100_000],
            [(Command.SPLIT_RUN, o.data) for o in outputs],
            framed=False,
        )
        assert waited.is_set()
        await asyncio.gather(*futures)
        assert all((o == value).all() for o in outputs)

    async with scripted(dialect, script) as port:
        c = await connect("127.0.0.1", port, split=True)
        async with c:
            assert c.split_version == VERSION
            results = await asyncio.gather(
                c.get_tensor(placed(9000)), run(c, 1), run(c, 2), c.get_alignment()
            )
            assert (results[0] == 7).all()
            assert results[3] == 64


async def test_a_server_that_hangs_up_within_bytes_without_a_frame() -> None:
    async def script(peer: Peer) -> None:
        await peer.take(Command.HELLO)
        await peer.answer(Command.HELLO, major=7, minor=0, patch=0, conn_caps=split_caps())
        await peer.take(Command.SPLIT_RUN)
        await peer.send_raw(bytes(7))

    async with scripted(with_split(NEWEST), script) as port:
        c = await connect("127.0.0.1", port, split=True)
        head = c.message(Command.SPLIT_RUN, device=0, program=0)
        output = memoryview(bytearray(10))
        futures = await c.exchange([head], [(Command.SPLIT_RUN, output)], framed=False)
        with pytest.raises(ConnectionLost, match=r"SPLIT_RUN \(7 of 10 bytes\)"):
            await futures[0]


async def test_closing_after_the_server_has_half_closed_within_an_upload() -> None:
    size = 64 << 20

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.reader.readexactly(9)
        peer.writer.write_eof()
        # The client notices while bytes of its own are still on their way.
        while await peer.reader.read(1 << 20):
            pass

    async with scripted(NEWEST, script) as port:
        c = await connect("127.0.0.1", port)
        with pytest.raises(ConnectionLost):
            await c.set_tensor(placed(size), bytes(size))
        await c.wait_closed()
        c.abort()
        await c.close()
