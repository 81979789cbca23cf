"""Requests of the split extension."""

from __future__ import annotations

import math
import time

from protocol.commands import Command
from protocol.errors import ProtocolError
from protocol.requests import Request
from protocol.split import (
    MAX_PARTS,
    MAX_PROGRAMS,
    VERSION,
    decode_program,
    description_fields,
    members_fields,
    program_size,
)
from rpc_server import SOFTWARE
from rpc_server.devices.base import Splitting
from rpc_server.session import by_hash
from rpc_server.session.handlers.base import Handler, device_index
from rpc_server.session.handlers.buffers import allocate
from rpc_server.session.handlers.graphs import run
from rpc_server.session.job import Job
from rpc_server.session.leases import Lease
from rpc_server.session.state import Session

# Longest that a client is left without an answer for a lease, seconds.
_MOST_PATIENCE = 60.0


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
    queue, dialect, limits = s.queue(index), s.dialect, s.context.limits
    body = request.graph
    size = program_size(body)
    limits.check_graph(size.nodes, 0)
    limits.check_program(size.steps, size.ids)
    task = Job(queue)

    def job() -> None:
        task.begin()
        # Not on the event loop: it may take half a second.
        payload = decode_program(body)
        limits.check_graph(0, len(payload.tensors))
        limits.check_program(size.steps, size.ids + sum(len(swap.ids) for swap in payload.swaps))
        s.programs.make(queue, index, number, payload, len(body), dialect, s.buffers)
        s.check_scratch(s.programs.find(index, number))

    run(s, request.command, queue, task, job)


def _split_run(s: Session, request: Request) -> None:
    index = device_index(s, request)
    number = request.fields.program
    plan, group = s.programs.find(index, number), s.programs.group_of(index, number)
    if not s.writable:
        raise ProtocolError("SPLIT_RUN from a client that has not taken its answers")
    queue = s.queue(index)
    task = Job(queue)

    def start() -> None:
        s.begin_stream(group)
        run(s, request.command, queue, task, lambda: task.go(plan))

    s.with_lease(index, start)


def _split_status(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    s.answer(request.command, device.split_status())


def _split_members(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    members = [s.context.identity, *(device.members if isinstance(device, Splitting) else ())]
    s.answer(request.command, members_fields(members))


def _split_acquire(s: Session, request: Request) -> None:
    index = device_index(s, request)
    s.wait(_acquire(s, request, index, min(request.fields.patience_ms / 1000, _MOST_PATIENCE)))


async def _acquire(s: Session, request: Request, index: int, seconds: float) -> None:
    lease, device = s.context.leases[index], s.device(index)
    end = time.monotonic() + seconds
    granted = await lease.acquire(s, seconds)
    holder = "" if granted else lease.holder
    if granted and isinstance(device, Splitting):
        # Whoever has a coordinator has its workers: within a program it is too late to wait.
        holder = await device.hold(max(0.0, end - time.monotonic()))
        if holder:
            lease.release(s)
    # Nobody is left in the way of one that came too late.
    granted = lease.held_by(s)
    s.answer(request.command, {"granted": int(granted), "holder": holder.encode()[:63]})


def _split_release(s: Session, request: Request) -> None:
    lease = s.context.leases[index := device_index(s, request)]
    device = s.device(index)
    if not request.fields.keep:
        lease.release(s)
    elif lease.renew(s) and isinstance(device, Splitting):
        s.wait(_renew(s, request, lease, device))
        return
    s.answer(request.command, {"kept": int(lease.held_by(s))})


async def _renew(s: Session, request: Request, lease: Lease, device: Splitting) -> None:
    if not await device.renew():
        lease.release(s)
    s.answer(request.command, {"kept": int(lease.held_by(s))})


def _split_describe(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    fields = description_fields(
        SOFTWARE, s.context.negotiator.spoken, device.name, device.description
    )
    s.answer(request.command, fields)


def _split_load(s: Session, request: Request) -> None:
    by_hash.begin_slice(s, request)


HANDLERS: dict[int, Handler] = {
    Command.SPLIT_QUERY: _split_query,
    Command.SPLIT_ALLOC_BUFFER: _split_alloc_buffer,
    Command.SPLIT_PROGRAM: _split_program,
    Command.SPLIT_RUN: _split_run,
    Command.SPLIT_STATUS: _split_status,
    Command.SPLIT_MEMBERS: _split_members,
    Command.SPLIT_ACQUIRE: _split_acquire,
    Command.SPLIT_RELEASE: _split_release,
    Command.SPLIT_LOAD: _split_load,
    Command.SPLIT_DESCRIBE: _split_describe,
}
