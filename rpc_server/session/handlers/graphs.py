"""Requests that compute, and how a session waits for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from dataclasses import replace

from protocol.commands import Command
from protocol.graph_payload import decode_graph, graph_device
from protocol.requests import Request
from rpc_server.devices.base import NotReadyError, Plan, Queue
from rpc_server.graph.errors import GraphError
from rpc_server.session.buffers import Buffer, Buffers
from rpc_server.session.handlers.base import Handler, device_index
from rpc_server.session.job import Job
from rpc_server.session.mapped import redirect
from rpc_server.session.state import Session


class _Here:
    """The buffers that a client has on one device, for the graphs that run there.

    llama.cpp names those on other devices too, for tensors that no node of the graph reads.
    """

    def __init__(self, buffers: Buffers, device: int) -> None:
        self._buffers = buffers
        self._device = device
        self._elsewhere: set[int] = set()

    def __call__(self, handle: int) -> Buffer | None:
        buffer = self._buffers.find(handle)
        if buffer is None or buffer.device == self._device:
            return buffer
        self._elsewhere.add(buffer.device)
        return None

    def explained(self, error: GraphError) -> GraphError:
        """The error, and where else the graph's tensors are."""
        if not self._elsewhere:
            return error
        others = ", ".join(map(str, sorted(self._elsewhere)))
        return GraphError(
            f"{error} (the graph runs on device {self._device}, has tensors on device {others})"
        )


def _graph_compute(s: Session, request: Request) -> None:
    assert request.graph is not None
    payload = request.graph
    index = s.existing_device(request.command, graph_device(payload, s.dialect))
    plans = s.plans[index]
    known = plans.find(payload)
    if known is not None:
        _run_known(s, request.command, index, *known)
        return
    s.stats.plan_misses += 1
    graph = decode_graph(payload, s.dialect)
    nodes = len(graph.nodes)
    s.context.limits.check_graph(nodes, len(graph.tensors))
    queue = s.queue(index)
    readings, here = s.readings, _Here(s.buffers, index)
    task = Job(queue, nodes)

    def job() -> None:
        task.begin()
        try:
            tensors, find = redirect(s.buffers.on(index), graph.tensors, here)
            given = replace(graph, tensors=tensors)
            made = queue.prepare(given, readings.choose(given, find), find, task.stop_word)
        except GraphError as error:
            raise here.explained(error) from None
        s.check_scratch(made)
        # To read a mapped weight may take the disk's time.
        made.brief = made.brief and find is here
        plans.add(payload, made, nodes)
        task.go(made)

    run(s, request.command, queue, task, job)


def _graph_recompute(s: Session, request: Request) -> None:
    index = device_index(s, request)
    last = s.plans[index].last
    if last is None:
        raise GraphError(f"GRAPH_RECOMPUTE, but device {index} has no graph that is still valid")
    _run_known(s, request.command, index, *last)


def _run_known(s: Session, command: Command, index: int, plan: Plan, nodes: int) -> None:
    """Run a plan that is there already, on this thread where that is quicker than to wake another.

    Raises GraphError.
    """
    s.stats.plan_hits += 1
    queue = s.queue(index)
    if plan.brief:
        began = time.monotonic()
        if queue.at_once(plan):
            s.completed(command, nodes, time.monotonic() - began)
            return
    task = Job(queue, nodes)
    run(s, command, queue, task, lambda: task.go(plan))


class _Submitted:
    """A job on a device's thread, until it has run.

    Plain callbacks: a small graph takes less time than the steps of an asyncio task around it. No
    closures that name each other: they would keep the client's memory until cycles are collected.
    """

    __slots__ = ("_command", "_job", "_loop", "_queue", "_session", "_task")

    def __init__(
        self, s: Session, command: Command, queue: Queue, task: Job, job: Callable[[], None]
    ) -> None:
        self._session = s
        self._command = command
        self._queue = queue
        self._task = task
        self._job = job
        self._loop = asyncio.get_running_loop()

    def submit(self, _: object = None) -> None:
        self._queue.submit(self._job).add_done_callback(self._done)

    def _done(self, future: concurrent.futures.Future[None]) -> None:
        """On the device's thread."""
        error = future.exception()
        if isinstance(error, NotReadyError):
            self._loop.call_soon_threadsafe(self._again, error)
            return
        seconds = self._task.seconds(time.monotonic())
        self._loop.call_soon_threadsafe(self._session.ran, self._command, seconds, error)

    def _again(self, not_ready: NotReadyError) -> None:
        # Compiling is no running.
        self._task.started = 0.0
        waiting = self._loop.run_in_executor(None, not_ready.wait)
        waiting.add_done_callback(self.submit)


def run(s: Session, command: Command, queue: Queue, task: Job, job: Callable[[], None]) -> None:
    """Do ``job`` on a thread of the device's before any further event."""
    s.running = task
    s.busy = True
    _Submitted(s, command, queue, task, job).submit()


HANDLERS: dict[int, Handler] = {
    Command.GRAPH_COMPUTE: _graph_compute,
    Command.GRAPH_RECOMPUTE: _graph_recompute,
}
