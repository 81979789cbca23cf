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


def without(function: F, features: tuple[str, ...]) -> F:
    """Have a routine compiled without the processor's features whose names begin so."""
    function.__without__ = features  # type: ignore[attr-defined]
    return function


def features_left_out(function: Any) -> tuple[str, ...]:
    """Return what :func:`without` was told of a routine."""
    found: tuple[str, ...] = getattr(function, "__without__", ())
    return found


def is_routine(function: Any) -> bool:
    return getattr(function, "__routine__", False) is True
