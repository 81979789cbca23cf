"""2: requests as frames: their sizes, how they arrive, which are answered."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from conformance.cases.groups import FRAMING
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.refusals import Refusal, declare
from conformance.suite.tensors import graph_bytes
from protocol.commands import Command
from protocol.dialects import Answer, Body
from protocol.ggml.ops import Op
from protocol.messages import fixed_size

_RECV = "ggml-rpc.cpp recv_msg, since 1.0"
_FIXED = tuple(
    command
    for command in Command
    if command not in (Command.HELLO, Command.SET_TENSOR, Command.GRAPH_COMPUTE)
    and command < Command.SPLIT_QUERY
)


def _head_size(c: Context, command: Command) -> int:
    return fixed_size(c.dialect.commands[command].request)


@FRAMING.case(
    2, source="ggml-rpc.cpp rpc_serve_client ('Unknown command'), since 1.0", hostile=True
)
def command_of_a_later_version(c: Context) -> None:
    """Its client would take a server for newer than it said that it is.

    Sends: each command that only later protocols have, on its own connection
    Expects: the connection is closed
    """
    later = [
        command
        for command in Command
        if command not in c.dialect.commands and command < Command.SPLIT_QUERY
    ]
    if not later:
        c.skip(f"protocol {c.dialect.name} has all commands")
    for command in later:
        peer = c.connect(command.name)
        peer.send_frame(command, bytes(4))
        c.refused(peer, differs=f"it knows {command.name}")
        peer.close()


def _small_graph(peer: Peer, buffer: RemoteBuffer) -> bytes:
    leaf = buffer.leaf(1, (8,))
    return graph_bytes(peer.dialect, [buffer.node(2, (8,), Op.ADD, 1, 1, at=64)], [leaf])


def _too_short(c: Context, peer: Peer, command: Command) -> None:
    size = _head_size(c, command)
    if not size:
        c.skip(f"{command.name} is empty in protocol {c.dialect.name}")
    peer.send_frame(command, bytes(size - 1))


def _sizes(command: Command) -> tuple[Refusal, Refusal]:
    """One byte less, and one more, than a command's structure has."""
    return (
        Refusal(
            20 + command, f"{_dashed(command)}-too-short",
            f"{command.name} with one byte less than its structure has",
            lambda c, peer: _too_short(c, peer, command), None,
            "Reading the structure anyway would take what was there before for the last byte.",
            needs=(command,),
        ),
        Refusal(
            40 + command, f"{_dashed(command)}-too-long",
            f"{command.name} with one byte more than its structure has",
            lambda c, peer: peer.send_frame(command, bytes(_head_size(c, command) + 1)), None,
            "Both sides would disagree on what the structure is, or where the next one starts.",
            differs="it takes a longer payload", needs=(command,),
        ),
    )  # fmt: skip


def _dashed(command: Command) -> str:
    return command.name.lower().replace("_", "-")


def _claims(number: int, command: Command) -> Refusal:
    """A message that claims to have far more bytes than any server can hold."""

    def send(c: Context, peer: Peer) -> None:
        buffer = peer.alloc(256)
        if command is Command.SET_TENSOR:
            start = peer.payload(command, tensor=buffer.whole()) + bytes(64)
        elif command is Command.GRAPH_COMPUTE:
            start = _small_graph(peer, buffer)
        else:
            start = peer.payload(command, size=64)
        peer.send_frame(command, start, size=1 << 62)

    return Refusal(
        number, f"{_dashed(command)}-of-2-62-bytes",
        f"{command.name} that claims to have 2^62 bytes, and a sound start of it", send, None,
        "The size is the client's word: failing to reserve as much must not end a server.",
        "ggml-rpc.cpp recv_msg (input.resize), since 1.0",
    )  # fmt: skip


declare(
    FRAMING,
    [
        Refusal(
            1, "unknown-command", "commands that no version has: 18, 19, 77, 127, 255",
            tuple(
                lambda c, peer, n=n: peer.send_frame(n)  # type: ignore[misc]
                for n in (18, 19, 77, 127, 255)
            ),
            None,
            "Whether a command has an answer isn't on the wire: one unknown can't be skipped.",
            "ggml-rpc.cpp rpc_serve_client ('Unknown command'), since 1.0",
        ),
        Refusal(
            3, "split-command-without-agreement",
            "commands of the split extension without having agreed on it",
            tuple(
                lambda c, peer, n=n: peer.send_frame(n, bytes(4))  # type: ignore[misc]
                for n in (Command.SPLIT_QUERY, Command.SPLIT_STATUS)
            ),
            None,
            "A client finds out by HELLO whether a server has the extension, and must be able to.",
            "protocol/split.py; to upstream's server they are unknown commands",
            "it has the extension without being asked",
        ),
        Refusal(
            4, "payload-that-is-missing",
            "GET_TENSOR, COPY_TENSOR, SET_TENSOR and GRAPH_COMPUTE without any payload",
            tuple(
                lambda c, peer, n=n: peer.send_frame(n)  # type: ignore[misc]
                for n in (
                    Command.GET_TENSOR, Command.COPY_TENSOR, Command.SET_TENSOR,
                    Command.GRAPH_COMPUTE,
                )
            ),
            None, "A size of 0 is honest, but not enough.",
        ),
        *(row for command in _FIXED for row in _sizes(command)),
        Refusal(
            20 + Command.SET_TENSOR, "set-tensor-too-short",
            "SET_TENSOR that ends one byte before its data could start",
            lambda c, peer: _too_short(c, peer, Command.SET_TENSOR), None,
            "The size of the data is what the head leaves of the message: it would be negative.",
            "ggml-rpc.cpp rpc_server::set_tensor (input.size() < header_size), since 1.0",
        ),
        Refusal(
            20 + Command.GRAPH_COMPUTE, "graph-compute-too-short",
            "GRAPH_COMPUTE of 3 bytes, which end within its first count",
            lambda c, peer: peer.send_frame(Command.GRAPH_COMPUTE, bytes(3)), None,
            "A count that isn't there is not 0.",
            "ggml-rpc.cpp rpc_server::graph_compute (input.size() < ...), since 1.0",
        ),
        _claims(61, Command.ALLOC_BUFFER),
        _claims(64, Command.SET_TENSOR),
        _claims(67, Command.GRAPH_COMPUTE),
    ],
    source=_RECV,
)  # fmt: skip


# -- how a message arrives -------------------------------------------------------------------------


@FRAMING.case(5, source="transport.cpp recv_data: reads until the structure is full")
def request_in_single_bytes(c: Context) -> None:
    """Segments on the way are split and joined as the network likes.

    Sends: GET_DEVICE_MEMORY byte by byte, each in a segment of its own
    Expects: its answer
    """
    peer = c.connect()
    for i, byte in enumerate(peer.message(Command.GET_DEVICE_MEMORY)):
        peer.send_bytes(bytes([byte]), more=i > 0, command="GET_DEVICE_MEMORY")
        # Without a pause the system joins them again.
        time.sleep(0.001)
    peer.answer(Command.GET_DEVICE_MEMORY)


@FRAMING.case(6, source="transport.cpp recv_data")
def upload_in_odd_pieces(c: Context) -> None:
    """The pieces end within the head and within the data, never where they would like to.

    Sends: SET_TENSOR with 5000 bytes in pieces of 1 to 97 bytes, then GET_TENSOR
    Expects: the bytes that were sent
    """
    peer = c.connect()
    rng = random.Random(c.seed)
    content = rng.randbytes(5000)
    buffer = peer.alloc(len(content))
    whole = buffer.whole()
    message = peer.message(Command.SET_TENSOR, content, tensor=whole)
    at = 0
    while at < len(message):
        size = rng.randint(1, 97)
        peer.send_bytes(message[at : at + size], more=at > 0, command="SET_TENSOR")
        at += size
    peer.answer(Command.SET_TENSOR)
    c.equal(peer.get(whole, buffer.size)[:5000], content, "what comes back")


@FRAMING.case(
    7, source="ggml-rpc.cpp rpc_serve_client: one loop; clients of 6.0 and later rely on it"
)
def pipelined_requests(c: Context) -> None:
    """Since 6.0 clients don't wait for answers before they send more.

    Sends: 100 different requests in one write
    Expects: 100 answers, in the order of the requests
    """
    peer = c.connect()
    buffer = peer.alloc(4096)
    content = random.Random(c.seed).randbytes(4096)
    peer.set(buffer.whole(), content)
    sizes = [1 + 37 * i % 200 for i in range(50)]
    asked = b"".join(
        peer.message(Command.GET_TENSOR, tensor=buffer.whole(), offset=i, size=size)
        + peer.message(Command.GET_ALIGNMENT)
        for i, size in enumerate(sizes)
    )
    peer.send_bytes(asked, command="GET_TENSOR")
    for i, size in enumerate(sizes):
        c.equal(peer.answer(Command.GET_TENSOR), content[i : i + size], f"answer {2 * i}")
        peer.answer(Command.GET_ALIGNMENT)


@FRAMING.case(8, source="transport.cpp recv_data")
def requests_cut_anywhere(c: Context) -> None:
    """A piece holds the end of one request and the start of the next.

    Sends: three requests in one stream, cut into pieces of 7 bytes
    Expects: three answers
    """
    peer = c.connect()
    asked = (Command.GET_ALIGNMENT, Command.GET_DEVICE_MEMORY, Command.GET_MAX_SIZE)
    stream = b"".join(peer.message(command) for command in asked)
    for at in range(0, len(stream), 7):
        peer.send_bytes(stream[at : at + 7], more=at > 0, command="three requests")
    for command in asked:
        peer.answer(command)


@FRAMING.case(9, source="ggml-rpc.cpp rpc_serve_client")
def half_closed_after_a_request(c: Context) -> None:
    """Who stops sending still waits for answers.

    Sends: GET_DEVICE_MEMORY, then the end of the stream
    Expects: its answer, then the end of the connection
    """
    peer = c.connect()
    peer.send(Command.GET_DEVICE_MEMORY)
    peer.half_close()
    peer.answer(Command.GET_DEVICE_MEMORY)
    c.expect(peer.closed_by_server(), "the connection stays open")


@FRAMING.case(10, source="ggml-rpc.cpp send_msg: blocks until the client reads")
def answers_that_are_read_late(c: Context) -> None:
    """Answers that the socket can't hold must wait, neither be dropped nor overwritten.

    Sends: 64 GET_TENSOR of 256 KiB, of which nothing is read until all are sent
    Expects: 64 answers, each with the right bytes
    """
    peer = c.connect()
    size = 256 << 10
    buffer = peer.alloc(size)
    content = random.Random(c.seed).randbytes(size)
    peer.set(buffer.whole(), content)
    peer.send_bytes(
        64 * peer.message(Command.GET_TENSOR, tensor=buffer.whole(), size=size),
        command="GET_TENSOR",
    )
    for i in range(64):
        c.equal(peer.answer(Command.GET_TENSOR), content, f"answer {i}")


@FRAMING.case(11, source="ggml-rpc.cpp rpc_serve_client: one request after the other")
def requests_are_done_in_order(c: Context) -> None:
    """A server that answers from memory which later requests change gives torn data.

    Sends: GET_TENSOR of 1 MiB and BUFFER_CLEAR right behind it, four times
    Expects: each answer holds what was there before the BUFFER_CLEAR behind it
    """
    peer = c.connect()
    size = 1 << 20
    buffer = peer.alloc(size)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=1)
    for value in range(2, 6):
        peer.send(Command.GET_TENSOR, tensor=buffer.whole(), size=size)
        peer.send(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=value)
    for value in range(1, 5):
        c.equal(peer.answer(Command.GET_TENSOR), bytes([value]) * size, f"answer {value}")
        peer.answer(Command.BUFFER_CLEAR)


@FRAMING.case(12, source="ggml-rpc.cpp rpc_server::set_tensor")
def large_upload(c: Context) -> None:
    """Models are uploaded in messages of this size and more.

    Sends: 8 MiB in one SET_TENSOR, then GET_TENSOR
    Expects: the bytes that were sent
    """
    peer = c.connect()
    content = random.Random(c.seed).randbytes(8 << 20)
    buffer = peer.alloc(len(content))
    peer.set(buffer.whole(), content)
    c.equal(peer.get(buffer.whole(), len(content)), content, "what comes back")


# -- connections that end --------------------------------------------------------------------------


def _cuts(peer: Peer, buffer: RemoteBuffer) -> dict[str, bytes]:
    """By the name of its case, what is sent of a message before the client hangs up."""
    upload = peer.message(Command.SET_TENSOR, bytes(buffer.size), tensor=buffer.whole())
    graph = peer.message(Command.GRAPH_COMPUTE, _small_graph(peer, buffer))
    copy = peer.message(Command.COPY_TENSOR, src=buffer.whole(), dst=buffer.whole())
    return {
        "within-a-frame": copy[:4],
        "before-a-payload": copy[:9],
        "within-a-structure": copy[:200],
        "within-an-upload": upload[: len(upload) // 2],
        "within-a-graph": graph[: len(graph) - 100],
    }


_CUTS = (
    "within-a-frame",
    "before-a-payload",
    "within-a-structure",
    "within-an-upload",
    "within-a-graph",
)


def _declare_hang_up(number: int, name: str) -> None:
    @FRAMING.case(
        number,
        name=f"hang-up-{name}",
        sends=f"part of a request that ends {name.replace('-', ' ')}, then the end of the stream",
        expects="the connection is closed, and the next client is served",
        source="ggml-rpc.cpp recv_msg: returns false, since 1.0",
        why="Clients are killed at any time; what they had begun is void.",
        hostile=True,
    )
    def check(c: Context) -> None:
        peer = c.connect()
        buffer = peer.alloc(64 << 10)
        peer.send_bytes(_cuts(peer, buffer)[name])
        peer.half_close()
        c.expect(peer.closed_by_server(), "the connection stays open")


for _i, _name in enumerate(_CUTS):
    _declare_hang_up(13 + _i, _name)


@FRAMING.case(18, source="ggml-rpc.cpp send_msg: returns false, since 1.0", hostile=True)
def reset_within_an_answer(c: Context) -> None:
    """A server that writes to a connection that is gone gets a signal if it doesn't take care.

    Sends: GET_TENSOR of 16 MiB, and a reset of the connection before the answer is read
    Expects: the next client is served
    """
    peer = c.connect()
    buffer = peer.alloc(16 << 20)
    peer.send(Command.GET_TENSOR, tensor=buffer.whole(), size=buffer.size)
    peer.read_bytes(1000)
    peer.reset()
    c.connect()


# -- which commands are answered -------------------------------------------------------------------


def _request(command: Command, peer: Peer, buffer: RemoteBuffer) -> tuple[bytes, dict[str, Any]]:
    """A sound request: its body, its fields."""
    fields: dict[str, Any] = {}
    if command in (Command.BUFFER_CLEAR, Command.FREE_BUFFER, Command.BUFFER_GET_BASE):
        fields["remote_ptr"] = buffer.handle
    elif command is Command.ALLOC_BUFFER:
        fields["size"] = 64
    elif command is Command.COPY_TENSOR:
        fields |= {"src": buffer.leaf(1, (8,)), "dst": buffer.leaf(2, (8,), at=64)}
    else:
        fields |= {"tensor": buffer.leaf(1, (8,)), "size": 16, "hash": 1}
    body = b""
    if peer.spec(command).body is Body.DATA:
        body = bytes(32)
    elif peer.spec(command).body is Body.GRAPH:
        body = _small_graph(peer, buffer)
    elif command is Command.GRAPH_RECOMPUTE:
        peer.call(Command.GRAPH_COMPUTE, _small_graph(peer, buffer))
    return body, fields


def _declare_answer(command: Command) -> None:
    @FRAMING.case(
        80 + command,
        name=f"{_dashed(command)}-answers-as-it-should",
        sends=f"{command.name}, then GET_DEVICE_MEMORY",
        expects="an answer of the size that this version has, or none where it has none",
        source="ggml-rpc.cpp rpc_serve_client; docs/protocol.md has the table of versions",
        why="An answer too many or too few shifts all that follow: the client reads nonsense.",
        needs=(command,),
    )
    def check(c: Context) -> None:
        peer = c.connect()
        buffer = peer.alloc(256)
        body, fields = _request(command, peer, buffer)
        spec = peer.spec(command)
        peer.send(command, body, **fields)
        peer.send(Command.GET_DEVICE_MEMORY)
        following = fixed_size(c.dialect.commands[Command.GET_DEVICE_MEMORY].response)
        expected: Sequence[int] = [following]
        if spec.answer is not Answer.NEVER:
            size = 16 if spec.answer is Answer.DATA else fixed_size(spec.response)
            expected = [size, following]
        sizes = [len(peer.read_answer()) for _ in expected]
        c.equal(sizes, list(expected), "the sizes of the answers")
        c.expect(peer.silent(0.02), "more comes than was asked for")


for _answering in sorted({*_FIXED, Command.SET_TENSOR, Command.GRAPH_COMPUTE}):
    _declare_answer(_answering)
