"""How the source of a routine is marked. Needs no compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# 'nnan' and 'ninf' are left out on purpose: ggml graphs carry -inf masks and expect NaN to spread.
FASTMATH = {"contract", "nsz"}


def routine(function: F) -> F:
    """Declare a function of int64 arguments that returns an int64 as a routine.

    It is compiled by numba; it must not allocate, raise or touch Python objects.
    """
    function.__routine__ = True  # type: ignore[attr-defined]
    return function


def is_routine(function: Any) -> bool:
    return getattr(function, "__routine__", False) is True
