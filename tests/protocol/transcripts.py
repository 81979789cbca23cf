"""Connections as lists of what each side sends in turn, for tests of what reads them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, Body, Dialect
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE, RpcTensor
from protocol.observe.conversation import (
    Conversation,
    Event,
    ObservedMessage,
    Side,
)
from protocol.split import (
    ProgramStep,
    description_fields,
    encode_program,
    members_fields,
    split_caps,
    split_status_fields,
    with_split,
)

Turn = tuple[Side, bytes]

HANDLE, BASE = 0x7F0000001000, 0x7F0000200000


def tensor_fields(
    dialect: Dialect, name: str, ne: Sequence[int] = (8, 2, 1, 1), op: Op = Op.NONE, **other: Any
) -> dict[str, Any]:
    """The fields of an rpc_tensor of F32 that ggml might send."""
    fields = vars(codec(RpcTensor).parse(bytes(codec(RpcTensor).size)))
    nb = [4, 4 * ne[0], 4 * ne[0] * ne[1], 4 * ne[0] * ne[1] * ne[2]]
    return {
        **fields,
        "id": 0x5000 + sum(name.encode()) * 16,
        "type": GgmlType.F32,
        "buffer": HANDLE,
        "ne": tuple(ne),
        "nb": tuple(nb),
        "op": dialect.op_number(op),
        "flags": 16 if op is not Op.NONE else 0,
        "data": BASE,
        "name": name.encode(),
        **other,
    }


def tensor_array(*fields: dict[str, Any]) -> Any:
    return np.frombuffer(b"".join(map(codec(RpcTensor).build, fields)), RPC_TENSOR_DTYPE)


def request(dialect: Dialect, command: Command, fields: dict[str, Any], body: bytes = b"") -> Turn:
    head = codec(dialect.commands[command].request).build(fields)
    frame = struct.pack("<BQ", command, len(head) + len(body))
    return Side.CLIENT, frame + head + body


def answer(dialect: Dialect, command: Command, content: dict[str, Any] | bytes) -> Turn:
    spec = dialect.commands[command]
    data = content if isinstance(content, bytes) else codec(spec.response).build(content)
    return Side.SERVER, struct.pack("<Q", len(data)) + data


def hello(dialect: Dialect, caps: bytes | None = None) -> list[Turn]:
    """The handshake, by a server that answers the dialect's own version."""
    major, minor, patch = dialect.version
    caps = bytes(24) if caps is None else caps
    version = {"major": major, "minor": minor, "patch": patch, "conn_caps": caps}
    return [
        request(dialect, Command.HELLO, {"conn_caps": caps}),
        answer(dialect, Command.HELLO, version),
    ]


def small_graph(dialect: Dialect) -> bytes:
    """y = f(w * x), whose GLU or, before there was one, UNARY tells how ops are numbered."""
    w = tensor_fields(dialect, "w", (8, 4, 1, 1))
    x = tensor_fields(dialect, "x", (8, 1, 1, 1))
    y = tensor_fields(dialect, "y", (4, 1, 1, 1), Op.MUL_MAT)
    y["src"] = (w["id"], x["id"], *[0] * 8)
    gated = Op.GLU in dialect.ops
    z = tensor_fields(dialect, "z", (2 if gated else 4, 1, 1, 1), Op.GLU if gated else Op.UNARY)
    z["src"] = (y["id"], *[0] * 9)
    nodes = np.array([y["id"], z["id"]], "<u8")
    return encode_graph(GraphPayload(0, nodes, tensor_array(w, x, y, z)), dialect)


def session(dialect: Dialect, upload: int = 64, download: int = 64) -> list[Turn]:
    """Every command of a dialect after its handshake, with tensors of so many bytes."""
    turns: list[Turn] = []
    data = bytes(i * 7 % 251 for i in range(upload))
    answers: dict[Command, dict[str, Any] | bytes] = {
        Command.DEVICE_COUNT: {"device_count": 1},
        Command.ALLOC_BUFFER: {"remote_ptr": HANDLE, "remote_size": 1 << 20},
        Command.GET_ALIGNMENT: {"alignment": 128},
        Command.GET_MAX_SIZE: {"max_size": 1 << 40},
        Command.BUFFER_GET_BASE: {"base_ptr": BASE},
        Command.SET_TENSOR_HASH: {"result": 0},
        Command.GET_TENSOR: bytes(i * 5 % 253 for i in range(download)),
        Command.COPY_TENSOR: {"result": 1},
        Command.GRAPH_COMPUTE: {"result": 0},
        Command.GET_DEVICE_MEMORY: {"free_mem": 1 << 30, "total_mem": 1 << 31},
        Command.GET_ALLOC_SIZE: {"alloc_size": 4096},
        Command.SPLIT_QUERY: {"version": 1, "max_programs": 64, "n_parts": 1},
        Command.SPLIT_ALLOC_BUFFER: {"remote_ptr": HANDLE + 16, "remote_size": 1 << 20},
        Command.SPLIT_PROGRAM: {"result": 0},
        Command.SPLIT_STATUS: split_status_fields(),
        Command.SPLIT_MEMBERS: members_fields([1 << 63, 3]),
        Command.SPLIT_ACQUIRE: {"granted": 1, "holder": b""},
        Command.SPLIT_RELEASE: {"kept": 0},
        Command.SPLIT_LOAD: {"result": 1},
        Command.SPLIT_DESCRIBE: description_fields("server 1", ["7.0.0"], "CPU", "a processor"),
    }
    tensor = tensor_fields(dialect, "blk.0.attn_q.weight", (max(upload, 8) // 4, 2, 1, 1))
    fields: dict[str, Any] = {
        "tensor": tensor, "src": tensor, "dst": tensor, "srcs": [tensor] * 10, "device": 0,
        "remote_ptr": HANDLE, "offset": 0, "size": download, "value": 7, "hash": 1 << 60,
        "cache_flag": 1, "n_proportions": 1, "proportions": [1.0] * 16, "program": 3,
        "patience_ms": 100, "keep": 1, "address": BASE, "nbytes": 4096, "start": 64, "count": 2,
        "distance": 128, "whole": 1,
    }  # fmt: skip
    for command, spec in dialect.commands.items():
        if command is Command.HELLO:
            continue
        body = b""
        if spec.body is Body.DATA:
            body = data
        elif spec.body is Body.GRAPH:
            split = command is Command.SPLIT_PROGRAM
            body = small_program(dialect) if split else small_graph(dialect)
        turns.append(request(dialect, command, fields, body))
        if spec.answer is not Answer.NEVER:
            turns.append(answer(dialect, command, answers.get(command, {})))
        if command is Command.SPLIT_RUN:
            turns += [
                (Side.CLIENT, bytes(range(32))),
                (Side.SERVER, bytes(range(100, 116))),
                (Side.CLIENT, bytes(range(32, 64))),
                (Side.SERVER, bytes(range(116, 132))),
            ]
    return turns


def small_program(dialect: Dialect) -> bytes:
    """Two steps that each take 32 bytes and give 16."""
    w = tensor_fields(dialect, "w", (8, 4, 1, 1))
    x = tensor_fields(dialect, "x", (8, 1, 1, 1))
    y = tensor_fields(dialect, "y", (4, 1, 1, 1), Op.MUL_MAT)
    y["src"] = (w["id"], x["id"], *[0] * 8)
    step = ProgramStep((x["id"],), (y["id"],), (y["id"],))
    return encode_program([step, step], tensor_array(w, x, y))


def split_session(dialect: Dialect) -> list[Turn]:
    return [*hello(dialect, split_caps()), *session(with_split(dialect))]


def full_session(dialect: Dialect, upload: int = 64, download: int = 64) -> list[Turn]:
    return [*hello(dialect), *session(dialect, upload, download)]


def events_of(
    conversation: Conversation, turns: Sequence[Turn], cuts: Sequence[int] = ()
) -> list[Event]:
    """All events; turns are fed in segments whose lengths repeat ``cuts``."""
    events: list[Event] = []
    i = 0
    for side, data in turns:
        while data:
            n = cuts[i % len(cuts)] if cuts else len(data)
            i += 1
            events += conversation.feed(side, data[:n], float(i))
            data = data[n:]
    return events + conversation.close()


def summary(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    """What events say, without times."""
    found: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, ObservedMessage):
            found.append(
                (
                    event.kind, event.command, event.number, event.start, event.end, event.head,
                    event.fields, event.body_size, bytes(event.body or b""), event.step,
                    event.missing, event.problem, event.dialect.name,
                )
            )  # fmt: skip
        else:
            found.append((type(event), event.side, event.text))
    return found
