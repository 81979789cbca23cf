"""Runs small graphs with their results over their sources, and looks for a byte outside the arena.

    python -m tests.guard --overlaps RUNS [--only FAMILY[,FAMILY]] [--seed N] [--card]

Each layout runs by kernels on one thread, on two threads one after the other, on two at once, and
by references; with --card by the GPU's kernels in emulation, whose threads take turns at any
access. A child process runs them: one that ends by a signal, stands still, or leaves a canary
changed is a finding, with the case and its layout.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import itertools
import json
import mmap
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field
from typing import Any, cast
from unittest import mock

import numpy as np

from conformance.differential.case import GraphCase
from conformance.differential.sketch import label
from rpc_server.devices.cpu import plan as plan_module
from rpc_server.devices.cpu.executor import Executor
from rpc_server.devices.cpu.kernels.interface import schedule as schedule_module
from rpc_server.devices.cpu.plan import CpuPlanBuilder
from rpc_server.devices.cpu.planner import Planner
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph, parse_graph
from rpc_server.ops.table import ContractError
from tests.guard.arena import Arena, Bytes, GuardedScratch
from tests.guard.check import DIALECT
from tests.guard.mapping import Side
from tests.guard.overlaps import (
    INDEXED,
    MOST_BYTES,
    Places,
    draw_small,
    families,
    fill,
    layouts,
    size_of,
)

# Runs the items that it reads, as JSON; the file is where it notes what it is at.
COMMAND = [sys.executable, "-m", "tests.guard", "--overlap-child"]

# A case whose runs take longer stands still.
_SECONDS = 300

# Contents that a plan runs with, one after the other.
_CONTENTS = 3
# Of a case; of one with indices more, so that each place over a few of them is among the layouts.
_LAYOUTS, _LAYOUTS_OF_INDEXED = 12, 48

Run = Callable[[], None]
Planning = Callable[[], AbstractContextManager[object]]


@functools.cache
def _executor(n_threads: int) -> Executor:
    return Executor(n_threads)


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """However little there is to do, both threads do it."""
    with (
        mock.patch.object(plan_module, "SERIAL_BELOW", 0),
        mock.patch.object(schedule_module, "SERIAL_BELOW", 0),
    ):
        yield


def _cut() -> AbstractContextManager[object]:
    """However little there is to do, it is more than two parts for each thread."""
    return mock.patch.multiple(Planner, part_bytes=16, part_products=64)


class Way:
    """One way in which a graph can run: its name, what plans it, and its scratch.

    Plans are made within ``planning``.
    """

    def __init__(
        self, name: str, n_threads: int, planning: Planning = nullcontext, *, kernels: bool = True
    ) -> None:
        self.name = name
        self._planning = planning
        self.scratch = GuardedScratch(n_threads)
        executor = _executor(n_threads) if kernels else None
        arena = cast(ScratchArena, self.scratch)
        self._builder = CpuPlanBuilder(executor, arena, use_kernels=kernels)

    def plan(self, graph: LinkedGraph) -> Run:
        """Make a plan for ``graph``. Raises GraphError."""
        with self._planning():
            return self._builder.build(graph).run


def ways() -> list[Any]:
    """The ways of the CPU device."""
    return [
        Way("kernels on one thread", 1),
        Way("kernels on two threads, one after the other", 2),
        Way("kernels on two threads at once", 2, _at_once),
        Way("kernels on two threads, cut into parts", 2, _cut),
        Way("references", 1, kernels=False),
    ]


@dataclass(frozen=True, slots=True)
class Item:
    """``runs`` runs, or a few more, of one variant of a family."""

    family: str
    variant: int
    runs: int
    seed: int
    card: bool

    @property
    def name(self) -> str:
        return (
            f"{self.family} {label(families()[self.family].family.variants[self.variant])}".strip()
        )

    @property
    def _seed(self) -> int:
        return zlib.crc32(f"{self.seed} {self.family} {self.variant}".encode())

    @property
    def contents(self) -> int:
        return 1 if self.card else _CONTENTS

    @property
    def _runs_of_a_layout(self) -> int:
        return self.contents * (1 if self.card else 4)

    def cases(self) -> list[GraphCase]:
        """The same ones each time."""
        overlapping = families()[self.family]
        family = overlapping.family
        of_a_case = _LAYOUTS if overlapping.often == 1 else _LAYOUTS_OF_INDEXED
        count = max(self.runs // (self._runs_of_a_layout * of_a_case), 1)
        return draw_small(family, family.variants[self.variant], count, self._seed)

    def layouts(
        self, case: GraphCase, number: int, n_cases: int
    ) -> Iterator[tuple[Places, Side, Any]]:
        """Layouts of a case, at which end of the memory, and what contents are drawn with."""
        random = np.random.default_rng([self._seed, number])
        count = -(-self.runs // (self._runs_of_a_layout * n_cases))
        for places in layouts(case, count, random):
            yield places, (Side.END, Side.BEGIN)[int(random.integers(2))], random


# Of a family of many types so many are run, which the seed chooses: kernels of all types of weights
# and caches take half an hour to compile, and differ in what they do with values only.
_MOST_VARIANTS = 8
# Small kernels, of which each does something with indices.
_ALL_VARIANTS = ("GET_ROWS", "SET_ROWS", "ROPE+SET_ROWS")


# Families that the emulated card runs, and the variants it has to compile for.
_CARD_TYPES = (
    *("", "f32", "f16", "i32", "q8_0", "q4_k", "f32->f16->i64", "f32->q8_0->i64"),
    *("f32->f32->i32", "f16->f32->i64", "f32->q4_k->i64", "f32->i32->i64"),
)


def items(runs: int, only: Sequence[str], seed: int, *, card: bool = False) -> list[Item]:
    """What there is to run, ``runs`` times in all: families with indices more than others."""
    shares = []
    for name, overlapping in families().items():
        if only and name not in only:
            continue
        if card and not (name in INDEXED or overlapping.often > 8):
            continue
        variants = [
            i
            for i, variant in enumerate(overlapping.family.variants)
            if not card or label(variant) in _CARD_TYPES or "computed" in name
        ]
        if len(variants) > _MOST_VARIANTS and name not in _ALL_VARIANTS:
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            variants = sorted(random.choice(variants, _MOST_VARIANTS, replace=False).tolist())
        shares += [(name, i, overlapping.often / len(variants)) for i in variants]
    whole = sum(share for *_, share in shares)
    return [
        Item(name, i, max(round(runs * share / whole), 1), seed, card) for name, i, share in shares
    ]


# -- the child -------------------------------------------------------------------------------------


class Note(ctypes.Structure):
    """What the child is at, how many runs there were, and how many of them were refused.

    It lies in a file's bytes, for whoever comes after the child's end.
    """

    _at = ("item", "case", "layout", "way")
    _fields_ = tuple((name, ctypes.c_int64) for name in (*_at, "runs", "refused"))

    @property
    def at(self) -> list[int]:
        """The item, and of it the case, the layout and the way."""
        return [getattr(self, name) for name in self._at]


def child(chosen: Sequence[Item], note: Note, say: Callable[[str], None]) -> None:
    """Run items; ``say`` is told what is wrong."""
    try:
        _run_items(chosen, note, say)
    finally:
        # Set, it would end the process in the middle of something else.
        faulthandler.cancel_dump_traceback_later()


def _run_items(chosen: Sequence[Item], note: Note, say: Callable[[str], None]) -> None:
    arena = Arena(MOST_BYTES * 2)
    how: list[Any] = []
    for number, item in enumerate(chosen):
        if not how:
            how = card_ways() if item.card else ways()
        note.item, note.case, note.layout, note.way = number, 0, 0, 0
        cases = item.cases()
        for note.case, case in enumerate(cases):
            laid = item.layouts(case, note.case, len(cases))
            for note.layout, (places, side, random) in enumerate(laid):
                for text in _run_layout(
                    case, places, side, random, item.contents, arena, how, note
                ):
                    say(text)
            faulthandler.cancel_dump_traceback_later()
            for way in how:
                way.scratch.forget()


def _run_layout(
    case: GraphCase,
    places: Places,
    side: Side,
    random: np.random.Generator,
    n_contents: int,
    arena: Arena,
    how: Sequence[Any],
    note: Note,
) -> Iterator[str]:
    size = size_of(places)
    contents = np.full((n_contents, size), 0, np.uint8)
    for content in contents:
        fill(case, places, content, random)
    arena.take(size, side)
    for root, offset in places.items():
        root.place(1, arena.base + offset)
    payload = case.graph.payload(DIALECT)
    runs = [_planned(way, parse_graph(payload, DIALECT, {1: arena}.get)) for way in how]
    if note.layout == 0:
        # From here on: kernels may have had to be compiled.
        faulthandler.dump_traceback_later(_SECONDS, exit=True)
    for note.way, (way, run) in enumerate(zip(how, runs, strict=True)):
        for content in contents:
            note.runs += 1
            wrong = _run_once(run, content, arena, way, note)
            if wrong:
                yield wrong


def _planned(way: Any, graph: LinkedGraph) -> Run | None:
    """None for a graph that is refused."""
    try:
        planned: Run = way.plan(graph)
    except GraphError:
        return None
    return planned


def _run_once(run: Run | None, content: Bytes, arena: Arena, way: Any, note: Note) -> str:
    """What is wrong with one run, or nothing."""
    if run is None:
        note.refused += 1
        return ""
    arena.view[...] = content
    wrong = ""
    try:
        run()
    except GraphError:
        note.refused += 1
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if not arena.canaries_intact:
        arena.take(arena.size, arena.side)
        return f"wrote outside its memory {wrong}"
    if not way.scratch.canaries_intact:
        way.scratch.restore_canaries()
        return f"wrote in front of its scratch {wrong}"
    return wrong


def child_main(path: str) -> None:
    """Run the items that come by stdin; a line of JSON for each finding."""
    faulthandler.enable()
    with open(path, "r+b") as file:
        note = Note.from_buffer(mmap.mmap(file.fileno(), mmap.PAGESIZE))
    chosen = [Item(*row) for row in json.load(sys.stdin)]
    child(chosen, note, lambda text: print(json.dumps([*note.at, text]), flush=True))


# -- the parent ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What was run, and the findings as text."""

    runs: int = 0
    refused: int = 0
    found: list[str] = field(default_factory=list)


def run(chosen: Sequence[Item]) -> Tally:
    """Run items in child processes, one after the other; a new one when one dies."""
    tally = Tally()
    left = list(chosen)
    while left:
        left = left[_run_until_death(left, tally) :]
    return tally


def _run_until_death(chosen: Sequence[Item], tally: Tally) -> int:
    """How many items are done with: all of them, or those up to the one that ended the child."""
    with tempfile.TemporaryFile() as trace, tempfile.TemporaryFile("w+") as todo:
        json.dump([astuple(item) for item in chosen], todo)
        todo.seek(0)
        with tempfile.NamedTemporaryFile() as noted:
            noted.truncate(mmap.PAGESIZE)
            command = [*COMMAND, noted.name]
            with subprocess.Popen(
                command, stdin=todo, stdout=subprocess.PIPE, stderr=trace, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    *at, text = json.loads(line)
                    _found(tally, chosen, at, text)
            note = Note.from_buffer_copy(noted.read(ctypes.sizeof(Note)))
        tally.runs += note.runs
        tally.refused += note.refused
        if process.returncode == 0:
            return len(chosen)
        trace.seek(0)
        ended = f"exit status {process.returncode}"
        if process.returncode < 0:
            ended = signal.Signals(-process.returncode).name
        text = f"{ended}\n{trace.read().decode(errors='replace')[-2000:]}"
        _found(tally, chosen, note.at, text)
        return note.at[0] + 1


def _found(tally: Tally, chosen: Sequence[Item], at: Sequence[int], what: str) -> None:
    item = chosen[at[0]]
    cases = item.cases()
    case = cases[at[1]]
    laid = item.layouts(case, at[1], len(cases))
    places, side, _ = next(itertools.islice(laid, at[2], None))
    names = {t: f"%{i}" for i, t in enumerate(case.graph.tensors)}
    where = ", ".join(f"{names[t]} at {start}" for t, start in sorted(places.items(), key=_start))
    tally.found.append(
        f"{item.name}, case {at[1]}, layout {at[2]} of seed {item.seed}, guard at the {side}, way "
        f"{at[3]}: {what}\n{case.describe()}\n{where}, of {size_of(places)}"
    )
    print(tally.found[-1], flush=True)


def _start(place: tuple[Any, int]) -> int:
    return place[1]


def main(runs: int, only: Sequence[str], seed: int, *, card: bool) -> int:
    """The exit status."""
    started = time.monotonic()
    chosen = items(runs, only, seed, card=card)
    tally = run(chosen)
    print(
        f"seed {seed}: {tally.runs} runs of {len(chosen)} variants in "
        f"{time.monotonic() - started:.0f} s, {tally.refused} refused, {len(tally.found)} findings"
    )
    return 1 if tally.found else 0


# -- the emulated card -----------------------------------------------------------------------------


class _CardWay:
    """By the GPU's kernels, in emulation."""

    name = "kernels of the GPU"

    def __init__(self) -> None:
        self.scratch = GuardedScratch(1)
        self._seeds = itertools.count(1)

    def plan(self, graph: LinkedGraph) -> Run:
        """Raises GraphError, also where there is no kernel."""
        from tests.cuda import harness

        launches, scratch = harness.plan_graph(graph.nodes)
        spans = [(t.address, t.address + t.nbytes) for t in _touched(graph) if t.address]
        start, end = min(s for s, _ in spans), max(e for _, e in spans)

        def run() -> None:
            memory, seed = [(start, end, True)], next(self._seeds)
            try:
                harness.run_launches(launches, scratch, memory, seed=seed, overlapping=True)
            except ContractError as error:
                raise GraphError(str(error)) from None

        return run


def _touched(graph: LinkedGraph) -> list[Any]:
    return [t for node in graph.nodes for t in (node, *node.src) if t is not None]


def card_ways() -> list[Any]:
    """The one way of the emulated card."""
    return [_CardWay()]
