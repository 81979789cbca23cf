"""Makes a value that breaks a property smaller, step by step, as long as it still breaks it.

For values that are lists of things that can be left out: most of what a long random session does
has nothing to do with what goes wrong in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Values that are tried at most; each costs as much as one example of the search.
_MOST_TRIES = 400


def reduced(value: T, smaller: Callable[[T], Iterable[T]], fails: Callable[[T], bool]) -> T:
    """Return the smallest value found for which ``fails`` holds, beginning with one such.

    ``smaller`` gives simpler values, those that leave out most first.
    """
    tried: set[str] = set()
    while True:
        for candidate in smaller(value):
            key = repr(candidate)
            if key in tried:
                continue
            if len(tried) >= _MOST_TRIES:
                return value
            tried.add(key)
            if fails(candidate):
                value = candidate
                break
        else:
            return value


def without_parts(items: Sequence[T], keep: int = 0) -> Iterator[tuple[T, ...]]:
    """Yield the items without some in a row.

    It is half of them first, in the end one; the first ``keep`` stay.
    """
    first, rest = tuple(items[:keep]), tuple(items[keep:])
    size = len(rest)
    while size:
        for at in range(len(rest) - size, -1, -size):
            yield first + rest[:at] + rest[at + size :]
        size //= 2


def simpler_numbers(number: int) -> Iterator[int]:
    """Yield smaller numbers in the place of one: 0, half of it, one less."""
    for candidate in dict.fromkeys((0, number // 2, number - 1)):
        if 0 <= candidate < number:
            yield candidate
