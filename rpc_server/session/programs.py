"""The programs that one client keeps on this server, and the stream they run over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from protocol.dialects import Dialect
from protocol.errors import ProtocolError
from protocol.split import MAX_PROGRAMS, ProgramPayload
from rpc_server.devices.base import BufferLike, Plan, Queue
from rpc_server.session.buffers import Buffers
from rpc_server.session.graph_memory import Share
from rpc_server.session.mapped import redirect

if TYPE_CHECKING:
    from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
    from rpc_server.devices.planning.group import LinkGroup


@dataclass(frozen=True, slots=True)
class _KeptProgram:
    """A program: its plan, the buffers that it uses, the bytes that count for it."""

    plan: Plan
    handles: frozenset[int]
    nbytes: int
    has_swaps: bool


class Programs:
    """By device and number. Programs that use a buffer are forgotten with it.

    Those with swaps need ``group``, and are forgotten with that.
    """

    def __init__(self, name: str, patience: float, share: Share) -> None:
        """``patience`` is how long a program waits for the client between exchanges, seconds.

        What is kept counts against ``share``.
        """
        self._share = share
        self._name = name
        self._patience = patience
        self._plans: dict[tuple[int, int], _KeptProgram] = {}
        self.group: LinkGroup | None = None

    @cached_property
    def peer(self) -> StreamPeer:
        """The client, as programs see it."""
        # Brings numba, which takes long to import: not before somebody needs it.
        from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer

        return StreamPeer(self._name, self._patience)

    @staticmethod
    def check(number: int) -> None:
        """Raise ProtocolError for a number that no program may have."""
        if number >= MAX_PROGRAMS:
            raise ProtocolError(f"program {number}, there are {MAX_PROGRAMS}")

    def make(
        self,
        queue: Queue,
        index: int,
        number: int,
        payload: ProgramPayload,
        size: int,
        dialect: Dialect,
        buffers: Buffers,
    ) -> None:
        """Plan a program in the place of one with the same number; on the device's thread.

        ``buffers`` are the client's; ``size`` is the number of bytes that it came in. Raises
        GraphError, LimitReached.
        """
        handles: set[int] = set()

        def watched(handle: int) -> BufferLike | None:
            handles.add(handle)
            return buffers.find(handle)

        self._drop((index, number))
        tensors, find = redirect(buffers.on(index), payload.tensors, watched)
        given = replace(payload, tensors=tensors)
        plan = queue.program(given, dialect, find, self.peer, self.group)
        # Programs may keep what they were read from: inputs, outputs, names.
        nbytes = size + plan.nbytes
        self._share.take(nbytes, "a program")
        self._plans[index, number] = _KeptProgram(
            plan, frozenset(handles), nbytes, bool(payload.swaps)
        )

    def _drop(self, key: tuple[int, int]) -> None:
        known = self._plans.pop(key, None)
        if known is not None:
            self._share.give_back(known.nbytes)

    def find(self, index: int, number: int) -> Plan:
        """Return a program; raise ProtocolError if there is no such one (any more)."""
        known = self._plans.get((index, number))
        if known is None:
            raise ProtocolError(f"SPLIT_RUN of program {number}, which device {index} doesn't have")
        return known.plan

    def group_of(self, index: int, number: int) -> LinkGroup | None:
        """Return the group that a program has swaps in, None where it has none.

        Raises ProtocolError where not all of it are linked.
        """
        if not self._plans[index, number].has_swaps:
            return None
        group = self.group
        if group is None or group.closed or group.missing:
            raise ProtocolError(f"SPLIT_RUN of program {number}, whose parts are not linked")
        return group

    def leave_group(self) -> LinkGroup | None:
        """Hang up on the other parts, and forget programs with swaps; return what the group was."""
        group, self.group = self.group, None
        if group is not None:
            for key in [key for key, kept in self._plans.items() if kept.has_swaps]:
                self._drop(key)
            group.close()
        return group

    def buffer_freed(self, handle: int) -> None:
        """Forget programs that use this buffer."""
        for key in [key for key, kept in self._plans.items() if handle in kept.handles]:
            self._drop(key)

    def clear(self) -> None:
        """Forget all of them."""
        for key in list(self._plans):
            self._drop(key)
