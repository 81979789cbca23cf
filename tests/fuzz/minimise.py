"""Keeps of many inputs those few that together cover what all of them cover."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.targets import Target

_PROJECT = Path(__file__).parents[2]
_FOLDERS = tuple(str(_PROJECT / name) for name in ("protocol", "rpc_server"))

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


def minimise(target: Target, folder: Path) -> None:
    """Copy into the kept corpus what adds coverage; small inputs are tried first.

    Kept inputs that others cover are removed, but for regressions.
    """
    kept = target.corpus
    kept.mkdir(parents=True, exist_ok=True)
    candidates = sorted({*kept.iterdir(), *folder.iterdir()}, key=lambda p: p.stat().st_size)
    covered: set[Edge] = set()
    inputs: dict[str, bytes] = {}
    for path in sorted(candidates, key=lambda p: not p.name.startswith("regression")):
        if path.name.startswith(("crash-", "timeout-", "oom-", "slow-", "leak-")):
            continue
        data = path.read_bytes()
        new = edges(target.run, data) - covered
        regression = path.name.startswith("regression")
        if new or regression:
            covered |= new
            inputs[path.name if regression else f"{len(inputs):03}"] = data
    for path in kept.iterdir():
        path.unlink()
    for name, data in inputs.items():
        (kept / name).write_bytes(data)
    size = sum(map(len, inputs.values()))
    about = f"{len(inputs)} inputs of {len(candidates)}, {size} bytes, {len(covered)} edges"
    print(f"{target.name}: {about}")
