"""Faults of the split extension: programs, and how weights are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from client.split.partition import Extent, Rows
from protocol.commands import Command
from protocol.requests import Request
from rpc_server.devices.split import sharded
from rpc_server.models.library import Stripes
from rpc_server.session import by_hash
from rpc_server.session.context import new_identity
from rpc_server.session.leases import Lease, LeaseHolder
from rpc_server.session.programs import Programs
from rpc_server.session.state import Session
from tests.conformance.faulty.memory import keep_freed_memory
from tests.conformance.faulty.registry import Handler, fault, instead_of

_OVER_TWO = ("--split", "local,{worker}", "--tensor-split", "1,1", "--split-mode", "row")


@fault("SPLIT_RUN runs the program that was made last, whatever its number", "program-number")
@instead_of(Programs, "find")
def program_number_ignored(right: Any, self: Programs, index: int, number: int) -> Any:
    return list(self._plans.values())[-1].plan


@fault("a program outlives the buffers it uses", "program-after-free")
def program_outlives_its_buffers() -> None:
    Programs.buffer_freed = lambda self, handle: None  # type: ignore[method-assign]
    keep_freed_memory()


@fault("of a weight cut by rows the second part is sent what begins a row earlier", "products",
       options=_OVER_TWO)  # fmt: skip
@instead_of(sharded, "row_extents")
def split_rows_off_by_one(right: Any, parts: list[Rows], row: int, *more: int) -> list[Extent]:
    runs: list[Extent] = right(parts, row, *more)
    return [replace(run, start=max(0, run.start - row)) if run.part else run for run in runs]


@fault("everybody who asks for the lease gets it", "one-lease", "lease-in-turn",
       "lease-of-one-who-left")  # fmt: skip
def lease_for_everybody() -> None:
    async def acquire(self: Lease, client: LeaseHolder, seconds: float) -> bool:
        self._give(client)
        return True

    Lease.acquire = acquire  # type: ignore[method-assign]


@fault("a lease is kept although others wait", "lease-in-turn", "program-without-a-lease")
def lease_that_is_not_shared() -> None:
    Lease.renew = Lease.held_by  # type: ignore[method-assign]


@fault("who came last gets the lease first", "lease-in-turn")
@instead_of(Lease, "wait")
def lease_out_of_turn(right: Any, self: Lease, client: LeaseHolder) -> Any:
    granted = right(self, client)
    self._queue.rotate(1)
    return granted


@fault("a client that leaves keeps the lease", "lease-of-one-who-left")
@instead_of(Lease, "release")
def lease_that_outlives_its_holder(right: Any, self: Lease, client: Any) -> None:
    if not client._ended:
        right(self, client)


@fault("programs run without a lease, whoever has it", "program-without-a-lease")
@instead_of(Session, "with_lease")
def lease_that_programs_ignore(right: Any, self: Session, index: int, start: Any) -> None:
    self._lease, self._borrowed = Lease(1.0), False
    start()


@fault("a server has another identity for each client", "members")
@instead_of(Command.SPLIT_MEMBERS)
def identity_of_a_moment(right: Handler, s: Session, request: Request) -> None:
    s.context.identity = new_identity()
    right(s, request)


@fault("a server's description fills its fields, with bytes that are no text", "description")
@instead_of(Command.SPLIT_DESCRIBE)
def description_without_end(right: Handler, s: Session, request: Request) -> None:
    sizes = {"software": 64, "protocols": 128, "device_name": 32, "device_description": 128}
    s.answer(request.command, {name: b"\xff" * n for name, n in sizes.items()})


@fault("of a slice in several runs what lies between them is taken too", "slice-of-what-is-there",
       options=("--cache",))  # fmt: skip
@instead_of(by_hash, "Stripes")
def slice_without_its_distance(right: Any, offset: int, size: int, stride: int, count: int) -> Any:
    return right(offset, size, size, count)


@fault("a server says that it has every slice", "slice-of-what-is-not-there")
@instead_of(Command.SPLIT_LOAD)
def slice_of_everything(right: Handler, s: Session, request: Request) -> None:
    s.answer(request.command, {"result": 1})


@fault("a slice may end behind its content", "slice-outside-of-its-content")
def slice_that_is_not_checked() -> None:
    Stripes.inside = lambda self, total: self.stride >= self.size  # type: ignore[method-assign]
