"""Connections as lists of what each side sends in turn, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocol.commands import Command
from protocol.dialects import Answer, Body, Dialect
from protocol.observe.conversation import Conversation
from protocol.observe.events import Event, ObservedMessage, Side
from protocol.split import (
    description_fields,
    encode_report,
    members_fields,
    peers_answer,
    peers_fields,
    split_caps,
    split_status_fields,
    with_split,
)
from tests.protocol.turns import (
    BASE,
    HANDLE,
    Turn,
    answer,
    hello,
    request,
    small_graph,
    small_program,
    tensor_fields,
)


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
        Command.SPLIT_PEERS: peers_answer("127.0.0.1:9 can't be reached"),
        Command.SPLIT_JOIN: {"result": 0},
    }
    tensor = tensor_fields(dialect, "blk.0.attn_q.weight", (max(upload, 8) // 4, 2, 1, 1))
    fields: dict[str, Any] = {
        "tensor": tensor, "src": tensor, "dst": tensor, "srcs": [tensor] * 10, "device": 0,
        "remote_ptr": HANDLE, "offset": 0, "size": download, "value": 7, "hash": 1 << 60,
        "cache_flag": 1, "n_proportions": 1, "proportions": [1.0] * 16, "program": 3,
        "patience_ms": 100, "keep": 1, "address": BASE, "nbytes": 4096, "start": 64, "count": 2,
        "distance": 128, "whole": 1,
        **peers_fields(b"secret" + bytes(26), 2.0, 1, [("127.0.0.1", 9, True), ("", 0, False)]),
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


def split_session(dialect: Dialect) -> list[Turn]:
    return [*hello(dialect, split_caps()), *session(with_split(dialect))]


_SECRET = b"secret" + bytes(26)


def member_session(dialect: Dialect, report: str = "") -> list[Turn]:
    """A server that becomes a member of a group, and runs a program with swaps.

    That fails in its second step where there is a ``report``.
    """
    extended = with_split(dialect)
    peers = peers_fields(_SECRET, 2.0, 1, [("127.0.0.1", 9, True), ("10.0.0.1", 50052, False)])
    program = {"device": 0, "program": 3}
    body = small_program(dialect, swapped=True)
    given = [(16).to_bytes(8, "little") + bytes(range(at, at + 16)) for at in (100, 116)]
    return [
        *hello(dialect, split_caps()),
        request(extended, Command.SPLIT_PEERS, {"device": 0, **peers}),
        answer(extended, Command.SPLIT_PEERS, peers_answer("")),
        request(extended, Command.SPLIT_PROGRAM, program, body),
        answer(extended, Command.SPLIT_PROGRAM, {"result": 0}),
        request(extended, Command.SPLIT_RUN, program),
        (Side.CLIENT, bytes(range(32))),
        (Side.SERVER, given[0]),
        (Side.CLIENT, bytes(range(32, 64))),
        (Side.SERVER, encode_report(report) if report else given[1]),
    ]


def link_session(dialect: Dialect, swaps: Sequence[Turn]) -> list[Turn]:
    """A connection that becomes a link, and what is on it."""
    extended = with_split(dialect)
    return [
        *hello(dialect, split_caps()),
        request(extended, Command.SPLIT_JOIN, {"secret": _SECRET, "number": 1}),
        answer(extended, Command.SPLIT_JOIN, {"result": 1}),
        *swaps,
    ]


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
