"""Has kernels compiled before anybody waits for them: what most language models need.

``python -m rpc_server --prepare`` does that and nothing else (:func:`prepare_now`). A server does
it in the background while it has nothing else to do (:func:`prepare_when_idle`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys

from rpc_server.devices.cpu.catalog import Kernel, common_kernels, instruction_sets, library
from rpc_server.devices.cpu.instruction_sets import chosen_isa
from rpc_server.native.routine import CompileError, InterruptedCompileError
from rpc_server.observability import progress
from rpc_server.observability.metrics import ServerStats

log = logging.getLogger(__name__)

# How often it is looked whether a client does something, seconds.
_LOOK = 0.25
_AT_REST = ("idle", "handshake", "link")


def prepare_now() -> int:
    """Compile what is not on disk, show how far it is, and return the exit status of a program."""
    kept = library()
    if kept.folder.unkept:
        return _refuse(f"compiled kernels can't be kept: {kept.folder.unkept}")
    with progress.shown():
        try:
            wanted = common_kernels(chosen_isa())
        except (CompileError, ValueError) as error:
            return _refuse(str(error))
        missing = kept.missing(wanted)
        futures = kept.prepare(missing, background=False)
        concurrent.futures.wait(futures)
    failed = 0
    for kernel, future in zip(missing, futures, strict=True):
        problem = future.exception()
        if problem is not None:
            failed += 1
            _refuse(f"no compiled {kernel.label}: {problem}")
    there = len(wanted) - failed
    print(f"{there} of {len(wanted)} kernels are in {kept.folder.path}", flush=True)
    return 1 if failed else 0


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return 1


async def prepare_when_idle(stats: ServerStats) -> None:
    """Compile what is not on disk, while no client of ``stats`` does anything."""
    clients = _Clients(stats)
    try:
        # Which kernels are the ones for this processor is known by a routine, too.
        await _prepare([instruction_sets], clients)
        isa = await asyncio.to_thread(chosen_isa)
    except (CompileError, ValueError) as error:
        # The first graph tells its client.
        log.debug("no kernels ahead of the first graph: %s", error)
        return
    await _prepare(common_kernels(isa), clients)


class _Clients:
    """Looks now and then whether clients do anything."""

    def __init__(self, stats: ServerStats) -> None:
        self._stats = stats
        self._seen = (0, 0)

    async def look(self) -> bool:
        """Return whether one did something within the last quarter of a second, or does now."""
        await asyncio.sleep(_LOOK)
        clients = self._stats.clients.values()
        before = self._seen
        self._seen = self._stats.clients_total, sum(c.bytes_in for c in clients)
        return self._seen != before or any(c.activity() not in _AT_REST for c in clients)


def _retrieve(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()


async def _prepare(kernels: list[Kernel], clients: _Clients) -> None:
    compiled = await asyncio.to_thread(library)
    failed: set[Kernel] = set()
    while missing := [kernel for kernel in compiled.missing(kernels) if kernel not in failed]:
        while await clients.look():
            pass
        made = compiled.prepare(missing, background=True)
        futures = [asyncio.wrap_future(future) for future in made]
        for future in futures:
            # When the server stops in between, nobody asks any more what came of them.
            future.add_done_callback(_retrieve)
        pending: set[asyncio.Future[None]] = set(futures)
        while pending:
            if await clients.look():
                compiled.interrupt()
            _, pending = await asyncio.wait(pending, timeout=0)
        for kernel, future in zip(missing, futures, strict=True):
            error = future.exception()
            if error is not None and not isinstance(error, InterruptedCompileError):
                log.debug("no compiled %s ahead of need: %s", kernel.label, error)
                failed.add(kernel)
