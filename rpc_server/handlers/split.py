"""Requests of the split extension."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from protocol.commands import Command
from protocol.errors import ProtocolError
from protocol.framing import Request
from protocol.split import MAX_PARTS, MAX_PROGRAMS, VERSION, decode_program, program_size
from rpc_server.handlers.base import Handler, device_index
from rpc_server.handlers.buffers import allocate
from rpc_server.handlers.graphs import run
from rpc_server.runs import Run

if TYPE_CHECKING:
    from rpc_server.session import Session


def _split_query(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    fields = {"version": VERSION, "max_programs": MAX_PROGRAMS, "n_parts": device.n_parts}
    s.answer(request.command, fields)


def _split_alloc_buffer(s: Session, request: Request) -> None:
    fields = request.fields
    n = fields.n_proportions
    shares = fields.proportions[:n]
    sound = n <= MAX_PARTS and all(0 <= share < math.inf for share in shares)
    if not sound or (n and not sum(shares)):
        raise ProtocolError(f"SPLIT_ALLOC_BUFFER with proportions {list(shares)}")
    allocate(s, request, shares)


def _split_program(s: Session, request: Request) -> None:
    assert request.graph is not None
    index = device_index(s, request)
    number = request.fields.program
    s.programs.check(number)
    lane, dialect, find, limits = s.lane(index), s.dialect, s.buffers.find, s.context.limits
    body = request.graph
    size = program_size(body)
    limits.check_graph(size.nodes, 0)
    limits.check_program(size.steps, size.ids)
    task = Run()

    def job() -> None:
        task.begin()
        # Not on the event loop: it may take half a second.
        payload = decode_program(body)
        limits.check_graph(0, len(payload.tensors))
        s.programs.make(lane, index, number, payload, dialect, find)

    run(s, request.command, lane, task, job)


def _split_run(s: Session, request: Request) -> None:
    index = device_index(s, request)
    plan = s.programs.find(index, request.fields.program)
    if not s.writable:
        raise ProtocolError("SPLIT_RUN from a client that has not taken its answers")
    s.begin_stream()
    task = Run()

    run(s, request.command, s.lane(index), task, lambda: task.go(plan))


def _split_status(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    s.answer(request.command, device.split_status())


HANDLERS: dict[int, Handler] = {
    Command.SPLIT_QUERY: _split_query,
    Command.SPLIT_ALLOC_BUFFER: _split_alloc_buffer,
    Command.SPLIT_PROGRAM: _split_program,
    Command.SPLIT_RUN: _split_run,
    Command.SPLIT_STATUS: _split_status,
}
