"""One job on a device's thread, as the event loop sees it: how long it runs, and how to end it."""

from __future__ import annotations

import time

import numpy as np

from rpc_server.devices.base import Plan, Queue, StopWord
from rpc_server.limits import LimitReached


class Job:
    """Between two threads: :meth:`begin` and :meth:`go` are the device's, the rest the loop's.

    ``queue`` is what it runs by.
    """

    __slots__ = (
        "_abandoned",
        "_plan",
        "_queue",
        "_stopped",
        "_waited",
        "error",
        "nodes",
        "planning",
        "started",
        "stop_word",
    )

    def __init__(self, queue: Queue, nodes: int = 0) -> None:
        self._queue = queue
        self.nodes = nodes
        # How long jobs of the queue had waited for turns of others when this one began.
        self._waited = 0.0
        # Monotonic; 0 while it waits for its turn.
        self.started = 0.0
        # Seconds that making the plan took.
        self.planning = 0.0
        # Set to 1, it ends what is being planned; most jobs run a plan that is there.
        self.stop_word: StopWord | None = None
        # Why it was stopped, to be told instead of how the plan failed.
        self.error: LimitReached | None = None
        self._plan: Plan | None = None
        self._stopped = False
        self._abandoned = False

    def begin(self) -> None:
        """Begin, as its turn has come; the plan has to be made first."""
        self._start()
        self.stop_word = np.zeros(1, np.int64)
        # It may have been stopped just before there was a word to set.
        self.stop_word[0] = self._stopped

    def _start(self) -> None:
        now = time.monotonic()
        self._waited = self._queue.waited(now)
        self.started = now

    def seconds(self, now: float) -> float:
        """Return how long it has had the device until ``now``; 0 before its first turn."""
        if not self.started:
            return 0.0
        return now - self.started - (self._queue.waited(now) - self._waited)

    def go(self, plan: Plan) -> None:
        """Run ``plan``. Raises what it raises, and fails if it was stopped before."""
        self._plan = plan
        if self.started:
            self.planning = time.monotonic() - self.started
        else:
            self._start()
        if self._stopped or (self._abandoned and not plan.shared):
            plan.stop()
        plan.run()

    def stop(self, error: LimitReached | None = None) -> None:
        """Let the plan fail as soon as it can."""
        self.error = self.error or error
        self._stopped = True
        if self.stop_word is not None:
            self.stop_word[0] = 1
        if self._plan is not None:
            self._plan.stop()

    def abandon(self) -> None:
        """Abandon it: nobody waits for the result any more; what others share goes on."""
        self._abandoned = True
        if self._plan is not None and not self._plan.shared:
            self.stop()
