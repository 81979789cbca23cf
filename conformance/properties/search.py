"""Looks for an input that breaks a property, and for the smallest such: hypothesis with a seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Counterexample(Generic[T]):
    """The smallest input found that breaks the property, and how it does."""

    value: T
    reason: str


@dataclass(slots=True)
class Search(Generic[T]):
    """The result of a search: how many inputs, how long, what it found."""

    examples: int = 0
    seconds: float = 0.0
    found: Counterexample[T] | None = None


def search(
    strategy: st.SearchStrategy[T],
    attempt: Callable[[T], object],
    examples: int,
    seed: int,
    *,
    shrink: bool = True,
) -> Search[T]:
    """Try ``examples`` inputs; ``attempt`` raises AssertionError for one that breaks the property.

    The same seed draws the same inputs. Other exceptions of ``attempt`` pass through. Without
    ``shrink`` the first input that breaks it is what is found.
    """
    done: Search[T] = Search()
    last: list[Counterexample[T]] = []

    def attempted(value: T) -> None:
        if not last:
            done.examples += 1
        try:
            attempt(value)
        except AssertionError as error:
            last.append(Counterexample(value, str(error)))
            raise

    profile = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
        print_blob=False,
    )
    run = hypothesis.seed(seed)(profile(given(strategy)(attempted)))
    started = time.perf_counter()
    try:
        run()
    except (AssertionError, Flaky):
        # A failure that comes and goes: the smallest input that failed at all.
        done.found = last[-1]
    done.seconds = time.perf_counter() - started
    return done
