"""One client: its requests in order, its state, and what is left when it goes.

Requests are taken one at a time. One that has to wait (a graph on the device's thread, the disk, a
socket that is full) makes the session busy; what the client sends meanwhile stays in the reader and
the transport until it is done. That gives the order which clients rely on, and back-pressure.

``dispatch.py`` hands events to what does them: ``handlers/``, and ``uploads.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.commands import Command
from protocol.dialects import Answer, Dialect
from protocol.errors import ProtocolError, TooLargeError
from protocol.messages import MAX_NAME
from protocol.requests import Hello, RequestReader
from protocol.responses import encode_answer, encode_size
from protocol.split import encode_report
from rpc_server.devices.base import Device, DeviceError, Plan, Queue, Upload
from rpc_server.devices.cpu.kernels.interface.stream import (
    BYTES_RECEIVED,
    BYTES_SENT,
    SILENT,
    STATUS_TEXT,
)
from rpc_server.graph.errors import GraphError, NodeError
from rpc_server.graph.parse import check_message, label_of_message
from rpc_server.limits import SCRATCH_BYTES, LimitReached
from rpc_server.observability.logs import ClientLog
from rpc_server.observability.metrics import ClientStats
from rpc_server.observability.upload_meter import UploadMeter
from rpc_server.session.buffers import (
    BadAddressError,
    Buffer,
    Buffers,
    LimitedError,
    OutOfMemoryError,
)
from rpc_server.session.context import ServerContext
from rpc_server.session.graph_memory import Share
from rpc_server.session.handshake import Handshake
from rpc_server.session.job import Job
from rpc_server.session.leases import Lease
from rpc_server.session.plan_cache import PlanCache
from rpc_server.session.programs import Programs
from rpc_server.session.readings import Readings
from rpc_server.sockets import shut_down

if TYPE_CHECKING:
    from rpc_server.devices.planning.group import LinkGroup

# What ends a session with one line in the log; anything else is a bug and logged with its trace.
# By the kind that it is counted as.
REFUSALS: dict[type[Exception], str] = {
    ProtocolError: "protocol",
    BadAddressError: "address",
    GraphError: "graph",
    DeviceError: "device",
    LimitReached: "limit",
    MemoryError: "memory",
}

# Answers up to this size are copied; of larger ones the transport sends the buffer itself.
_COPY_ANSWER = 64 << 10


def error_kind(error: Exception) -> str:
    """Return what an error that ends a connection is counted as."""
    return next((kind for type_, kind in REFUSALS.items() if isinstance(error, type_)), "internal")


def _nothing() -> str:
    """Return what a client that is gone is doing."""
    return "gone"


def _say_goodbye(
    log: ClientLog, stats: ClientStats, count: int, freed: int, _: object = None
) -> None:
    """Log that a client is gone, when the system has its memory back."""
    log.log(
        logging.INFO if count or stats.graphs else logging.DEBUG,
        "disconnected; freed %d buffers, %.1f MiB; %d graphs in %.1f s",
        count,
        freed / (1 << 20),
        stats.graphs,
        stats.graph_seconds,
        extra={"event": "disconnected", "bytes_freed": freed, "graphs": stats.graphs},
    )


@dataclass(slots=True)
class PendingUpload:
    """The upload of one client that is under way, if there is one.

    ``direct`` is where its bytes go: buffer, start, size, and whether the cache is to keep them.
    Bytes that belong elsewhere go by ``relay``; ``relayed`` is what is kept once that has them.
    ``size`` is in bytes.
    """

    direct: tuple[Buffer, int, int, bool] | None = None
    relay: Upload | None = None
    relayed: tuple[Buffer, int, int] | None = None
    size: int = 0

    @property
    def under_way(self) -> bool:
        return self.direct is not None or self.relay is not None

    def clear(self) -> None:
        """Forget it: the client is gone."""
        self.direct = self.relay = self.relayed = None


class Session:
    """State of one connection. ``transport`` is where answers go; ``stats`` name the client."""

    def __init__(
        self,
        context: ServerContext,
        transport: asyncio.Transport,
        stats: ClientStats,
        resume: Callable[[], None],
    ) -> None:
        self.context = context
        self.stats = stats
        self.name = stats.name
        self.log = ClientLog(logging.getLogger(__name__), stats.name, context.lines, stats.address)
        self._transport = transport
        # Called when the session is no longer busy: more events may be taken.
        self._resume = resume
        limits = context.limits
        self.reader = RequestReader(limits.framing)
        self.buffers = Buffers(
            context.space, context.budgets, limits.memory_per_client, stats.address
        )
        extension = all(budget.device.runs_programs for budget in context.budgets)
        self.handshake = Handshake(context.negotiator, stats.address, self.log, extension=extension)
        # By which op numberings its graphs may be read; nothing before HELLO.
        self.readings = Readings(context.numberings, stats.address, ())
        # Of messages, plans and programs; what the client is at the time.
        self.share = Share(context.graph_memory, stats.address)
        self.plans = [PlanCache(self.share) for _ in context.budgets]
        # By device; there is none before the first graph.
        self._queues: list[Queue | None] = [None for _ in context.budgets]
        self.programs = Programs(stats.name, limits.peer, self.share)
        self.upload = PendingUpload()
        self.meter = UploadMeter(self.log)
        self.busy = False
        # Messages handled so far.
        self.handled = 0
        self.running: Job | None = None
        # While a program runs, its bytes on the socket are not for the reader.
        self.streaming = False
        self.writable = True
        # The server wants to end: nothing new is begun.
        self.leaving = False
        # The reader's dialect when it was last looked at.
        self.spoken: Dialect | None = None
        self._broken = False
        self._ended = False
        self._task: asyncio.Task[None] | None = None
        self._departing: asyncio.Future[None] | None = None
        self._flushed = asyncio.Event()
        # Whether the connection is another server's link, whose bytes are those of swaps.
        self.linked = False
        # The group that the running program has swaps in.
        self._group: LinkGroup | None = None
        # What was counted when the socket was lent, and bytes that had come by then.
        self._lent_at = (0, 0, 0)
        # What the running program runs by, and whether that is for this run only.
        self._lease: Lease | None = None
        self._borrowed = False
        stats.activity = self.activity

    # -- life ----------------------------------------------------------------------------------

    def note_names(self) -> None:
        """Log that the client's tensors are longer than ggml's are by default."""
        self.spoken = self.reader.dialect
        size = self.dialect.name_size
        if size == MAX_NAME:
            return
        news = self.context.numberings.long_names(self.stats.address)
        self.log.log(
            logging.INFO if news else logging.DEBUG,
            "sends names of %d bytes: its ggml is compiled with GGML_MAX_NAME = %d, as "
            "stable-diffusion.cpp's",
            size,
            size,
        )

    def connection_lost(self) -> None:
        """Free everything, after the work in flight if there is some: the peer is gone."""
        self._ended = True
        self._flushed.set()
        for lease in self.context.leases:
            lease.leave(self)
        by_server = self._broken or self.leaving
        if not by_server and not self.reader.at_boundary:
            self.log.warning("hung up within %s", self.reader.within)
        self.handshake.ended(by_server=by_server)
        if self.busy:
            # A graph on the device's thread still uses the buffers; _finished comes after it.
            if self.running is not None:
                self.running.abandon()
            self._departing = self.context.departing()
            return
        self._free()

    def pause_writing(self) -> None:
        self.writable = False
        self._flushed.clear()

    def resume_writing(self) -> None:
        self.writable = True
        self._flushed.set()

    def failed(self, error: Exception) -> None:
        """Log why the connection is closed, and forget what was assumed of the peer."""
        if isinstance(error, TooLargeError):
            error = LimitReached("--max-message", str(error))
        elif isinstance(error, MemoryError) and not error.args:
            error = MemoryError("out of memory")
        self._broken = True
        kind = error_kind(error)
        stats = self.context.stats
        stats.errors[kind] += 1
        extra = {"event": "refused" if kind != "internal" else "internal_error", "kind": kind}
        if isinstance(error, LimitReached):
            stats.limits[error.option] += 1
            extra["option"] = error.option
        if kind == "internal":
            self.log.log(
                logging.ERROR, "internal error; closing the connection", extra=extra, error=error
            )
        else:
            self.log.log(logging.ERROR, "%s; closing the connection", error, extra=extra)
        if isinstance(error, ProtocolError):
            self.handshake.broken()
        elif isinstance(error, DeviceError):
            self.context.note_device_failure()

    def end(self, error: LimitReached) -> None:
        """Close the connection because the client is at a limit."""
        if self._broken or self._ended:
            return
        self.failed(error)
        if self.lent:
            # A thread waits on the socket: closing it would not wake it.
            shut_down(self._fileno())
        self._transport.abort()

    def stop_running(self) -> None:
        """Stop what runs for this client, without waiting for it: the server ends."""
        if self.running is not None:
            self.running.stop()

    def _free(self) -> None:
        for plans in self.plans:
            plans.clear()
        self.programs.clear()
        self.leave_group()
        for lease in self.context.leases:
            lease.release(self)
        for queue in self._queues:
            if queue is not None:
                queue.leave()
        self.upload.clear()
        # A view of a buffer would keep its memory from being given back.
        self.reader.abandon()
        self.share.close()
        self.meter.finish()
        count, freed = len(self.buffers), self.buffers.nbytes
        releasing = self.context.release(self.buffers.take_all())
        if self._departing is not None:
            self._departing.set_result(None)
        stats = self.stats
        stats.activity = _nothing
        self.context.stats.disconnected(stats)
        farewell = functools.partial(_say_goodbye, self.log, stats, count, freed)
        if releasing is None:
            farewell()
        else:
            releasing.add_done_callback(farewell)

    def present(self) -> bool:
        """Return whether the client is there: else long work for it is in vain."""
        return not self._ended

    def wait(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` before any further event."""
        self.busy = True
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._waited)

    def _waited(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._finished(None if task.cancelled() else task.exception())

    def _finished(self, error: BaseException | None) -> None:
        """Go on, or end with what it raised: what made the session busy is done."""
        self.busy = False
        if self._ended:
            self._free()
            return
        if isinstance(error, Exception):
            if not self._broken:
                self.failed(error)
            self._transport.abort()
            return
        self._resume()

    # -- what the sweep looks at (watch.Watched) ---------------------------------------------

    @property
    def received(self) -> int:
        return self.stats.bytes_in

    @property
    def taken(self) -> int:
        return self.stats.bytes_out - self.unsent

    @property
    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    @property
    def greeted(self) -> bool:
        return self.reader.dialect is not None

    @property
    def awaits_rest(self) -> bool:
        return not self.busy and not self.reader.at_boundary

    @property
    def awaits_taking(self) -> bool:
        return not self.writable and not self.streaming

    @property
    def at_rest(self) -> bool:
        return not (self.busy or self.linked) and self.writable and self.reader.at_boundary

    def graph_seconds(self, now: float) -> float:
        running = self.running
        return running.seconds(now) if running is not None else 0.0

    def overran(self, error: LimitReached) -> None:
        running = self.running
        if running is None or running.error is not None:
            return
        running.stop(error)
        if self.streaming:
            shut_down(self._fileno())

    def activity(self) -> str:
        """Say in a word, for people, what it does: see ClientStats."""
        if not self.greeted:
            return "handshake"
        if self.linked:
            return "link"
        if self.running is not None:
            return "program" if self.streaming else "graph"
        if self.upload.under_way:
            return "upload"
        if not self.writable:
            return "answer"
        return "idle" if self.at_rest else "message"

    # -- handshake -----------------------------------------------------------------------------

    def hello(self, hello: Hello) -> None:
        self.reader.dialect, answer = self.handshake.hello(hello)
        self.readings = Readings(
            self.context.numberings, self.stats.address, self.handshake.dialects
        )
        self.stats.protocol = self.reader.dialect.name
        self.answer(Command.HELLO, answer)

    @property
    def dialect(self) -> Dialect:
        """The dialect of the connection; there is nothing to do before HELLO."""
        assert self.reader.dialect is not None
        return self.reader.dialect

    # -- answers -------------------------------------------------------------------------------

    def answer(self, command: Command, fields: dict[str, Any]) -> None:
        """Send an answer, if the command has one."""
        spec = self.dialect.commands[command]
        if spec.answer is Answer.NEVER or self._ended:
            # Writing to a transport that is closed raises, and what comes next wouldn't be done.
            return
        data = encode_answer(spec, fields)
        self.stats.bytes_out += len(data)
        self._transport.write(data)

    def answer_empty(self, command: Command) -> None:
        self.answer(command, {})

    def send_bytes(self, view: memoryview) -> None:
        """Answer with these bytes; nothing else may happen until they are on their way."""
        if self._ended:
            return
        header = encode_size(len(view))
        self.stats.bytes_out += 8 + len(view)
        if len(view) <= _COPY_ANSWER:
            self._transport.write(header + bytes(view))
            return
        self._transport.write(header)
        self._transport.write(view)
        # The next request may change these bytes: first they have to be on their way.
        if not self.writable and not self.busy:
            self.wait(self.drained())

    async def drained(self) -> None:
        """Wait until the client has taken all answers, or is gone."""
        if not self.writable:
            await self._flushed.wait()

    # -- devices, buffers, graphs --------------------------------------------------------------

    def existing_device(self, command: Command, index: int) -> int:
        """Return ``index``. Raises ProtocolError if there is no such device."""
        count = len(self.context.budgets)
        if index >= count:
            raise ProtocolError(f"{command.name} for device {index}, this server has {count}")
        return index

    def device(self, index: int) -> Device:
        return self.context.budgets[index].device

    def queue(self, index: int) -> Queue:
        """Return what this client's graphs run by on a device."""
        queue = self._queues[index]
        if queue is None:
            queue = self._queues[index] = self.device(index).queue(self.stats.address)
        return queue

    def locate(self, tensor: Any, offset: int, size: int) -> tuple[Buffer, int]:
        """Return buffer and offset of ``size`` bytes, ``offset`` bytes into a tensor off the wire.

        Raises BadAddressError, GraphError.
        """
        check_message(tensor)
        try:
            buffer = self.buffers.get(tensor.buffer)
            return buffer, buffer.locate(tensor.data, offset, size)
        except BadAddressError as error:
            raise BadAddressError(f"tensor '{label_of_message(tensor)}': {error}") from None

    def check_scratch(self, plan: Plan) -> None:
        """Hold what a run of ``plan`` takes beside the client's buffers against these.

        Raises GraphError.
        """
        if plan.scratch > SCRATCH_BYTES + self.buffers.nbytes:
            raise GraphError(
                f"a graph that takes {plan.scratch} bytes beside its client's buffers, which have "
                f"{self.buffers.nbytes}: {SCRATCH_BYTES} more are the most"
            )

    def update_buffer_stats(self) -> None:
        """Note what the client holds: it has changed."""
        self.stats.buffers = len(self.buffers)
        self.stats.memory = self.buffers.nbytes

    def allocation_failed(self, size: int, error: OutOfMemoryError) -> None:
        """Tell log and stats why a buffer was refused; the answer tells the client."""
        extra = {"event": "no_room", "bytes": size}
        if isinstance(error, LimitedError):
            self.context.stats.limits[error.option] += 1
            extra["option"] = error.option
        self.context.stats.errors["no_room"] += 1
        self.log.log(logging.WARNING, "no buffer of %d bytes: %s", size, error, extra=extra)

    def ran(self, command: Command, seconds: float, error: BaseException | None) -> None:
        """Take note that a job on the device's thread is over; on the event loop."""
        running, self.running = self.running, None
        assert running is not None
        self.stats.plan_seconds += running.planning
        if self.streaming:
            self._end_stream()
            self._end_swaps(error)
            assert self._lease is not None
            self._lease.ended()
            if self._borrowed:
                self._lease.release(self)
            if isinstance(error, GraphError) and self._is_silent(str(error)):
                error = LimitReached("--peer-timeout", str(error))
        if error is None and running.error is None:
            self.completed(command, running.nodes, seconds)
        elif command is Command.SPLIT_PROGRAM and isinstance(error, NodeError):
            # A coordinator has clients beside the one whose graph that was.
            self.context.stats.errors["graph"] += 1
            self.log.log(
                logging.ERROR,
                "%s; the program is refused",
                error,
                extra={"event": "refused", "kind": "graph"},
            )
            self.answer(command, {"result": 1})
            error = None
        self._finished(running.error or error)

    def completed(self, command: Command, nodes: int, seconds: float) -> None:
        """Count a job of so many nodes that went well, and answer."""
        if command is Command.SPLIT_RUN:
            self.stats.programs_run += 1
        if command is not Command.SPLIT_PROGRAM:
            self.stats.graph(nodes, seconds)
        # GGML_STATUS_SUCCESS; a graph that fails has no answer, its connection is closed.
        self.answer(command, {"result": 0})

    # -- links to the other parts of a split -------------------------------------------------

    @property
    def lent(self) -> bool:
        """Return whether a plan reads and writes the socket by itself."""
        return self.streaming or self.linked

    def enter_group(self, group: LinkGroup) -> None:
        """Make ``group`` the one that the client's programs have swaps in."""
        self.leave_group()
        self.programs.group = group
        self.context.groups.add(group)

    def leave_group(self) -> None:
        """Hang up on the other parts of the client's split."""
        group = self.programs.leave_group()
        if group is not None:
            self.context.groups.discard(group)

    @property
    def holds_anything(self) -> bool:
        """Return whether the client has sent what a link has no use for, or has something here."""
        held = len(self.buffers) or self.programs.group is not None
        return bool(held) or not self.reader.at_boundary

    def become_link(self, group: LinkGroup, number: int) -> None:
        """Make this connection the link of another server's client to one of ``group``."""
        self.linked = True
        group.add(number, self._fileno(), self._unlink)

    def _unlink(self) -> None:
        """Close the connection, whose group has ended."""
        if not self._ended:
            self._transport.abort()

    # -- the socket, lent to a program -------------------------------------------------------

    def with_lease(self, index: int, start: Callable[[], None]) -> None:
        """Call ``start``, which begins a stream, as soon as the client has the device's lease.

        One that didn't ask for it has it for one run. Raises LimitReached.
        """
        lease = self._lease = self.context.leases[index]
        self._borrowed = not lease.held_by(self)
        if lease.take(self):
            lease.began()
            start()
            return

        def granted(future: asyncio.Future[None]) -> None:
            if future.cancelled():
                self._finished(None)
                return
            lease.began()
            start()
            # The connection stops reading: what comes now is the program's.
            self._resume()

        self.busy = True
        lease.wait(self).add_done_callback(granted)

    def begin_stream(self, group: LinkGroup | None) -> None:
        """Give the socket to the running program from here on, and its links to the others."""
        if group is not None:
            group.begin()
        self._group = group
        stream = self.programs.peer.stream
        early = self.reader.take_received()
        stream.open(self._fileno(), early)
        self._lent_at = stream.count(BYTES_RECEIVED), stream.count(BYTES_SENT), len(early)
        self.streaming = True

    def _end_stream(self) -> None:
        self.streaming = False
        stream = self.programs.peer.stream
        received, sent, early = self._lent_at
        left = stream.early_left
        self.stats.bytes_in += stream.count(BYTES_RECEIVED) - received - (early - len(left))
        self.stats.bytes_out += stream.count(BYTES_SENT) - sent
        self.reader.put_back(left)

    def _end_swaps(self, error: BaseException | None) -> None:
        """Give back the links; tell the client why a program fails that may be another's fault."""
        group, self._group = self._group, None
        if group is None:
            return
        group.end(failed=error is not None)
        if isinstance(error, GraphError) and not self._ended:
            # Past the transport, which forgets what it was given when the connection is closed.
            with contextlib.suppress(OSError):
                os.write(self._fileno(), encode_report(str(error)))

    def _is_silent(self, message: str) -> bool:
        """Return whether a program failed because it waited for this client, not for a worker."""
        return message.startswith(self.name) and message.endswith(STATUS_TEXT[SILENT])

    def _fileno(self) -> int:
        return int(self._transport.get_extra_info("socket").fileno())
