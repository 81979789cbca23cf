"""Faults of the split extension: programs, and how weights are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from client.split.partition import Extent, Rows
from protocol.commands import Command
from rpc_server.devices.split import sharded
from rpc_server.models.library import Stripes
from rpc_server.session import by_hash
from rpc_server.session.context import new_identity
from rpc_server.session.leases import Lease, LeaseHolder
from rpc_server.session.programs import Programs
from rpc_server.session.state import Session
from tests.conformance.faulty.memory import keep_freed_memory
from tests.conformance.faulty.registry import fault, handle, replace_method

_OVER_TWO = ("--split", "local,{worker}", "--tensor-split", "1,1")


@fault("SPLIT_RUN runs the program that was made last, whatever its number", "program-number")
def program_number_ignored() -> None:
    def find(self: Programs, index: int, number: int) -> Any:
        return list(self._plans.values())[-1][0]

    Programs.find = find  # type: ignore[method-assign]


@fault("a program outlives the buffers it uses", "program-after-free")
def program_outlives_its_buffers() -> None:
    Programs.buffer_freed = lambda self, handle: None  # type: ignore[method-assign]
    keep_freed_memory()


@fault("of a weight cut by rows the second part is sent what begins a row earlier", "products",
       options=_OVER_TWO)  # fmt: skip
def split_rows_off_by_one() -> None:
    def make(right: Any) -> Any:
        def row_runs(parts: list[Rows], row_bytes: int, *more: int) -> list[Extent]:
            runs: list[Extent] = right(parts, row_bytes, *more)
            return [
                replace(run, start=max(0, run.start - row_bytes)) if run.part else run
                for run in runs
            ]

        return row_runs

    replace_method(sharded, "row_extents", make)


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
def lease_out_of_turn() -> None:
    def wait(right: Any) -> Any:
        def put_first(self: Lease, client: LeaseHolder) -> Any:
            granted = right(self, client)
            self._queue.rotate(1)
            return granted

        return put_first

    replace_method(Lease, "wait", wait)


@fault("a client that leaves keeps the lease", "lease-of-one-who-left")
def lease_that_outlives_its_holder() -> None:
    def release(right: Any) -> Any:
        def if_it_is_there(self: Lease, client: Any) -> None:
            if not client._ended:
                right(self, client)

        return if_it_is_there

    replace_method(Lease, "release", release)


@fault("programs run without a lease, whoever has it", "program-without-a-lease")
def lease_that_programs_ignore() -> None:
    def with_lease(right: Any) -> Any:
        def at_once(self: Session, index: int, start: Any) -> None:
            self._lease, self._borrowed = Lease(1.0), False
            start()

        return at_once

    replace_method(Session, "with_lease", with_lease)


@fault("a server has another identity for each client", "members")
def identity_of_a_moment() -> None:
    def members(right: Any) -> Any:
        def anew(s: Session, request: Any) -> None:
            s.context.identity = new_identity()
            right(s, request)

        return anew

    handle(Command.SPLIT_MEMBERS, members)


@fault("a server's description fills its fields, with bytes that are no text", "description")
def description_without_end() -> None:
    def describe(right: Any) -> Any:
        def noise(s: Session, request: Any) -> None:
            sizes = (64, 128, 32, 128)
            names = ("software", "protocols", "device_name", "device_description")
            fields = {name: b"\xff" * n for name, n in zip(names, sizes, strict=True)}
            s.answer(request.command, fields)

        return noise

    handle(Command.SPLIT_DESCRIBE, describe)


@fault("of a slice in several runs what lies between them is taken too", "slice-of-what-is-there",
       options=("--cache",))  # fmt: skip
def slice_without_its_distance() -> None:
    def make(right: Any) -> Any:
        return lambda offset, size, stride, count: right(offset, size, size, count)

    replace_method(by_hash, "Stripes", make)


@fault("a server says that it has every slice", "slice-of-what-is-not-there")
def slice_of_everything() -> None:
    def wrong(s: Session, request: Any) -> None:
        s.answer(request.command, {"result": 1})

    handle(Command.SPLIT_LOAD, lambda right: wrong)


@fault("a slice may end behind its content", "slice-outside-of-its-content")
def slice_that_is_not_checked() -> None:
    Stripes.inside = lambda self, total: self.stride >= self.size  # type: ignore[method-assign]
