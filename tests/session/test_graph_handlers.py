"""Graphs that are known: on the event loop's thread where that is quicker, or the device's."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.commands import Command
from protocol.dialects import DIALECTS
from rpc_server.graph.errors import GraphError
from rpc_server.session.handlers.graphs import HANDLERS


class Plan:
    """Counts its runs, and fails if it is to."""

    nbytes = scratch = 0
    dialect = DIALECTS[0]
    shared = False

    def __init__(self, *, brief: bool, fails: bool = False) -> None:
        self.brief = brief
        self.runs = 0
        self._fails = fails

    def run(self) -> None:
        self.runs += 1
        if self._fails:
            raise GraphError("node 3: an index beyond its rows")

    def stop(self) -> None: ...


class Queue:
    """``free`` says whether the device is; what it is given otherwise runs at once, too."""

    def __init__(self, *, free: bool = True) -> None:
        self._free = free
        self.submitted = 0

    def at_once(self, plan: Plan) -> bool:
        if self._free:
            plan.run()
        return self._free

    def submit(self, job: Callable[[], None]) -> concurrent.futures.Future[None]:
        self.submitted += 1
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        job()
        future.set_result(None)
        return future

    def waited(self, now: float) -> float:
        return 0.0


class Recompute:
    """A session whose client asks for its last graph again."""

    def __init__(self, plan: Plan, queue: Queue) -> None:
        self.completed: list[Command] = []
        self.ran: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._session: Any = SimpleNamespace(
            stats=SimpleNamespace(plan_hits=0),
            plans=[SimpleNamespace(last=(plan, 1))],
            existing_device=lambda command, index: index,
            queue=lambda index: queue,
            running=None,
            busy=False,
            completed=lambda command, nodes, seconds: self.completed.append(command),
            ran=lambda command, seconds, error: self.ran.set_result(error),
        )

    def ask(self) -> None:
        fields = SimpleNamespace(device=0)
        request: Any = SimpleNamespace(command=Command.GRAPH_RECOMPUTE, fields=fields)
        HANDLERS[Command.GRAPH_RECOMPUTE](self._session, request)

    @property
    def busy(self) -> bool:
        return bool(self._session.busy)

    @property
    def running(self) -> object:
        return self._session.running


async def test_a_brief_one_is_answered_without_another_thread() -> None:
    plan, queue = Plan(brief=True), Queue()
    session = Recompute(plan, queue)
    session.ask()
    assert (plan.runs, queue.submitted) == (1, 0)
    assert session.completed == [Command.GRAPH_RECOMPUTE]
    assert not session.busy
    assert session.running is None


async def test_one_that_fails_ends_its_connection_as_any_error_does() -> None:
    session = Recompute(Plan(brief=True, fails=True), Queue())
    with pytest.raises(GraphError, match="beyond its rows"):
        session.ask()
    assert session.completed == []
    assert session.running is None


@pytest.mark.parametrize(("brief", "free"), [(False, True), (True, False)])
async def test_any_other_has_its_turn_on_the_devices_thread(brief: bool, free: bool) -> None:
    plan, queue = Plan(brief=brief), Queue(free=free)
    session = Recompute(plan, queue)
    session.ask()
    assert session.busy
    assert await asyncio.wait_for(session.ran, 60) is None
    assert (plan.runs, queue.submitted, session.completed) == (1, 1, [])
