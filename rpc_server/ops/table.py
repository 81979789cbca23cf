"""The op table, a row an op: its contract, its array reference, and what is known of it besides.

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
    from protocol.tensor import Tensor
    from rpc_server.ops.arrays import ArrayContext
    from rpc_server.ops.shards import Propagated, Shards

Contract = Callable[["Tensor"], None]
Reference = Callable[["ArrayContext", "Tensor"], None]
ShardRule = Callable[["Tensor", "Shards"], "Propagated | None"]


class ContractError(ValueError):
    """A node breaks its op's contract, or an index in its data is out of range."""


def refuse(message: str) -> NoReturn:
    raise ContractError(message)


def require(condition: bool, message: str) -> None:
    """Raise :class:`ContractError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ContractError(message)


def source(t: Tensor, i: int) -> Tensor:
    """Return source ``i`` of a node that must have it."""
    s = t.src[i]
    if s is None:
        refuse(f"source {i} is missing")
    return s


@dataclass(slots=True)
class OpSpec:
    """The row of one op, whatever the device; how many sources it has, the op itself says."""

    op: Op
    contract: Contract
    reference: Reference | None = None
    # No-ops (VIEW, RESHAPE, ...) only describe memory; nothing runs and nothing is written.
    is_view: bool = False
    # Sources that are written beside the node's own memory.
    writes: tuple[int, ...] = ()
    # What parts of a split make of it; None: only who has all of its sources can compute it.
    shard_rule: ShardRule | None = None

    def written(self, t: Tensor) -> list[Tensor]:
        """Return what node ``t`` of this op writes: itself, and sources that it changes."""
        return [t, *(s for i in self.writes if (s := t.src[i]) is not None)]


OPS: dict[Op, OpSpec] = {}


def contract(
    *ops: Op,
    is_view: bool = False,
    writes: tuple[int, ...] = (),
    shard_rule: ShardRule | None = None,
) -> Callable[[Contract], Contract]:
    """Register the contract of ``ops``, with what else their rows say (see :class:`OpSpec`)."""

    def register(function: Contract) -> Contract:
        for op in ops:
            if op in OPS:
                raise RuntimeError(f"two contracts for {op}")
            OPS[op] = OpSpec(op, function, None, is_view, writes, shard_rule)
        return function

    return register


def reference(*ops: Op) -> Callable[[Reference], Reference]:
    """Register the array implementation of ``ops`` (after their contract)."""

    def register(function: Reference) -> Reference:
        for op in ops:
            if OPS[op].reference is not None:
                raise RuntimeError(f"two references for {op}")
            OPS[op].reference = function
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
        for i in range(t.op.min_sources):
            if t.src[i] is None:
                refuse(f"source {i} is missing")
        most = t.op.max_sources
        for i in range(most, len(t.src)):
            if t.src[i] is not None:
                refuse(f"has a source {i}, the op takes {most}")
        if not spec.is_view:
            # Reading absent data is what a view may leave undone and nothing else may.
            for i, source in enumerate(t.src):
                if source is not None and source.address == 0 and not source.empty:
                    refuse(f"data of source {i} '{source.name}' not here")
            require(t.address != 0 or t.empty, "has no memory on this server")
        spec.contract(t)
    except ContractError as error:
        raise ContractError(f"{t.label}: {error}") from None
    return spec


def propagate(node: Tensor, shards: Shards) -> Propagated | None:
    """Return what a node makes of ``shards``, those of its sources (None: whole), by its op's rule.

    None if it has to have all of them. Views have no rule: they are looked up where they are read.
    """
    spec = OPS.get(node.op)
    rule = None if spec is None else spec.shard_rule
    if rule is None or node.empty or any(s is not None and s.empty for s in node.src):
        return None
    return rule(node, shards)
