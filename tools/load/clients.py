"""What each client of a load test does: honest work, checked, and every way of leaving.

All steady clients have the same work, so that what they get done can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from client.backend import Backend
from client.connection import Connection
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

Floats = npt.NDArray[np.float32]

# Of the weights and of the activations, elements.
_WIDTH, _ROWS, _TOKENS = 256, 384, 8
_EPS = 1e-5
# Rounds of one connection at most.
_ROUNDS = 40
# A client that has not got an answer for so long is starved.
PATIENCE = 60.0
# What a client that never reads asks for, and how often.
_UNREAD_BYTES = 4 << 20
_UNREAD_TIMES = 8


class WrongResult(Exception):  # noqa: N818
    """A graph gave other values than numpy."""


@dataclass(slots=True)
class LoadTally:
    """The work that one client got done."""

    name: str
    kind: str
    rounds: int = 0
    connections: int = 0
    left: Counter[str] = field(default_factory=Counter)
    # Seconds of each round.
    times: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class LoadClient:
    """One client: the server's address, what it gets done, its choices, and what ends it."""

    address: Address
    tally: LoadTally
    chosen: random.Random
    stop: asyncio.Event

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Backend]:
        """Connect once more."""
        async with Backend.connect(*self.address, version=None, timeout=PATIENCE) as backend:
            self.tally.connections += 1
            yield backend


Behaviour = Callable[[LoadClient], Coroutine[Any, Any, None]]


class _Work:
    """One connection's weights and graph: ``rms_norm(weights x activations)``."""

    def __init__(self, backend: Backend, chosen: random.Random) -> None:
        self._backend = backend
        self._random = np.random.default_rng(chosen.getrandbits(32))

    async def prepare(self) -> None:
        """Upload the weights and make the graph."""
        b, shape = self._backend, (_ROWS, _WIDTH)
        self._weights = self._random.standard_normal(shape, np.float32)
        w = await b.tensor(GgmlType.F32, (_WIDTH, _ROWS), self._weights)
        self.x = await b.tensor(GgmlType.F32, (_WIDTH, _TOKENS))
        self._y = b.graph.rms_norm(b.graph.mul_mat(w, self.x), _EPS)
        self._plan = await b.prepare(self._y)

    def activations(self) -> Floats:
        return self._random.standard_normal((_TOKENS, _WIDTH), np.float32)

    async def round(self) -> None:
        """Upload, compute, download. Raises WrongResult."""
        x = self.activations()
        await self._backend.upload(self.x, x)
        await self._plan.run()
        y = (await self._backend.download(self._y)).reshape(_TOKENS, _ROWS)
        products = x.astype(np.float64) @ self._weights.T.astype(np.float64)
        expected = products / np.sqrt((products**2).mean(axis=1, keepdims=True) + _EPS)
        error = float(np.abs(y - expected).max())
        if not error < 1e-3:
            raise WrongResult(f"off by {error:.3g}")

    @property
    def plan_payload(self) -> bytes:
        return self._plan.graph.encode(self._backend.connection.dialect)


# -- ways of leaving


async def _politely(connection: Connection, work: _Work, chosen: random.Random) -> None:
    await connection.close()


async def _at_once(connection: Connection, work: _Work, chosen: random.Random) -> None:
    connection.abort()


async def _within_an_upload(connection: Connection, work: _Work, chosen: random.Random) -> None:
    data = work.activations().tobytes()
    fields = {"tensor": connection.wire_tensor(work.x), "offset": 0, "cache_flag": 0}
    message = connection.message(Command.SET_TENSOR, body_size=len(data), **fields) + data
    await _cut(connection, message, chosen)


async def _within_a_graph(connection: Connection, work: _Work, chosen: random.Random) -> None:
    payload = work.plan_payload
    message = connection.message(Command.GRAPH_COMPUTE, body_size=len(payload)) + payload
    await _cut(connection, message, chosen)


async def _cut(connection: Connection, message: bytes, chosen: random.Random) -> None:
    await connection.send_raw(message[: chosen.randrange(1, len(message))])
    await asyncio.sleep(chosen.choice((0.0, 0.01, 0.1)))
    connection.abort()


async def _while_computing(connection: Connection, work: _Work, chosen: random.Random) -> None:
    for _ in range(3):
        await connection.graph_compute(work.plan_payload)
    connection.abort()


async def _with_answers_due(connection: Connection, work: _Work, chosen: random.Random) -> None:
    for _ in range(4):
        await connection.start(
            Command.GET_TENSOR,
            destination=memoryview(bytearray(work.x.nbytes)),
            tensor=connection.wire_tensor(work.x),
            offset=0,
            size=work.x.nbytes,
        )
    connection.abort()


_WAYS = {
    "politely": _politely,
    "at once": _at_once,
    "within an upload": _within_an_upload,
    "within a graph": _within_a_graph,
    "while computing": _while_computing,
    "with answers due": _with_answers_due,
}


# -- behaviours


async def _session(c: LoadClient, pause: float) -> None:
    """One connection: some rounds of work, then gone in one of many ways."""
    async with c.connected() as backend:
        work = _Work(backend, c.chosen)
        async with asyncio.timeout(PATIENCE):
            await work.prepare()
        for _ in range(c.chosen.randint(1, _ROUNDS)):
            started = time.monotonic()
            async with asyncio.timeout(PATIENCE):
                await work.round()
            c.tally.rounds += 1
            c.tally.times.append(time.monotonic() - started)
            if c.stop.is_set():
                break
            if pause:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(c.stop.wait(), c.chosen.uniform(0, 2 * pause))
        way = c.chosen.choice(list(_WAYS))
        c.tally.left[way] += 1
        await _WAYS[way](backend.connection, work, c.chosen)


async def _forever(c: LoadClient, pause: float) -> None:
    while not c.stop.is_set():
        try:
            await _session(c, pause)
        except WrongResult as error:
            c.tally.problems.append(f"wrong result: {error}")
        except TimeoutError:
            c.tally.problems.append(f"no answer for {PATIENCE:.0f} s")
        except OSError as error:
            c.tally.problems.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.5)


async def steady(c: LoadClient) -> None:
    """Work without a pause, and come back after each time it left."""
    await _forever(c, 0.0)


async def slow(c: LoadClient) -> None:
    """Do the same with pauses."""
    await _forever(c, 0.2)


async def deaf(c: LoadClient) -> None:
    """Ask for megabytes and never read them; hang up after a while, and come back."""
    while not c.stop.is_set():
        with contextlib.suppress(OSError, TimeoutError):
            async with c.connected() as backend:
                connection = backend.connection
                t = await backend.tensor(GgmlType.I8, (_UNREAD_BYTES,))
                # From here on nobody reads: the socket is used as if it were another's.
                number = await connection.lend()
                await _ask(number, _requests(connection, t))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(c.stop.wait(), c.chosen.uniform(0.5, 5.0))
                c.tally.left["never read"] += 1
                connection.abort()


def _requests(connection: Connection, t: Tensor) -> bytes:
    message = connection.message(
        Command.GET_TENSOR, tensor=connection.wire_tensor(t), offset=0, size=t.nbytes
    )
    return message * _UNREAD_TIMES


async def _ask(number: int, requests: bytes) -> None:
    with socket.socket(fileno=os.dup(number)) as lent:
        lent.setblocking(False)
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(lent, requests), PATIENCE)


async def trickling(c: LoadClient) -> None:
    """Send an upload a few bytes at a time, and hang up before its end."""
    while not c.stop.is_set():
        with contextlib.suppress(OSError, TimeoutError):
            async with c.connected() as backend:
                work = _Work(backend, c.chosen)
                await work.prepare()
                connection = backend.connection
                fields = {"tensor": connection.wire_tensor(work.x), "offset": 0, "cache_flag": 0}
                head = connection.message(Command.SET_TENSOR, body_size=work.x.nbytes, **fields)
                data = head + bytes(work.x.nbytes)
                for at in range(0, c.chosen.randrange(len(data)), 64):
                    await connection.send_raw(data[at : at + 64])
                    await asyncio.sleep(0.01)
                    if c.stop.is_set():
                        break
                c.tally.left["within a slow upload"] += 1
                connection.abort()


KINDS: dict[str, Behaviour] = {
    "steady": steady,
    "slow": slow,
    "deaf": deaf,
    "trickling": trickling,
}


def kinds(count: int) -> list[str]:
    """Return the kinds of ``count`` clients.

    Two in ten are slow, one deaf, one trickling, the others steady.
    """
    pattern = ("steady", "slow", "steady", "deaf", "steady", "steady", "trickling", "steady")
    return [(*pattern, "steady", "slow")[i % 10] for i in range(count)]
