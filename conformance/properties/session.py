"""Does the steps of a session on a server and on the model, and compares all memory.

Several clients are connected at once; their questions are asked before any is answered, so that an
answer that goes to the wrong one shows. A step's requests are sent without waiting for earlier ones
where no answer is needed to go on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conformance.properties.memory import ModelBuffer, ModelGraph, Range, content
from conformance.properties.steps import MAX_BUFFERS, MAX_BYTES, Action, ActionKind, ActionSequence
from conformance.suite.context import Context
from conformance.suite.errors import CaseEnded
from conformance.suite.peer import Peer
from conformance.suite.tensors import Fields, tensor
from protocol.commands import Command
from protocol.dialects import Answer
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size

# Answers that may be due before they are taken.
_MOST_DUE = 16
# Types of which sizes are asked for.
_SIZED = (GgmlType.Q4_0, GgmlType.F32, GgmlType.Q8_0, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.I8)
# Segments that one request is cut into, and one for the rest.
_MOST_CUTS = 40


class Violation(AssertionError):  # noqa: N818
    """The server's memory, or an answer, is not what the model says; the message says where."""


def byte_tensor(handle: int, address: int, size: int) -> Fields:
    """Return the rpc_tensor of ``size`` bytes (I8)."""
    return tensor(1, (size,), type=GgmlType.I8, buffer=handle, data=address)


@dataclass(slots=True)
class _Client:
    """One client: its connection, what the server must have of it, what is to be answered."""

    number: int
    peer: Peer
    buffers: list[ModelBuffer] = field(default_factory=list)
    graph: ModelGraph | None = None
    # What the coming answers must be, in order: each returns what is wrong, or ''.
    due: deque[tuple[Command, Callable[[Any], str]]] = field(default_factory=deque)
    # Contents that the server was asked to keep.
    kept: list[bytes] = field(default_factory=list)

    def buffer(self, number: int) -> ModelBuffer | None:
        return self.buffers[number % len(self.buffers)] if self.buffers else None


class SequencePlayer:
    """Plays one session; :meth:`play` raises Violation."""

    def __init__(self, context: Context, session: ActionSequence) -> None:
        self._context = context
        self._session = session
        self._clients: list[_Client] = []

    def play(self) -> None:
        """Do all steps, compare after each (or every few). Raises Violation."""
        step: Action | None = None
        number = 0
        try:
            for i in range(self._session.clients):
                self._clients.append(_Client(i, self._connect(i)))
            for number, step in enumerate(self._session.steps):
                if any(b.nan.any() for client in self._clients for b in client.buffers):
                    # Bits of what is no number are the server's: read before they are used.
                    self._compare()
                client = self._clients[step.client % len(self._clients)]
                _DO[step.kind](self, client, step)
                if number % self._session.every == 0:
                    self._compare()
            step = None
            self._compare()
        except (CaseEnded, Violation) as error:
            where = "at the end" if step is None else f"after step {number} ({step.kind})"
            raise Violation(f"{where}: {error}") from None

    def _connect(self, client: int) -> Peer:
        return self._context.connect(f"client {client}")

    # -- comparing

    def _compare(self) -> None:
        """Ask for all memory of all clients, then take and check all answers."""
        for client in self._clients:
            for buffer in client.buffers:
                self._read(client, buffer, 0, len(buffer.data), adopt=True)
        for client in self._clients:
            self._settle(client)

    def _settle(self, client: _Client) -> None:
        """Take all answers that are due, and check them."""
        while client.due:
            command, check = client.due.popleft()
            wrong = check(client.peer.answer(command))
            if wrong:
                raise Violation(f"client {client.number}: {wrong}")

    def _read(
        self, client: _Client, buffer: ModelBuffer, at: int, size: int, adopt: bool = False
    ) -> None:
        """Ask for some bytes, which must be those of now; ``adopt`` only if nothing follows."""
        where = f"buffer {client.buffers.index(buffer)} of {len(buffer.data)} bytes"
        expected = buffer.part(at, size)

        def check(answer: bytes) -> str:
            wrong = expected.difference(answer)
            if adopt and not wrong:
                buffer.adopt(answer)
            return wrong and f"{where}, from {at} on: {wrong}"

        # Half of the way by the tensor's place, half by the offset into it.
        inside = at // 2
        tensor = byte_tensor(buffer.handle, buffer.base + inside, len(buffer.data) - inside)
        fields = {"tensor": tensor, "offset": at - inside, "size": size}
        self._ask(client, Command.GET_TENSOR, fields, check)

    # -- sending

    def _ask(
        self,
        client: _Client,
        command: Command,
        fields: dict[str, Any],
        check: Callable[[Any], str] = lambda answer: "",
        body: bytes = b"",
    ) -> None:
        """Send a request; its answer, if this version has one, is checked when it is taken."""
        if len(client.due) > _MOST_DUE:
            self._settle(client)
        self._send(client.peer, command, client.peer.message(command, body, **fields))
        if client.peer.spec(command).answer is not Answer.NEVER:
            client.due.append((command, check))

    def _send(self, peer: Peer, command: Command, data: bytes) -> None:
        at = 0
        for length in itertools.islice(itertools.cycle(self._session.cuts), _MOST_CUTS):
            if at + length >= len(data):
                break
            peer.send_bytes(data[at : at + length], more=at > 0, command=command.name)
            at += length
        peer.send_bytes(data[at:], more=at > 0, command=command.name)

    def _now(self, client: _Client, command: Command, **fields: Any) -> Any:
        """Send a request whose answer is needed to go on."""
        self._settle(client)
        self._send(client.peer, command, client.peer.message(command, **fields))
        return client.peer.answer(command)

    # -- steps

    def _alloc(self, client: _Client, step: Action) -> None:
        if len(client.buffers) >= MAX_BUFFERS:
            return
        size = step.size % MAX_BYTES + 1
        answer = self._now(client, Command.ALLOC_BUFFER, size=size)
        if not answer.remote_ptr:
            raise Violation(f"no room for {size} bytes")
        if answer.remote_size < size:
            raise Violation(f"{answer.remote_size} bytes given, {size} asked for")
        if any(b.handle == answer.remote_ptr for b in client.buffers):
            raise Violation(f"handle {answer.remote_ptr:#x} is given twice")
        handle = answer.remote_ptr
        base = self._now(client, Command.BUFFER_GET_BASE, remote_ptr=handle).base_ptr
        for other in client.buffers:
            if base < other.base + len(other.data) and other.base < base + size:
                raise Violation(f"the new buffer at {base:#x} lies across one at {other.base:#x}")
        # What is in new memory is the server's business, but it must stay.
        whole = byte_tensor(handle, base, size)
        found = self._now(client, Command.GET_TENSOR, tensor=whole, size=size)
        client.buffers.append(ModelBuffer(handle, base, bytearray(found)))

    def _set(self, client: _Client, step: Action) -> None:
        buffer = client.buffer(step.a)
        if buffer is None:
            return
        at, size = self._part(buffer, step)
        data = content(step.seed, size)
        self._upload(client, buffer, at, data, cache_flag=0)

    def _upload(
        self, client: _Client, buffer: ModelBuffer, at: int, data: bytes, cache_flag: int
    ) -> None:
        inside = at // 2
        tensor = byte_tensor(buffer.handle, buffer.base + inside, len(buffer.data) - inside)
        fields = {"tensor": tensor, "offset": at - inside, "cache_flag": cache_flag}
        self._ask(client, Command.SET_TENSOR, fields, body=data)
        buffer.write(at, data)

    @staticmethod
    def _part(buffer: ModelBuffer, step: Action) -> tuple[int, int]:
        """A range of at least a byte in the buffer."""
        at = step.at % len(buffer.data)
        return at, step.size % (len(buffer.data) - at) + 1

    def _clear(self, client: _Client, step: Action) -> None:
        buffer = client.buffer(step.a)
        if buffer is None:
            return
        value = step.seed & 0xFF
        self._ask(client, Command.BUFFER_CLEAR, {"remote_ptr": buffer.handle, "value": value})
        buffer.write(0, bytes([value]) * len(buffer.data))

    def _memset(self, client: _Client, step: Action) -> None:
        buffer = client.buffer(step.a)
        if buffer is None:
            return
        at, size = self._part(buffer, step)
        value = step.seed & 0xFF
        inside = at // 2
        tensor = byte_tensor(buffer.handle, buffer.base + inside, len(buffer.data) - inside)
        fields = {"tensor": tensor, "offset": at - inside, "size": size, "value": value}
        self._ask(client, Command.MEMSET_TENSOR, fields)
        buffer.write(at, bytes([value]) * size)

    def _copy(self, client: _Client, step: Action) -> None:
        source, target = client.buffer(step.a), client.buffer(step.b)
        if source is None or target is None:
            return
        at, size = self._part(source, step)
        size = min(size, len(target.data))
        to = step.seed % (len(target.data) - size + 1)
        if source is target and at < to + size and to < at + size:
            # Ranges that lie across each other: whatever comes first is right.
            return
        fields = {
            "src": byte_tensor(source.handle, source.base + at, size),
            "dst": byte_tensor(target.handle, target.base + to, size),
        }

        def check(answer: Any) -> str:
            return "" if answer.result == 1 else f"COPY_TENSOR answered {answer.result}"

        self._ask(client, Command.COPY_TENSOR, fields, check)
        target.write(to, bytes(source.data[at : at + size]))

    def _get(self, client: _Client, step: Action) -> None:
        buffer = client.buffer(step.a)
        if buffer is not None:
            self._read(client, buffer, *self._part(buffer, step))

    def _graph(self, client: _Client, step: Action) -> None:
        n = step.size % 64 + 1
        roomy = [b for b in client.buffers if len(b.data) >= 4 * n]
        if not roomy:
            return
        leaves = []
        for i, choice in enumerate((step.a, step.b)):
            buffer = roomy[choice % len(roomy)]
            places = (len(buffer.data) - 4 * n) // 4 + 1
            leaves.append(Range(buffer, 4 * ((step.at + i * n) % places), n))
        client.graph = ModelGraph(leaves, step.words)
        self._run(client, Command.GRAPH_COMPUTE, {}, client.graph.payload(client.peer.dialect))

    def _rerun(self, client: _Client, step: Action) -> None:
        if client.graph is not None:
            self._run(client, Command.GRAPH_RECOMPUTE, {})

    def _run(
        self, client: _Client, command: Command, fields: dict[str, Any], body: bytes = b""
    ) -> None:
        def check(answer: Any) -> str:
            return "" if answer.result == 0 else f"{command.name} answered {answer.result}"

        self._ask(client, command, fields, check, body)
        assert client.graph is not None
        client.graph.run()

    def _hash(self, client: _Client, step: Action) -> None:
        """Offer contents by their hash: some that the server was asked to keep, or others."""
        buffer = client.buffer(step.a)
        if buffer is None:
            return
        at, size = self._part(buffer, step)
        if step.b % 2 == 0:
            data = content(step.seed, size)
            self._upload(client, buffer, at, data, cache_flag=1)
            client.kept.append(data)
            return
        fitting = [d for d in client.kept if len(d) <= len(buffer.data)]
        data = fitting[step.seed % len(fitting)] if fitting else content(step.seed + 1, size)
        at = step.at % (len(buffer.data) - len(data) + 1)
        tensor = byte_tensor(buffer.handle, buffer.base + at, len(data))
        digest = fnv1a_64(data)
        answer = self._now(client, Command.SET_TENSOR_HASH, tensor=tensor, hash=digest)
        if answer.result not in (0, 1):
            raise Violation(f"SET_TENSOR_HASH answered {answer.result}")
        if answer.result:
            # It says that it had them: then they are there.
            buffer.write(at, data)

    def _query(self, client: _Client, step: Action) -> None:
        """Questions that change nothing."""
        which = step.a % 6
        if which == 0:
            self._ask(client, Command.GET_ALIGNMENT, {}, _power_of_two)
        elif which == 1:
            self._ask(client, Command.GET_MAX_SIZE, {}, _positive)
        elif which == 2:
            self._ask(client, Command.GET_DEVICE_MEMORY, {}, _free_of_total)
        elif which == 3 and Command.DEVICE_COUNT in client.peer.dialect.commands:
            self._ask(client, Command.DEVICE_COUNT, {}, _some_devices)
        elif which == 4:
            self._ask_alloc_size(client, step)
        elif (buffer := client.buffer(step.b)) is not None:
            tensor = byte_tensor(buffer.handle, buffer.base, len(buffer.data))
            self._ask(client, Command.INIT_TENSOR, {"tensor": tensor})
            base = buffer.base
            self._ask(
                client,
                Command.BUFFER_GET_BASE,
                {"remote_ptr": buffer.handle},
                lambda a: "" if a.base_ptr == base else f"base {a.base_ptr:#x}, was {base:#x}",
            )

    def _ask_alloc_size(self, client: _Client, step: Action) -> None:
        """Ask what tensors take that have no place yet; rows of blocks may be padded, not cut."""
        for type_ in _SIZED:
            ne = (TYPE_INFO[type_].block_size * (1 + step.at % 4), 1 + step.size % 8)
            least = row_size(type_, ne[0]) * ne[1]

            def check(answer: Any, type_: GgmlType = type_, least: int = least) -> str:
                size = answer.alloc_size
                return "" if size >= least else f"{size} bytes for {least} of {type_.name}"

            fields = {"tensor": tensor(1, ne, type=type_)}
            self._ask(client, Command.GET_ALLOC_SIZE, fields, check)

    def _free(self, client: _Client, step: Action) -> None:
        buffer = client.buffer(step.a)
        if buffer is None:
            return
        # Answers that are due may be about it.
        self._settle(client)
        self._ask(client, Command.FREE_BUFFER, {"remote_ptr": buffer.handle})
        client.buffers.remove(buffer)
        client.graph = None

    def _reconnect(self, client: _Client, step: Action) -> None:
        """Hang up, also in the middle of what is to be answered, and come back with nothing."""
        if not self._context.facts.concurrent:
            # What that does to a server without a thread to spare, cases of group 2 find out.
            self._settle(client)
        client.peer.close()
        client.due.clear()
        client.buffers.clear()
        client.graph = None
        client.peer = self._connect(client.number)


def _power_of_two(answer: Any) -> str:
    n = answer.alignment
    return "" if n > 0 and n & (n - 1) == 0 else f"alignment {n} is no power of two"


def _positive(answer: Any) -> str:
    return "" if answer.max_size > 0 else "no buffer may have any byte"


def _free_of_total(answer: Any) -> str:
    sound = answer.free_mem <= answer.total_mem
    return "" if sound else f"{answer.free_mem} bytes free of {answer.total_mem}"


def _some_devices(answer: Any) -> str:
    return "" if answer.device_count > 0 else "no device"


_DO: dict[ActionKind, Callable[[SequencePlayer, _Client, Action], None]] = {
    ActionKind.ALLOC: SequencePlayer._alloc,
    ActionKind.SET: SequencePlayer._set,
    ActionKind.CLEAR: SequencePlayer._clear,
    ActionKind.MEMSET: SequencePlayer._memset,
    ActionKind.COPY: SequencePlayer._copy,
    ActionKind.GET: SequencePlayer._get,
    ActionKind.GRAPH: SequencePlayer._graph,
    ActionKind.RERUN: SequencePlayer._rerun,
    ActionKind.HASH: SequencePlayer._hash,
    ActionKind.ASK: SequencePlayer._query,
    ActionKind.FREE: SequencePlayer._free,
    ActionKind.RECONNECT: SequencePlayer._reconnect,
}


def play(context: Context, session: ActionSequence) -> None:
    """Play a session on the server. Raises Violation."""
    SequencePlayer(context, session).play()
