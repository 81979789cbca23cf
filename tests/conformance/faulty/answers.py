"""Faults of what is answered: nothing, too much, too little, the wrong thing, to the wrong one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

from protocol.commands import Command
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.messages import CONN_CAPS_SIZE
from protocol.requests import Request
from rpc_server.graph.parse import tensor_of_message
from rpc_server.session.handshake import Handshake
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import Handler, fault, instead_of, put


@fault("COPY_TENSOR is done, but not answered", "copy-tensor-answers-as-it-should")
@instead_of(Command.COPY_TENSOR)
def copy_not_answered(right: Handler, s: Session, request: Request) -> None:
    with mock.patch.object(s, "answer"):
        right(s, request)


def _resized(command: Command, delta: int) -> None:
    """Answer a command with more or fewer bytes than its structure has."""

    def wrong(right: Handler, s: Session, request: Request) -> None:
        size = 8 + delta
        s._transport.write(size.to_bytes(8, "little") + bytes([64] + [0] * (size - 1)))

    put(command, wrong)


@fault("GET_DEVICE_MEMORY's answer has a byte too many", "get-device-memory-answers-as-it-should")
def answer_too_long() -> None:
    _resized(Command.GET_DEVICE_MEMORY, 9)


@fault("GET_MAX_SIZE's answer has four bytes", "get-max-size-answers-as-it-should")
def answer_too_short() -> None:
    _resized(Command.GET_MAX_SIZE, -4)


@fault(
    "FREE_BUFFER is answered in a version that has no answer for it",
    "free-buffer-answers-as-it-should",
)
@instead_of(Command.FREE_BUFFER)
def answer_where_there_is_none(right: Handler, s: Session, request: Request) -> None:
    right(s, request)
    s._transport.write(bytes(8))


@fault("clients get each other's answers to GET_TENSOR", "many-clients-in-turn")
def answers_swapped_between_clients() -> None:
    last: dict[str, bytes] = {}

    def send_bytes(right: Any, s: Session, view: memoryview) -> None:
        content = bytes(view)
        others = [data for name, data in last.items() if name != s.name]
        last[s.name] = content
        wrong = next((data for data in others if len(data) == len(content)), content)
        right(s, memoryview(wrong))

    put((Session, "send_bytes"), send_bytes)


@fault(
    "of two requests that arrive together, the second is answered first",
    "buffer-get-base-answers-as-it-should",
)
def answers_in_wrong_order() -> None:
    held: dict[str, tuple[Command, dict[str, Any]]] = {}

    def answer(right: Any, s: Session, command: Command, fields: dict[str, Any]) -> None:
        def release() -> None:
            if s.name in held:
                right(s, *held.pop(s.name))

        if command is Command.BUFFER_GET_BASE and s.name not in held:
            # The next request may be on its way; one that waits for this answer gets it.
            held[s.name] = (command, fields)
            asyncio.get_running_loop().call_later(0.05, release)
            return
        right(s, command, fields)
        release()

    put((Session, "answer"), answer)


def _answering_hello(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    def hello(right: Any, self: Handshake, message: Any) -> Any:
        dialect, answer = right(self, message)
        return dialect, {**answer, **change(answer)}

    put((Handshake, "hello"), hello)


@fault("HELLO is answered with a newer minor version than is spoken", probe="is offered 4.1.")
def wrong_version_answered() -> None:
    _answering_hello(lambda answer: {"minor": answer["minor"] + 1})


@fault(
    "HELLO is answered 5.1 and 5.0 in turn",
    "version-is-the-same-each-time",
    options=("--protocol", "5.1"),
)
def version_that_changes() -> None:
    minors = itertools.cycle((1, 0))
    _answering_hello(lambda answer: {"minor": next(minors)})


@fault(
    "a connection that says HELLO and closes has the next one answered otherwise: 5.1, or 5.0",
    "hang-ups-change-nothing",
    options=("--protocol", "5.1"),
)
def version_given_up_at_a_hang_up() -> None:
    minor = served = 1

    def accepted(right: Any, self: Handshake) -> None:
        nonlocal served
        served = minor
        right(self)

    def ended(right: Any, self: Handshake, *, by_server: bool) -> None:
        nonlocal minor
        if not self.done:
            minor = 1 - served
        right(self, by_server=by_server)

    _answering_hello(lambda answer: {"minor": minor})
    put((Handshake, "accepted"), accepted)
    put((Handshake, "ended"), ended)


@fault("HELLO's answer has capability bytes that say nothing known", "unused-bytes-are-zero")
def capabilities_from_nowhere() -> None:
    _answering_hello(lambda answer: {"conn_caps": b"\x01" * CONN_CAPS_SIZE})


@fault("GET_TENSOR of over 1 MiB has zeros behind the first", "large-upload")
@instead_of(Session, "send_bytes")
def large_answer_truncated(right: Any, s: Session, view: memoryview) -> None:
    kept = 1 << 20
    right(s, memoryview(bytes(view[:kept]) + bytes(max(0, len(view) - kept))))


def _answering(command: Command, **wrong_fields: Any) -> None:
    """Answer a command with these fields, whatever was asked."""

    def wrong(right: Handler, s: Session, request: Request) -> None:
        answer = s.answer

        def changed(command: Command, fields: dict[str, Any]) -> None:
            answer(command, {**fields, **wrong_fields})

        with mock.patch.object(s, "answer", changed):
            right(s, request)

    put(command, wrong)


@fault("GET_ALIGNMENT is answered 48", "alignment-is-a-power-of-two")
def alignment_of_48() -> None:
    _answering(Command.GET_ALIGNMENT, alignment=48)


@fault("GET_DEVICE_MEMORY tells more free memory than there is", "memory-adds-up")
def more_free_than_total() -> None:
    _answering(Command.GET_DEVICE_MEMORY, free_mem=2, total_mem=1)


@fault("GET_ALLOC_SIZE says 64 bytes for any tensor", "sizes-asked-and-nothing-made")
def alloc_size_of_anything() -> None:
    _answering(Command.GET_ALLOC_SIZE, alloc_size=64)


@fault("GET_ALLOC_SIZE leaves out the last block of a quantized tensor", "alloc-size-of-every-type")
@instead_of(Command.GET_ALLOC_SIZE)
def alloc_size_too_small(right: Handler, s: Session, request: Request) -> None:
    tensor = tensor_of_message(request.fields.tensor, s.dialect)
    info = TYPE_INFO[GgmlType(tensor.type)]
    less = info.type_size if info.quantized else 0
    s.answer(request.command, {"alloc_size": tensor.nbytes - less})
