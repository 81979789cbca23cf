"""Requests that compute, and how a session waits for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.commands import Command
from protocol.framing import Request
from protocol.graph_payload import decode_graph
from rpc_server.devices.base import Device, NotReadyError
from rpc_server.graph.errors import GraphError
from rpc_server.handlers.base import Handler, device_index
from rpc_server.runs import Run

if TYPE_CHECKING:
    from rpc_server.session import Session


def _graph_compute(s: Session, request: Request) -> None:
    assert request.graph is not None
    payload = request.graph
    graph = decode_graph(payload, s.dialect)
    nodes = len(graph.nodes)
    s.context.limits.check_graph(nodes, len(graph.tensors))
    index = s.existing_device(request.command, graph.device)
    device = s.device(index)
    plans = s.plans[index]
    plan = plans.find(payload)
    if plan is None:
        s.figures.plan_misses += 1
    else:
        s.figures.plan_hits += 1
    dialects, find = s.handshake.dialects, s.buffers.find
    task = Run(nodes)

    def job() -> None:
        if plan is not None:
            task.go(plan)
            return
        task.begin()
        made = device.prepare(graph, dialects, find)
        plans.add(payload, made, nodes)
        task.go(made)

    run(s, request.command, device, task, job)


def _graph_recompute(s: Session, request: Request) -> None:
    index = device_index(s, request)
    last = s.plans[index].last
    if last is None:
        raise GraphError(f"GRAPH_RECOMPUTE, but device {index} has no graph that is still valid")
    plan, nodes = last
    s.figures.plan_hits += 1
    task = Run(nodes)

    run(s, request.command, s.device(index), task, lambda: task.go(plan))


def run(s: Session, command: Command, device: Device, task: Run, job: Callable[[], None]) -> None:
    """Do ``job`` on the device's thread before any further event.

    By plain callbacks: a small graph takes less time than the steps of an asyncio task around it.
    """
    loop = asyncio.get_running_loop()

    def done(future: concurrent.futures.Future[None]) -> None:
        error = future.exception()
        if isinstance(error, NotReadyError):
            loop.call_soon_threadsafe(again, error)
            return
        seconds = time.monotonic() - task.started
        loop.call_soon_threadsafe(s.ran, command, seconds, error)

    def again(not_ready: NotReadyError) -> None:
        # Compiling is no running.
        task.started = 0.0
        waiting = loop.run_in_executor(None, not_ready.wait)
        waiting.add_done_callback(lambda _: submit())

    def submit() -> None:
        device.submit(job).add_done_callback(done)

    s.running = task
    s.busy = True
    submit()


HANDLERS: dict[int, Handler] = {
    Command.GRAPH_COMPUTE: _graph_compute,
    Command.GRAPH_RECOMPUTE: _graph_recompute,
}
