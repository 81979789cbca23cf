"""A client that minds its own business, and notices whatever others do to it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from protocol.commands import Command
from tools.wire import ClosedError, Wire, sources, tensor

# How long it waits for anything, seconds.
PATIENCE = 30.0
_PAUSE = 0.01
_SIDE = 384
_PRODUCTS = 8


@dataclass(slots=True)
class Noticed:
    """The things that a victim saw beside an attack: worst and median latencies, in seconds.

    ``changed`` says what was not as it should have been, '' if nothing.
    """

    hello: float = 0.0
    graph: float = 0.0
    typical_hello: float = 0.0
    typical_graph: float = 0.0
    rounds: int = 0
    changed: str = ""


class Victim:
    """One connection with bytes of its own, a graph of one node, and one that measures speed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._wire = wire = Wire(port, timeout=PATIENCE)
        handle, base = wire.alloc(4 << 20)
        numbers = np.random.default_rng(5)
        self._content = numbers.bytes(1 << 20)
        self._bytes = tensor(1, (1 << 18,), handle, base)
        wire.set_tensor(self._bytes, self._content)
        self._values = numbers.random(256, np.float32)
        self._leaf = tensor(2, (256,), handle, base + (2 << 20))
        place = base + (2 << 20) + 4096
        self._node = tensor(3, (256,), handle, place, op=wire.op("ADD"), src=sources(2, 2))
        wire.set_tensor(self._leaf, self._values.tobytes())
        self._graph = wire.graph([self._node], [self._leaf])
        # Its own buffer: products of numbers that are zeros take as long as any.
        size = 4 * _SIDE * _SIDE
        handle, base = wire.alloc(2 * size)
        square = tensor(1, (_SIDE, _SIDE), handle, base)
        ne = (_SIDE, _SIDE)
        op = wire.op("MUL_MAT")
        products = [
            tensor(2 + i, ne, handle, base + size, op=op, src=sources(1, 1))
            for i in range(_PRODUCTS)
        ]
        self._products = wire.graph(products, [square])

    def close(self) -> None:
        """Hang up."""
        self._wire.socket.close()

    def hello(self) -> float:
        """Return how long it takes to connect and to have HELLO answered, in seconds."""
        started = time.perf_counter()
        with Wire(self._port, timeout=PATIENCE):
            return time.perf_counter() - started

    def one_node(self) -> tuple[float, bool]:
        """Return how long a graph of one node takes with its result, and whether that is right."""
        started = time.perf_counter()
        self._wire.send(Command.GRAPH_COMPUTE, self._graph)
        got = self._wire.get_tensor(self._node, 1024)
        return time.perf_counter() - started, got == (2 * self._values).tobytes()

    def intact(self) -> bool:
        """Return whether all its bytes are what they were."""
        return self._wire.get_tensor(self._bytes, len(self._content)) == self._content

    def speed(self, rounds: int = 9) -> float:
        """Return how long products of matrices take, in seconds: the fastest of some rounds."""
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            self._wire.send(Command.GRAPH_COMPUTE, self._products)
            self._wire.call(Command.GET_ALIGNMENT, {"device": 0})
            times.append(time.perf_counter() - started)
        return min(times)

    def watch(self, going_on: Callable[[], bool], seconds: float) -> Noticed:
        """Do what it does for ``seconds``, and as long as ``going_on()`` says; what it noticed."""
        seen = Noticed()
        hellos, graphs = [], []
        end = time.monotonic() + seconds
        while time.monotonic() < end or going_on():
            try:
                hellos.append(self.hello())
                latency, right = self.one_node()
                graphs.append(latency)
                if not right:
                    seen.changed = "a result is wrong"
                elif not self.intact():
                    seen.changed = "bytes have changed"
            except TimeoutError:
                seen.changed = f"no answer within {PATIENCE:.0f} s"
            except (ClosedError, OSError) as error:
                seen.changed = f"its connection ended ({type(error).__name__})"
            if seen.changed:
                break
            time.sleep(_PAUSE)
        seen.rounds = len(graphs)
        if graphs:
            seen.hello, seen.graph = max(hellos), max(graphs)
            seen.typical_hello = statistics.median(hellos)
            seen.typical_graph = statistics.median(graphs)
        return seen
