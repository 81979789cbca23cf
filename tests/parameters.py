"""Parameters of tests: which of them every run takes, and which the complete ones only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: int = 1) -> list[Any]:
    """Return parameters of which the first ``quick`` are in every run, the others marked slow.

    A value that is a tuple is one for several names, as pytest has it.
    """
    listed = list(values)
    return listed[:quick] + [_slow(value) for value in listed[quick:]]


def _slow(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
