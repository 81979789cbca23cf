"""The coordinator's connection to one worker: parts of weights there, and programs that use them.

A worker with the split extension is sent a program once and then streams. One without it, such as
upstream's server, gets for each exchange the ordinary commands in one go: inputs by SET_TENSOR,
GRAPH_COMPUTE, outputs by GET_TENSOR. Either way an exchange is one message there and one back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.backend import Backend, Buffer
from client.connection import connect
from client.errors import AllocationFailed, ConnectionLost, VersionMismatch
from client.graph import Graph
from client.tensors import Tensor
from protocol.commands import Command
from protocol.ggml_types import GgmlType
from protocol.split import MAX_PROGRAMS, ProgramStep, encode_program, split_part_fields
from rpc_server.devices.base import DeviceError
from rpc_server.split.exchange import Peer
from rpc_server.split.stream import BYTES_RECEIVED, BYTES_SENT, EXCHANGES, WAIT_NS

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
# Protocols of workers: what a step needs is there from 5 on, tried newest first.
_VERSIONS = ("7", "6", "5")
# Tries before a receive goes to sleep: about 100 us, more than a worker takes for a small product.
_SPINS = 100
_ALIGN = 128
_FIRST_REGION = 4 << 20


class WorkerLost(DeviceError):  # noqa: N818 - says what happened
    """The worker can't be reached, or its connection ended; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Frames:
    """What surrounds the inputs of one step on their way: a prefix for each, and what follows."""

    prefixes: tuple[bytes, ...]
    suffix: bytes
    # Framing before each output on the way back.
    head: int


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Steps that a worker is ready for, the frames of each, and its number there if it has one."""

    steps: tuple[Step, ...]
    frames: tuple[Frames, ...]
    number: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """One exchange as a worker sees it; all tensors have memory there."""

    inputs: tuple[Tensor, ...]
    graph: Graph
    outputs: tuple[Tensor, ...]


class Link:
    """One connection to one worker. All methods run on the event loop's thread."""

    def __init__(self, name: str, backend: Backend, timeout: float) -> None:
        self.name = name
        self.backend = backend
        self.peer = Peer(f"worker {name}", timeout, _SPINS)
        self.free = self.total = 0
        self.round_trip = 0.0
        self.rows = 0
        self.bytes = 0
        self._region: Buffer | None = None
        self._programs: dict[int, Program] = {}
        self._programmed = 0
        self._lent = False

    @classmethod
    async def open(cls, host: str, port: int, timeout: float) -> Link:
        """Connect by the newest protocol that the worker speaks.

        ``timeout`` (seconds) is how long one exchange may take. Raises WorkerLost.
        """
        name = f"{host}:{port}"
        mismatch = ""
        for version in _VERSIONS:
            try:
                connection = await connect(
                    host, port, version=version, timeout=CONNECT_TIMEOUT, split=version == "7"
                )
            except VersionMismatch as error:
                mismatch = str(error)
                continue
            except TimeoutError:
                raise WorkerLost(
                    f"worker {name} accepts but does not answer (does another client hold it?)"
                ) from None
            except OSError as error:
                raise WorkerLost(f"worker {name}: {error.strerror or error}") from None
            connection.enable_keepalive()
            link = cls(name, await Backend.open(connection), timeout)
            await link.refresh()
            await link._measure()
            log.info(
                "worker %s: protocol %s, %s, %d of %d MiB free",
                name,
                connection.dialect.name,
                "split extension" if connection.split_version else "ordinary commands",
                link.free >> 20,
                link.total >> 20,
            )
            return link
        raise WorkerLost(f"worker {name}: {mismatch}")

    @property
    def extended(self) -> bool:
        """Whether the worker has the split extension."""
        return self.backend.connection.split_version > 0

    @property
    def lost(self) -> bool:
        return self.backend.connection.closed

    def require(self) -> None:
        """Raises WorkerLost if the connection has ended."""
        if self.lost:
            raise WorkerLost(f"worker {self.name} was lost")

    def abort(self) -> None:
        """Hang up at once: the stream is out of step, or nobody needs it."""
        self.backend.connection.abort()

    async def refresh(self) -> None:
        """Ask for the memory the worker has."""
        try:
            self.free, self.total = await self.backend.connection.get_device_memory()
        except ConnectionLost as error:
            raise WorkerLost(f"worker {self.name}: {error}") from None

    async def _measure(self) -> None:
        """Round trip of a small request; the least of a few, since anything may delay one."""
        times = []
        for _ in range(5):
            started = time.perf_counter()
            await self.backend.connection.get_alignment()
            times.append(time.perf_counter() - started)
        self.round_trip = min(times)

    def status(self) -> dict[str, Any]:
        """The fields of a SplitPart."""
        stream = self.peer.stream
        return split_part_fields(
            self.name,
            rows=self.rows,
            bytes=self.bytes,
            exchanges=stream.count(EXCHANGES),
            bytes_sent=stream.count(BYTES_SENT),
            bytes_received=stream.count(BYTES_RECEIVED),
            round_trip_seconds=self.round_trip,
            wait_seconds=stream.count(WAIT_NS) / 1e9,
        )

    # -- weights

    async def place(self, type: GgmlType, ne: Sequence[int], name: str) -> tuple[Tensor, Buffer]:
        """Memory for a part of a weight. Raises WorkerLost, also when the worker has no room."""
        tensor = self.backend.graph.new_tensor(type, ne, name)
        try:
            buffers = await self.backend.allocate([tensor])
        except AllocationFailed:
            raise WorkerLost(
                f"worker {self.name} has no room for {tensor.nbytes} bytes of '{name}'"
            ) from None
        except ConnectionLost as error:
            raise WorkerLost(f"worker {self.name}: {error}") from None
        self.rows += tensor.ne[1] * tensor.ne[2]
        self.bytes += tensor.nbytes
        return tensor, buffers[0]

    async def release(self, tensor: Tensor, buffer: Buffer) -> None:
        """Give back what :meth:`place` got; nothing to do when the worker is lost."""
        self.rows -= tensor.ne[1] * tensor.ne[2]
        self.bytes -= tensor.nbytes
        if not self.lost:
            await self.backend.free([buffer], [tensor])

    async def write(self, tensor: Tensor, data: memoryview, offset: int) -> None:
        """Raises WorkerLost."""
        try:
            await self.backend.connection.set_tensor(tensor, data, offset)
        except ConnectionLost as error:
            raise WorkerLost(f"worker {self.name}: {error}") from None

    async def read(self, tensor: Tensor, offset: int, size: int) -> memoryview:
        """Raises WorkerLost."""
        try:
            return (await self.backend.connection.get_tensor(tensor, offset, size)).data
        except ConnectionLost as error:
            raise WorkerLost(f"worker {self.name}: {error}") from None

    # -- programs

    async def place_step(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors of one step memory that all steps share; outputs come last, adjacent."""
        offsets, at = [], 0
        for t in tensors:
            offsets.append(at)
            at = -(-(at + t.nbytes) // _ALIGN) * _ALIGN
        if self._region is None or at > self._region.size:
            # Programs made before keep the old region; each new one is twice as large.
            size = max(_FIRST_REGION, 2 * at)
            probe = self.backend.graph.new_tensor_1d(GgmlType.I8, size, "exchange")
            try:
                self._region = (await self.backend.allocate([probe]))[0]
            except AllocationFailed:
                raise WorkerLost(f"worker {self.name} has no room for {size} bytes") from None
        for t, offset in zip(tensors, offsets, strict=True):
            t.place(self._region.handle, self._region.base + offset)

    async def program(self, steps: Sequence[Step]) -> Program:
        """Make the worker ready to run ``steps`` in this order, again and again.

        Raises WorkerLost.
        """
        if not self.extended:
            return Program(tuple(steps), tuple(self._commands(steps)), None)
        number = self._programmed % MAX_PROGRAMS
        self._programmed += 1
        run = self.backend.connection.message(Command.SPLIT_RUN, device=0, program=number)
        frames = [Frames((b"",) * len(s.inputs), b"", 0) for s in steps]
        # The command that starts the program goes out with the first input.
        frames[0] = Frames((run, *frames[0].prefixes[1:]), b"", 0)
        program = Program(tuple(steps), tuple(frames), number)
        await self._send_program(program)
        return program

    async def _send_program(self, program: Program) -> None:
        assert program.number is not None
        connection = self.backend.connection
        tensors = np.concatenate(
            [s.graph.payload(connection.dialect).tensors for s in program.steps]
        )
        # Weights may be part of several steps.
        _, first = np.unique(tensors["id"], return_index=True)
        steps = [
            ProgramStep(
                tuple(t.id for t in s.inputs),
                tuple(t.id for t in s.graph.nodes),
                tuple(t.id for t in s.outputs),
            )
            for s in program.steps
        ]
        try:
            await connection.request(
                Command.SPLIT_PROGRAM,
                data=encode_program(steps, tensors[np.sort(first)]),
                device=0,
                program=program.number,
            )
        except ConnectionLost as error:
            raise WorkerLost(f"worker {self.name} refused a graph: {error}") from None
        self._programs[program.number] = program

    def _commands(self, steps: Sequence[Step]) -> list[Frames]:
        connection = self.backend.connection
        made = []
        for step in steps:
            prefixes = tuple(
                connection.message(
                    Command.SET_TENSOR,
                    body_size=t.nbytes,
                    tensor=connection.wire_tensor(t),
                    offset=0,
                    cache_flag=0,
                )
                for t in step.inputs
            )
            payload = step.graph.encode(connection.dialect)
            suffix = connection.message(Command.GRAPH_COMPUTE, body_size=len(payload)) + payload
            for t in step.outputs:
                suffix += connection.message(
                    Command.GET_TENSOR,
                    tensor=connection.wire_tensor(t),
                    offset=0,
                    size=t.nbytes,
                )
            made.append(Frames(prefixes, suffix, 8))
        return made

    # -- the socket

    async def lend(self, program: Program) -> None:
        """Let compiled code run ``program`` on the socket; see Connection.lend.

        Raises WorkerLost.
        """
        if program.number is not None and self._programs.get(program.number) is not program:
            # A newer one took its number.
            await self._send_program(program)
        try:
            fd = await self.backend.connection.lend()
        except ConnectionLost as error:
            raise WorkerLost(f"worker {self.name}: {error}") from None
        self.peer.stream.open(fd)
        self._lent = True

    def take_back(self) -> None:
        """After :meth:`lend`."""
        if self._lent:
            self._lent = False
            self.backend.connection.take_back()


async def open_links(
    endpoints: Sequence[tuple[str, int]], timeout: float
) -> list[Link | WorkerLost]:
    """Links to all, or why there is none."""

    async def one(host: str, port: int) -> Link | WorkerLost:
        try:
            return await Link.open(host, port, timeout)
        except WorkerLost as error:
            return error

    return list(await asyncio.gather(*(one(*e) for e in endpoints)))
