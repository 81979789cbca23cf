"""Strategies for every message of every protocol version, requests and answers.

They follow from the tables of ``protocol.dialects``: a field is drawn by what it is declared as and
what it is called, so a message that is added there is drawn here. Tensors look like those of
llama.cpp (types, whole blocks, dense or permuted strides, ops that the dialect has), graphs hang
together; numbers are drawn near the edges of what their field holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from construct import Array, Bytes, FormatField, Padded, Struct
from hypothesis import strategies as st

from client.tensors import dims
from conformance.properties.programs import build, programs
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, Body, Dialect
from protocol.errors import NotInRelease
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import MAX_DIMS, MAX_SOURCES, RPC_TENSOR_DTYPE, RpcTensor
from protocol.requests import encode_request
from protocol.responses import encode_size
from protocol.split import ProgramStep, encode_program
from protocol.tensor import contiguous_strides

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DrawnRequest:
    """A request: the fields of its head, and the body that follows it."""

    command: Command
    fields: Fields
    body: bytes = b""

    def encode(self, dialect: Dialect) -> bytes:
        """Return the bytes on the wire."""
        spec = dialect.commands[self.command]
        return encode_request(self.command, spec, self.fields, len(self.body)) + self.body


class Reply(NamedTuple):
    """An answer to ``command``: fields, or for GET_TENSOR its ``data``."""

    command: Command
    fields: Fields
    data: bytes = b""

    def encode(self, dialect: Dialect) -> bytes:
        """Return the bytes on the wire."""
        spec = dialect.commands[self.command]
        payload = self.data
        if spec.answer is Answer.FIXED:
            payload = codec(spec.response).build(self.fields)
        return encode_size(len(payload)) + payload


# -- numbers and fields ----------------------------------------------------------------------------


def integers(bits: int, signed: bool = False) -> st.SearchStrategy[int]:
    """Return integers that a field of so many bits holds, often at the edges of it."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    edges = sorted({low, low + 1, 0, 1, 2, 255, 256, high >> 1, high - 1, high})
    fitting = [n for n in edges if low <= n <= high]
    return st.sampled_from(fitting) | st.integers(low, high)


def _plain(field: FormatField[Any, Any]) -> st.SearchStrategy[Any]:
    form = field.fmtstr[-1]
    if form in "fd":
        return st.floats(width=32 if form == "f" else 64, allow_nan=False)
    return integers(8 * field.length, signed=form.islower())


def declared(declaration: Any, dialect: Dialect) -> st.SearchStrategy[Any]:
    """Return values of a construct declaration: numbers, bytes, lists, dicts."""
    if declaration is RpcTensor:
        return tensors(dialect)
    if isinstance(declaration, Struct):
        named = [field for field in declaration.subcons if field.name]
        return st.fixed_dictionaries({f.name: declared(f.subcon, dialect) for f in named})
    if isinstance(declaration, Array):
        count = int(declaration.count)
        if declaration.subcon is RpcTensor:
            # Ten whole tensors at once would leave no room for others: most are none.
            return st.lists(tensors(dialect), max_size=2).map(
                lambda some: [*some, *[NO_TENSOR] * (count - len(some))]
            )
        return st.lists(declared(declaration.subcon, dialect), min_size=count, max_size=count)
    if isinstance(declaration, Bytes):
        length = int(declaration.length)
        return st.binary(max_size=length).map(lambda raw: raw.ljust(length, b"\0"))
    if isinstance(declaration, Padded):
        return st.none()
    assert isinstance(declaration, FormatField)
    return _plain(declaration)


# -- tensors and graphs ----------------------------------------------------------------------------

NO_TENSOR: Fields = {
    field.name: [0] * int(field.subcon.count)
    if isinstance(field.subcon, Array)
    else (bytes(field.subcon.sizeof()) if isinstance(field.subcon, Bytes) else 0)
    for field in RpcTensor.subcons
}


@st.composite
def tensors(draw: Any, dialect: Dialect) -> Fields:
    """Return the fields of one rpc_tensor as clients send them.

    Now and then a field has anything in it.
    """
    type_ = draw(st.sampled_from(GgmlType))
    block = TYPE_INFO[type_].block_size
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 5, 8, 64, 0)), min_size=1, max_size=MAX_DIMS))
    ne = dims([shape[0] * block, *shape[1:]])
    nb = list(contiguous_strides(type_, ne))
    order = draw(st.permutations(range(4)) | st.just([0, 1, 2, 3]))
    made: dict[str, Any] = {
        **NO_TENSOR,
        "id": draw(st.integers(1, (1 << 64) - 1)),
        "type": int(type_),
        "ne": [ne[i] for i in order],
        "nb": [nb[i] & 0xFFFFFFFF for i in order],
        "op": draw(st.integers(0, len(dialect.ops) - 1)),
        "flags": draw(st.sampled_from((0, 1, 2, 16, 18))),
        "buffer": draw(st.integers(0, (1 << 48) - 1)),
        "data": draw(st.integers(0, (1 << 48) - 1)),
        "name": draw(st.text(max_size=15)).encode().ljust(64, b"\0"),
        "use_count": draw(st.integers(0, 3)),
    }
    made["src"] = [*draw(st.lists(integers(64), max_size=3)), *[0] * MAX_SOURCES][:MAX_SOURCES]
    made["op_params"] = [*draw(st.lists(integers(32, True), max_size=4)), *[0] * 16][:16]
    if draw(st.booleans()):
        name = draw(st.sampled_from([f.name for f in RpcTensor.subcons]))
        field = next(f.subcon for f in RpcTensor.subcons if f.name == name)
        made[name] = draw(declared(field, dialect))
    return made


def wire_array(rows: list[Fields]) -> Any:
    """Return RPC_TENSOR_DTYPE[n] of tensors given by their fields."""
    raw = b"".join(codec(RpcTensor).build(row) for row in rows)
    return np.frombuffer(raw, RPC_TENSOR_DTYPE)


@st.composite
def graphs(draw: Any, dialect: Dialect) -> bytes:
    """Return the body of a GRAPH_COMPUTE: one that a program makes, or tensors that don't fit."""
    if draw(st.booleans()):
        program = build(draw(programs(12)), 12).graph
        # What came with a later release has no number here.
        with contextlib.suppress(NotInRelease):
            return program.encode(dialect)
    rows = draw(st.lists(tensors(dialect), max_size=4))
    nodes = np.array(draw(st.lists(integers(64), max_size=4)), np.uint64)
    device = draw(integers(32)) if dialect.graph_device else 0
    return encode_graph(GraphPayload(device, nodes, wire_array(rows)), dialect)


@st.composite
def split_programs(draw: Any, dialect: Dialect) -> bytes:
    """Return the body of a SPLIT_PROGRAM."""
    ids = st.lists(integers(64), max_size=3).map(tuple)
    steps = draw(st.lists(st.builds(ProgramStep, ids, ids, ids), max_size=3))
    return encode_program(steps, wire_array(draw(st.lists(tensors(dialect), max_size=3))))


# -- messages --------------------------------------------------------------------------------------


@st.composite
def requests(draw: Any, dialect: Dialect, command: Command | None = None) -> DrawnRequest:
    """Return any request of the dialect but HELLO, or of one command."""
    chosen = command
    if chosen is None:
        chosen = draw(st.sampled_from([c for c in dialect.commands if c is not Command.HELLO]))
    spec = dialect.commands[chosen]
    fields = draw(declared(spec.request, dialect))
    body = b""
    if spec.body is Body.DATA:
        # Below and above the size from which bytes are received where they belong.
        size = draw(st.sampled_from((0, 1, 17, 4095, 4096, 5000, 70_000)))
        body = np.random.default_rng(draw(st.integers(0, 255))).bytes(size)
    elif chosen is Command.SPLIT_PROGRAM:
        body = draw(split_programs(dialect))
    elif spec.body is Body.GRAPH:
        body = draw(graphs(dialect))
    return DrawnRequest(chosen, fields, body)


@st.composite
def replies(draw: Any, dialect: Dialect, command: Command | None = None) -> Reply:
    """Return any answer of the dialect but HELLO's, or to one command."""
    chosen = command
    if chosen is None:
        answered = [
            c
            for c, spec in dialect.commands.items()
            if spec.answer is not Answer.NEVER and c is not Command.HELLO
        ]
        chosen = draw(st.sampled_from(answered))
    spec = dialect.commands[chosen]
    if spec.answer is Answer.DATA:
        size = draw(st.sampled_from((0, 1, 17, 4095, 4096, 5000, 70_000)))
        return Reply(chosen, {}, np.random.default_rng(draw(st.integers(0, 255))).bytes(size))
    return Reply(chosen, draw(declared(spec.response, dialect)))
