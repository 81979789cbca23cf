"""The coordinator's connection to one worker: parts of weights there, and programs that use them.

A worker with the split extension is sent a program once and then streams. One without it, such as
upstream's server, gets for each exchange the ordinary commands in one go: inputs by SET_TENSOR,
GRAPH_COMPUTE, outputs by GET_TENSOR. Either way an exchange is one message there and one back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from client.backend import Backend, BackendBuffer
from client.builder.graph import GraphBuilder
from client.connection import Connection, connect_any
from client.errors import AllocationFailed, ConnectionLost, VersionMismatch
from client.split.lifetimes import Lifetime, place_lifetimes
from client.split.partition import Extent
from client.split.steps import (
    Envelope,
    Region,
    Step,
    command_envelope,
    encode_steps,
    program_envelopes,
)
from client.tensors import ShapeError
from protocol.commands import Command
from protocol.endpoint import format_endpoint
from protocol.errors import ProtocolError
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.split import (
    LEASES_SINCE,
    LOADS_SINCE,
    MAX_MEMBERS,
    MAX_PROGRAMS,
    MOST_REPORT,
    SWAPS_SINCE,
    decode_report,
    split_part_fields,
)
from protocol.tensor import Tensor
from rpc_server.devices.base import DeviceError
from rpc_server.devices.cpu.kernels.interface.stream import (
    BYTES_RECEIVED,
    BYTES_SENT,
    CONFUSED,
    EXCHANGES,
    STATUS_TEXT,
    WAIT_NS,
    StreamPeer,
)
from rpc_server.graph.errors import GraphError
from rpc_server.sockets import shut_down

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
# More than any machine has.
_MOST_MEMORY = 1 << 50
_MOST_ALIGNMENT = 1 << 30
# From this version on it is said with a tensor whether it is to be kept; before, size decided.
_KEEPS_SINCE = (7, 0, 0)
# What a worker is asked to keep, to see whether it does.
_KEPT = b"a coordinator asked whether tensors are kept here\n"
# Longest that a worker may take to plan a graph: the first one compiles kernels.
PREPARE_TIMEOUT = 300.0
# Longest that a worker may take to reach the other parts, beside one exchange.
_LINK_SECONDS = 30.0


class UnfitError(GraphError):
    """A part can't compute its share of a graph; the message names it. The part goes on."""


class WorkerLost(DeviceError):  # noqa: N818 - says what happened
    """The worker can't be reached, or its connection ended; the message names it and says why."""


class PartsMissing(WorkerLost):
    """Parts can't be had at the start; ``reasons`` says why of each, by its number."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = dict(reasons)


class NoRoom(WorkerLost):
    """The worker has no memory for something; its connection goes on."""


class WorkerSilent(WorkerLost):
    """It takes connections, and doesn't answer: others may have it."""


@dataclass(frozen=True, slots=True)
class Tls:
    """The way to speak to a worker.

    It is inside of TLS with ``context``, showing ``token``; see connect.
    """

    context: ssl.SSLContext | None = None
    token: bytes | None = field(default=None, repr=False)


NO_TLS = Tls()


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Steps that a worker is ready for, their envelopes, and its number there if it has one."""

    steps: tuple[Step, ...]
    envelopes: tuple[Envelope, ...]
    number: int | None

    @property
    def has_swaps(self) -> bool:
        """Return whether its steps wait for other parts."""
        return any(step.swap for step in self.steps)


class Worker:
    """One connection to one worker. All methods run on the event loop's thread.

    Clients share it: requests of one wait while the socket is lent for a graph of another, and a
    graph waits for the request that is on its way. Whatever a worker doesn't answer in time ends
    the connection, as what would come later couldn't be told from the next answer.
    """

    def __init__(self, name: str, backend: Backend, timeout: float) -> None:
        self.name = name
        self.backend = backend
        self.peer = StreamPeer(f"worker {name}", timeout, renewed=True)
        self.free = self.total = 0
        self.round_trip = 0.0
        self.rows = 0
        self.bytes = 0
        # Whether this server has the lease of the worker's device now.
        self.leased = False
        # The identities of the worker and of all servers behind it; none of those without leases.
        self.members: tuple[int, ...] = ()
        # Whether the worker is a coordinator itself.
        self.splits = False
        # Whether it keeps on disk what it is sent, as far as it was asked (see find_keeping).
        self.keeps = False
        self._region = Region(backend)
        self._kept = Region(backend)
        self._linked = Region(backend)
        self._programs: dict[int, Program] = {}
        self._programmed = 0
        self._timeout = timeout
        self._turn = asyncio.Lock()
        # Where it was reached, and how.
        self._endpoint = ("", 0)
        self._tls = NO_TLS
        self._lent = False
        self._fd = -1
        # Why we hung up, if we did.
        self._reason = ""

    @classmethod
    async def open(
        cls, host: str, port: int, timeout: float, tls: Tls = NO_TLS, name: str = ""
    ) -> Worker:
        """Connect by the newest protocol that the worker speaks.

        ``timeout`` (seconds) is how long one exchange may take, ``name`` what it is called if not
        by its address. Raises WorkerLost.
        """
        name = name or format_endpoint(host, port)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                connection = await connect_any(
                    host, port, timeout=None, split=True, tls=tls.context, token=tls.token
                )
                try:
                    worker = await cls._begin(name, connection, timeout)
                    worker._endpoint, worker._tls = (host, port), tls
                except BaseException:
                    connection.abort()
                    raise
        except TimeoutError:
            raise WorkerSilent(
                f"worker {name} accepts but does not answer within {CONNECT_TIMEOUT:g} s: another "
                "client or coordinator has it (llama.cpp's ggml-rpc-server serves one at a time), "
                "or it hangs"
            ) from None
        except VersionMismatch as error:
            raise WorkerLost(f"worker {name}: {error}") from None
        except ProtocolError as error:
            raise WorkerLost(f"worker {name} speaks something else: {error}") from None
        except ssl.SSLError as error:
            raise WorkerLost(f"worker {name}: TLS: {error.reason or error}") from None
        except OSError as error:
            raise WorkerLost(f"worker {name}: {error.strerror or error}") from None
        log.info(
            "worker %s: protocol %s, %s, %d of %d MiB free",
            name,
            connection.dialect.name,
            worker.speaks,
            worker.free >> 20,
            worker.total >> 20,
        )
        return worker

    @classmethod
    async def _begin(cls, name: str, connection: Connection, timeout: float) -> Worker:
        connection.enable_keepalive()
        worker = cls(name, await Backend.open(connection), timeout)
        worker.free, worker.total = await connection.get_device_memory()
        worker._check_figures()
        await worker._find_members()
        await worker._measure()
        return worker

    def _check_figures(self) -> None:
        """Raise WorkerLost for what no device has; all that is shared out is computed from it."""
        alignment, largest = self.backend.alignment, self.backend.max_size
        if alignment.bit_count() != 1 or alignment > _MOST_ALIGNMENT:
            what = f"an alignment of {alignment} bytes"
        elif not largest:
            what = "buffers of no byte"
        elif not 0 < self.total <= _MOST_MEMORY or self.free > self.total:
            what = f"{self.free} of {self.total} bytes free"
        elif not self.free:
            raise WorkerLost(f"worker {self.name} has no memory free (who holds it?)")
        else:
            return
        raise WorkerLost(f"worker {self.name} tells what can't be: {what}")

    @property
    def extended(self) -> bool:
        """True if the worker has the split extension."""
        return self.backend.connection.split_version > 0

    @property
    def has_leases(self) -> bool:
        """True if the worker lets one coordinator run at a time."""
        return self.backend.connection.split_version >= LEASES_SINCE

    @property
    def loads(self) -> bool:
        """True if the worker can be asked for slices of what it has on its own disk."""
        return self.backend.connection.split_version >= LOADS_SINCE and not self.splits

    @property
    def speaks(self) -> str:
        """The dialect and extension of the worker, for people."""
        if not self.extended:
            return "ordinary commands"
        return "split extension" if self.has_leases else "split extension without leases"

    @property
    def identity(self) -> int:
        """The number that the worker is known by under whatever address.

        It is 0 where it doesn't tell.
        """
        return self.members[0] if self.members else 0

    @property
    def peer_address(self) -> tuple[str, int]:
        """The address and port at the other end of the connection."""
        return self.backend.connection.peer_address

    @property
    def lost(self) -> bool:
        return self.backend.connection.closed

    def require(self) -> None:
        """Raise WorkerLost if the connection has ended."""
        if self.lost:
            raise WorkerLost(self.loss)

    @property
    def loss(self) -> str:
        """The message about a worker that is lost."""
        return f"worker {self.name} was lost" + (f" ({self._reason})" if self._reason else "")

    def abort(self, reason: str) -> None:
        """Hang up at once, and say why to those who need it later; nobody uses a lent socket."""
        # What came first is what counts.
        self._reason = self._reason or reason
        self.backend.connection.abort()
        self.take_back()

    def close(self) -> None:
        """Hang up; a thread that the socket is lent to gets to know."""
        if self._lent:
            self.interrupt()
        else:
            self.abort("this server stops")

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Name the worker in what ends a request: raises WorkerLost."""
        try:
            yield
        except (ConnectionLost, ProtocolError) as error:
            raise WorkerLost(f"worker {self.name}: {self._reason or error}") from None

    @contextlib.asynccontextmanager
    async def _asking(self, seconds: float) -> AsyncIterator[None]:
        """Have the connection for a request, which may take ``seconds``. Raises WorkerLost."""
        async with self._turn:
            with self._blamed():
                async with self._within(seconds):
                    yield

    @contextlib.asynccontextmanager
    async def _within(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            reason = f"no answer within {seconds:g} s"
            self.abort(reason)
            raise WorkerLost(f"worker {self.name}: {reason}") from None

    async def _measure(self) -> None:
        """Round trip of a small request; the least of a few, since anything may delay one."""
        times = []
        for _ in range(5):
            started = time.perf_counter()
            await self.backend.connection.get_alignment()
            times.append(time.perf_counter() - started)
        self.round_trip = min(times)

    async def _find_members(self) -> None:
        if not self.has_leases:
            return
        query = await self.backend.connection.request(Command.SPLIT_QUERY, device=0)
        self.splits = query.n_parts > 0
        answer = await self.backend.connection.request(Command.SPLIT_MEMBERS, device=0)
        if not 0 < answer.n_members <= MAX_MEMBERS:
            raise ProtocolError(
                f"it splits over {answer.n_members - 1} servers, {MAX_MEMBERS - 1} is the most"
            )
        self.members = tuple(answer.members[: answer.n_members])

    async def refresh_members(self) -> None:
        """Ask a worker that splits over others which these are now. Raises WorkerLost."""
        async with self._asking(self._timeout):
            await self._find_members()

    # -- leases

    async def acquire_lease(self, seconds: float) -> str:
        """Ask for the lease of the worker's device, which may wait ``seconds`` there.

        Returns '' when it is had, else the name of who has it. Raises WorkerLost.
        """
        async with self._asking(self._timeout + seconds):
            answer = await self.backend.connection.request(
                Command.SPLIT_ACQUIRE, device=0, patience_ms=int(seconds * 1000)
            )
        self.leased = bool(answer.granted)
        if self.leased:
            return ""
        return bytes(answer.holder).rstrip(b"\0").decode("ascii", "replace") or "somebody else"

    async def release_lease(self, *, keep: bool = False) -> bool:
        """Give the lease back, or ``keep`` it if nobody waits; return whether it is still had."""
        kept = False
        # A worker that is lost has given it to others already.
        with contextlib.suppress(WorkerLost):
            async with self._asking(self._timeout):
                answer = await self.backend.connection.request(
                    Command.SPLIT_RELEASE, device=0, keep=int(keep)
                )
            kept = bool(answer.kept)
        self.leased = kept
        return kept

    def status(self) -> dict[str, Any]:
        """Return the fields of a SplitPart."""
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

    async def place(
        self, type: GgmlType, ne: Sequence[int], name: str
    ) -> tuple[Tensor, BackendBuffer]:
        """Return memory for a part of a weight. Raises WorkerLost, NoRoom."""
        tensor = self.backend.graph.new_tensor(type, ne, name)
        buffer = await self._allocate(tensor)
        self.rows += tensor.ne[1] * tensor.ne[2]
        self.bytes += tensor.nbytes
        return tensor, buffer

    async def _allocate(self, tensor: Tensor) -> BackendBuffer:
        try:
            async with self._asking(self._timeout):
                return (await self.backend.allocate([tensor]))[0]
        except (AllocationFailed, ShapeError):
            raise NoRoom(
                f"worker {self.name} has no room for {tensor.nbytes} bytes of '{tensor.name}'"
            ) from None

    async def clear(self, buffer: BackendBuffer, value: int = 0) -> None:
        """Set all bytes of a buffer. Raises WorkerLost."""
        async with self._asking(self._timeout):
            await self.backend.connection.buffer_clear(buffer.handle, value)

    async def release(self, tensor: Tensor, buffer: BackendBuffer) -> None:
        """Give back what :meth:`place` got; nothing to do when the worker is lost."""
        self.rows -= tensor.ne[1] * tensor.ne[2]
        self.bytes -= tensor.nbytes
        if self.lost:
            return
        # A worker that is lost meanwhile has freed it.
        with contextlib.suppress(WorkerLost):
            async with self._asking(self._timeout):
                await self.backend.free([buffer], [tensor])

    async def write(self, tensor: Tensor, data: memoryview, offset: int) -> None:
        """Write to the worker's memory. Raises WorkerLost."""
        async with self._asking(self._timeout):
            await self.backend.connection.set_tensor(tensor, data, offset)

    async def find_keeping(self) -> str:
        """Find out whether the worker keeps tensors; return why it doesn't, '' if it does.

        Raises WorkerLost.
        """
        self.keeps, connection = False, self.backend.connection
        if self.splits:
            return "splits over others, which it does not ask to keep anything"
        if connection.dialect.version < _KEEPS_SINCE:
            return f"speaks protocol {connection.dialect.name}, which keeps large tensors only"
        content = np.frombuffer(_KEPT, np.uint8)
        tensor = self.backend.graph.new_tensor_1d(GgmlType.I8, len(content), "keeps?")
        buffer = await self._allocate(tensor)
        try:
            async with self._asking(self._timeout):
                await connection.set_tensor(tensor, content.data, cache_flag=1)
                self.keeps = await connection.set_tensor_hash(tensor, fnv1a_64(_KEPT))
        finally:
            if not self.lost:
                async with self._asking(self._timeout):
                    await self.backend.free([buffer], [tensor])
        return "" if self.keeps else "was started without --cache"

    async def write_kept(self, tensor: Tensor, data: memoryview, offset: int) -> None:
        """Write whole blocks, which the worker is to keep on disk. Raises WorkerLost."""
        piece = self._piece(tensor, offset, len(data))
        async with self._asking(self._timeout):
            await self.backend.connection.set_tensor(piece, data, cache_flag=1)

    async def recall(self, tensor: Tensor, offset: int, size: int, hash: int) -> bool:
        """Have the worker fill in what :meth:`write_kept` wrote; whether it had it.

        Raises WorkerLost.
        """
        piece = self._piece(tensor, offset, size)
        async with self._asking(self._timeout):
            return await self.backend.connection.set_tensor_hash(piece, hash)

    async def load(self, tensor: Tensor, extent: Extent, digest: int, nbytes: int) -> bool:
        """Have the worker fill in a slice from its own disk; return whether it has the content.

        That is named by the hash and the size of all of it. Raises WorkerLost.
        """
        handle, address = tensor.location
        size = extent.count * extent.size
        # It may have to read gigabytes.
        async with self._asking(PREPARE_TIMEOUT):
            answer = await self.backend.connection.request(
                Command.SPLIT_LOAD,
                remote_ptr=handle,
                address=address + extent.at,
                hash=digest,
                nbytes=nbytes,
                start=extent.start,
                size=extent.size,
                distance=extent.distance,
                count=extent.count,
                whole=int(size == tensor.nbytes),
            )
        return bool(answer.result)

    @staticmethod
    def _piece(tensor: Tensor, offset: int, size: int) -> Tensor:
        """A tensor of its own for some blocks: a server keeps and serves whole tensors."""
        info = TYPE_INFO[tensor.type]
        n = size // info.type_size * info.block_size
        piece = GraphBuilder().new_tensor_1d(tensor.type, n, tensor.name)
        handle, address = tensor.location
        piece.place(handle, address + offset)
        return piece

    async def read(self, tensor: Tensor, offset: int, size: int) -> memoryview:
        """Read from the worker's memory. Raises WorkerLost."""
        async with self._asking(self._timeout):
            return (await self.backend.connection.get_tensor(tensor, offset, size)).data

    # -- programs

    async def place_step(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors of one step memory that all steps share; outputs come last, adjacent.

        Raises WorkerLost, NoRoom.
        """
        await self._place_in(self._region, tensors)

    async def place_kept(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors memory that is theirs for a whole run; see :meth:`place_step`."""
        await self._place_in(self._kept, tensors)

    async def place_lifetimes(self, wanted: Sequence[tuple[Tensor, Lifetime]]) -> None:
        """Give tensors memory for as long as each is needed; see :meth:`place_step`."""
        tensors = [t for t, _ in wanted]
        try:
            async with self._asking(self._timeout):
                sizes = await asyncio.gather(*map(self.backend.alloc_size, tensors))
                sized = [replace(n, size=size) for (_, n), size in zip(wanted, sizes, strict=True)]
                offsets, size = place_lifetimes(sized)
                await self._linked.place_at(list(zip(tensors, offsets, strict=True)), size)
        except (AllocationFailed, ShapeError):
            raise NoRoom(f"worker {self.name} has no room for its activations") from None

    async def place_copies(self, tensors: Sequence[Tensor]) -> list[BackendBuffer]:
        """Return memory for small tensors, together. Raises WorkerLost, NoRoom."""
        try:
            async with self._asking(self._timeout):
                buffers = await self.backend.allocate(tensors)
        except (AllocationFailed, ShapeError):
            raise NoRoom(f"worker {self.name} has no room for {len(tensors)} norms") from None
        self.bytes += sum(t.nbytes for t in tensors)
        return buffers

    async def release_copies(
        self, tensors: Sequence[Tensor], buffers: Sequence[BackendBuffer]
    ) -> None:
        """Give back what :meth:`place_copies` got; nothing to do when the worker is lost."""
        self.bytes -= sum(t.nbytes for t in tensors)
        with contextlib.suppress(WorkerLost):
            async with self._asking(self._timeout):
                await self.backend.free(buffers, tensors)

    async def _place_in(self, region: Region, tensors: Sequence[Tensor]) -> None:
        try:
            async with self._asking(self._timeout):
                # Programs made before keep the memory they have.
                await region.place(tensors)
        except (AllocationFailed, ShapeError):
            size = sum(t.nbytes for t in tensors)
            raise NoRoom(
                f"worker {self.name} has no room for {size} bytes of activations"
            ) from None
        except ConnectionLost as error:
            raise WorkerLost(f"worker {self.name}: {error}") from None

    async def program(self, steps: Sequence[Step]) -> Program:
        """Make the worker ready to run ``steps`` in this order, again and again.

        Raises WorkerLost, and UnfitError when it refuses them.
        """
        connection = self.backend.connection
        if not self.extended:
            made = [command_envelope(connection, s) for s in steps]
            return Program(tuple(steps), tuple(made), None)
        number = self._programmed % MAX_PROGRAMS
        self._programmed += 1
        envelopes = program_envelopes(connection, number, steps)
        program = Program(tuple(steps), tuple(envelopes), number)
        async with self._asking(PREPARE_TIMEOUT):
            await self._make_ready(program)
        return program

    async def _make_ready(self, program: Program) -> None:
        """Send a program, and wait for as long as the worker answers others meanwhile.

        It may have kernels to compile, which takes minutes; one that hangs answers nobody.
        """
        sent = asyncio.ensure_future(self._send_program(program))
        try:
            while not (await asyncio.wait([sent], timeout=self._timeout))[0]:
                if not await self._greets():
                    reason = f"no answer within {self._timeout:g} s, nor to a greeting"
                    self.abort(reason)
                    raise WorkerLost(f"worker {self.name}: {reason}")
            await sent
        finally:
            sent.cancel()
            await asyncio.wait([sent])
            if not sent.cancelled():
                # What it ended with is known, or of no interest any more.
                sent.exception()

    async def _greets(self) -> bool:
        """Return whether the worker says anything to one that connects to it now."""
        host, port = self._endpoint
        try:
            async with asyncio.timeout(self._timeout):
                connection = await connect_any(
                    host,
                    port,
                    timeout=None,
                    split=True,
                    tls=self._tls.context,
                    token=self._tls.token,
                )
        except TimeoutError:
            return False
        except (OSError, ProtocolError):
            # It is there, and has no room for us.
            return True
        connection.abort()
        return True

    async def _send_program(self, program: Program) -> None:
        assert program.number is not None
        connection = self.backend.connection
        # Whatever comes of it, the one that had the number is gone.
        self._programs.pop(program.number, None)
        answer = await connection.request(
            Command.SPLIT_PROGRAM,
            data=encode_steps(connection, program.steps),
            device=0,
            program=program.number,
        )
        if answer.result:
            raise UnfitError(f"worker {self.name} refuses its share of the graph; its log says why")
        self._programs[program.number] = program

    # -- links to the other parts

    async def link(self, fields: Mapping[str, Any]) -> str:
        """Let the worker link to other parts; return why it can't, '' if it has. See SPLIT_PEERS.

        Raises WorkerLost.
        """
        async with self._asking(self._timeout + _LINK_SECONDS):
            answer = await self.backend.connection.request(Command.SPLIT_PEERS, device=0, **fields)
        if not answer.result:
            return ""
        return bytes(answer.reason).rstrip(b"\0").decode(errors="replace") or "it does not say why"

    @property
    def no_links(self) -> str:
        """Return why the worker can't link to other parts, as far as is known; '' if it can."""
        if self.backend.connection.split_version < SWAPS_SINCE:
            return f"has no version {SWAPS_SINCE} of the split extension"
        if self.splits:
            return "splits over others itself"
        return "is spoken to inside of TLS" if self._tls.context is not None else ""

    @property
    def own_address(self) -> str:
        """The address of this machine that the worker sees."""
        return self.backend.connection.own_address[0]

    def report(self, error: str = "") -> str:
        """Return why a program with swaps fails there, if the worker has told; while it is lent.

        ``error`` is what ended the run here, if it has ended.
        """
        taken = b""
        if error.startswith(self.peer.name) and error.endswith(STATUS_TEXT[CONFUSED]):
            # The plan has read as much as an output's size.
            taken = self.peer.staged(8)
        flags = socket.MSG_DONTWAIT | (0 if taken else socket.MSG_PEEK)
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as twin:
            taken += twin.recv(8 + MOST_REPORT, flags)
        return decode_report(taken)

    @property
    def next_byte(self) -> bytes | None:
        """The next byte of a connection that is lent; none if there is none yet, or no more."""
        flags = socket.MSG_DONTWAIT | socket.MSG_PEEK
        try:
            with socket.socket(fileno=os.dup(self._fd)) as twin:
                return twin.recv(1, flags)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def interrupt(self) -> None:
        """End a connection that is lent: whoever waits on it gets to know."""
        if self._lent:
            shut_down(self._fd)

    # -- the socket

    async def lend(self, program: Program) -> None:
        """Let compiled code run ``program`` on the socket; see Connection.lend.

        Raises WorkerLost.
        """
        await self._turn.acquire()
        self._lent = True
        try:
            with self._blamed():
                if program.number is not None and self._programs.get(program.number) is not program:
                    # A newer one took its number.
                    async with self._within(PREPARE_TIMEOUT):
                        await self._make_ready(program)
                async with self._within(self._timeout):
                    self._fd = await self.backend.connection.lend()
        except BaseException:
            self.take_back()
            raise
        self.peer.stream.open(self._fd)

    def take_back(self) -> None:
        """Take the socket back after :meth:`lend`."""
        if self._lent:
            self._lent = False
            self._turn.release()
            self.backend.connection.take_back()
