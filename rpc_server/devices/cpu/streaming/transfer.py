"""Steps of a plan that move tensors between this server and a peer, beside its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides
from rpc_server.devices.cpu.catalog import Kernel, stream_receive, stream_send, stream_swap
from rpc_server.devices.cpu.kernels.interface.stream import (
    STAGING_BYTES,
    STATUS_TEXT,
    SWAP_PEER_WORDS,
    StreamPeer,
)
from rpc_server.devices.cpu.planner import Planner
from rpc_server.devices.planning.program import adjacent
from rpc_server.devices.planning.records import STATUS_TEXT as PLAN_STATUS_TEXT

PLAN_STATUS_TEXT.update(STATUS_TEXT)


@dataclass(slots=True)
class Send:
    """Send rows of memory framed by ``prefix`` and ``suffix``.

    ``tensors`` are what the rows are part of, for the schedule; ``address``, ``row_bytes``, ``ne``
    (of dimensions 1 to 3) and ``nb`` say where the rows lie.
    """

    peer: StreamPeer
    tensors: Sequence[Tensor]
    address: int
    row_bytes: int
    ne: tuple[int, int, int] = (1, 1, 1)
    nb: tuple[int, int, int] = (0, 0, 0)
    prefix: bytes = b""
    suffix: bytes = b""
    # Whether the peer has all it needs for a step after it: one exchange.
    completes: bool = False
    # How many times as long as one exchange the answer to that step may take.
    patience: int = 1
    kernel: ClassVar[Kernel] = stream_send
    _around: list[Any] = field(default_factory=list)

    @classmethod
    def whole(cls, peer: StreamPeer, t: Tensor, prefix: bytes = b"", suffix: bytes = b"") -> Send:
        """Send all of a tensor with dense rows."""
        return cls(peer, [t], t.address, t.row_size, t.ne[1:], t.nb[1:], prefix, suffix)

    @classmethod
    def adjacent(cls, peer: StreamPeer, tensors: Sequence[Tensor]) -> list[Send]:
        """Send contiguous tensors one after the other, by as few sends as their places allow."""
        runs = adjacent(tensors)
        return [cls(peer, run, run[0].address, sum(t.nbytes for t in run)) for run in runs]

    @property
    def label(self) -> str:
        return f"{self.peer.name}, which was sent '{self.tensors[0].name}',"

    @property
    def held(self) -> object:
        """Return what the record holds addresses of, beside tensors and streams."""
        return self._around

    def words(self, pause: int) -> list[int]:
        """Return the record's own words; at ``pause`` it is told to pause."""
        words = [self.peer.stream.address]
        around = [np.frombuffer(data or b"\0", np.uint8) for data in (self.prefix, self.suffix)]
        self._around = around
        words += [int(around[0].ctypes.data), len(self.prefix)]
        words += [self.address, self.row_bytes, *self.ne, *self.nb]
        words += [int(around[1].ctypes.data), len(self.suffix)]
        words += [self.peer.staging_address, STAGING_BYTES, int(self.completes)]
        return [*words, pause, self.patience]

    def emit(self, planner: Planner) -> None:
        """Append the record."""
        words, first = self.words(planner.pause_address), self.tensors[0]
        planner.emit(self.kernel, first, slots=(None, *self.tensors), extra=words, work=0)


@dataclass(slots=True)
class Receive:
    """Receive ``runs`` times ``run_bytes`` to places that are ``distance`` apart in ``tensor``."""

    peer: StreamPeer
    tensor: Tensor
    address: int
    run_bytes: int
    runs: int
    distance: int
    # Bytes of a size that the peer sends before the data: upstream's framing.
    head: int = 0
    kernel: ClassVar[Kernel] = stream_receive

    @classmethod
    def whole(cls, peer: StreamPeer, t: Tensor) -> Receive:
        """Receive all of a contiguous tensor."""
        return cls(peer, t, t.address, t.nbytes, 1, t.nbytes)

    @property
    def label(self) -> str:
        return f"{self.peer.name}, which computes '{self.tensor.name}',"

    @property
    def held(self) -> object:
        """Return nothing: the record holds addresses of tensors and streams alone."""
        return None

    def words(self, pause: int) -> list[int]:
        """Return the record's own words; at ``pause`` it is told to pause."""
        words = [self.peer.stream.address, self.head]
        words += [self.address, self.run_bytes, self.runs, self.distance]
        return [*words, self.peer.staging_address, STAGING_BYTES, pause]

    def emit(self, planner: Planner) -> None:
        """Append the record."""
        words = self.words(planner.pause_address)
        planner.emit(self.kernel, self.tensor, slots=(self.tensor,), extra=words, work=0)
        planner.finish(self.tensor)


@dataclass(slots=True)
class Swap:
    """Send a tensor to all peers, and receive one from each of them at the same time.

    ``peers`` are the others of a group by their numbers, ``received`` where what each sends goes.
    All tensors are contiguous.
    """

    peers: Mapping[int, StreamPeer]
    sent: Tensor
    received: Mapping[int, Tensor]
    _table: Any = None

    @property
    def label(self) -> str:
        others = ", ".join(f"part {i} ({peer.name})" for i, peer in self.peers.items())
        return f"'{self.sent.name}', exchanged with {others}"

    @property
    def held(self) -> object:
        """Return what the record holds the address of, beside tensors and streams."""
        return self._table

    def emit(self, planner: Planner) -> None:
        """Append the record."""
        words = []
        for i, peer in self.peers.items():
            t = self.received[i]
            words += [peer.stream.address, t.address, t.nbytes, i]
        n = len(self.peers)
        assert len(words) == SWAP_PEER_WORDS * n
        table = self._table = np.array([*words, *[0] * n], np.int64)
        extra = [int(table.ctypes.data), n, self.sent.address, self.sent.nbytes]
        extra.append(planner.pause_address)
        # A record writes one span: one that has all of them.
        slots = (_span(list(self.received.values())), self.sent)
        planner.emit(stream_swap, self.sent, slots=slots, extra=extra, work=0)
        for t in self.received.values():
            planner.finish(t)


def _span(tensors: Sequence[Tensor]) -> Tensor:
    """Bytes from the first of these to the end of the last, as a tensor."""
    start = min(t.address for t in tensors)
    size = max(t.address + t.nbytes for t in tensors) - start
    ne = (size, 1, 1, 1)
    return Tensor(0, GgmlType.I8, ne, contiguous_strides(GgmlType.I8, ne), Op.NONE, address=start)


Transfer = Send | Receive | Swap
