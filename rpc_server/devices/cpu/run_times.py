"""Whether a program runs on all threads, or on half of them: whatever is faster just now.

Threads work in lockstep: when something else has the core of one of them, all wait for it until the
scheduler gives it back, some milliseconds for the work of some microseconds. Then fewer threads, on
cores that nobody else wants, are faster. Smaller shares of work would be of no help: who loses its
core has begun with what it has.

As long as threads hardly wait for one another nothing is tried. Where they do, both ways are
measured, on the runs that there are anyway.
"""

from __future__ import annotations

# Of a run's time, what threads wait where something else has their cores.
_MUCH = 0.25
# A run of less is over before a thread gets its core back, once it has lost it; seconds.
_BRIEF = 0.0005
# The slower way is tried again after this many seconds, later and later if it stays so; and not
# before this many runs of that time.
_SOON, _LATE = 0.25, 2.0
_RARELY = 30
# So many runs are a try; and how much of an average the newest run is.
_TRIES = 2
_NEWEST = 0.5


class RunTimes:
    """The times of one program's runs, on all threads (False) and on half of them (True)."""

    __slots__ = ("_again", "_best", "_left", "_seconds", "_waits", "_when")

    def __init__(self) -> None:
        # Seconds of a run, on average; 0 for what was not tried.
        self._seconds = {False: 0.0, True: 0.0}
        # The share of a run on all threads that these wait for one another, on average.
        self._waits = 0.0
        self._best = False
        # Runs left of a try of the other way; when the next try is, and how long after this one.
        self._left = 0
        self._when = 0.0
        self._again = _SOON

    def half(self, now: float) -> bool:
        """Return whether half of the threads are to run it at ``now``, in seconds."""
        if self._waits < _MUCH:
            return False
        if not self._left and now >= self._when:
            self._left = _TRIES
        return self._best != (self._left > 0)

    def note(self, half: bool, seconds: float, waited: float, now: float) -> None:
        """Note a whole run that ended ``now``, in which threads ``waited`` so long, on average."""
        if not half:
            share = waited / seconds if seconds > _BRIEF else 0.0
            self._waits += _NEWEST * (share - self._waits)
        before = self._seconds[half]
        self._seconds[half] = before + _NEWEST * (seconds - before) if before else seconds
        if not self._left or half is self._best:
            return
        self._left -= 1
        if self._left:
            return
        if self._seconds[half] < self._seconds[self._best]:
            self._best, self._again = half, _SOON
        else:
            self._again = min(2 * self._again, _LATE)
        self._when = now + max(self._again, _RARELY * seconds)
