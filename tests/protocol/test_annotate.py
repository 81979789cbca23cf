"""What is said about messages follows from their declarations, for every message there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect
from protocol.errors import ProtocolError
from protocol.ggml.ops import Op, UnaryOp
from protocol.graph_payload import GraphPayload
from protocol.observe.annotate import (
    annotate,
    describe,
    graph_lines,
    message_of_answer,
    message_of_request,
    size_text,
    tree,
)
from protocol.observe.conversation import Conversation, MessageKind, ObservedMessage
from tests.protocol.transcripts import events_of, full_session, split_session
from tests.protocol.turns import (
    Turn,
    answer,
    hello,
    request,
    small_graph,
    tensor_array,
    tensor_fields,
)

NEWEST = DIALECTS[0]


def seen(conversation: Conversation, turns: Sequence[Turn]) -> list[ObservedMessage]:
    return [e for e in events_of(conversation, turns) if isinstance(e, ObservedMessage)]


def session_messages(dialect: Dialect) -> list[ObservedMessage]:
    return seen(Conversation(), full_session(dialect))


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_spans_cover_every_message(dialect: Dialect) -> None:
    messages = session_messages(dialect)
    if dialect is NEWEST:
        messages += seen(Conversation(), split_session(dialect))
    for message in messages:
        at = 0
        for span in annotate(message):
            assert span.start == at, (message.command, span)
            assert span.end > span.start
            at = span.end
        assert at == len(message.data)
        assert describe(message).startswith(message.command.name)
        assert tree(message)[0] == describe(message)


def test_spans_have_the_values_of_the_fields() -> None:
    tensor = tensor_fields(NEWEST, "blk.0.ffn_norm", (8, 2, 1, 1), view_offs=12)
    turn = request(NEWEST, Command.SET_TENSOR, {"tensor": tensor, "cache_flag": 1, "offset": 3},
                   bytes(5))  # fmt: skip
    message = message_of_request(turn[1], NEWEST)
    spans = {span.path: span for span in annotate(message)}
    assert spans["command"].value == "SET_TENSOR (6)"
    assert spans["tensor.name"].value == "'blk.0.ffn_norm'"
    assert spans["tensor.ne[1]"].value == "2"
    assert spans["tensor.type"].value == "F32 (0)"
    assert spans["tensor.view_offs"].value == "12"
    assert spans["tensor.data"].value == hex(tensor["data"])
    assert spans["offset"].value == "3"
    assert spans["data"].value == "5 bytes"
    # Places are those that the codec reads from.
    head = codec(NEWEST.commands[Command.SET_TENSOR].request)
    changed = bytearray(turn[1])
    changed[spans["tensor.ne[2]"].start] = 9
    assert head.parse(bytes(changed), 9).tensor.ne[2] == 9


def test_ops_are_named_by_the_numbering_of_the_dialect() -> None:
    for dialect in DIALECTS:
        turn = request(dialect, Command.GRAPH_COMPUTE, {}, small_graph(dialect))
        graph = message_of_request(turn[1], dialect).graph
        assert graph is not None
        lines = graph_lines(graph, dialect)
        assert lines[0] == "2 nodes, 4 tensors"
        assert lines[1:] == [
            "    0  MUL_MAT    y  F32 4 <- w (F32 8x4), x (F32 8)",
            "    1  GLU REGLU  z  F32 2 <- y"
            if Op.GLU in dialect.ops
            else "    1  UNARY ABS  z  F32 4 <- y",
        ]


def test_unary_functions_are_named() -> None:
    params = (int(UnaryOp.SILU), *[0] * 15)
    x = tensor_fields(NEWEST, "x")
    y = tensor_fields(NEWEST, "y", op=Op.UNARY, op_params=params, view_src=x["id"])
    y["src"] = (x["id"], *[0] * 9)
    payload = GraphPayload(0, tensor_array(y)["id"], tensor_array(x, y))
    assert "UNARY SILU" in graph_lines(payload, NEWEST)[1]
    turn = request(NEWEST, Command.INIT_TENSOR, {"tensor": y})
    assert any("(SILU)" in line for line in tree(message_of_request(turn[1], NEWEST)))


@pytest.mark.parametrize(
    ("command", "fields", "body", "expected"),
    [
        (Command.ALLOC_BUFFER, {"device": 0, "size": 3 << 20}, b"", "ALLOC_BUFFER size 3.0 MiB"),
        (Command.ALLOC_BUFFER, {"device": 1, "size": 9}, b"", "ALLOC_BUFFER device 1 size 9 B"),
        (
            Command.SET_TENSOR,
            {"tensor": tensor_fields(NEWEST, "w"), "cache_flag": 0, "offset": 0},
            bytes(64),
            "SET_TENSOR 'w' F32 8x2 64 B",
        ),
        (
            Command.SET_TENSOR,
            {"tensor": tensor_fields(NEWEST, "w"), "cache_flag": 1, "offset": 8},
            bytes(16),
            "SET_TENSOR 'w' F32 8x2 16 B at 8 of 64 cache_flag 1",
        ),
        (
            Command.GET_TENSOR,
            {"tensor": tensor_fields(NEWEST, "y", op=Op.ADD), "offset": 0, "size": 64},
            b"",
            "GET_TENSOR ADD 'y' F32 8x2 64 B",
        ),
        (Command.GRAPH_RECOMPUTE, {"device": 0}, b"", "GRAPH_RECOMPUTE"),
        (Command.FREE_BUFFER, {"remote_ptr": 0xABC}, b"", "FREE_BUFFER remote_ptr 0xabc"),
    ],
)
def test_one_line(command: Command, fields: dict[str, Any], body: bytes, expected: str) -> None:
    message = message_of_request(request(NEWEST, command, fields, body)[1], NEWEST)
    assert describe(message) == expected


def test_the_line_of_an_answer() -> None:
    [_, said] = seen(Conversation(), hello(NEWEST))
    assert describe(said) == "HELLO = protocol 7.0.0"
    content = {"free_mem": 1 << 30, "total_mem": 3 << 30}
    data = answer(NEWEST, Command.GET_DEVICE_MEMORY, content)[1]
    message = message_of_answer(data, Command.GET_DEVICE_MEMORY, NEWEST)
    assert describe(message) == "GET_DEVICE_MEMORY = free_mem 1.0 GiB total_mem 3.0 GiB"


def test_bytes_that_were_not_seen_are_told() -> None:
    conversation = Conversation(keep=10)
    turns = full_session(NEWEST, upload=50, download=50)
    large = [e for e in seen(conversation, turns) if e.body_size and e.body is None]
    assert len(large) == 2
    for message in large:
        assert annotate(message)[-1].value == "50 bytes"
        assert annotate(message)[-1].end == message.size
    conversation = Conversation()
    at = next(i for i, t in enumerate(turns) if len(t[1]) == 24 and i > 2)
    for side, data in turns[:at]:
        conversation.feed(side, data)
    [hole] = conversation.gap(turns[at][0], len(turns[at][1]))
    assert isinstance(hole, ObservedMessage)
    assert "not seen" in "\n".join(tree(hole))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(DIALECTS))
def test_nothing_in_a_message_is_an_exception(data: st.DataObject, dialect: Dialect) -> None:
    """Fields off the wire have any value: it is shown, whatever it is."""
    message = data.draw(st.sampled_from(session_messages(dialect)))
    broken = bytearray(message.data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at] = data.draw(st.integers(0, 255))
    try:
        if message.kind is MessageKind.REQUEST:
            read = message_of_request(bytes(broken), dialect)
        else:
            read = message_of_answer(bytes(broken), message.command, dialect)
    except ProtocolError:
        return
    spans = annotate(read)
    assert sum(span.end - span.start for span in spans) == len(broken)
    assert describe(read)
    assert tree(read)
    if isinstance(read.graph, GraphPayload):
        assert graph_lines(read.graph, dialect)


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 10239, 10240, 207360, 3 << 30, 5 << 40)] == [
        "0 B", "10239 B", "10.0 KiB", "202.5 KiB", "3.0 GiB", "5.0 TiB",
    ]  # fmt: skip
