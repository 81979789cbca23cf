"""The worker's side: programs and their streams over a real socket, sound ones and others.

All of it by the processor, and by an emulated card.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from client.backend import Backend
from client.connection import Connection
from client.errors import ConnectionLost
from client.split.steps import Step, encode_steps
from client.tensors import Array
from protocol.commands import Command
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.split import MAX_PROGRAMS, ProgramStep, encode_program
from protocol.tensor import Tensor
from rpc_server.devices.split.worker import UnfitError, Worker
from tests.split.cluster import HOST, WORKER_IDS, WORKERS, WorkerProcess, backend
from tests.split.weights import values

F32 = GgmlType.F32
PATIENCE = 30.0


@pytest.fixture(scope="module", params=WORKERS, ids=WORKER_IDS)
def whole(request: pytest.FixtureRequest) -> Iterator[WorkerProcess]:
    """The worker that programs are sent to."""
    with request.param() as started:
        yield started


@pytest.fixture
async def b(whole: WorkerProcess) -> AsyncIterator[Backend]:
    async with backend(whole) as made:
        yield made
    assert whole.alive, whole.log
    assert "internal error" not in whole.log


async def program(b: Backend, steps: Sequence[Step], number: int = 0) -> None:
    """Send a program; returns when the worker has it."""
    payload = encode_steps(b.connection, steps)
    await b.connection.request(Command.SPLIT_PROGRAM, data=payload, device=0, program=number)


async def step(b: Backend, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Step:
    """One step, its tensors given memory."""
    graph = b.graph.build(outputs)
    await b.allocate(t for t in (*inputs, *graph.roots) if not t.placed)
    return Step(tuple(inputs), graph, tuple(outputs))


def run_message(connection: Connection, number: int) -> bytes:
    return connection.message(Command.SPLIT_RUN, device=0, program=number)


class Stream:
    """The socket of a connection that lends it, read and written as the stream of a program."""

    def __init__(self, twin: socket.socket) -> None:
        self._socket = twin

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, b: Backend) -> AsyncIterator[Stream]:
        with socket.socket(fileno=os.dup(await b.connection.lend())) as twin:
            twin.settimeout(PATIENCE)
            yield cls(twin)
        b.connection.take_back()

    async def send(self, *data: bytes) -> None:
        await asyncio.to_thread(self._socket.sendall, b"".join(data))

    async def receive(self, *shape: int) -> Array:
        """F32 of this shape."""
        whole = np.empty(shape, np.float32)
        view = whole.data.cast("B")

        def fill() -> None:
            at = 0
            while at < len(view):
                n = self._socket.recv_into(view[at:])
                assert n, "the server hung up"
                at += n

        await asyncio.to_thread(fill)
        return whole

    def take(self) -> bytes:
        """What has come; nothing once the server has hung up."""
        try:
            return self._socket.recv(4096)
        except ConnectionError:
            return b""

    async def ended(self) -> bool:
        """Whether the server closes the connection (waits for it)."""

        def wait() -> bool:
            try:
                return not self._socket.recv(1)
            except ConnectionError:
                return True

        return await asyncio.to_thread(wait)


async def doubling(b: Backend, n: int = 64, factor: float = 2.0) -> Step:
    x = b.graph.new_tensor(F32, (n,), "x")
    return await step(b, [x], [b.graph.scale(x, factor)])


async def test_steps_with_several_inputs_and_outputs(b: Backend) -> None:
    g = b.graph
    w = await b.tensor(F32, (256, 96), values(96, 256, seed=1))
    x, y = (g.new_tensor(F32, (256, 4), name) for name in "xy")
    first = await step(b, [x, y], [g.add(x, y), g.mul_mat(w, x), g.mul(x, y)])
    z = g.new_tensor(F32, (100,), "z")
    second = await step(b, [z], [g.sqr(z)])
    # What an earlier step computed is still there.
    third = await step(b, [], [g.scale(first.outputs[0], 3.0)])
    await program(b, [first, second, third], 5)
    for seed in range(3):
        a, c, d = (values(4, 256, seed=seed), values(4, 256, seed=seed + 9), values(100))
        async with Stream.of(b) as stream:
            await stream.send(run_message(b.connection, 5), a.tobytes(), c.tobytes())
            assert np.array_equal(await stream.receive(4, 256), a + c)
            product = await stream.receive(4, 96)
            assert np.allclose(product, a @ values(96, 256, seed=1).T, atol=1e-3)
            assert np.array_equal(await stream.receive(4, 256), a * c)
            await stream.send(d.tobytes())
            assert np.array_equal(await stream.receive(100), d * d)
            assert np.array_equal(await stream.receive(4, 256), (a + c) * np.float32(3))
    # The ordinary commands go on where the stream ended.
    assert np.array_equal((await b.download(first.outputs[0])).reshape(4, 256), a + c)


async def test_all_inputs_and_the_next_commands_at_once(b: Backend) -> None:
    """They are in the server's hands before the program begins: none is lost, none is taken."""
    steps = [await doubling(b), await doubling(b, 3000, 3.0)]
    await program(b, steps)
    c = b.connection
    x, y = values(64, seed=2), values(3000, seed=3)
    run = run_message(c, 0) + x.tobytes() + y.tobytes()
    align = c.message(Command.GET_ALIGNMENT, device=0)
    async with Stream.of(b) as stream:
        await stream.send(run, run, align, run, align)
        for runs in (2, 1):
            for _ in range(runs):
                assert np.array_equal(await stream.receive(64), x * 2)
                assert np.array_equal(await stream.receive(3000), y * 3)
            answer = (await stream.receive(4)).view(np.int64).tolist()
            assert answer == [8, b.alignment]
    assert await c.get_alignment() == b.alignment


async def test_inputs_that_come_byte_by_byte(b: Backend) -> None:
    await program(b, [await doubling(b)])
    x = values(64, seed=4)
    message = run_message(b.connection, 0) + x.tobytes()
    async with Stream.of(b) as stream:
        for byte in message:
            await stream.send(bytes([byte]))
        assert np.array_equal(await stream.receive(64), x * 2)


async def test_outputs_larger_than_a_socket_holds(b: Backend) -> None:
    n = 4 << 20
    x = b.graph.new_tensor(F32, (n,), "x")
    await program(b, [await step(b, [x], [b.graph.neg(x), b.graph.sqr(x)])])
    data = values(n, seed=5)
    async with Stream.of(b) as stream:
        await stream.send(run_message(b.connection, 0), data.tobytes())
        await asyncio.sleep(0.1)
        assert np.array_equal(await stream.receive(n), -data)
        assert np.array_equal(await stream.receive(n), data * data)


async def test_a_new_program_takes_the_number_of_an_old_one(b: Backend) -> None:
    for factor in (2.0, 5.0):
        await program(b, [await doubling(b, 64, factor)], MAX_PROGRAMS - 1)
        x = values(64, seed=6)
        async with Stream.of(b) as stream:
            await stream.send(run_message(b.connection, MAX_PROGRAMS - 1), x.tobytes())
            assert np.array_equal(await stream.receive(64), x * np.float32(factor))


async def test_programs_are_not_graphs_but_runs_are(b: Backend, whole: WorkerProcess) -> None:
    await program(b, [await doubling(b)])
    x = values(64)
    for _ in range(2):
        async with Stream.of(b) as stream:
            await stream.send(run_message(b.connection, 0), x.tobytes())
            await stream.receive(64)
    name = b.connection._transport.get_extra_info("sockname")[1]
    await b.connection.close()
    whole.wait_for(rf"\({HOST}:{name}\): disconnected; freed \d+ buffers, [0-9.]+ MiB; 2 graphs")


async def refused(b: Backend, whole: WorkerProcess, pattern: str) -> None:
    """The connection ends, the log says why, and the server goes on."""
    name = b.connection._transport.get_extra_info("sockname")[1]
    with pytest.raises(ConnectionLost):
        await b.connection.get_alignment()
    whole.wait_for(rf"\({HOST}:{name}\): [^\n]*{pattern}[^\n]*; closing the connection")
    async with backend(whole) as other:
        assert (
            await other.compute(other.graph.scale(await other.tensor(F32, (1,), [3.0]), 2.0))
        ) == 6


async def run_blindly(b: Backend, number: int) -> None:
    await b.connection.send_raw(run_message(b.connection, number))


async def test_a_number_without_a_program(b: Backend, whole: WorkerProcess) -> None:
    await program(b, [await doubling(b)], 1)
    await run_blindly(b, 2)
    await refused(b, whole, "SPLIT_RUN of program 2, which device 0 doesn't have")


@pytest.mark.parametrize("number", [MAX_PROGRAMS, 2**32 - 1])
async def test_a_number_that_no_program_has(b: Backend, whole: WorkerProcess, number: int) -> None:
    with pytest.raises(ConnectionLost):
        await program(b, [await doubling(b)], number)
    await refused(b, whole, f"program {number}, there are {MAX_PROGRAMS}")


async def test_a_device_that_is_none(b: Backend, whole: WorkerProcess) -> None:
    payload = encode_steps(b.connection, [await doubling(b)])
    with pytest.raises(ConnectionLost):
        await b.connection.request(Command.SPLIT_PROGRAM, data=payload, device=3, program=0)
    await refused(b, whole, "SPLIT_PROGRAM for device 3")


async def test_a_program_is_forgotten_with_a_buffer_of_it(b: Backend, whole: WorkerProcess) -> None:
    made = await doubling(b)
    await program(b, [made], 1)
    await program(b, [await doubling(b)], 2)
    await b.connection.free_buffer(made.inputs[0].buffer)
    x = values(64, seed=7)
    async with Stream.of(b) as stream:
        await stream.send(run_message(b.connection, 2), x.tobytes())
        assert np.array_equal(await stream.receive(64), x * 2)
    await run_blindly(b, 1)
    await refused(b, whole, "SPLIT_RUN of program 1")


async def send_program(b: Backend, payload: bytes) -> None:
    with pytest.raises(ConnectionLost):
        await b.connection.request(Command.SPLIT_PROGRAM, data=payload, device=0, program=0)


@pytest.mark.parametrize("size", [0, 3, 4, 100, 5000])
async def test_garbage_is_refused(b: Backend, whole: WorkerProcess, size: int) -> None:
    await send_program(b, np.random.default_rng(size).bytes(size))
    await refused(b, whole, "program of")


@pytest.mark.parametrize("field", ["inputs", "outputs", "nodes"])
async def test_ids_that_no_tensor_has(b: Backend, whole: WorkerProcess, field: str) -> None:
    made = await doubling(b)
    tensors = made.graph.payload(b.connection.dialect).tensors
    x, y = made.inputs[0].id, made.outputs[0].id
    good = ProgramStep((x,), (y,), (y,))
    await send_program(b, encode_program([replace(good, **{field: (y + 1000,)})], tensors))
    await refused(b, whole, "not among the graph's tensors")


@pytest.mark.parametrize("which", ["input", "output"])
@pytest.mark.parametrize(
    ("offset", "pattern"),
    [
        (1 << 20, "lie outside"),
        (-(1 << 20), "lie outside"),
        (2, "not aligned"),
        (None, "whole and here"),
    ],
)
async def test_tensors_outside_their_buffers(
    b: Backend, whole: WorkerProcess, which: str, offset: int | None, pattern: str
) -> None:
    made = await doubling(b)
    tensors = made.graph.payload(b.connection.dialect).tensors.copy()
    x, y = made.inputs[0].id, made.outputs[0].id
    i = np.flatnonzero(tensors["id"] == (x if which == "input" else y))[0]
    if offset is None:
        tensors["buffer"][i] = tensors["data"][i] = 0
    else:
        tensors["data"][i] = int(tensors["data"][i]) + offset
    await send_program(b, encode_program([ProgramStep((x,), (y,), (y,))], tensors))
    await refused(b, whole, pattern)


async def test_a_buffer_of_another_client(b: Backend, whole: WorkerProcess) -> None:
    async with backend(whole) as other:
        made = await doubling(other)
        payload = encode_steps(other.connection, [made])
        await send_program(b, payload)
        await refused(b, whole, "whole and here")
        await program(other, [made])


async def test_strided_outputs(b: Backend, whole: WorkerProcess) -> None:
    g = b.graph
    x = await b.tensor(F32, (64, 8), values(8, 64))
    view = g.view_2d(x, 32, 8, x.nb[1], 0)
    payload = encode_program(
        [ProgramStep((), (view.id,), (view.id,))],
        g.build([g.cont(view)]).payload(b.connection.dialect).tensors,
    )
    await send_program(b, payload)
    await refused(b, whole, "whole and here")


async def test_nodes_in_the_wrong_order(b: Backend, whole: WorkerProcess) -> None:
    g = b.graph
    x = g.new_tensor(F32, (64,), "x")
    first = g.scale(x, 2.0)
    made = await step(b, [x], [g.sqr(first)])
    tensors = made.graph.payload(b.connection.dialect).tensors
    last = made.outputs[0].id
    await send_program(
        b, encode_program([ProgramStep((x.id,), (last, first.id), (last,))], tensors)
    )
    await refused(b, whole, "computed after it")


async def test_a_program_without_anything(b: Backend) -> None:
    """It is over at once."""
    empty = b.graph.build([]).payload(b.connection.dialect).tensors
    for number, steps in enumerate([[], [ProgramStep((), (), ())] * 3]):
        await b.connection.request(
            Command.SPLIT_PROGRAM, data=encode_program(steps, empty), device=0, program=number
        )
        await run_blindly(b, number)
        assert await b.connection.get_alignment() == b.alignment


async def test_a_client_that_hangs_up_within_a_program(b: Backend, whole: WorkerProcess) -> None:
    """The thread that waits for its input is free at once, and its memory too."""
    await program(b, [await doubling(b, 1 << 20)])
    name = b.connection._transport.get_extra_info("sockname")[1]
    await b.connection.send_raw(run_message(b.connection, 0) + bytes(1000))
    await asyncio.sleep(0.2)
    b.connection.abort()
    await b.connection.wait_closed()
    whole.wait_for(rf"\({HOST}:{name}\): [^\n]*hung up[^\n]*; closing the connection")
    whole.wait_for(rf"\({HOST}:{name}\): disconnected; freed [1-9]")


async def test_others_compute_while_a_program_waits_for_its_client(
    b: Backend, whole: WorkerProcess
) -> None:
    """Wherever in an input it stops, it goes on from there."""
    await program(b, [await doubling(b), await doubling(b, 3000, 3.0)])
    x, z = values(64, seed=8), values(3000, seed=9)
    async with backend(whole) as other, Stream.of(b) as stream:
        leaf = await other.tensor(F32, (64,), x)
        y = other.graph.scale(leaf, 3.0)
        plan = await other.prepare(y)

        async def others_compute() -> None:
            for _ in range(3):
                await plan.run()
                result = await asyncio.wait_for(other.download(y), 30)
                assert np.array_equal(result.reshape(64), x * np.float32(3))

        await stream.send(run_message(b.connection, 0), x.tobytes()[:100])
        await others_compute()
        await stream.send(x.tobytes()[100:150])
        await others_compute()
        await stream.send(x.tobytes()[150:], z.tobytes()[:5000])
        assert np.array_equal(await stream.receive(64), x * 2)
        await others_compute()
        await stream.send(z.tobytes()[5000:])
        assert np.array_equal(await stream.receive(3000), z * np.float32(3))


async def test_others_compute_while_a_client_does_not_take_a_result(
    b: Backend, whole: WorkerProcess
) -> None:
    n = 4 << 20
    x = b.graph.new_tensor(F32, (n,), "x")
    await program(b, [await step(b, [x], [b.graph.neg(x), b.graph.sqr(x)])])
    data = values(n, seed=5)
    async with backend(whole) as other, Stream.of(b) as stream:
        leaf = await other.tensor(F32, (64,), data[:64])
        y = other.graph.scale(leaf, 3.0)
        plan = await other.prepare(y)
        await stream.send(run_message(b.connection, 0), data.tobytes())
        for _ in range(5):
            await plan.run()
            result = await asyncio.wait_for(other.download(y), 30)
            assert np.array_equal(result.reshape(64), data[:64] * np.float32(3))
        assert np.array_equal(await stream.receive(n), -data)
        await plan.run()
        assert np.array_equal(await stream.receive(n), data * data)


@pytest.mark.parametrize("kind", WORKERS, ids=WORKER_IDS)
async def test_stopping_does_not_wait_for_a_client(kind: type[WorkerProcess]) -> None:
    with kind("--drain-seconds", "0.3") as worker:
        async with backend(worker) as b:
            await program(b, [await doubling(b)])
            async with Stream.of(b) as stream:
                await stream.send(run_message(b.connection, 0))
                await asyncio.sleep(0.2)
                started = time.monotonic()
                assert await asyncio.to_thread(worker.stop, PATIENCE) == 0
                assert time.monotonic() - started < PATIENCE / 2
                assert await stream.ended()


async def test_a_node_that_cannot_be_computed_is_answered(b: Backend, whole: WorkerProcess) -> None:
    """A coordinator has other clients: the program is refused, and the connection goes on."""
    g = b.graph
    x, y = g.new_tensor(F32, (64,), "x"), g.new_tensor(F32, (32, 2), "y")
    bad = await step(b, [x, y], [g.op(Op.MUL_MAT, F32, (64,), (x, y))])
    payload = encode_steps(b.connection, [bad])
    nothing = encode_program([], g.build([]).payload(b.connection.dialect).tensors)
    await b.connection.request(Command.SPLIT_PROGRAM, data=nothing, device=0, program=1)
    answer = await b.connection.request(Command.SPLIT_PROGRAM, data=payload, device=0, program=2)
    assert answer.result == 1
    assert "the program is refused" in whole.log
    # The other one runs still, and one in the place of a program that is refused is gone.
    await run_blindly(b, 1)
    assert await b.connection.get_alignment() == b.alignment
    answer = await b.connection.request(Command.SPLIT_PROGRAM, data=payload, device=0, program=1)
    assert answer.result == 1
    await run_blindly(b, 1)
    await refused(b, whole, "SPLIT_RUN of program 1, which device 0 doesn't have")


async def test_a_link_outlives_a_program_that_is_refused(whole: WorkerProcess) -> None:
    link = await Worker.open(HOST, whole.port, 20.0)
    try:
        g = link.backend.graph
        x, y = g.new_tensor(F32, (64,), "x"), g.new_tensor(F32, (32, 2), "y")
        bad = await step(link.backend, [x, y], [g.op(Op.MUL_MAT, F32, (64,), (x, y))])
        with pytest.raises(UnfitError, match=f"worker {HOST}:{whole.port} refuses"):
            await link.program([bad])
        assert not link.lost
        await link.program([await doubling(link.backend)])
    finally:
        link.close()
