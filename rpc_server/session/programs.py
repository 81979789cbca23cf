"""The programs that one client keeps on this server, and the stream they run over."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from protocol.dialects import Dialect
from protocol.errors import ProtocolError
from protocol.split import MAX_PROGRAMS, ProgramPayload
from rpc_server.devices.base import (
    BufferLike,
    Plan,
    Queue,
    Resolve,
)

if TYPE_CHECKING:
    from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer


class Programs:
    """By device and number. Programs that use a buffer are forgotten with it."""

    def __init__(self, name: str, patience: float) -> None:
        """``patience`` is how long a program waits for the client between exchanges, seconds."""
        self._name = name
        self._patience = patience
        self._plans: dict[tuple[int, int], tuple[Plan, frozenset[int]]] = {}

    @cached_property
    def peer(self) -> StreamPeer:
        """The client, as programs see it."""
        # Brings numba, which takes long to import: not before somebody needs it.
        from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer

        return StreamPeer(self._name, self._patience)

    @staticmethod
    def check(number: int) -> None:
        """Raises ProtocolError for a number that no program may have."""
        if number >= MAX_PROGRAMS:
            raise ProtocolError(f"program {number}, there are {MAX_PROGRAMS}")

    def make(
        self,
        queue: Queue,
        index: int,
        number: int,
        payload: ProgramPayload,
        dialect: Dialect,
        resolve: Resolve,
    ) -> None:
        """Plan a program in the place of one with the same number; on the device's thread.

        Raises GraphError.
        """
        handles: set[int] = set()

        def watched(handle: int) -> BufferLike | None:
            handles.add(handle)
            return resolve(handle)

        self._plans.pop((index, number), None)
        plan = queue.program(payload, dialect, watched, self.peer)
        self._plans[index, number] = (plan, frozenset(handles))

    def find(self, index: int, number: int) -> Plan:
        """Raises ProtocolError if there is no such program (any more)."""
        known = self._plans.get((index, number))
        if known is None:
            raise ProtocolError(f"SPLIT_RUN of program {number}, which device {index} doesn't have")
        return known[0]

    def buffer_freed(self, handle: int) -> None:
        """Forget programs that use this buffer."""
        self._plans = {key: kept for key, kept in self._plans.items() if handle not in kept[1]}

    def clear(self) -> None:
        self._plans.clear()
