"""The op table: for each op its contract and its array reference.

One table serves every device. ``contract`` functions say when a node may be run at all; whatever
they let through must be memory-safe for the reference and for every device's kernels. References
are written once against an array module and run where a device has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from protocol.ggml.ops import Op

if TYPE_CHECKING:
    from rpc_server.graph.tensor import Tensor
    from rpc_server.ops.arrays import ArrayContext

Contract = Callable[["Tensor"], None]
Reference = Callable[["ArrayContext", "Tensor"], None]


class ContractError(ValueError):
    """A node breaks its op's contract, or an index in its data is out of range."""


def refuse(message: str) -> NoReturn:
    raise ContractError(message)


def require(condition: bool, message: str) -> None:
    """Raise :class:`ContractError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ContractError(message)


@dataclass(slots=True)
class OpSpec:
    """What is known of one op, whatever the device."""

    op: Op
    min_sources: int
    max_sources: int
    contract: Contract
    reference: Reference | None = None
    # No-ops (VIEW, RESHAPE, ...) only describe memory; nothing runs and nothing is written.
    is_view: bool = False
    # Sources that are written beside the node's own memory.
    writes: tuple[int, ...] = ()

    def written(self, t: Tensor) -> list[Tensor]:
        """What node ``t`` of this op writes: itself, and sources that it changes."""
        return [t, *(s for i in self.writes if (s := t.src[i]) is not None)]


OPS: dict[Op, OpSpec] = {}


def contract(
    op: Op,
    *,
    sources: int | tuple[int, int],
    is_view: bool = False,
    writes: tuple[int, ...] = (),
) -> Callable[[Contract], Contract]:
    """Register the contract of ``op``; ``sources`` is how many src entries it has (or min, max)."""
    low, high = (sources, sources) if isinstance(sources, int) else sources

    def register(function: Contract) -> Contract:
        if op in OPS:
            raise RuntimeError(f"two contracts for {op}")
        OPS[op] = OpSpec(op, low, high, function, is_view=is_view, writes=writes)
        return function

    return register


def reference(op: Op) -> Callable[[Reference], Reference]:
    """Register the array implementation of ``op`` (after its contract)."""

    def register(function: Reference) -> Reference:
        spec = OPS[op]
        if spec.reference is not None:
            raise RuntimeError(f"two references for {op}")
        spec.reference = function
        return function

    return register


def check(t: Tensor) -> OpSpec:
    """Hold node ``t`` against its op's contract; the spec if it passes.

    Raises ContractError naming the node.
    """
    spec = OPS.get(t.op)
    try:
        if spec is None:
            refuse("this server does not implement the op")
        for i, source in enumerate(t.src):
            if i < spec.min_sources:
                require(source is not None, f"source {i} is missing")
            elif i >= spec.max_sources:
                require(source is None, f"has a source {i}, the op takes {spec.max_sources}")
        if not spec.is_view:
            # Reading absent data is what a view may leave undone and nothing else may.
            for i, source in enumerate(t.src):
                if source is not None and not source.empty:
                    require(source.address != 0, f"data of source {i} '{source.name}' not here")
            require(t.address != 0 or t.empty, "has no memory on this server")
        spec.contract(t)
    except ContractError as error:
        raise ContractError(f"{t.label}: {error}") from None
    return spec
