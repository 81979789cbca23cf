"""What making a plan is on every device: lowering node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError, NodeError
from rpc_server.graph.parse import BufferLike, Resolve
from rpc_server.ops.table import ContractError, OpSpec, check

R = TypeVar("R")
S = TypeVar("S")
Lowering = TypeVar("Lowering", bound=Callable[..., bool])

PlanAction = Callable[[], None]


def registers(table: dict[Op, Lowering], ops: Sequence[Op]) -> Callable[[Lowering], Lowering]:
    """Return what enters a function in ``table`` as the only lowering of ``ops``."""

    def register(function: Lowering) -> Lowering:
        for op in ops:
            if op in table:
                raise RuntimeError(f"two lowerings for {op}")
            table[op] = function
        return function

    return register


def watching(resolve: Resolve, kind: type[S], storages: dict[int, S]) -> Resolve:
    """Return ``resolve`` that notes by handles the storages of ``kind`` that it finds."""

    def watched(handle: int) -> BufferLike | None:
        buffer = resolve(handle)
        storage = getattr(buffer, "storage", None)
        if isinstance(storage, kind):
            storages[handle] = storage
        return buffer

    return watched


class NodePlanner(Protocol):
    """A planner that is told where a node begins, and what has been written."""

    def begin(self, node: Tensor) -> None: ...
    def finish(self, node: Tensor) -> None: ...


def lower_node(
    node: Tensor,
    planner: NodePlanner,
    lower: Callable[[Tensor], bool],
    decline: Callable[[Tensor, OpSpec], None],
) -> None:
    """Hold ``node`` against its contract and lower it, if it is to run at all.

    Where ``lower`` has no kernel for it, ``decline`` does what is to be done instead. Raises
    NodeError, GraphError.
    """
    try:
        planner.begin(node)
        spec = check(node)
        if spec.is_view or node.empty:
            return
        if not lower(node):
            decline(node, spec)
        for written in spec.written(node):
            planner.finish(written)
    except ContractError as error:
        raise NodeError(str(error)) from None
    except MemoryError as error:
        raise GraphError(f"{node.label}: {error}") from None


class PlanSteps(list[list[R] | Tensor]):
    """Runs of records or launches, and between them nodes that have none.

    ``interpreted`` says how many of those there are of which op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.interpreted: dict[str, int] = {}

    def without_kernel(self, before: list[R], node: Tensor) -> None:
        """Add ``node``, which has no kernel; ``before`` is what runs since the last such."""
        self += [before, node]
        self.interpreted[node.op] = self.interpreted.get(node.op, 0) + 1

    def steps(
        self, of_node: Callable[[Tensor], PlanAction], of_run: Callable[[list[R]], PlanAction]
    ) -> list[PlanAction]:
        """Return what a plan does, one after the other."""
        return [
            of_node(part) if isinstance(part, Tensor) else of_run(part)
            for part in self
            if isinstance(part, Tensor) or part
        ]

    def runs(self) -> Iterable[list[R]]:
        """Yield all but the nodes."""
        return (part for part in self if not isinstance(part, Tensor))
