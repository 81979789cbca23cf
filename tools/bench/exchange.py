"""What an exchange of a split takes on a server with a card that does nothing: the host's part.

    python -m tools.bench.split --card none

A stand-in for CuPy takes launches and copies, copies, and computes nothing, so that what is left is
what this server does, both ends' system calls, and the loopback between them. Exchanges are those
of a token: as many to a run as a model has, each with the activations of one token in and out.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from client.backend import Backend
from client.connection import connect
from client.split.steps import (
    Envelope,
    Step,
    command_envelope,
    encode_steps,
    program_envelopes,
)
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
from rpc_server.devices.cpu.streaming.direct import DirectTransfer
from rpc_server.devices.cpu.streaming.transfer import Receive, Send
from rpc_server.devices.cpu.turns import PauseWord
from tools.bench.cores import on_core
from tools.bench.servers import answers
from tools.serving.ports import free_port
from tools.serving.processes import HOST, Process, emulation_command

# As tests.cuda.serve knows a card that computes nothing.
NO_CARD = {"EMULATION": "none"}
_START_SECONDS = 60.0
# The first program waits for compiled code.
_PATIENCE = 300.0

# An 8B's activations, and a head's rows of a weight: nothing reads them.
_WIDTH, _ROWS = 4096, 64
# Of a layer of 32 in tensor mode two, and the output's.
EXCHANGES = 65
_RUNS = 30


@dataclass(frozen=True)
class Figures:
    """Seconds of an exchange by one way: the median run's, and the fastest's."""

    way: str
    median: float
    least: float


async def _steps(b: Backend, count: int) -> list[Step]:
    """Products of one weight, each with an input and an output of its own."""
    w = await b.tensor(GgmlType.F16, (_WIDTH, _ROWS))
    steps = []
    for _ in range(count):
        x = b.graph.new_tensor(GgmlType.F32, (_WIDTH,), "x")
        y = b.graph.repeat(b.graph.mul_mat(w, x), _WIDTH)
        graph = b.graph.build([y])
        await b.allocate(t for t in (x, *graph.roots) if not t.placed)
        steps.append(Step((x,), graph, (y,)))
    return steps


async def _envelopes(b: Backend, steps: Sequence[Step], programs: bool) -> list[Envelope]:
    if not programs:
        return [command_envelope(b.connection, step) for step in steps]
    body = encode_steps(b.connection, steps)
    answer = await b.connection.request(Command.SPLIT_PROGRAM, data=body, device=0, program=0)
    assert not answer.result
    return program_envelopes(b.connection, 0, steps)


async def seconds_of_exchanges(port: int, *, programs: bool, runs: int = _RUNS) -> list[float]:
    """Return seconds of an exchange with the server at ``port``, of each run the mean.

    By a program of the split extension, or by ordinary commands. The first two runs, in which
    graphs are planned and captured, aren't counted.
    """
    async with await connect(HOST, port, split=programs, timeout=_PATIENCE) as connection:
        b = await Backend.open(connection)
        steps = await _steps(b, EXCHANGES)
        envelopes = await _envelopes(b, steps, programs)
        peer, pause = StreamPeer("the server", _PATIENCE, renewed=True), PauseWord()
        data = [np.zeros(_WIDTH, np.float32) for _ in range(2)]
        there, back = (int(array.ctypes.data) for array in data)
        transfers: list[DirectTransfer] = []
        for step, envelope in zip(steps, envelopes, strict=True):
            x, y = step.inputs[0], step.outputs[0]
            (prefix,), suffix = envelope.prefixes, envelope.suffix
            sent = Send(peer, [x], there, x.nbytes, prefix=prefix, suffix=suffix, completes=True)
            received = Receive(peer, y, back, y.nbytes, 1, y.nbytes, envelope.head)
            transfers += [DirectTransfer(t, pause) for t in (sent, received)]

        def run() -> float:
            started = time.perf_counter()
            for transfer in transfers:
                transfer()
            return (time.perf_counter() - started) / len(steps)

        measured = []
        for _ in range(2 + runs):
            peer.stream.open(await connection.lend())
            measured.append(await asyncio.to_thread(run))
            connection.take_back()
        return measured[2:]


def measure_exchanges() -> list[Figures]:
    """Measure a server of this project's with a card that does nothing, on the second core.

    Raises ProgramError.
    """
    port = free_port()
    with on_core(1):
        server = Process(emulation_command(port), env=NO_CARD)
    figures = []
    with server:
        server.wait_until(lambda: answers(port), _START_SECONDS, "answer to HELLO")
        for way, programs in (("a program", True), ("ordinary commands", False)):
            seconds = asyncio.run(seconds_of_exchanges(port, programs=programs))
            figures.append(Figures(way, statistics.median(seconds), min(seconds)))
    return figures


def exchange_table(figures: Sequence[Figures]) -> str:
    """Return the figures as Markdown."""
    lines = ["| exchanges by | us each, median | least |", "|---|---|---|"]
    lines += [f"| {f.way} | {f.median * 1e6:.0f} | {f.least * 1e6:.0f} |" for f in figures]
    return "\n".join(lines)
