"""Servers that exchange tensors among themselves: groups, links and programs with swaps.

Over real sockets, the client being the only one who knows what is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from client.backend import Backend
from client.errors import ConnectionLost
from client.split.links import LinkError, open_link
from client.split.steps import Step, encode_steps
from conformance.cases.split_groups import adding as adding_steps
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.split import SECRET_SIZE, decode_report, peers_fields
from tests.split.cluster import HOST, WorkerProcess, backend
from tests.split.test_programs import Stream, run_message
from tests.split.weights import values

F32 = GgmlType.F32


@contextlib.asynccontextmanager
async def members(
    servers: Sequence[WorkerProcess | int], timeout: float = 20.0
) -> AsyncIterator[list[Backend]]:
    """Clients of servers (or of those at ports) that are members of one group."""
    secret = secrets.token_bytes(SECRET_SIZE)
    ports = [s if isinstance(s, int) else s.port for s in servers]
    async with contextlib.AsyncExitStack() as stack:
        made = [await stack.enter_async_context(backend(server)) for server in servers]
        for i, b in enumerate(made):
            parts = [(HOST, port, j < i) for j, port in enumerate(ports)]
            assert await enter(b, secret, i, parts, timeout) == ""
        yield made


async def enter(
    b: Backend,
    secret: bytes,
    number: int,
    parts: Sequence[tuple[str, int, bool]],
    timeout: float = 20.0,
) -> str:
    """Make a server a member; return why it can't be."""
    fields = peers_fields(secret, timeout, number, parts)
    answer = await b.connection.request(Command.SPLIT_PEERS, device=0, **fields)
    assert bool(answer.result) == any(answer.reason)
    return bytes(answer.reason).rstrip(b"\0").decode()


async def adding(b: Backend, number: int, n_parts: int, n: int, rounds: int = 1) -> list[Step]:
    """Steps that double ``x`` and add it to what the others have, again and again; placed."""
    steps, whole = adding_steps(b.graph, number, n_parts, n, rounds)
    await b.allocate(whole.roots)
    return steps


async def send_program(b: Backend, steps: Sequence[Step]) -> None:
    body = encode_steps(b.connection, steps)
    answer = await b.connection.request(Command.SPLIT_PROGRAM, data=body, device=0, program=0)
    assert answer.result == 0


async def run(b: Backend, x: np.ndarray) -> np.ndarray:
    """Run program 0 and return what it gives."""
    async with Stream.of(b) as stream:
        await stream.send(run_message(b.connection, 0), x.tobytes())
        size = (await stream.receive(2)).view(np.int64)
        assert size[0] == x.nbytes
        return await stream.receive(len(x))


@pytest.fixture
async def servers(whole: WorkerProcess, workers: list[WorkerProcess]) -> list[WorkerProcess]:
    return [whole, *workers]


@pytest.mark.parametrize("n_parts", [2, 3])
async def test_all_members_have_the_same_bits(n_parts: int, servers: list[WorkerProcess]) -> None:
    """Added in one order everywhere, whichever of the terms is a member's own."""
    async with members(servers[:n_parts]) as made:
        for i, b in enumerate(made):
            await send_program(b, await adding(b, i, n_parts, 4096, rounds=5))
        for turn in range(3):
            given = [values(4096, seed=10 * turn + i) for i in range(n_parts)]
            got = await asyncio.gather(*(run(b, x) for b, x in zip(made, given, strict=True)))
            total = given
            for _ in range(5):
                terms = [np.float32(2) * x for x in total]
                added = terms[0]
                for term in terms[1:]:
                    added = added + term
                total = [added] * n_parts
            for one in got:
                assert np.array_equal(one, total[0])


async def test_more_than_sockets_hold(servers: list[WorkerProcess]) -> None:
    """Both send before they have received: neither waits for the other to take it."""
    n = 4 << 20
    async with members(servers[:2]) as made:
        for i, b in enumerate(made):
            await send_program(b, await adding(b, i, 2, n))
        x, y = values(n, seed=1), values(n, seed=2)
        one, other = await asyncio.gather(run(made[0], x), run(made[1], y))
        assert np.array_equal(one, 2 * x + 2 * y)
        assert np.array_equal(other, one)


async def test_ordinary_programs_and_commands_between(servers: list[WorkerProcess]) -> None:
    async with members(servers[:2]) as made:
        for i, b in enumerate(made):
            await send_program(b, await adding(b, i, 2, 64))
        for _ in range(2):
            x = values(64)
            one, _ = await asyncio.gather(*(run(b, x) for b in made))
            assert np.array_equal(one, 4 * x)
            assert await made[0].connection.get_alignment() == made[0].alignment


async def failing(b: Backend, x: np.ndarray) -> str:
    """Run program 0, which fails; return what the server says of why."""
    async with Stream.of(b) as stream:
        await stream.send(run_message(b.connection, 0), x.tobytes())
        data = bytearray()
        while True:
            piece = await asyncio.to_thread(stream.take)
            if not piece:
                return decode_report(bytes(data))
            data += piece


async def test_a_member_that_says_nothing(servers: list[WorkerProcess]) -> None:
    """It is waited for as long as the client said, and the client is told whom for."""
    async with members(servers[:2], timeout=1.0) as made:
        for i, b in enumerate(made):
            await send_program(b, await adding(b, i, 2, 64))
        report = await failing(made[0], values(64))
    assert report.endswith("part 1 did not answer in time")


async def test_a_member_that_leaves(servers: list[WorkerProcess]) -> None:
    async with members(servers[:2]) as made:
        for i, b in enumerate(made):
            await send_program(b, await adding(b, i, 2, 64))
        waiting = asyncio.create_task(failing(made[0], values(64)))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await made[1].connection.close()
        assert (await waiting).endswith("part 1 hung up")


async def test_a_member_that_is_stopped_and_goes_on() -> None:
    """A pause shorter than the patience costs nothing but time."""
    with WorkerProcess() as one, WorkerProcess() as other:
        async with members([one, other]) as made:
            for i, b in enumerate(made):
                await send_program(b, await adding(b, i, 2, 1 << 20))
            other.child.send_signal(signal.SIGSTOP)
            x = values(1 << 20)
            both = asyncio.gather(*(run(b, x) for b in made))
            await asyncio.sleep(0.5)
            other.child.send_signal(signal.SIGCONT)
            assert np.array_equal((await both)[0], 4 * x)


async def test_a_member_that_sends_too_little(servers: list[WorkerProcess]) -> None:
    """Its own program is smaller: what is missing is waited for, and never made up."""
    async with members(servers[:2], timeout=1.0) as made:
        for i, b in enumerate(made):
            await send_program(b, await adding(b, i, 2, 64 if i else 4096))
        first, second = await asyncio.gather(
            failing(made[0], values(4096)), run(made[1], values(64)), return_exceptions=True
        )
    assert isinstance(first, str)
    assert "part 1" in first
    assert isinstance(second, np.ndarray)


# -- who is let in


async def test_a_secret_that_nobody_handed_out(whole: WorkerProcess) -> None:
    with pytest.raises(LinkError, match="does not let us in"):
        await open_link(HOST, whole.port, secrets.token_bytes(SECRET_SIZE), 0)
    whole.wait_for("SPLIT_JOIN with a secret that no client here has handed out; closing")


async def test_a_number_that_is_not_expected(servers: list[WorkerProcess]) -> None:
    """The server's own, one that is there already, and one beyond the group."""
    secret = secrets.token_bytes(SECRET_SIZE)
    async with backend(servers[0]) as b:
        parts = [(HOST, server.port, False) for server in servers[:2]]
        assert await enter(b, secret, 0, parts) == ""
        for number in (0, 2, 1 << 31):
            with pytest.raises(LinkError):
                await open_link(HOST, servers[0].port, secret, number)
        link = await open_link(HOST, servers[0].port, secret, 1)
        with pytest.raises(LinkError):
            await open_link(HOST, servers[0].port, secret, 1)
        link.abort()
    servers[0].wait_for("SPLIT_JOIN as part 1, which is not expected; closing")


async def test_a_group_ends_with_its_client(servers: list[WorkerProcess]) -> None:
    secret = secrets.token_bytes(SECRET_SIZE)
    async with backend(servers[0]) as b:
        assert await enter(b, secret, 0, [(HOST, s.port, False) for s in servers[:2]]) == ""
    async with asyncio.timeout(20):
        while True:
            try:
                (await open_link(HOST, servers[0].port, secret, 1)).abort()
            except LinkError:
                break


async def test_a_member_that_cant_be_reached(servers: list[WorkerProcess]) -> None:
    """The client is told why, and its connection goes on."""
    secret = secrets.token_bytes(SECRET_SIZE)
    async with backend(servers[0]) as b:
        parts = [(HOST, servers[1].port, True), (HOST, servers[0].port, False)]
        assert "does not let us in" in await enter(b, secret, 1, parts)
        closed = [(HOST, 9, True), (HOST, servers[0].port, False)]
        assert "can't be reached" in await enter(b, secret, 1, closed)
        assert await b.connection.get_alignment() == b.alignment


async def test_only_those_of_allow_are_connected_to(servers: list[WorkerProcess]) -> None:
    with WorkerProcess("--allow", HOST) as guarded:
        async with backend(guarded) as b:
            parts = [("127.0.0.2", servers[0].port, True), (HOST, guarded.port, False)]
            reason = await enter(b, secrets.token_bytes(SECRET_SIZE), 1, parts)
            assert reason.endswith("is not among those of --allow")


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no-secret": ({"secret": bytes(SECRET_SIZE)}, "without a secret"),
    "number": ({"number": 2}, "as number 2 of 2"),
    "alone": ({"n_parts": 1}, "as number 0 of 1"),
    "many": ({"n_parts": 17}, "as number 0 of 17"),
    "patience": ({"timeout_ms": 0}, "to wait 0 ms"),
    "name": (
        {"parts": [{"host": b"", "port": 0, "reach": 0}]
         + [{"host": b"localhost", "port": 1, "reach": 1}] * 15},
        "'localhost', which is no address",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_group_that_can_not_be(what: str, whole: WorkerProcess) -> None:
    given, said = HOSTILE[what]
    secret = secrets.token_bytes(SECRET_SIZE)
    fields = {**peers_fields(secret, 1.0, 0, [(HOST, 1, False)] * 2), **given}
    async with backend(whole) as b:
        with pytest.raises(ConnectionLost):
            await b.connection.request(Command.SPLIT_PEERS, device=0, **fields)
    whole.wait_for(f"{said}.*; closing")
    assert whole.alive


async def test_swaps_without_a_group(whole: WorkerProcess) -> None:
    async with backend(whole) as b:
        with pytest.raises(ConnectionLost):
            await send_program(b, await adding(b, 0, 2, 64))
    whole.wait_for("a swap in a group of 2, the client has none; closing")


async def test_swaps_among_more_than_the_group_has(servers: list[WorkerProcess]) -> None:
    async with members(servers[:2]) as made:
        with pytest.raises(ConnectionLost):
            await send_program(made[0], await adding(made[0], 0, 3, 64))
    servers[0].wait_for("a swap in a group of 3, the client has one of 2; closing")


async def test_a_run_before_all_are_there(servers: list[WorkerProcess]) -> None:
    async with backend(servers[0]) as b:
        parts = [(HOST, s.port, False) for s in servers[:2]]
        assert await enter(b, secrets.token_bytes(SECRET_SIZE), 0, parts) == ""
        await send_program(b, await adding(b, 0, 2, 64))
        async with Stream.of(b) as stream:
            await stream.send(run_message(b.connection, 0))
            assert await stream.ended()
    servers[0].wait_for("SPLIT_RUN of program 0, whose parts are not linked; closing")


async def test_swaps_whose_tensors_lie_over_one_another(servers: list[WorkerProcess]) -> None:
    async with members(servers[:2]) as made:
        b = made[0]
        steps = await adding(b, 0, 2, 64)
        own, other = steps[0].swap
        other.place(own.buffer, own.address + 128)
        with pytest.raises(ConnectionLost):
            await send_program(b, steps)
    servers[0].wait_for("a swap's tensors lie over one another; closing")


async def test_a_swap_into_what_is_computed(servers: list[WorkerProcess]) -> None:
    async with members(servers[:2]) as made:
        b = made[0]
        first, last = await adding(b, 0, 2, 64)
        own = first.swap[0]
        steps = [Step(first.inputs, first.graph, (), (own, last.outputs[0])), last]
        with pytest.raises(ConnectionLost):
            await send_program(b, steps)
    servers[0].wait_for("what a swap brings must not be computed here; closing")
