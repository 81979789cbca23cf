"""Steps that a server computes again and again, and the bytes that make it do so.

A step is an exchange: inputs there, a graph, outputs back. A server with the split extension is
sent steps once as a program (protocol.split) and then streams. Any other gets the ordinary commands
in one go: inputs by SET_TENSOR, GRAPH_COMPUTE, outputs by GET_TENSOR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from client.backend import Backend, BackendBuffer
from client.builder.graph import Graph
from client.connection import Connection
from client.errors import AllocationFailed
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.split import ProgramStep, ProgramSwap, encode_program
from protocol.tensor import Tensor

_ALIGN = 128
_FIRST_REGION = 4 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """One exchange as a server sees it; all tensors have memory there."""

    inputs: tuple[Tensor, ...]
    graph: Graph
    outputs: tuple[Tensor, ...]
    # What goes to and comes from the others of a group behind it, by member; for programs only.
    swap: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Envelope:
    """The bytes around the inputs of one step on their way: a prefix for each, and what follows."""

    prefixes: tuple[bytes, ...]
    suffix: bytes
    # Framing before each output on the way back.
    head: int


def command_envelope(connection: Connection, step: Step) -> Envelope:
    """Return a step by ordinary commands."""
    prefixes = tuple(
        connection.message(
            Command.SET_TENSOR,
            body_size=t.nbytes,
            tensor=connection.wire_tensor(t),
            offset=0,
            cache_flag=0,
        )
        for t in step.inputs
    )
    payload = step.graph.encode(connection.dialect)
    suffix = connection.message(Command.GRAPH_COMPUTE, body_size=len(payload)) + payload
    for t in step.outputs:
        suffix += connection.message(
            Command.GET_TENSOR, tensor=connection.wire_tensor(t), offset=0, size=t.nbytes
        )
    return Envelope(prefixes, suffix, 8)


def program_envelopes(connection: Connection, number: int, steps: Sequence[Step]) -> list[Envelope]:
    """Return the envelopes of a program's steps: what starts it goes out with the first input."""
    run = connection.message(Command.SPLIT_RUN, device=0, program=number)
    # Outputs of a program with swaps are framed: instead of one there may be why it fails.
    head = 8 if any(s.swap for s in steps) else 0
    envelopes = [Envelope((b"",) * len(s.inputs), b"", head) for s in steps]
    envelopes[0] = Envelope((run, *envelopes[0].prefixes[1:]), b"", head)
    return envelopes


def encode_steps(connection: Connection, steps: Sequence[Step]) -> bytes:
    """Return the body of the SPLIT_PROGRAM that has ``steps``."""
    tensors = np.concatenate([s.graph.payload(connection.dialect).tensors for s in steps])
    # Weights may be part of several steps.
    _, first = np.unique(tensors["id"], return_index=True)
    program = [
        ProgramStep(
            tuple(t.id for t in s.inputs),
            tuple(t.id for t in s.graph.nodes),
            tuple(t.id for t in s.outputs),
        )
        for s in steps
    ]
    swaps = [ProgramSwap(i, tuple(t.id for t in s.swap)) for i, s in enumerate(steps) if s.swap]
    return encode_program(program, tensors[np.sort(first)], swaps)


class Region:
    """Memory on one server that the tensors of all steps share, one step after the other.

    ``buffer`` is the one that tensors are placed in now.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.buffer: BackendBuffer | None = None

    async def place(self, tensors: Sequence[Tensor]) -> BackendBuffer | None:
        """Give the tensors of one step memory, outputs last and adjacent where sizes allow.

        Where they need more than there is, they get a new buffer, twice as large as needed if there
        is room; the old one, in which steps made before still lie, is returned. Raises
        AllocationFailed, ConnectionLost.
        """
        offsets, at = [], 0
        for t in tensors:
            offsets.append(at)
            at = -(-(at + await self._backend.alloc_size(t)) // _ALIGN) * _ALIGN
        old = None
        if self.buffer is None or at > self.buffer.size:
            try:
                made = await self._new(max(_FIRST_REGION, 2 * at))
            except AllocationFailed:
                made = await self._new(at)
            old, self.buffer = self.buffer, made
        for t, offset in zip(tensors, offsets, strict=True):
            t.place(self.buffer.handle, self.buffer.base + offset)
        return old

    async def place_at(
        self, places: Sequence[tuple[Tensor, int]], size: int
    ) -> BackendBuffer | None:
        """Give tensors their places in ``size`` bytes; as :meth:`place`."""
        old = None
        if self.buffer is None or size > self.buffer.size:
            old, self.buffer = self.buffer, await self._new(size)
        for t, offset in places:
            t.place(self.buffer.handle, self.buffer.base + offset)
        return old

    async def _new(self, size: int) -> BackendBuffer:
        probe = self._backend.graph.new_tensor_1d(GgmlType.I8, size, "exchange")
        (made,) = await self._backend.allocate([probe])
        return made
