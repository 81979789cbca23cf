"""Keeps of many inputs those few that together cover what all of them cover."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz import inputs
from tests.fuzz.targets import Target

_PROJECT = Path(__file__).parents[2]
_FOLDERS = tuple(str(_PROJECT / name) for name in ("protocol", "rpc_server"))

_REGRESSION = "regression"

# A line and the line before it in the same function.
Edge = tuple[str, int, int]


def edges(run: Callable[[bytes], bool], data: bytes) -> set[Edge]:
    """Which steps from line to line in the project's code an input makes."""
    seen: set[Edge] = set()

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_FOLDERS):
            return None
        before = 0

        def step(inner: FrameType, what: str, _: Any) -> Any:
            nonlocal before
            if what == "line":
                seen.add((name, before, inner.f_lineno))
                before = inner.f_lineno
            return step

        return step

    # What is imported, cached or compiled the first time isn't the input's.
    run(data)
    sys.settrace(enter)
    try:
        run(data)
    finally:
        sys.settrace(None)
    return seen


def _regressions_first_then_by_size(given: tuple[str, bytes]) -> tuple[bool, int]:
    name, data = given
    return not name.startswith(_REGRESSION), len(data)


def minimise(target: Target, folder: Path) -> None:
    """Copy into the kept corpus what adds coverage; small inputs are tried first.

    Kept inputs that others cover are removed, but for regressions.
    """
    candidates = [*inputs.read(folder).items()]
    if target.corpus.exists():
        candidates += inputs.read(target.corpus).items()
    covered: set[Edge] = set()
    kept: dict[str, bytes] = {}
    for name, data in sorted(candidates, key=_regressions_first_then_by_size):
        if name.startswith(("crash-", "timeout-", "oom-", "slow-", "leak-")):
            continue
        new = edges(target.run, data) - covered
        regression = name.startswith(_REGRESSION)
        if new or regression:
            covered |= new
            kept[name if regression else f"{len(kept):03}"] = data
    inputs.write(target.corpus, kept)
    size = sum(map(len, kept.values()))
    about = f"{len(kept)} inputs of {len(candidates)}, {size} bytes, {len(covered)} edges"
    print(f"{target.name}: {about}")
