"""The leases that a coordinator has of its workers, and how it comes by them.

A program runs on all workers at once, and a worker runs one client's at a time, so a coordinator
takes the lease of each before it starts any (``rpc_server.session.leases`` is the workers' side).
Others that do the same, in whatever order, can't get in each other's way for good:

- Who waits for a lease has no other. Where all are free they are had at once; where one isn't,
  those that were had are given back, that one is waited for, and only then the others are asked
  for, which may take a moment and no more.
- Leases are kept between graphs, for an instant, since asking costs a round trip. Every few graphs
  all are offered, which costs one too: a worker at which somebody waits gives the lease to who came
  first, and then the others are given up as well. From then on, as long as others come for the
  workers, they are offered after each graph.
- A coordinator that is a worker itself is leased together with all that it runs on. While a graph
  of its own waits for them, whoever asks for it waits no longer than it said that it would.
- A worker without leases (the first version of the extension, or none) is taken as it is.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from rpc_server.devices.split.worker import Worker, WorkerLost

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long leases are kept when no graph follows: longer than a sampler takes, shorter than a person
# notices.
_IDLE_SECONDS = 0.02
# How long graphs follow one another without an offer of the leases: a few tokens.
_OFFER_SECONDS = 0.05
# How long after others came for a worker leases are offered after each graph.
_SHARED_SECONDS = 1.0
# Longest to wait for one lease while having others, and it is drawn anew each time.
_MOMENT = (0.05, 0.15)
# How long one request waits in a worker's queue.
_PATIENCE = 10.0
# Who waits as long is told so in the log.
_WORTH_SAYING = 2.0


class Holding:
    """The leases of one coordinator. All methods run on the event loop's thread.

    ``background`` runs what nobody waits for.
    """

    def __init__(
        self,
        workers: Callable[[], Sequence[Worker]],
        background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._workers = workers
        self._background = background
        # One takes leases or gives them back at a time.
        self._turn = asyncio.Lock()
        # Whether a graph runs, and whether a coordinator that this one works for has it all.
        self._running = False
        self._leased_out = False
        self._idle: asyncio.TimerHandle | None = None
        # When leases were last offered, and when others last had or wanted one.
        self._offered = self._shared = float("-inf")

    async def acquire(self, workers: Iterable[Worker], seconds: float = float("inf")) -> str:
        """Have the leases of all ``workers``, waiting up to ``seconds`` for others.

        Returns who has one otherwise, and where; '' once all are had. Raises WorkerLost.
        """
        end = time.monotonic() + seconds
        # Who has the turn may wait for a lease without limit, and who asks here may have that very
        # lease: a moment is enough for the steps between graphs, which have the turn as well.
        try:
            async with asyncio.timeout(None if seconds == float("inf") else seconds + _MOMENT[0]):
                await self._turn.acquire()
        except TimeoutError:
            return "a graph of its own that waits"
        try:
            self._stop_idling()
            return await self._acquire(
                sorted((n for n in workers if n.has_leases), key=lambda n: n.identity), end
            )
        finally:
            self._turn.release()

    async def _acquire(self, workers: Sequence[Worker], end: float) -> str:
        # What a graph runs on, or is leased out as one, is not given back to wait for more.
        in_use = self._running or self._leased_out
        keep = self._held() if in_use else []
        blocked = await self._at_once(workers)
        while blocked is not None:
            self._shared = time.monotonic()
            worker, holder = blocked
            await self._drop(n for n in self._held() if n not in keep)
            if in_use or time.monotonic() >= end:
                return f"{holder} at {worker.name}"
            if (holder := await self._wait_for(worker, end)) != "":
                return f"{holder} at {worker.name}"
            self._shared = time.monotonic()
            blocked = await self._others(workers, end)
        return ""

    async def begin(self, workers: Iterable[Worker]) -> None:
        """Have the leases of ``workers`` for a graph that is about to run. Raises WorkerLost."""
        if (holder := await self.acquire(workers)) != "":
            raise WorkerLost(f"a worker came back and is in use by another: {holder}")
        self._running = True

    def end(self) -> None:
        """Note that the graph has run, or will not: others may have the leases now, or soon."""
        self._running = False
        if self._leased_out:
            return
        now = time.monotonic()
        if now - self._shared < _SHARED_SECONDS or now - self._offered >= _OFFER_SECONDS:
            self._background(self._offer())
        else:
            self._start_idling()

    async def lease_out(self, seconds: float) -> str:
        """Have all leases for somebody who uses this coordinator as a worker; as acquire."""
        holder = await self.acquire(self._workers(), seconds)
        self._leased_out = not holder
        return holder

    async def renew(self) -> bool:
        """Offer what is leased out to those who wait; return whether all of it is still had."""
        async with self._turn:
            return await self._renew()

    def take_in(self) -> None:
        """Note that nobody uses this coordinator as a worker any more."""
        if self._leased_out:
            self._leased_out = False
            if not self._running:
                self._background(self._give_up())

    # -- one step of it

    async def _at_once(self, workers: Sequence[Worker]) -> tuple[Worker, str] | None:
        """Ask for all that are missing; return the first that somebody else has, and who."""
        missing = [worker for worker in workers if not worker.leased]
        holders = await _all([worker.acquire_lease(0.0) for worker in missing])
        return next(((n, h) for n, h in zip(missing, holders, strict=True) if h), None)

    async def _others(self, workers: Sequence[Worker], end: float) -> tuple[Worker, str] | None:
        """Ask for what is missing one by one, in the order that all coordinators keep."""
        for worker in workers:
            if not worker.leased:
                moment = min(random.uniform(*_MOMENT), max(0.0, end - time.monotonic()))
                if (holder := await worker.acquire_lease(moment)) != "":
                    return worker, holder
        return None

    async def _wait_for(self, worker: Worker, end: float) -> str:
        """Wait for one lease, having none; return who still has it when the time is over."""
        started, said = time.monotonic(), False
        while True:
            left = end - time.monotonic()
            patience = min(_WORTH_SAYING if not said else _PATIENCE, max(left, 0.0))
            holder = await worker.acquire_lease(patience)
            if not holder or left <= 0:
                if said:
                    log.info(
                        "worker %s is free after %.1f s", worker.name, time.monotonic() - started
                    )
                return holder
            if not said:
                log.info("worker %s is in use by another: %s; waiting for it", worker.name, holder)
                said = True

    async def _renew(self) -> bool:
        self._offered = time.monotonic()
        kept = await _all([worker.release_lease(keep=True) for worker in self._held()])
        if all(kept):
            return True
        self._shared = time.monotonic()
        await self._drop(self._held())
        return False

    def _held(self) -> list[Worker]:
        return [worker for worker in self._workers() if worker.leased]

    @staticmethod
    async def _drop(workers: Iterable[Worker]) -> None:
        await _all([worker.release_lease() for worker in workers])

    # -- between graphs

    async def _offer(self) -> None:
        async with self._turn:
            if self._running or self._leased_out:
                return
            if await self._renew():
                self._start_idling()

    async def _give_up(self) -> None:
        async with self._turn:
            if not self._running and not self._leased_out:
                self._stop_idling()
                await self._drop(self._held())

    def _start_idling(self) -> None:
        """Give the leases up unless a graph follows."""
        self._stop_idling()
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(_IDLE_SECONDS, lambda: self._background(self._give_up()))

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None


async def _all(asked: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results; where one failed raise that, but not before all answers are there."""
    results = await asyncio.gather(*asked, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [r for r in results if not isinstance(r, BaseException)]
