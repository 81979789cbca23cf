"""Whose turn it is on a device: its clients share it in slices, each by what it has used so far.

A job keeps the device for as long as nobody else wants it. Once somebody waits, it gives way at the
end of its slice to whoever has used least; where it can: between records, parts of a record, or
pieces of a reference. Nobody looks at a clock while no one waits. Who waits does, and sets a word
that compiled code reads wherever it can pause.

Clients of one address are counted together: whoever connects ten times has no ten turns. Among
themselves they share as addresses do.

What a client didn't use while it did nothing is not saved up: it begins where the others are, but
for one slice. So a small graph is next, whatever the others have under way.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np

# Seconds that a client has the device for while others wait for it.
SLICE = 0.010


class PauseWord:
    """A word in memory, by which compiled code is told to pause."""

    def __init__(self) -> None:
        # A cache line of its own, wherever in the array that begins.
        self._words = np.zeros(16, np.int64)
        start = -(-int(self._words.ctypes.data) // 64) * 64
        self.address = start
        self._at = (start - int(self._words.ctypes.data)) // 8

    @property
    def is_set(self) -> bool:
        """True if compiled code is to pause."""
        return bool(self._words[self._at])

    def set(self) -> None:
        """Have what runs come back as soon as it can; from any thread."""
        self._words[self._at] = 1

    def clear(self) -> None:
        """Let it go on."""
        self._words[self._at] = 0


class UsageOfAddress:
    """The seconds that clients of one address have used, and the most that one of them has."""

    __slots__ = ("__weakref__", "level", "used")

    def __init__(self) -> None:
        self.used = 0.0
        # What one has used that has been here all the time.
        self.level = 0.0


class Turns:
    """Gives one device to one of its shares at a time. ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.word = PauseWord()
        self._clock = clock
        self._lock = threading.Lock()
        self._holder: DeviceShare | None = None
        self._waiting: list[DeviceShare] = []
        # Since when the holder has it, as far as that was not added to what it has used.
        self._since = 0.0
        # What clients of an address have used that have been here all the time.
        self._level = 0.0
        self._accounts: weakref.WeakValueDictionary[str, UsageOfAddress] = (
            weakref.WeakValueDictionary()
        )
        # The one of those waiting that looks at the clock for all.
        self._timer: DeviceShare | None = None

    def share(self, address: str = "") -> DeviceShare:
        """Return the share of a new client, which is counted by itself without an address."""
        with self._lock:
            account = self._accounts.get(address) or UsageOfAddress()
            if address:
                self._accounts[address] = account
        return DeviceShare(self, account)

    @property
    def n_waiting(self) -> int:
        """The number of clients that wait for their turn."""
        return len(self._waiting)

    def held_by(self, share: DeviceShare) -> bool:
        """Return whether it is the turn of ``share``."""
        return self._holder is share

    def now(self) -> float:
        """Return the time by its clock."""
        return self._clock()

    def take(self, share: DeviceShare) -> None:
        """Wait until it is the turn of ``share``."""
        with self._lock:
            self._catch_up(share)
            if self._holder is None:
                self._give(share)
                return
            self._queue(share)
        self._wait(share)

    def take_now(self, share: DeviceShare) -> bool:
        """Have it be the turn of ``share`` if nobody has the device; return whether it is."""
        with self._lock:
            if self._holder is not None:
                return False
            self._catch_up(share)
            self._give(share)
            return True

    def give_back(self, share: DeviceShare) -> None:
        """End the turn of ``share``, whose job is done or waits for something else."""
        with self._lock:
            self._charge(share)
            self._holder = None
            if self._waiting:
                self._give(self._next())

    def give_way(self, share: DeviceShare) -> None:
        """Let others go first that have used less, if the slice of ``share`` is over."""
        if not self.word.is_set or self._holder is not share:
            return
        with self._lock:
            self.word.clear()
            self._charge(share)
            if not self._waiting or min(s.order for s in self._waiting) > share.order:
                return
            self._queue(share)
            self._give(self._next())
        self._wait(share)

    def _catch_up(self, share: DeviceShare) -> None:
        """Begin where the others are, but for one slice."""
        account = share.account
        account.used = max(account.used, self._level - SLICE)
        share.used = max(share.used, account.level - SLICE)

    def charge(self, share: DeviceShare, seconds: float) -> None:
        """Count what ``share`` has used beside its turns."""
        with self._lock:
            share.add(seconds)

    def _charge(self, share: DeviceShare) -> None:
        now = self._clock()
        share.add(now - self._since)
        self._since = now

    def _queue(self, share: DeviceShare) -> None:
        share.waiting_since = share.waiting_since or self._clock()
        self._waiting.append(share)

    def _next(self) -> DeviceShare:
        """Take the one that has used least from those waiting; of equals who came first."""
        found = min(self._waiting, key=lambda s: s.order)
        self._waiting.remove(found)
        return found

    def _give(self, share: DeviceShare) -> None:
        self._holder = share
        self._since = self._clock()
        self._level = max(self._level, share.account.used)
        share.account.level = max(share.account.level, share.used)
        if share.waiting_since:
            share.waited_before += self._since - share.waiting_since
            share.waiting_since = 0.0
            share.wake()
        self.word.clear()

    def _wait(self, share: DeviceShare) -> None:
        while True:
            with self._lock:
                if self._holder is share:
                    if self._timer is share:
                        self._timer = None
                        if self._waiting:
                            self._waiting[0].wake()
                    return
                if self._timer is None:
                    self._timer = share
                left = self._since + SLICE - self._clock()
                if left <= 0:
                    self.word.set()
                    left = SLICE
                timeout = left if self._timer is share else -1
            share.sleep(timeout)


class DeviceShare:
    """One client's part in a device. One thread at a time uses it.

    ``used`` is the seconds it had the device; a client that did nothing for a while is taken to
    have used about as much as the others.
    """

    def __init__(self, turns: Turns, account: UsageOfAddress) -> None:
        self._turns = turns
        self.account = account
        self._sleep = threading.Lock()
        self._sleep.acquire()
        self.used = 0.0
        # Seconds it waited for its turn, and since when it waits now (0: it doesn't).
        self.waited_before = 0.0
        # Whether its turn is one that doesn't give way.
        self._keeps = False
        self.waiting_since = 0.0

    @property
    def word(self) -> PauseWord:
        """The word that tells compiled code to pause on this device."""
        return self._turns.word

    def waited(self, now: float) -> float:
        """Return the seconds it has waited for its turn until ``now``."""
        since = self.waiting_since
        return self.waited_before + (now - since if since else 0.0)

    def give_way(self) -> None:
        """Let others have the device, if the slice is over; to be called wherever that can be."""
        if not self._keeps:
            self._turns.give_way(self)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have the device, but for where the work in it gives way or is :meth:`away`."""
        self._turns.take(self)
        try:
            yield
        finally:
            self._turns.give_back(self)

    def at_once(self, work: Callable[[], None]) -> bool:
        """Have the device for ``work``, and return True; False if it would have to be waited for.

        It is for work that is over in less than a slice: it doesn't give way, which is to wait.
        """
        if not self._turns.take_now(self):
            return False
        self._keeps = True
        try:
            work()
        finally:
            self._keeps = False
            self._turns.give_back(self)
        return True

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Leave the device to others within a turn, while something else is waited for.

        That time counts as waited, within :meth:`aside` too. Without a turn there is nothing to
        leave.
        """
        if not self._turns.held_by(self):
            began = self.waiting_since = self._turns.now()
            try:
                yield
            finally:
                self.waited_before += self._turns.now() - began
                self.waiting_since = 0.0
            return
        self._turns.give_back(self)
        self.waiting_since = self._turns.now()
        try:
            yield
        finally:
            self._turns.take(self)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Let others have the device within a turn, and compute beside them; that counts as used.

        For work that nothing can interrupt, and that uses nothing of the device but a core.
        """
        if not self._turns.held_by(self):
            yield
            return
        self._turns.give_back(self)
        started, waited = self._turns.now(), self.waited_before
        try:
            yield
        finally:
            elapsed = self._turns.now() - started
            self._turns.charge(self, elapsed - (self.waited_before - waited))
            self._turns.take(self)

    # -- for Turns, which calls all of these but the last with its lock held

    @property
    def order(self) -> tuple[float, float]:
        """The key by which the next turn is chosen: the least."""
        return self.account.used, self.used

    def add(self, seconds: float) -> None:
        """Count what it has used, for it and for its address."""
        self.used += seconds
        self.account.used += seconds

    def wake(self) -> None:
        """Let :meth:`sleep` return, now or when it is called next."""
        if self._sleep.locked():
            self._sleep.release()

    def sleep(self, timeout: float) -> None:
        """Return after :meth:`wake`, or ``timeout`` seconds (-1: never)."""
        self._sleep.acquire(timeout=timeout)
