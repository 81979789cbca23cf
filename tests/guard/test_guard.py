"""The guard pages work, what goes wrong is found, and a slice of all graphs is clean."""

from __future__ import annotations

import ctypes
import importlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from client.builder.graph import GraphBuilder
from conformance.differential.case import GraphCase
from conformance.differential.compare import Check
from conformance.differential.values import Fill
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.plan import CpuPlan
from tests.guard import __main__ as program
from tests.guard.cases import chains, draw_cases
from tests.guard.check import Layout, findings
from tests.guard.mapping import PAGE, GuardedMemory, Side
from tests.parameters import mostly_slow

F32 = GgmlType.F32

# -- memory


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("size", [0, 1, 100, PAGE, PAGE + 1])
def test_memory_is_as_large_as_asked_for(size: int, side: Side) -> None:
    memory = GuardedMemory(size, side)
    data = bytes(i % 251 for i in range(size))
    memory.write(data)
    assert memory.read() == data
    assert memory.canaries_intact
    edge = memory.address + (size if side is Side.END else 0)
    assert edge % PAGE == 0
    memory.close()


_TOUCH = """
import ctypes, sys
from tests.guard.mapping import GuardedMemory, Side
memory = GuardedMemory(100, Side(sys.argv[1]))
{}(memory.address + int(sys.argv[2]){})
"""


@pytest.mark.parametrize(("side", "offset"), [(Side.END, 100), (Side.BEGIN, -1)])
@pytest.mark.parametrize("touch", [("ctypes.memset", ", 0, 1"), ("ctypes.string_at", ", 1")])
def test_a_byte_too_far_is_fatal(side: Side, offset: int, touch: tuple[str, str]) -> None:
    def ends(at: int) -> int:
        script = _TOUCH.format(*touch)
        command = [sys.executable, "-c", script, str(side), str(at)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert ends(offset) == -signal.SIGSEGV
    assert ends(offset - 1 if side is Side.END else 0) == 0


# -- what is found


def _case() -> tuple[GraphCase, Tensor]:
    """a + b into every second row of a larger tensor, and that tensor."""
    g = GraphBuilder()
    a, b, target = (g.new_tensor(F32, (8, n)) for n in (3, 3, 6))
    rows = g.view_2d(target, 8, 3, 2 * target.nb[1], 0)
    result = g.cpy(g.add(a, b), rows)
    return GraphCase.of([(result, Check())], {t: Fill() for t in (a, b, target)}), target


def _run_then(harm: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: CpuPlan) -> None:
        original(self)
        harm()

    original = CpuPlan.run
    monkeypatch.setattr(CpuPlan, "run", run)


def test_nothing_is_found_in_a_sound_run() -> None:
    case, _ = _case()
    for side in Side:
        for kernels in (True, False):
            assert findings(case, Layout.of(case), side, kernels) == ("", [])


@pytest.mark.parametrize("kernels", [True, False])
def test_writes_between_rows_are_found(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, target = _case()
    _run_then(lambda: ctypes.memset(target.address + target.nb[1] + 4, 1, 2), monkeypatch)
    _, wrong = findings(case, Layout.of(case), Side.END, kernels)
    assert "wrote 2 bytes between elements" in wrong[0]


def test_writes_beside_a_tensor_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case, target = _case()
    _run_then(lambda: ctypes.memset(target.address - 1, 1, 1), monkeypatch)
    _, wrong = findings(case, Layout.of(case), Side.END, True)
    assert "wrote outside its memory" in wrong[0]


def test_results_that_depend_on_other_memory_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case, target = _case()
    between = target.nb[1]
    _run_then(lambda: ctypes.memmove(target.address, target.address + between, 4), monkeypatch)
    _, wrong = findings(case, Layout.of(case), Side.END, True)
    assert "4 bytes depend on memory that is none of its sources" in wrong[0]


@pytest.mark.slow
def test_a_case_that_ends_its_process_is_named_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A child that takes every buffer for a page longer than it is.
    lies = (
        "from rpc_server.devices.cpu.plan import CpuPlan; import ctypes, sys;"
        "from tests.guard import mapping, check, __main__ as m;"
        "wrote = check._run;"
        "check._run = lambda case, memory, *rest: ("
        "case.graph.nodes[0].op.value == 'SQR' and ctypes.string_at("
        "next(iter(memory.values())).address, 1 << 20), wrote(case, memory, *rest))[1];"
        "m.main(['--child'])"
    )
    monkeypatch.setattr(program, "COMMAND", [sys.executable, "-c", lies])
    chosen = program.items(["SQR", "FILL"], 0.02, 5)
    tally = program.run([i for i in chosen if i.variant == 0])
    assert len(tally.found) == 1
    assert tally.found[0].startswith("SQR f32->f32, case 0 of seed 5, guard at the end, by kernels")
    assert "SIGSEGV" in tally.found[0]
    assert "SQR(%0)" in tally.found[0]
    assert tally.runs > 1


# -- graphs


def test_chains_read_what_they_computed() -> None:
    cases = draw_cases(chains(), 30, 1)
    again = draw_cases(chains(), 30, 1)
    assert [case.describe() for case in again] == [case.describe() for case in cases]
    joined = [
        any(s is not None and _root(s) in case.graph.nodes for t in case.graph.nodes for s in t.src)
        for case in cases
    ]
    assert sum(joined) > len(cases) / 2


def test_cases_do_not_depend_on_what_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is told a seed and a number draws the same case, though it runs elsewhere."""

    def drawn() -> list[Any]:
        numbers: Any = st.integers(0, 1 << 60)
        return draw_cases(numbers, 300, 1)

    before = drawn()
    code = "\n".join(f"N{i} = {(1 << 50) + i}" for i in range(100))
    (tmp_path / "some_numbers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("some_numbers")
    try:
        assert drawn() == before
    finally:
        del sys.modules[module.__name__]


def _root(t: Tensor) -> Tensor:
    return t if t.view_src is None else t.view_src


def test_disturbed_bytes_are_those_that_no_node_reads() -> None:
    case, target = _case()
    layout = Layout.of(case)
    changed = layout.disturbed[target] != layout.data[target]
    # The destination of a copy counts as read, since ggml names it as a source.
    rows = np.repeat([False, True] * 3, 8 * 4)
    np.testing.assert_array_equal(changed, rows)


@pytest.mark.parametrize("every", mostly_slow([150, 15]))
def test_a_slice_of_all_graphs_is_clean(every: int) -> None:
    chosen = program.items([], 0.0, 7)[::every]
    tally = program.run(chosen)
    assert not tally.found, tally.found[0]
    assert tally.runs >= 4 * len(chosen)
