"""Faults of the split extension: programs, and how weights are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from client.partition import Rows, Run
from rpc_server.memory import Buffers
from rpc_server.split import weights
from rpc_server.split.programs import Programs
from tests.conformance.faulty.registry import fault, replace_method

_OVER_TWO = ("--split", "local,{worker}", "--tensor-split", "1,1")


@fault("SPLIT_RUN runs the program that was made last, whatever its number", "program-number")
def program_number_ignored() -> None:
    def find(self: Programs, index: int, number: int) -> Any:
        return list(self._plans.values())[-1][0]

    Programs.find = find  # type: ignore[method-assign]


@fault("a program outlives the buffers it uses", "program-after-free")
def program_outlives_its_buffers() -> None:
    Programs.buffer_freed = lambda self, handle: None  # type: ignore[method-assign]

    def free(self: Buffers, handle: int) -> None:
        self.get(handle)
        del self._by_handle[handle]

    Buffers.free = free  # type: ignore[method-assign]


@fault("of a weight cut by rows the second part is sent what begins a row earlier", "products",
       options=_OVER_TWO)  # fmt: skip
def split_rows_off_by_one() -> None:
    def make(right: Any) -> Any:
        def row_runs(parts: list[Rows], row_bytes: int, *more: int) -> list[Run]:
            runs: list[Run] = right(parts, row_bytes, *more)
            return [
                replace(run, start=max(0, run.start - row_bytes)) if run.part else run
                for run in runs
            ]

        return row_runs

    replace_method(weights, "row_runs", make)
