"""One client: what each of its requests does, in order.

Requests are taken one at a time. One that has to wait (a graph on the device's thread, the disk, a
socket that is full) makes the session busy; what the client sends meanwhile stays in the reader and
the transport until it is done. That gives the order which clients rely on, and back-pressure.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, Dialect
from protocol.errors import ProtocolError
from protocol.framing import (
    Event,
    Hello,
    Request,
    RequestReader,
    UploadEnd,
    UploadPart,
    UploadStart,
)
from protocol.graph_payload import decode_graph
from protocol.messages import CONN_CAPS_SIZE
from protocol.negotiation import Offer
from protocol.split import (
    MAX_PARTS,
    MAX_PROGRAMS,
    VERSION,
    caps_version,
    decode_program,
    split_caps,
    with_split,
)
from rpc_server.cache import HASH_THRESHOLD, TensorCache
from rpc_server.context import ServerContext
from rpc_server.devices.base import Device, DeviceError, NotReadyError, Relaying, Upload
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import tensor_of_message
from rpc_server.graph.tensor import Tensor
from rpc_server.memory import BadAddressError, Buffer, Buffers, OutOfMemoryError
from rpc_server.plans import PlanCache
from rpc_server.progress import UploadMeter
from rpc_server.split.programs import Programs

log = logging.getLogger(__name__)

# What ends a session with one line in the log; anything else is a bug and logged with its trace.
REFUSALS = (ProtocolError, BadAddressError, GraphError, DeviceError)

# Answers up to this size are copied; of larger ones the transport sends the buffer itself.
_COPY_ANSWER = 64 << 10


class Session:
    """State of one connection. ``transport`` is where answers go; ``name`` is for the log."""

    def __init__(
        self,
        context: ServerContext,
        transport: asyncio.Transport,
        address: str,
        name: str,
        resume: Callable[[], None],
    ) -> None:
        self._context = context
        self._transport = transport
        self._address = address
        self.name = name
        # Called when the session is no longer busy: more events may be taken.
        self._resume = resume
        self.reader = RequestReader(context.limits)
        self.buffers = Buffers(context.space, context.budgets)
        self.offer: Offer | None = None
        self.busy = False
        self._went_on = False
        self._broken = False
        self._ended = False
        self._dialects: list[Dialect] = []
        self._plans = [PlanCache() for _ in context.budgets]
        self._upload: tuple[Buffer, int, int, bool] | None = None
        self._relay: Upload | None = None
        self._programs = Programs(name)
        # While a program runs, its bytes on the socket are not for the reader.
        self.streaming = False
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._meter = UploadMeter(name)
        self.graphs = 0
        self.graph_seconds = 0.0

    # -- life ----------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Do one event. Raises what REFUSALS lists; the connection can't go on then."""
        if isinstance(event, Request):
            self._go_on()
            self._meter.other()
            _HANDLERS[event.command](self, event)
        elif isinstance(event, UploadStart):
            self._go_on()
            self._begin_upload(event)
        elif isinstance(event, UploadPart):
            self._wait(self._relay_on())
        elif isinstance(event, UploadEnd):
            self._end_upload()
        elif isinstance(event, Hello):
            self._hello(event)

    def connection_lost(self) -> None:
        """The peer is gone: free everything, after the work in flight if there is some."""
        self._ended = True
        self._writable.set()
        if not self._broken and not self.reader.at_boundary:
            log.warning("%s: hung up within %s", self.name, self.reader.within)
        if self.offer is not None and not self._went_on:
            self._refused_by_peer(self.offer)
        if self.busy:
            # A graph on the device's thread still uses the buffers; _finished comes after it.
            return
        self._free()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def failed(self, error: Exception) -> None:
        """Log why the connection is closed, and forget what was assumed of the peer."""
        self._broken = True
        if isinstance(error, REFUSALS):
            log.error("%s: %s; closing the connection", self.name, error)
        else:
            log.error("%s: internal error; closing the connection", self.name, exc_info=error)
        if isinstance(error, ProtocolError) and self.offer is not None:
            self._context.negotiator.forget(self._address, self.offer)

    def _free(self) -> None:
        for plans in self._plans:
            plans.clear()
        self._programs.clear()
        self._upload = self._relay = None
        # A view of a buffer would keep its memory from being given back.
        self.reader.abandon()
        self._meter.finish()
        count = len(self.buffers)
        freed = self.buffers.free_all()
        log.log(
            logging.INFO if count or self.graphs else logging.DEBUG,
            "%s: disconnected; freed %d buffers, %.1f MiB; %d graphs in %.1f s",
            self.name,
            count,
            freed / (1 << 20),
            self.graphs,
            self.graph_seconds,
        )

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` before any further event."""
        self.busy = True
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._waited)

    def _waited(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._finished(None if task.cancelled() else task.exception())

    def _finished(self, error: BaseException | None) -> None:
        """What made the session busy is done: go on, or end with what it raised."""
        self.busy = False
        if self._ended:
            self._free()
            return
        if isinstance(error, Exception):
            self.failed(error)
            self._transport.abort()
            return
        self._resume()

    # -- handshake -----------------------------------------------------------------------------

    def _hello(self, hello: Hello) -> None:
        offer = self._context.negotiator.choose(self._address, len(hello.caps))
        self.offer = offer
        self.reader.dialect = offer.dialect
        self._dialects = list(offer.dialects)
        major, minor, patch = offer.version
        # Capabilities are those of RDMA, or of our own extension for those who asked for it;
        # all-zero caps keep the connection on plain TCP.
        caps = bytes(CONN_CAPS_SIZE)
        if caps_version(hello.caps):
            caps = split_caps()
            self.reader.dialect = with_split(offer.dialect)
        self._answer(
            Command.HELLO, {"major": major, "minor": minor, "patch": patch, "conn_caps": caps}
        )

    def _go_on(self) -> None:
        if self._went_on or self.offer is None:
            return
        self._went_on = True
        news = self._context.negotiator.accepted(self._address, self.offer)
        size = self.offer.dialect.hello_size
        how = "24 bytes, so 4.0 or later" if size else "empty, so 1.0 to 3.x"
        log.log(
            logging.INFO if news else logging.DEBUG,
            "%s: speaks protocol %s (its HELLO is %s; it accepted %d.%d.%d)",
            self.name,
            self.offer.name,
            how,
            *self.offer.version,
        )

    def _refused_by_peer(self, offer: Offer) -> None:
        following = self._context.negotiator.refused(self._address, offer)
        if following is None:
            log.warning(
                "%s: hung up on protocol %s, the last one it was not offered yet; "
                "its next try starts over with the newest",
                self.name,
                offer.name,
            )
            return
        log.warning(
            "%s: hung up on protocol %s; the next try from %s is offered %s "
            "(start the client again, or pin a version with --protocol)",
            self.name,
            offer.name,
            self._address,
            following.name,
        )

    @property
    def _dialect(self) -> Dialect:
        """What the connection speaks; there is nothing to do before HELLO."""
        assert self.reader.dialect is not None
        return self.reader.dialect

    # -- answers -------------------------------------------------------------------------------

    def _answer(self, command: Command, fields: dict[str, Any]) -> None:
        spec = self._dialect.commands[command]
        if spec.answer is Answer.NEVER:
            return
        body = codec(spec.response).build(fields)
        self._transport.write(len(body).to_bytes(8, "little") + body)

    def _answer_empty(self, command: Command) -> None:
        self._answer(command, {})

    # -- devices and buffers -------------------------------------------------------------------

    def _device_index(self, request: Request) -> int:
        # Before protocol 3.0 there was one device and no field for it.
        return self._existing_device(request.command, getattr(request.fields, "device", 0))

    def _existing_device(self, command: Command, index: int) -> int:
        count = len(self._context.budgets)
        if index >= count:
            raise ProtocolError(f"{command.name} for device {index}, this server has {count}")
        return index

    def _device(self, index: int) -> Device:
        return self._context.budgets[index].device

    def _device_count(self, request: Request) -> None:
        self._answer(request.command, {"device_count": len(self._context.budgets)})

    def _get_alignment(self, request: Request) -> None:
        device = self._device(self._device_index(request))
        self._answer(request.command, {"alignment": device.alignment})

    def _get_max_size(self, request: Request) -> None:
        device = self._device(self._device_index(request))
        self._answer(request.command, {"max_size": device.max_size})

    def _get_device_memory(self, request: Request) -> None:
        free, total = self._context.budgets[self._device_index(request)].memory()
        self._answer(request.command, {"free_mem": free, "total_mem": total})

    def _get_alloc_size(self, request: Request) -> None:
        device = self._device(self._device_index(request))
        tensor = tensor_of_message(request.fields.tensor, self._dialect)
        self._answer(request.command, {"alloc_size": device.alloc_size(tensor)})

    def _alloc_buffer(self, request: Request) -> None:
        self._allocate(request, ())

    def _allocate(self, request: Request, proportions: Sequence[float]) -> None:
        index = self._device_index(request)
        size: int = request.fields.size
        try:
            buffer = self.buffers.allocate(index, size, proportions)
        except OutOfMemoryError as error:
            log.warning("%s: no buffer of %d bytes: %s", self.name, size, error)
            self._answer(request.command, {"remote_ptr": 0, "remote_size": 0})
            return
        log.debug("%s: buffer %#x of %d bytes", self.name, buffer.handle, size)
        self._answer(request.command, {"remote_ptr": buffer.handle, "remote_size": size})

    def _buffer_get_base(self, request: Request) -> None:
        buffer = self.buffers.get(request.fields.remote_ptr)
        self._answer(request.command, {"base_ptr": buffer.base})

    def _free_buffer(self, request: Request) -> None:
        self.buffers.free(request.fields.remote_ptr)
        # Plans hold addresses of the buffer: none of them may be run again.
        for plans in self._plans:
            plans.clear()
        self._programs.buffer_freed(request.fields.remote_ptr)
        self._answer_empty(request.command)

    def _buffer_clear(self, request: Request) -> None:
        buffer = self.buffers.get(request.fields.remote_ptr)
        self._fill(request.command, buffer, 0, buffer.size, request.fields.value)

    # -- tensors -------------------------------------------------------------------------------

    def _locate(self, tensor: Any, offset: int, size: int) -> tuple[Buffer, int]:
        """Buffer and offset of ``size`` bytes, ``offset`` bytes into a tensor off the wire."""
        try:
            buffer = self.buffers.get(tensor.buffer)
            return buffer, buffer.locate(tensor.data, offset, size)
        except BadAddressError as error:
            raise BadAddressError(f"tensor '{_label(tensor)}': {error}") from None

    def _begin_upload(self, upload: UploadStart) -> None:
        fields = upload.fields
        buffer, start = self._locate(fields.tensor, fields.offset, upload.size)
        if isinstance(buffer.storage, Relaying):
            tensor = tensor_of_message(fields.tensor, self._dialect)
            if buffer.storage.concerns(start, upload.size, tensor):
                self._meter.upload(upload.size, cached=False)
                self._wait(self._begin_relay(buffer, tensor, start, fields.offset, upload.size))
                return
        keep = False
        if self._context.cache is not None:
            flag = getattr(fields, "cache_flag", None)
            keep = upload.size > HASH_THRESHOLD if flag is None else bool(flag)
        self._upload = (buffer, start, upload.size, keep)
        self._meter.upload(upload.size, cached=False)
        self._context.weights_arrive(buffer.device, fields.tensor.type, upload.size)
        self.reader.direct(buffer.storage.place(start, upload.size))

    async def _begin_relay(
        self, buffer: Buffer, tensor: Tensor, start: int, offset: int, size: int
    ) -> None:
        assert isinstance(buffer.storage, Relaying)
        self._relay = await buffer.storage.upload(tensor, start, offset, size)
        if self._relay is None:
            self._upload = (buffer, start, size, False)
            self.reader.direct(buffer.storage.place(start, size))
            return
        self.reader.direct(self._relay.room())

    async def _relay_on(self) -> None:
        assert self._relay is not None
        await self._relay.forward()
        self.reader.direct(self._relay.room())

    async def _end_relay(self, relay: Upload) -> None:
        await relay.forward()
        self._answer_empty(Command.SET_TENSOR)

    def _end_upload(self) -> None:
        if self._relay is not None:
            relay, self._relay = self._relay, None
            self._wait(self._end_relay(relay))
            return
        assert self._upload is not None
        buffer, start, size, keep = self._upload
        self._upload = None
        if keep:
            self._wait(self._keep(buffer, start, size))
            return
        self._answer_empty(Command.SET_TENSOR)

    async def _keep(self, buffer: Buffer, start: int, size: int) -> None:
        cache = self._context.cache
        assert cache is not None
        path = await asyncio.to_thread(cache.store, buffer.storage.view(start, size))
        if path is not None:
            log.debug("%s: cached %d bytes as %s", self.name, size, path)
        self._answer_empty(Command.SET_TENSOR)

    def _set_tensor_hash(self, request: Request) -> None:
        fields = request.fields
        # How long the content is only the cache knows; it may fill the buffer to its end at most.
        buffer, start = self._locate(fields.tensor, fields.offset, 0)
        cache = self._context.cache
        if cache is not None:
            tensor = tensor_of_message(fields.tensor, self._dialect)
            if not _elsewhere(buffer, start, tensor.nbytes, tensor):
                self._wait(self._load_cached(request, cache, buffer, start, tensor))
                return
        self._answer(request.command, {"result": 0})

    async def _load_cached(
        self, request: Request, cache: TensorCache, buffer: Buffer, start: int, tensor: Tensor
    ) -> None:
        room = min(buffer.size - start, max(0, tensor.nbytes - request.fields.offset))

        def load() -> int:
            content = cache.load(request.fields.hash, room)
            if content is None:
                return 0
            size = len(content)
            with content:
                buffer.storage.place(start, size)[:] = content
            return size

        size = await asyncio.to_thread(load)
        if size:
            self._meter.upload(size, cached=True)
            self._context.weights_arrive(buffer.device, request.fields.tensor.type, size)
        self._answer(request.command, {"result": 1 if size else 0})

    def _init_tensor(self, request: Request) -> None:
        # Our devices keep nothing beside a tensor's data and pad nothing.
        tensor_of_message(request.fields.tensor, self._dialect)
        self._answer_empty(request.command)

    def _memset_tensor(self, request: Request) -> None:
        fields = request.fields
        buffer, start = self._locate(fields.tensor, fields.offset, fields.size)
        self._fill(request.command, buffer, start, fields.size, fields.value)

    def _fill(self, command: Command, buffer: Buffer, start: int, size: int, value: int) -> None:
        if _elsewhere(buffer, start, size):
            self._wait(self._fill_elsewhere(command, buffer, start, size, value))
            return
        buffer.storage.fill(start, size, value)
        self._answer_empty(command)

    async def _fill_elsewhere(
        self, command: Command, buffer: Buffer, start: int, size: int, value: int
    ) -> None:
        assert isinstance(buffer.storage, Relaying)
        await buffer.storage.overwrite(start, size, value)
        self._answer_empty(command)

    def _get_tensor(self, request: Request) -> None:
        fields = request.fields
        buffer, start = self._locate(fields.tensor, fields.offset, fields.size)
        if _elsewhere(buffer, start, fields.size):
            self._wait(self._read_back(buffer, start, fields.size))
            return
        self._give(buffer.storage.view(start, fields.size))

    async def _read_back(self, buffer: Buffer, start: int, size: int) -> None:
        assert isinstance(buffer.storage, Relaying)
        self._give(await buffer.storage.read(start, size))
        await self._drain()

    def _give(self, view: memoryview) -> None:
        """Answer with these bytes; nothing else may happen until they are on their way."""
        header = len(view).to_bytes(8, "little")
        if len(view) <= _COPY_ANSWER:
            self._transport.write(header + bytes(view))
            return
        self._transport.write(header)
        self._transport.write(view)
        # The next request may change these bytes: first they have to be on their way.
        if not self._writable.is_set() and not self.busy:
            self._wait(self._drain())

    async def _drain(self) -> None:
        await self._writable.wait()

    def _copy_tensor(self, request: Request) -> None:
        fields = request.fields
        tensor = tensor_of_message(fields.src, self._dialect)
        src, src_start = self._locate(fields.src, 0, tensor.nbytes)
        dst, dst_start = self._locate(fields.dst, 0, tensor.nbytes)
        places = ((src, src_start), (dst, dst_start))
        apart = src.device != dst.device
        if apart or any(_elsewhere(*place, tensor.nbytes) for place in places):
            # llama.cpp then copies through itself.
            self._answer(request.command, {"result": 0})
            return
        dst.storage.copy_from(src.storage, src_start, dst_start, tensor.nbytes)
        self._answer(request.command, {"result": 1})

    # -- graphs --------------------------------------------------------------------------------

    def _graph_compute(self, request: Request) -> None:
        assert request.graph is not None
        payload = request.graph
        graph = decode_graph(payload, self._dialect)
        index = self._existing_device(request.command, graph.device)
        device = self._device(index)
        plans = self._plans[index]
        plan = plans.find(payload)

        def job() -> None:
            if plan is not None:
                plan.run()
                return
            made = device.prepare(graph, self._dialects, self.buffers.find)
            plans.add(payload, made)
            made.run()

        self._run(request.command, device, job)

    def _graph_recompute(self, request: Request) -> None:
        index = self._device_index(request)
        plan = self._plans[index].last
        if plan is None:
            raise GraphError(
                f"GRAPH_RECOMPUTE, but device {index} has no graph that is still valid"
            )
        self._run(request.command, self._device(index), plan.run)

    def _run(self, command: Command, device: Device, job: Callable[[], None]) -> None:
        """Do ``job`` on the device's thread before any further event.

        By plain callbacks: a small graph takes less time than the steps of a task around it.
        """
        started = time.perf_counter()
        loop = asyncio.get_running_loop()

        def done(future: concurrent.futures.Future[None]) -> None:
            error = future.exception()
            if isinstance(error, NotReadyError):
                loop.call_soon_threadsafe(again, error)
                return
            seconds = time.perf_counter() - started
            loop.call_soon_threadsafe(self._ran, command, seconds, error)

        def again(not_ready: NotReadyError) -> None:
            waiting = loop.run_in_executor(None, not_ready.wait)
            waiting.add_done_callback(lambda _: submit())

        def submit() -> None:
            device.submit(job).add_done_callback(done)

        self.busy = True
        submit()

    def _ran(self, command: Command, seconds: float, error: BaseException | None) -> None:
        if self.streaming:
            self._end_stream()
        if error is None:
            if command is not Command.SPLIT_PROGRAM:
                self.graphs += 1
                self.graph_seconds += seconds
            # GGML_STATUS_SUCCESS; a graph that fails has no answer, its connection is closed.
            self._answer(command, {"result": 0})
        self._finished(error)

    # -- the split extension -------------------------------------------------------------------

    def _split_query(self, request: Request) -> None:
        device = self._device(self._device_index(request))
        fields = {"version": VERSION, "max_programs": MAX_PROGRAMS, "n_parts": device.n_parts}
        self._answer(request.command, fields)

    def _split_alloc_buffer(self, request: Request) -> None:
        fields = request.fields
        n = fields.n_proportions
        shares = fields.proportions[:n]
        sound = n <= MAX_PARTS and all(0 <= share < math.inf for share in shares)
        if not sound or (n and not sum(shares)):
            raise ProtocolError(f"SPLIT_ALLOC_BUFFER with proportions {list(shares)}")
        self._allocate(request, shares)

    def _split_program(self, request: Request) -> None:
        assert request.graph is not None
        index = self._device_index(request)
        number = request.fields.program
        self._programs.check(number)
        payload = decode_program(request.graph)
        device, dialect, find = self._device(index), self._dialect, self.buffers.find

        def job() -> None:
            self._programs.make(device, index, number, payload, dialect, find)

        self._run(request.command, device, job)

    def _split_run(self, request: Request) -> None:
        index = self._device_index(request)
        plan = self._programs.find(index, request.fields.program)
        if not self._writable.is_set():
            raise ProtocolError("SPLIT_RUN from a client that has not taken its answers")
        socket = self._transport.get_extra_info("socket")
        self._programs.peer.stream.open(socket.fileno(), self.reader.take_staged())
        self.streaming = True
        self._run(request.command, self._device(index), plan.run)

    def _end_stream(self) -> None:
        self.streaming = False
        self.reader.put_back(self._programs.peer.stream.early_left)

    def _split_status(self, request: Request) -> None:
        device = self._device(self._device_index(request))
        self._answer(request.command, device.split_status())


def _elsewhere(buffer: Buffer, start: int, size: int, tensor: Tensor | None = None) -> bool:
    storage = buffer.storage
    return isinstance(storage, Relaying) and storage.concerns(start, size, tensor)


def _label(tensor: Any) -> str:
    return bytes(tensor.name).split(b"\0", 1)[0].decode("utf-8", "replace")


_HANDLERS: dict[Command, Callable[[Session, Request], None]] = {
    Command.DEVICE_COUNT: Session._device_count,
    Command.GET_ALIGNMENT: Session._get_alignment,
    Command.GET_MAX_SIZE: Session._get_max_size,
    Command.GET_DEVICE_MEMORY: Session._get_device_memory,
    Command.GET_ALLOC_SIZE: Session._get_alloc_size,
    Command.ALLOC_BUFFER: Session._alloc_buffer,
    Command.BUFFER_GET_BASE: Session._buffer_get_base,
    Command.FREE_BUFFER: Session._free_buffer,
    Command.BUFFER_CLEAR: Session._buffer_clear,
    Command.SET_TENSOR_HASH: Session._set_tensor_hash,
    Command.INIT_TENSOR: Session._init_tensor,
    Command.MEMSET_TENSOR: Session._memset_tensor,
    Command.GET_TENSOR: Session._get_tensor,
    Command.COPY_TENSOR: Session._copy_tensor,
    Command.GRAPH_COMPUTE: Session._graph_compute,
    Command.GRAPH_RECOMPUTE: Session._graph_recompute,
    Command.SPLIT_QUERY: Session._split_query,
    Command.SPLIT_ALLOC_BUFFER: Session._split_alloc_buffer,
    Command.SPLIT_PROGRAM: Session._split_program,
    Command.SPLIT_RUN: Session._split_run,
    Command.SPLIT_STATUS: Session._split_status,
}
