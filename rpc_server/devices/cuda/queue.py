"""One client's graphs on a card: a stream of their own, beside those of other clients."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from protocol.dialects import Dialect
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload
from rpc_server.devices.base import Plan, StopWord
from rpc_server.devices.cuda.plan import CudaPlan, CudaPlanBuilder
from rpc_server.devices.cuda.resources import StreamResources
from rpc_server.devices.cuda.storage import CudaStorage
from rpc_server.devices.planning.nodes import watching
from rpc_server.devices.planning.program import linked_steps
from rpc_server.devices.planning.transfers import TransfersOf
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Resolve, parse_graph

if TYPE_CHECKING:
    from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
    from rpc_server.devices.planning.group import LinkGroup

T = TypeVar("T")


class CudaQueue:
    """A queue for graphs of one client; one of its jobs runs at a time.

    The card gives it nothing before the first graph; :meth:`leave` gives all of it back.
    """

    def __init__(
        self,
        resources: StreamResources,
        threads: concurrent.futures.ThreadPoolExecutor,
        transfers: TransfersOf | None = None,
    ) -> None:
        """``transfers`` are by which programs reach their clients; without, none is taken."""
        self._resources = resources
        self._threads = threads
        self._transfers = transfers
        self._builder = CudaPlanBuilder(resources)

    @property
    def stream(self) -> Any:
        """The card's stream that graphs run on, one after the other."""
        return self._resources.stream

    def prepare(
        self, payload: GraphPayload, dialect: Dialect, resolve: Resolve, stop: StopWord | None
    ) -> CudaPlan:
        """Do what Queue says."""
        storages: dict[int, CudaStorage] = {}
        graph = parse_graph(payload, dialect, watching(resolve, CudaStorage, storages))
        return self._builder.build(graph, list(storages.values()), stop)

    def program(
        self,
        payload: ProgramPayload,
        dialect: Dialect,
        resolve: Resolve,
        peer: StreamPeer,
        group: LinkGroup | None = None,
    ) -> CudaPlan:
        """Return a program of the split extension, its steps captured. Raises GraphError."""
        from rpc_server.devices.cuda.program import build_program

        if self._transfers is None:
            raise GraphError("programs of the split extension don't run here")
        # What it compiles is compiled while the card's kernels are.
        transfers = self._transfers(peer)
        storages: dict[int, CudaStorage] = {}
        # No group is joined for this device: a program with swaps is refused.
        steps = linked_steps(payload, dialect, watching(resolve, CudaStorage, storages))
        return build_program(
            self._builder, self._resources, steps, transfers, dialect, list(storages.values())
        )

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``job`` on a thread of the device's."""
        return self._threads.submit(job)

    def at_once(self, plan: Plan) -> bool:
        """Do nothing: a card is waited for."""
        return False

    def waited(self, now: float) -> float:
        """Return 0: graphs run beside those of others."""
        return 0.0

    def leave(self) -> None:
        """Give back what the card has given; plans must be gone, and nothing may run."""
        self._builder.close()
        self._resources.close()
