"""One connection to a server: any protocol version, commands pipelined, answers in order.

Requests are written in the order in which they are made, and each may be made before the earlier
ones are answered; the server answers in the same order. What a command looks like and whether it is
answered at all, the dialect's table says.

Large payloads are not copied: SET_TENSOR hands the caller's memory to the transport piece by piece,
waiting for each to leave before the next, and GET_TENSOR receives into an array made for the
answer. So a call of ``set_tensor`` returns when its bytes are in the kernel's hands, and the memory
may be changed from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from client.errors import (
    AllocationFailed,
    ConnectionLost,
    GraphFailed,
    UnsupportedCommand,
    VersionMismatch,
)
from client.tunnel import keep_alive, open_tunnel
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Body, CommandSpec, Dialect, Version, find_dialects
from protocol.errors import ProtocolError
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import CONN_CAPS_SIZE, MAX_SOURCES, RPC_TENSOR_SIZE, RpcTensor
from protocol.numbering import wire_params
from protocol.requests import encode_frame
from protocol.responses import ResponseReader
from protocol.split import caps_version, split_caps, with_split
from protocol.tensor import Tensor

Bytes = bytes | bytearray | memoryview
# A tensor of this client, or the fields of an rpc_tensor as they are to be sent.
TensorLike = Tensor | Mapping[str, Any]

# A payload up to this goes out in one write with its head; longer ones in pieces of _PIECE.
_JOIN_UP_TO = 64 << 10
_PIECE = 1 << 20
_LINGER = 2.0
# Fields that older versions lack and that change no result: left out where there is no room for
# them. Any other field without room has to be 0.
_HINTS = frozenset({"srcs", "cache_flag", "conn_caps"})

_NO_TENSOR: Mapping[str, Any] = codec(RpcTensor).parse(bytes(RPC_TENSOR_SIZE)).__dict__


async def connect(
    host: str,
    port: int,
    *,
    version: str | Dialect = DIALECTS[0],
    timeout: float | None = 10.0,
    split: bool = False,
    tls: ssl.SSLContext | None = None,
    token: bytes | None = None,
) -> Connection:
    """Connect, and agree on the protocol as llama.cpp does.

    ``version`` is a Dialect or a version such as '7', '5.1' or '4.0.2'; where it leaves the choice
    between several, the newest that is not above the server's is spoken. ``timeout`` (seconds) is
    for both steps. Raises VersionMismatch if the server's major number is another or its minor
    number is above ours, ConnectionLost if it hangs up, TimeoutError, OSError.

    ``split`` asks for the extension of protocol.split; Connection.split_version tells whether the
    server has it. With ``tls`` (see client.tunnel) the connection is inside of TLS, to a server's
    TLS port, and ``token`` is shown there first.
    """
    if token is not None and tls is None:
        raise ValueError("a token is shown inside of TLS only")
    candidates = [version] if isinstance(version, Dialect) else find_dialects(version)
    caps = split_caps() if split and candidates[0].hello_size else bytes(CONN_CAPS_SIZE)
    async with asyncio.timeout(timeout):
        connection = await _open(host, port, candidates[0], tls, token)
        try:
            await connection._hello(candidates, caps)
            if tls is None:
                _reset_when_closed(connection._transport, False)
        except BaseException:
            connection.abort()
            raise
    return connection


# Major versions by which a graph is answered with nothing and devices are numbered, newest first.
NEWEST_MAJORS = ("7", "6", "5")


async def connect_any(
    host: str,
    port: int,
    *,
    versions: Sequence[str] = NEWEST_MAJORS,
    timeout: float | None = 10.0,
    split: bool = False,
    tls: ssl.SSLContext | None = None,
    token: bytes | None = None,
) -> Connection:
    """Connect by the newest of ``versions`` that the server speaks.

    ``versions`` are as of :func:`connect`, newest first; ``timeout`` is for each try, ``tls`` and
    ``token`` are as there. Raises VersionMismatch if it speaks none of them, else as
    :func:`connect`.
    """
    answered: set[Version] = set()
    while True:
        try:
            return await connect(
                host, port, version=versions[0], timeout=timeout, split=split, tls=tls, token=token
            )
        except VersionMismatch as error:
            # A server that tries to guess a client's version answers otherwise the next time, and
            # comes to the newest; any other repeats itself.
            if error.theirs not in answered:
                answered.add(error.theirs)
                continue
            major = str(error.theirs[0])
            version = next((v for v in versions if v.split(".")[0] == major), None)
            if version is None:
                if split:
                    raise
                # A server of this project that takes us for another client of this address, an old
                # llama.cpp, tells us from it by the mark of the extension.
                split = True
                answered.clear()
                continue
            # Servers of older protocols can't have the extension.
            return await connect(host, port, version=version, timeout=timeout, tls=tls, token=token)


async def _open(
    host: str, port: int, dialect: Dialect, tls: ssl.SSLContext | None, token: bytes | None
) -> Connection:
    connection = Connection(dialect)
    if tls is not None:
        await open_tunnel(host, port, lambda: _Wire(connection), tls, token)
        transport = connection._transport
    else:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: _Wire(connection), host, port)
        # Small requests must not wait for the answer to the one before.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _reset_when_closed(transport, True)
    # The limit of 0 makes "may write" mean "all has left": what is sent is the caller's memory.
    transport.set_write_buffer_limits(high=0)
    return connection


def _reset_when_closed(transport: asyncio.Transport, reset: bool) -> None:
    """Have the system end the connection by a reset when it is closed, however this process ends.

    llama.cpp's server has one client at a time, and answers the others when their turn comes. A
    reset tells it that one of them is not there any more; an end in good order does not.
    """
    linger = struct.pack("ii", int(reset), 0)
    with contextlib.suppress(OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class _Wire(asyncio.BufferedProtocol):
    """The protocol that asyncio calls; everything goes to the connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._reader = connection._reader

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connection._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.receive_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.received(nbytes)
        self._connection._take_answers()

    def pause_writing(self) -> None:
        self._connection._writable.clear()

    def resume_writing(self) -> None:
        self._connection._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection._lost(exc)


class Connection:
    """A connection after HELLO; made by :func:`connect`.

    Every command is a coroutine that returns with the answer, or for a command without one when it
    has been sent. Several may be in flight (``asyncio.gather``); they are sent in the order in
    which the coroutines first ran. Every one raises ConnectionLost when the server has hung up,
    ProtocolError when it answered with what is no answer, and UnsupportedCommand when the protocol
    version doesn't have it.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.server_version: Version = (0, 0, 0)
        self.server_caps = b""
        # Version of the split extension that both sides speak, 0 for none.
        self.split_version = 0
        self._transport: asyncio.Transport
        self._reader = ResponseReader()
        self._answers: deque[asyncio.Future[Any]] = deque()
        self._writing = asyncio.Lock()
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = asyncio.Event()
        self._error: Exception | None = None
        # The last answer that comes in a frame.
        self._framed: asyncio.Future[Any] | None = None

    # -- life

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        return self._error is not None

    @property
    def peer_address(self) -> tuple[str, int]:
        """Address and port at the other end, as the system has them."""
        host, port, *_ = self._transport.get_extra_info("peername")
        return str(host), int(port)

    @property
    def own_address(self) -> tuple[str, int]:
        """Address and port at this end, as the system has them."""
        host, port, *_ = self._transport.get_extra_info("sockname")
        return str(host), int(port)

    @property
    def in_flight(self) -> int:
        """Return how many requests wait for their answers."""
        return len(self._answers)

    async def close(self) -> None:
        """Hang up, after what has been written is sent; pending calls raise ConnectionLost.

        A server that doesn't take it within _LINGER seconds is left without it.
        """
        self._fail(ConnectionLost("this client closed the connection"))
        self._transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                await self._ended.wait()
        self._hang_up()
        await self._ended.wait()

    def abort(self) -> None:
        """Hang up at once; pending calls raise ConnectionLost."""
        self._fail(ConnectionLost("this client closed the connection"))
        self._hang_up()

    def _hang_up(self) -> None:
        # asyncio's transports don't bear it once they have ended by themselves.
        if not self._ended.is_set():
            self._transport.abort()

    async def wait_closed(self) -> Exception:
        """Wait until the connection has ended, and return why."""
        await self._ended.wait()
        assert self._error is not None
        return self._error

    async def _hello(self, candidates: Sequence[Dialect], caps: bytes) -> None:
        ours = candidates[0].version
        answer = await self.request(Command.HELLO, conn_caps=caps)
        theirs = (answer.major, answer.minor, answer.patch)
        if theirs[0] != ours[0] or theirs[1] > ours[1]:
            raise VersionMismatch(ours, theirs)
        self.server_version = theirs
        self.server_caps = getattr(answer, "conn_caps", b"")
        self.dialect = next((d for d in candidates if d.version <= theirs), candidates[0])
        self.split_version = min(caps_version(caps), caps_version(self.server_caps))
        if self.split_version:
            self.dialect = with_split(self.dialect, self.split_version)

    # -- the socket itself

    async def lend(self) -> int:
        """Stop using the socket, so that the caller may read and write it: its file descriptor.

        Everything asked before is answered by then. It is non-blocking and stays this connection's;
        no other method may be called until :meth:`take_back`. Raises what has ended the connection.
        """
        while self._answers:
            with contextlib.suppress(Exception):
                await asyncio.shield(self._answers[-1])
        await self._flushed()
        self._transport.pause_reading()
        return int(self._transport.get_extra_info("socket").fileno())

    def enable_keepalive(self, idle: int = 10, interval: int = 5, probes: int = 3) -> None:
        """Let the system notice a peer that is gone without a word; seconds, seconds, count."""
        keep_alive(self._transport.get_extra_info("socket"), idle, interval, probes)

    def take_back(self) -> None:
        """Use the socket again; what was read and written meanwhile was whole messages."""
        if not self.closed:
            self._transport.resume_reading()

    # -- sending and receiving

    async def request(
        self,
        command: Command,
        *,
        data: Bytes | None = None,
        destination: memoryview | None = None,
        **fields: Any,
    ) -> Any:
        """Send a command and wait for its answer: a Message, ``destination``, or None.

        ``fields`` are those of the request's declaration in protocol.messages, ``data`` what
        follows them (SET_TENSOR, GRAPH_COMPUTE), ``destination`` takes the bytes of an answer with
        data (GET_TENSOR). Fields that this version has no room for must be 0.
        """
        return await (await self.start(command, data=data, destination=destination, **fields))

    async def start(
        self,
        command: Command,
        *,
        data: Bytes | None = None,
        destination: memoryview | None = None,
        **fields: Any,
    ) -> asyncio.Future[Any]:
        """Send a command; returns when it is sent, with the future of its answer.

        Parameters and results as in :meth:`request`.

        Raises ValueError for data where the command has none, for none where it has some, and for
        fields out of range.
        """
        spec = self._spec(command)
        if (spec.body is Body.NONE) != (data is None):
            raise ValueError(f"{command.name} carries {spec.body.value}")
        body = memoryview(b"" if data is None else data).cast("B")
        head = self.message(command, body_size=len(body), **fields)
        async with self._writing:
            await self._flushed()
            answer = self._expect(command, spec, destination)
            await self._write(memoryview(head), body)
        return answer

    async def exchange(
        self,
        parts: Sequence[Bytes],
        answers: Sequence[tuple[Command, memoryview]],
        *,
        framed: bool = True,
    ) -> list[asyncio.Future[Any]]:
        """Send prepared messages in one go; returns when they are sent, with the answers' futures.

        ``parts`` are the messages' bytes in pieces (see :meth:`message`); ``answers`` are what
        they will be answered with, each into its memory. With ``framed`` false the answers are
        bytes of the stream (SPLIT_RUN); earlier answers are waited for first, since a server that
        has not got rid of one refuses to run.
        """
        specs = [self._spec(command) for command, _ in answers]
        bodies = [memoryview(part).cast("B") for part in parts]
        async with self._writing:
            while not framed and self._framed is not None and not self._framed.done():
                await asyncio.wait([self._framed])
            await self._flushed()
            futures = [
                self._expect(command, spec, destination, framed)
                for (command, destination), spec in zip(answers, specs, strict=True)
            ]
            await self._write(*bodies)
        return futures

    def message(self, command: Command, *, body_size: int = 0, **fields: Any) -> bytes:
        """Return a request as it goes out, up to the ``body_size`` bytes that will follow it.

        Fields and errors as in :meth:`request`; for those who send by themselves.
        """
        head = self._head(command, self._spec(command), fields)
        return encode_frame(command, len(head) + body_size) + head

    async def send_raw(self, data: Bytes) -> None:
        """Write bytes as they are; announce what they will be answered with by :meth:`expect`."""
        async with self._writing:
            await self._flushed()
            await self._write(memoryview(data).cast("B"))

    def expect(
        self, command: Command, destination: memoryview | None = None
    ) -> asyncio.Future[Any]:
        """Announce an answer to what :meth:`send_raw` is about to send; its future."""
        return self._expect(command, self._spec(command), destination)

    def _spec(self, command: Command) -> CommandSpec:
        spec = self.dialect.commands.get(command)
        if spec is None:
            raise UnsupportedCommand(
                f"{command.name} is no command of protocol {self.dialect.name}"
            )
        return spec

    def _head(self, command: Command, spec: CommandSpec, fields: Mapping[str, Any]) -> bytes:
        names = {field.name for field in spec.request.subcons}
        for name in fields.keys() - names - _HINTS:
            if fields[name]:
                raise UnsupportedCommand(
                    f"{command.name} of protocol {self.dialect.name} has no room for "
                    f"{name} = {fields[name]}"
                )
        try:
            return codec(spec.request).build(fields)
        except struct.error as error:
            raise ValueError(f"{command.name}: a field is out of range ({error})") from None

    def _expect(
        self,
        command: Command,
        spec: CommandSpec,
        destination: memoryview | None,
        framed: bool = True,
    ) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not framed:
            assert destination is not None
            self._reader.expect_raw(command, spec, destination)
            self._answers.append(answer)
        elif spec.answer is Answer.NEVER:
            answer.set_result(None)
        else:
            self._reader.expect(command, spec, destination)
            self._answers.append(answer)
            self._framed = answer
        return answer

    async def _flushed(self) -> None:
        """Wait until everything written has left. Raises what has ended the connection."""
        await self._writable.wait()
        if self._error is None and self._transport.is_closing():
            # Nothing that is written leaves any more; why, we are about to be told.
            await self._ended.wait()
        if self._error is not None:
            raise _copy(self._error)

    async def _write(self, *parts: memoryview) -> None:
        """Write whole messages. Cut short (cancelled), it takes the connection with it."""
        try:
            joined = bytearray()
            for part in parts:
                if len(joined) + len(part) > _JOIN_UP_TO and joined:
                    self._transport.write(joined)
                    joined = bytearray()
                if len(part) <= _JOIN_UP_TO:
                    joined += part
                    continue
                for at in range(0, len(part), _PIECE):
                    await self._flushed()
                    self._transport.write(part[at : at + _PIECE])
                await self._flushed()
            if joined:
                self._transport.write(joined)
        except asyncio.CancelledError:
            self._fail(ConnectionLost("a request was cancelled while it was being sent"))
            self._hang_up()
            raise

    def _take_answers(self) -> None:
        try:
            while (received := self._reader.next_answer()) is not None:
                future = self._answers.popleft()
                if not future.done():
                    future.set_result(received.answer)
        except ProtocolError as error:
            self._fail(error)
            self._transport.abort()

    def _lost(self, cause: Exception | None) -> None:
        reason = f" ({cause})" if cause else ""
        self._fail(
            ConnectionLost(f"the server hung up while {self._reader.within} was due{reason}")
        )
        self._ended.set()

    def _fail(self, error: Exception) -> None:
        """End all pending calls, and all later ones, with ``error``; the first one counts."""
        if self._error is not None:
            return
        self._error = error
        self._writable.set()
        while self._answers:
            future = self._answers.popleft()
            if not future.done():
                future.set_exception(_copy(error))
                # Whoever started it may wait for another one that fails for the same reason.
                future.exception()

    def wire_tensor(self, tensor: TensorLike) -> Mapping[str, Any]:
        """Return the rpc_tensor of ``tensor`` with this version's numbers.

        Raises ValueError if it has none.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        fields = tensor.fields()
        params = wire_params(self.dialect.numbering, tensor.op, fields["op_params"])
        return {**fields, "op": self.dialect.op_number(tensor.op), "op_params": params}

    # -- commands

    async def device_count(self) -> int:
        """Return how many devices the server has."""
        answer = await self.request(Command.DEVICE_COUNT)
        return int(answer.device_count)

    async def get_alignment(self, device: int = 0) -> int:
        """Return what the addresses of tensors must be multiples of, bytes."""
        answer = await self.request(Command.GET_ALIGNMENT, device=device)
        return int(answer.alignment)

    async def get_max_size(self, device: int = 0) -> int:
        """Return the size of the largest buffer, bytes."""
        answer = await self.request(Command.GET_MAX_SIZE, device=device)
        return int(answer.max_size)

    async def get_device_memory(self, device: int = 0) -> tuple[int, int]:
        """Free and total memory, bytes."""
        answer = await self.request(Command.GET_DEVICE_MEMORY, device=device)
        return int(answer.free_mem), int(answer.total_mem)

    async def alloc_buffer(self, size: int, device: int = 0) -> tuple[int, int]:
        """Allocate a buffer; return its handle and size in bytes. Raises AllocationFailed."""
        answer = await self.request(Command.ALLOC_BUFFER, device=device, size=size)
        if answer.remote_ptr == 0:
            raise AllocationFailed(f"the server has no room for a buffer of {size} bytes")
        return int(answer.remote_ptr), int(answer.remote_size)

    async def buffer_get_base(self, buffer: int) -> int:
        """Return the address of a buffer's first byte."""
        answer = await self.request(Command.BUFFER_GET_BASE, remote_ptr=buffer)
        return int(answer.base_ptr)

    async def free_buffer(self, buffer: int) -> None:
        """Give a buffer back."""
        await self.request(Command.FREE_BUFFER, remote_ptr=buffer)

    async def buffer_clear(self, buffer: int, value: int = 0) -> None:
        """Fill a buffer with one byte value."""
        await self.request(Command.BUFFER_CLEAR, remote_ptr=buffer, value=value)

    async def init_tensor(self, tensor: TensorLike) -> None:
        """Let the server prepare a new tensor (llama.cpp does for padded quantized ones)."""
        await self.request(Command.INIT_TENSOR, tensor=self.wire_tensor(tensor))

    async def get_alloc_size(self, tensor: TensorLike, device: int = 0) -> int:
        """Return how many bytes the server wants for ``tensor``; its sources count in newer
        versions.
        """
        sources: list[Mapping[str, Any]] = [_NO_TENSOR] * MAX_SOURCES
        if isinstance(tensor, Tensor):
            for i, source in enumerate(tensor.src):
                if source is not None:
                    sources[i] = self.wire_tensor(source)
        answer = await self.request(
            Command.GET_ALLOC_SIZE, device=device, tensor=self.wire_tensor(tensor), srcs=sources
        )
        return int(answer.alloc_size)

    async def set_tensor(
        self, tensor: TensorLike, data: Bytes, offset: int = 0, *, cache_flag: int = 0
    ) -> None:
        """Write ``data`` to the tensor's memory from byte ``offset`` on.

        ``cache_flag`` 1 asks the server to keep the data for :meth:`set_tensor_hash`.
        """
        await self.request(
            Command.SET_TENSOR,
            data=data,
            tensor=self.wire_tensor(tensor),
            offset=offset,
            cache_flag=cache_flag,
        )

    async def set_tensor_hash(self, tensor: TensorLike, hash: int, offset: int = 0) -> bool:
        """Let the server fill in data that it has by their hash (fnv1a_64); whether it had them."""
        answer = await self.request(
            Command.SET_TENSOR_HASH, tensor=self.wire_tensor(tensor), offset=offset, hash=hash
        )
        return bool(answer.result)

    async def get_tensor(
        self, tensor: TensorLike, offset: int = 0, size: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """Return ``size`` bytes (default: to the end) of the tensor's memory from ``offset`` on.

        Raises ValueError for a tensor given by its fields without a size.
        """
        if size is None:
            if not isinstance(tensor, Tensor):
                raise ValueError("the size of a tensor given by its fields must be said")
            size = tensor.nbytes - offset
        data = np.empty(size, np.uint8)
        await self.request(
            Command.GET_TENSOR,
            destination=data.data,
            tensor=self.wire_tensor(tensor),
            offset=offset,
            size=size,
        )
        return data

    async def memset_tensor(
        self, tensor: TensorLike, value: int, offset: int = 0, size: int | None = None
    ) -> None:
        """Fill ``size`` bytes of the tensor's memory with one byte value (default: to its end).

        Raises ValueError for a tensor given by its fields without a size.
        """
        if size is None:
            if not isinstance(tensor, Tensor):
                raise ValueError("the size of a tensor given by its fields must be said")
            size = tensor.nbytes - offset
        await self.request(
            Command.MEMSET_TENSOR,
            tensor=self.wire_tensor(tensor),
            offset=offset,
            size=size,
            value=value,
        )

    async def copy_tensor(self, src: TensorLike, dst: TensorLike) -> bool:
        """Copy one tensor's memory to another's on the server; whether the server did."""
        answer = await self.request(
            Command.COPY_TENSOR, src=self.wire_tensor(src), dst=self.wire_tensor(dst)
        )
        return bool(answer.result)

    async def graph_compute(self, graph: GraphPayload | Bytes) -> None:
        """Compute a graph. Returns when it is sent; versions before 3.5 wait for the result.

        Bytes are sent as they are. Raises GraphFailed where the version answers with a failure.
        """
        data = encode_graph(graph, self.dialect) if isinstance(graph, GraphPayload) else graph
        answer = await self.request(Command.GRAPH_COMPUTE, data=data)
        if answer is not None and answer.result:
            raise GraphFailed(f"the server could not compute the graph: status {answer.result}")

    async def graph_recompute(self, device: int = 0) -> None:
        """Compute the device's last graph again. Returns when the request is sent."""
        await self.request(Command.GRAPH_RECOMPUTE, device=device)


def _copy(error: Exception) -> Exception:
    # One object raised in many tasks would collect all their tracebacks.
    return type(error)(*error.args)
