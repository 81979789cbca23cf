"""A client whose data and graph are checked before and after something happens to another."""

from __future__ import annotations

import numpy as np

from protocol.commands import Command
from tests.server.process import ServerProcess, Wire, sources, tensor


class Bystander:
    """A connection with values in memory, and a graph that doubles them."""

    def __init__(self, server: ServerProcess) -> None:
        self.wire = Wire(server.port)
        handle, base = self.wire.alloc(1 << 14)
        self._values = np.arange(1024, dtype=np.float32)
        self._a = tensor(1, (1024,), handle, base)
        op = self.wire.op("ADD")
        self._c = tensor(2, (1024,), handle, base + 8192, op=op, src=sources(1, 1))
        self.wire.set_tensor(self._a, self._values.tobytes())
        self.wire.compute([self._c], [self._a])
        self.check()

    def __enter__(self) -> Bystander:
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.socket.close()

    def check(self) -> None:
        """Data and graph are as they were."""
        self.wire.call(Command.GRAPH_RECOMPUTE, {"device": 0})
        assert self.wire.get_tensor(self._c, 4096) == (2 * self._values).tobytes()
        assert self.wire.get_tensor(self._a, 4096) == self._values.tobytes()


def endless(wire: Wire, n: int = 1024, nodes: int = 400) -> bytes:
    """The payload of a graph that computes for minutes: products of square matrices, in a chain."""
    size = 4 * n * n
    handle, base = wire.alloc(3 * size)
    a = tensor(1, (n, n), handle, base)
    chain = [
        tensor(
            10 + i,
            (n, n),
            handle,
            base + size * (1 + i % 2),
            op=wire.op("MUL_MAT"),
            src=sources(1, 9 + i if i else 1),
        )
        for i in range(nodes)
    ]
    return wire.graph(chain, [a])
