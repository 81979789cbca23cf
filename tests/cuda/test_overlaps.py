"""Results of the GPU's kernels over their indices, with threads that take turns at any access."""

from __future__ import annotations

import pytest

from rpc_server.devices.cuda.kernels import Unit
from tests.cuda import emulation, harness
from tests.guard.overlap_run import Note, child, items

pytestmark = harness.needs_compiler

# What SET_ROWS does with an index, and the same with a second look at it.
_ONCE = "    return to.data + id * to.nb[1]"
_TWICE = (
    "    return to.data + to.nb[1] *"
    " load_index(at(ids, place.i[1], place.i[2] % ids.ne[1], place.i[3] % ids.ne[2]), ids.type)"
)


def _found(runs: int, only: list[str]) -> list[str]:
    found: list[str] = []
    note = Note()
    child(items(runs, only, 3, card=True), note, found.append)
    assert note.refused < note.runs
    return found


def test_rows_by_indices_stay_inside() -> None:
    assert not _found(300, ["rows by indices", "rows of computed indices", "GET_ROWS"])


@pytest.mark.slow
def test_a_planted_second_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(of: Unit, capability: int) -> emulation.Module:
        assert _ONCE in of.text
        return emulation.build(f"{of.label}-planted", of.text.replace(_ONCE, _TWICE))

    monkeypatch.setattr(harness, "unit", planted)
    found = _found(600, ["rows by indices"])
    assert "out of bounds" in found[0]
