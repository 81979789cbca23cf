"""One job on a device's thread, as the event loop sees it: how long it runs, and how to end it."""

from __future__ import annotations

import time

from rpc_server.devices.base import Plan
from rpc_server.limits import LimitReached


class Job:
    """Between two threads: :meth:`begin` and :meth:`go` are the device's, the rest the loop's."""

    __slots__ = ("_abandoned", "_plan", "_stopped", "error", "nodes", "started")

    def __init__(self, nodes: int = 0) -> None:
        self.nodes = nodes
        # Monotonic; 0 while it waits for its turn.
        self.started = 0.0
        # Why it was stopped, to be told instead of how the plan failed.
        self.error: LimitReached | None = None
        self._plan: Plan | None = None
        self._stopped = False
        self._abandoned = False

    def begin(self) -> None:
        """Its turn has come, and the plan has to be made first."""
        self.started = time.monotonic()

    def go(self, plan: Plan) -> None:
        """Run ``plan``. Raises what it raises, and fails if it was stopped before."""
        self._plan = plan
        if not self.started:
            self.started = time.monotonic()
        if self._stopped or (self._abandoned and not plan.shared):
            plan.stop()
        plan.run()

    def stop(self, error: LimitReached | None = None) -> None:
        """Let the plan fail as soon as it can."""
        self.error = self.error or error
        self._stopped = True
        if self._plan is not None:
            self._plan.stop()

    def abandon(self) -> None:
        """Nobody waits for the result any more; what others share goes on."""
        self._abandoned = True
        if self._plan is not None and not self._plan.shared:
            self.stop()
