"""Single turns of a connection: what one side sends, and what such messages hold."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Dialect
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE, RpcTensor
from protocol.observe.events import Side
from protocol.split import ProgramStep, ProgramSwap, encode_program

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


def small_program(dialect: Dialect, *, swapped: bool = False) -> bytes:
    """Two steps that each take 32 bytes and give 16, with a swap behind each if ``swapped``."""
    w = tensor_fields(dialect, "w", (8, 4, 1, 1))
    x = tensor_fields(dialect, "x", (8, 1, 1, 1))
    y = tensor_fields(dialect, "y", (4, 1, 1, 1), Op.MUL_MAT)
    y["src"] = (w["id"], x["id"], *[0] * 8)
    step = ProgramStep((x["id"],), (y["id"],), (y["id"],))
    if not swapped:
        return encode_program([step, step], tensor_array(w, x, y))
    z = tensor_fields(dialect, "of another", (4, 1, 1, 1))
    swaps = [ProgramSwap(i, (y["id"], z["id"])) for i in range(2)]
    return encode_program([step, step], tensor_array(w, x, y, z), swaps)
