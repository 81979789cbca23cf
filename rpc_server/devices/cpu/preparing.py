"""Has kernels compiled before anybody waits for them: what most language models need.

``python -m rpc_server --prepare`` does that and nothing else (:func:`prepare_now`). A server does
it as well (:func:`prepare_when_idle`): at once, as if somebody waited, for what the first model is
likely to need, and in the background for the rest, while it has nothing else to do. What it imports
for its first graph only, so as to listen sooner, is imported by then, too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys

from rpc_server.devices.cpu.catalog import (
    ALWAYS,
    Kernel,
    common_kernels,
    first_kernels,
    library,
)
from rpc_server.devices.cpu.instruction_sets import chosen_isa
from rpc_server.native.library import Library
from rpc_server.native.routine import CompileError, InterruptedCompileError
from rpc_server.observability import progress
from rpc_server.observability.metrics import ServerStats

log = logging.getLogger(__name__)

# How often it is looked whether a client does something, seconds.
_LOOK = 0.25
# How often it is looked whether some of what comes first is done, and how much of it is asked for
# at once: enough for few compilers, and not much for a client to wait for.
_SOON = 0.05
_AT_ONCE = 2
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
    """Compile what is not on disk; most of it while no client of ``stats`` does anything."""
    try:
        compiled = await asyncio.to_thread(library)
        # Which kernels are the ones for this processor is known by a routine, too.
        missing = compiled.missing(ALWAYS)
        await asyncio.to_thread(compiled.pending, missing, urgent=True)
        # Meanwhile compilers start.
        await asyncio.to_thread(_import)
        isa = await asyncio.to_thread(chosen_isa)
    except (CompileError, ValueError) as error:
        # The first graph tells its client.
        log.debug("no kernels ahead of the first graph: %s", error)
        return
    first = first_kernels(isa)
    await _prepare_first(compiled, first)
    # The last of them may be under way yet: nobody is to wait for the same file.
    others = [kernel for kernel in common_kernels(isa) if kernel not in first]
    await _prepare(compiled, others, _Clients(stats))


def _import() -> None:
    """Import what makes plans and runs them: a fifth of what a small model's first token takes."""
    import rpc_server.devices.cpu.executor
    import rpc_server.devices.cpu.plan  # noqa: F401


async def _prepare_first(compiled: Library, kernels: list[Kernel]) -> None:
    """Have compiled what is not on disk, whatever clients do.

    Never much of it at once: what a client needs comes next. Returns as soon as there is room for
    something else, so that no core is idle beside the last one.
    """
    asked: list[Kernel] = []
    for kernel in compiled.missing(kernels):
        await asyncio.to_thread(compiled.request, [kernel])
        asked.append(kernel)
        while len(compiled.pending(asked, urgent=False)) >= _AT_ONCE:
            await asyncio.sleep(_SOON)


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


async def _prepare(compiled: Library, kernels: list[Kernel], clients: _Clients) -> None:
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
