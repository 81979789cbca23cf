"""Results are laid over sources as promised, what goes wrong is found, and a slice is clean."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys

import numpy as np
import pytest

from client.builder.graph import GraphBuilder
from conformance.differential.case import GraphCase
from conformance.differential.compare import Check
from conformance.differential.values import Fill, ValueKind, leaf_bytes
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.planner import Planner
from tests.guard import overlap_run
from tests.guard.arena import Arena, GuardedScratch
from tests.guard.mapping import PAGE, Side
from tests.guard.overlaps import (
    anywhere,
    families,
    fill,
    layouts,
    pairs,
    side_by_side,
    size_of,
    wrong_numbers,
)

F32, I64 = GgmlType.F32, GgmlType.I64


def _case() -> GraphCase:
    """Three rows of F32 to those of eight that indices name."""
    g = GraphBuilder()
    to, rows, ids = g.new_tensor(F32, (4, 8)), g.new_tensor(F32, (4, 3)), g.new_tensor(I64, (3,))
    fills = {to: Fill(), rows: Fill(), ids: Fill(ValueKind.DISTINCT, 0, 4, 1.0)}
    return GraphCase.of([(g.set_rows(to, rows, ids), Check())], fills)


def _roots(case: GraphCase) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows go, rows, and indices."""
    by_rows = {t.ne[1]: t for t in case.graph.roots}
    return by_rows[8], by_rows[3], by_rows[1]


def _random() -> np.random.Generator:
    return np.random.default_rng(5)


# -- layouts


def test_pairs_are_all_places_at_which_a_result_overlaps_other_memory() -> None:
    case = _case()
    to, rows, ids = _roots(case)
    found = pairs(case)
    # Bytes of both, less the four that would make them neighbours.
    assert len(found) == len(set(found)) == (128 + 24) // 4 - 1 + (128 + 48) // 4 - 1
    assert {result for result, *_ in found} == {to}
    assert [other for _, other, _ in found[:37]] == [ids] * 37
    assert {other for _, other, _ in found[37:]} == {rows}


@pytest.mark.parametrize("number", range(80))
def test_a_pair_lies_apart_from_the_others(number: int) -> None:
    case = _case()
    pair = pairs(case)[number]
    places = side_by_side(case, pair, _random())
    result, other, distance = pair
    assert places[result] - places[other] == distance
    assert all(start % TYPE_INFO[t.type].alignment == 0 for t, start in places.items())
    (third,) = set(case.graph.roots) - {result, other}
    for t in (result, other):
        apart = places[third] + third.nbytes <= places[t]
        assert apart or places[t] + t.nbytes <= places[third]


def test_everything_may_lie_anywhere() -> None:
    case, random = _case(), _random()
    drawn = [anywhere(case, random) for _ in range(50)]
    assert len({tuple(places.values()) for places in drawn}) > 40
    assert all(start % TYPE_INFO[t.type].alignment == 0 for p in drawn for t, start in p.items())


def test_layouts_are_as_many_as_wanted() -> None:
    case = _case()
    for count in (1, 2, 20, 200):
        assert len(list(layouts(case, count, _random()))) == count


def test_every_place_over_indices_comes_first() -> None:
    case = _case()
    to, _, ids = _roots(case)
    over = {distance for _, other, distance in pairs(case) if other is ids}
    seen = {places[to] - places[ids] for places in layouts(case, 96, _random())}
    assert over <= seen


def test_indices_are_right_until_they_are_written_over() -> None:
    case, random = _case(), _random()
    _, _, ids = _roots(case)
    for places in layouts(case, 60, random):
        memory = np.zeros(size_of(places), np.uint8)
        fill(case, places, memory, random)
        held = memory[places[ids] : places[ids] + ids.nbytes]
        assert np.array_equal(held, leaf_bytes(ids, case.fills[ids]))


def test_wrong_numbers_name_no_row() -> None:
    words = wrong_numbers(4096, _random()).view(np.int32)
    assert ((words < 0) | (words > 4)).mean() > 0.8
    assert {-1, 5} <= set(words.tolist())


# -- memory


_TOUCH = """
import ctypes, sys
from tests.guard.arena import Arena
from tests.guard.mapping import Side
arena = Arena()
arena.take(104, Side(sys.argv[1]))
{}(arena.address + int(sys.argv[2]){})
"""


@pytest.mark.parametrize(
    ("side", "offset"), [(Side.END, 104), (Side.BEGIN, -1), (Side.END, 1 << 33)]
)
@pytest.mark.parametrize("touch", [("ctypes.memset", ", 0, 1"), ("ctypes.string_at", ", 1")])
def test_a_byte_outside_the_arena_is_fatal(side: Side, offset: int, touch: tuple[str, str]) -> None:
    command = [sys.executable, "-c", _TOUCH.format(*touch), str(side), str(offset)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGSEGV


@pytest.mark.parametrize("side", Side)
def test_a_byte_written_beside_the_arena_is_seen(side: Side) -> None:
    arena = Arena()
    arena.take(104, side)
    arena.view[...] = 0
    assert arena.canaries_intact
    ctypes.memset(arena.address + (-1 if side is Side.END else 104), 1, 1)
    assert not arena.canaries_intact


def test_scratch_is_what_was_asked_for_and_nothing_behind_it() -> None:
    scratch = GuardedScratch(2)
    planner = Planner(2, scratch)
    first, second = planner.scratch(100), planner.scratch(64)
    assert first % 64 == second % 64 == 0
    assert (first + 128) % PAGE == (second + 64) % PAGE == 0
    start, stride = planner.thread_scratch(1000)
    for address in (first, second, start, start + stride):
        ctypes.memset(address, 1, 64)
    assert scratch.canaries_intact
    ctypes.memset(first - 1, 1, 1)
    assert not scratch.canaries_intact
    scratch.restore_canaries()
    assert scratch.canaries_intact


# -- runs


@pytest.mark.slow
def test_a_planted_second_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel that checks all indices first, and loads each again where it uses it."""
    chosen = overlap_run.items(4000, ["rows by indices"], 3)
    assert not overlap_run.run(chosen).found
    planted = [sys.executable, "-m", "tests.guard.planted", "--overlap-child"]
    monkeypatch.setattr(overlap_run, "COMMAND", planted)
    found = overlap_run.run(chosen).found
    assert all(text.startswith("rows by indices, case ") for text in found)
    assert "SIGSEGV" in found[-1]
    assert "SET_ROWS(" in found[-1]


def _child_that(does: str, seconds: int = overlap_run._SECONDS) -> list[str]:
    """The command of a child that is not itself; it stands still after so many seconds."""
    lines = (
        "import ctypes, sys, time; from tests.guard import overlap_run as o, __main__ as m;"
        f"o._SECONDS = {seconds}; ran = o._run_once; o._run_once = lambda *a: {does};"
        "m.main(['--overlap-child', sys.argv[1]])"
    )
    return [sys.executable, "-c", lines]


def test_what_stands_still_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_run, "COMMAND", _child_that("time.sleep(600)", 2))
    (found,) = overlap_run.run(overlap_run.items(1, ["SQR"], 1)[:1]).found
    assert "SQR" in found
    assert "exit status 1" in found
    assert "Timeout" in found


def test_what_is_written_beside_the_arena_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = "a[2].address + (a[2].size if a[2].side == 'begin' else -1)"
    harm = f"ran(lambda: (a[0](), ctypes.memset({beside}, 1, 1)), *a[1:])"
    monkeypatch.setattr(overlap_run, "COMMAND", _child_that(harm))
    tally = overlap_run.run(overlap_run.items(1, ["SQR"], 1)[:1])
    assert len(tally.found) == tally.runs - tally.refused
    assert "wrote outside its memory" in tally.found[0]


def test_errors_of_our_own_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    harm = "ran(lambda: 1 // 0, *a[1:])"
    monkeypatch.setattr(overlap_run, "COMMAND", _child_that(harm))
    tally = overlap_run.run(overlap_run.items(1, ["SQR"], 1)[:1])
    assert "ZeroDivisionError" in tally.found[0]


def test_cases_are_the_same_each_time_and_fit_the_arena() -> None:
    (item,) = overlap_run.items(100, ["rows by indices"], 1)
    again = [case.describe() for case in item.cases()]
    assert [case.describe() for case in item.cases()] == again
    arena = Arena(1 << 16)
    for number, case in enumerate(item.cases()):
        for places, side, _ in item.layouts(case, number, len(again)):
            arena.take(size_of(places), side)


@pytest.mark.slow
def test_a_slice_of_all_families_is_clean() -> None:
    chosen = overlap_run.items(1, [], 7)
    indexed = [item for item in chosen if families()[item.family].often > 1]
    tally = overlap_run.run([*indexed[::12], *chosen[::60]])
    assert not tally.found, tally.found[0]
    assert tally.runs > 200
