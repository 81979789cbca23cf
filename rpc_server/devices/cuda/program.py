"""Programs of the split extension on a card: what the host does of an exchange is to pass it on.

The inputs of a step are received into pinned memory. One captured graph copies them to the card,
computes, and copies the outputs back, with the word that tells of failures; then these are sent.
Kernels are compiled and graphs captured when the program is made: an exchange waits for neither.

What is larger than the mailbox, as in prompts, goes in pieces: one is copied while another is on
the network.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from protocol.dialects import Dialect
from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.abi import N_EXTRA
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.plan import CapturedGraph, CudaPlan, CudaPlanBuilder, Scratch
from rpc_server.devices.cuda.planner import Launch, Product
from rpc_server.devices.cuda.resources import MAIL, Mailbox, StreamResources
from rpc_server.devices.cuda.storage import CHUNK, CudaStorage
from rpc_server.devices.planning.nodes import PlanSteps
from rpc_server.devices.planning.program import LinkedStep, adjacent
from rpc_server.devices.planning.records import record_words
from rpc_server.devices.planning.transfers import HostTransfers
from rpc_server.graph.errors import GraphError

log = logging.getLogger(__name__)

_COPY_PIECES = kernel("exchange", "copy_pieces")
# So many a launch, of three words each.
_PIECES = N_EXTRA // 3
# What a thread copies at once, and the most blocks that are given to one piece.
_WIDE, _MOST_BLOCKS = 16, 64

# What a captured graph takes of memory, about, beside its launches: here, and on the card.
_EXCHANGE_BYTES = 64 << 10

Action = Callable[[], None]


class _Exchange:
    """The work of a step, one after the other: receive, have the card compute, send."""

    def __init__(
        self,
        mailbox: Mailbox,
        receives: Sequence[Action],
        actions: Sequence[Action],
        sends: Sequence[Action],
    ) -> None:
        self._mailbox = mailbox
        self._receives = receives
        self._actions = actions
        self._sends = sends

    def run(self) -> int:
        """Return the status of what was computed; nothing is sent of what failed."""
        for receive in self._receives:
            receive()
        for action in self._actions:
            action()
        status = self._mailbox.word.wait()
        if not status:
            for send in self._sends:
                send()
        return status


class CudaProgram(CudaPlan):
    """Exchanges, one after the other, on the stream of the client whose program it is."""

    def __init__(
        self,
        resources: StreamResources,
        dialect: Dialect,
        storages: Sequence[CudaStorage],
        exchanges: Sequence[_Exchange],
        labels: list[str],
        scratch: Scratch | None,
        interpreted: dict[str, int],
        transfers: HostTransfers,
    ) -> None:
        super().__init__(resources, dialect, storages, [], labels, scratch, interpreted)
        self.nbytes += len(exchanges) * _EXCHANGE_BYTES
        self._exchanges = exchanges
        self._transfers = transfers

    def _run(self) -> int:
        for exchange in self._exchanges:
            self._go_on()
            if status := exchange.run():
                return status
        return 0

    def stop(self) -> None:
        """Let a run end before its next exchange, or where it waits for its client."""
        super().stop()
        self._transfers.stop()


class _ExchangeMaker:
    """Makes the exchanges of one program; ``labels`` are what statuses of its nodes name."""

    def __init__(
        self,
        builder: CudaPlanBuilder,
        resources: StreamResources,
        transfers: HostTransfers,
        scratch: Scratch | None,
    ) -> None:
        try:
            self._mailbox = resources.mailbox
        except MemoryError as error:
            raise GraphError(f"no memory for exchanges: {error}") from None
        self._builder = builder
        self._resources = resources
        self._transfers = transfers
        self._scratch = scratch
        self.labels: list[str] = []

    def exchange(self, step: LinkedStep, parts: PlanSteps[Launch | Product]) -> _Exchange:
        """Return the exchange of ``step``, whose nodes are ``parts``. Raises GraphError."""
        first, last = parts[0], parts[-1]
        # As CudaPlanBuilder.lower has it.
        assert not isinstance(first, Tensor)
        assert not isinstance(last, Tensor)
        before, receives, filling = self._inputs(step.inputs)
        after, sends, emptying = self._outputs(step.outputs)
        first[:0] = filling
        last += emptying
        self._builder.finish(parts, self._scratch, self._mailbox.word, self.labels)
        actions: list[Action] = []
        graphs: list[CapturedGraph] = []
        for part in parts:
            if isinstance(part, Tensor):
                actions.append(self._builder.reference_step(part))
            elif part or part is first or part is last:
                graphs.append(CapturedGraph(self._resources, part))
                actions.append(graphs[-1])
        graphs[0].before += before
        graphs[-1].after.append(after)
        if _size(step.inputs) <= MAIL and _size(step.outputs) <= MAIL:
            # Others are a prompt's, which may come only once.
            for graph in graphs:
                graph.get_ready()
        return _Exchange(self._mailbox, receives, actions, sends)

    def _inputs(self, tensors: Sequence[Tensor]) -> tuple[list[Action], list[Action], list[Launch]]:
        """Actions before launches, those that receive, and launches that put inputs in place."""
        runs, size, mailbox = adjacent(tensors), _size(tensors), self._mailbox
        if size > MAIL:
            return [], [functools.partial(self._receive_in_pieces, run) for run in runs], []
        if not runs:
            return [], [], []
        receives = [self._transfers.receiver(tensors[0], mailbox.inputs_here, size)]
        if len(runs) == 1:
            return [functools.partial(mailbox.deliver, tensors[0].address, size)], receives, []
        pieces = [(a, mailbox.inputs + at, n) for a, at, n in _places(runs)]
        before: list[Action] = [functools.partial(mailbox.deliver, mailbox.inputs, size)]
        return before, receives, _copies(pieces, tensors[0])

    def _outputs(self, tensors: Sequence[Tensor]) -> tuple[Action, list[Action], list[Launch]]:
        """The action after launches, those that send, and launches that gather outputs."""
        runs, size, mailbox = adjacent(tensors), _size(tensors), self._mailbox
        if size > MAIL:
            in_pieces = [functools.partial(self._send_in_pieces, run) for run in runs]
            return mailbox.word.fetch, [*in_pieces], []
        if not runs:
            return mailbox.word.fetch, [], []
        there, here = mailbox.outputs(size)
        pieces = [(there + at, a, n) for a, at, n in _places(runs)]
        after = functools.partial(mailbox.fetch, size)
        sends = [self._transfers.sender(tensors, here, size)]
        return after, sends, _copies(pieces, tensors[0])

    def _receive_in_pieces(self, run: Sequence[Tensor]) -> None:
        resources, t, size = self._resources, run[0], _size(run)
        for at, chunk in resources.pinned.pieces_to(t.address, size, resources.stream):
            n = min(CHUNK, size - at)
            self._transfers.receiver(t, chunk.address, n)()

    def _send_in_pieces(self, run: Sequence[Tensor]) -> None:
        resources, size = self._resources, _size(run)
        for at, chunk in resources.pinned.pieces_from(run[0].address, size, resources.stream):
            n = min(CHUNK, size - at)
            self._transfers.sender(run, chunk.address, n)()


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _places(runs: Sequence[Sequence[Tensor]]) -> list[tuple[int, int, int]]:
    """Of each run its address, where it is among the bytes of all of them, and its size."""
    places, at = [], 0
    for run in runs:
        size = _size(run)
        places.append((run[0].address, at, size))
        at += size
    return places


def _copies(pieces: Sequence[tuple[int, int, int]], node: Tensor) -> list[Launch]:
    """Launches that copy pieces: to, from, bytes; ``node`` is what they are of, for messages."""
    launches = []
    for number in range(0, len(pieces), _PIECES):
        some = pieces[number : number + _PIECES]
        extra = [word for piece in some for word in piece]
        words = np.array(record_words(_COPY_PIECES, (), (), extra), np.int64)
        threads = -(-max(n for _, _, n in some) // _WIDE)
        blocks = min(-(-threads // _COPY_PIECES.threads), _MOST_BLOCKS)
        grid = (blocks, len(some), 1)
        launches.append(Launch(_COPY_PIECES, words, grid, _COPY_PIECES.threads, 0, node))
    return launches


def build_program(
    builder: CudaPlanBuilder,
    resources: StreamResources,
    steps: Sequence[LinkedStep],
    transfers: HostTransfers,
    dialect: Dialect,
    storages: Sequence[CudaStorage],
) -> CudaProgram:
    """Plan a program's steps, get all kernels, and capture what an exchange runs.

    ``storages`` are all that it touches. Raises GraphError, DeviceError.
    """
    started = time.perf_counter()
    lowered = [builder.lower(step.nodes) for step in steps]
    scratch = builder.scratch_of(max((size for _, size in lowered), default=0))
    maker = _ExchangeMaker(builder, resources, transfers, scratch)
    exchanges = [
        maker.exchange(step, parts) for step, (parts, _) in zip(steps, lowered, strict=True)
    ]
    interpreted: Counter[str] = Counter()
    for parts, _ in lowered:
        interpreted.update(parts.interpreted)
    log.debug(
        "made %d exchanges of %d launches in %.1f ms; without kernels: %s",
        len(exchanges),
        len(maker.labels),
        (time.perf_counter() - started) * 1e3,
        dict(interpreted) or "none",
    )
    return CudaProgram(
        resources,
        dialect,
        storages,
        exchanges,
        maker.labels,
        scratch,
        dict(interpreted),
        transfers,
    )
