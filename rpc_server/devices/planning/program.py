"""A program of the split extension off the wire: its steps, linked and checked, for any device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from protocol.dialects import Dialect
from protocol.ggml.ops import Op
from protocol.split import ProgramPayload, ProgramSwap
from protocol.tensor import Tensor
from rpc_server.devices.planning.group import LinkGroup
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Resolve, check_order, parse_tensors, tensor_with_id

# How often tensors go over the stream in one run, on average, at most.
_MOST_TRANSFERS = 8


@dataclass(frozen=True, slots=True)
class LinkedSwap:
    """A tensor that goes to all others of a group, and where what each sends goes, by number."""

    sent: Tensor
    received: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class LinkedStep:
    """One exchange: what it takes, computes and gives, and the swaps behind it.

    Inputs and outputs are contiguous, not empty, and lie inside of buffers of the client.
    """

    inputs: list[Tensor]
    nodes: list[Tensor]
    outputs: list[Tensor]
    swaps: list[LinkedSwap]


def linked_steps(
    payload: ProgramPayload, dialect: Dialect, resolve: Resolve, group: LinkGroup | None = None
) -> list[LinkedStep]:
    """Return the steps of a program in the order of execution.

    ``group`` is what the client's swaps are made in. Raises GraphError: for what parse_tensors
    refuses, for what is taken, given or exchanged and is not whole and here, for an input that a
    node computes, and for swaps without a group of as many.
    """
    tensors = parse_tensors(payload.tensors, dialect, resolve)
    _check_transfers(payload)
    steps: list[LinkedStep] = []
    swaps = deque(payload.swaps)
    for number, step in enumerate(payload.steps):
        inputs = [_placed(tensors, i) for i in step.inputs]
        nodes = [tensor_with_id(tensors, i) for i in step.nodes]
        outputs = [_placed(tensors, i) for i in step.outputs]
        behind: list[LinkedSwap] = []
        while swaps and swaps[0].step == number:
            behind.append(_swap(swaps.popleft(), tensors, group))
        steps.append(LinkedStep(inputs, nodes, outputs, behind))
    check_order([t for step in steps for t in step.nodes])
    return steps


def adjacent(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return contiguous tensors in their order, as few runs that lie side by side."""
    runs: list[list[Tensor]] = []
    for t in tensors:
        if runs and runs[-1][-1].address + runs[-1][-1].nbytes == t.address:
            runs[-1].append(t)
        else:
            runs.append([t])
    return runs


def _check_transfers(payload: ProgramPayload) -> None:
    """Raise GraphError for a program that says the same again and again.

    An id is 8 bytes, and the transfer that is made of it more than a kilobyte.
    """
    for step in payload.steps:
        for ids in (step.inputs, step.outputs):
            if len(set(ids)) != len(ids):
                raise GraphError("a program's step takes or gives the same tensor twice")
    transfers = sum(len(step.inputs) + len(step.outputs) for step in payload.steps)
    for swap in payload.swaps:
        if len(set(swap.ids)) != len(swap.ids):
            raise GraphError("a program's swap names the same tensor twice")
        transfers += len(swap.ids)
    most = _MOST_TRANSFERS * len(payload.tensors)
    if transfers > most:
        raise GraphError(f"a program of {len(payload.tensors)} tensors and {transfers} transfers")


def _swap(swap: ProgramSwap, tensors: dict[int, Tensor], group: LinkGroup | None) -> LinkedSwap:
    if group is None or len(swap.ids) != group.n_parts:
        have = "none" if group is None else f"one of {group.n_parts}"
        raise GraphError(f"a swap in a group of {len(swap.ids)}, the client has {have}")
    found = [_placed(tensors, i) for i in swap.ids]
    received = {i: t for i, t in enumerate(found) if i != group.number}
    for t in received.values():
        if t.op is not Op.NONE:
            raise GraphError(f"{t.label}: what a swap brings must not be computed here")
    for one, other in pairwise(sorted(found, key=lambda t: t.address)):
        if one.address + one.nbytes > other.address:
            raise GraphError(f"{one.label}: a swap's tensors lie over one another")
    return LinkedSwap(found[group.number], received)


def _placed(tensors: dict[int, Tensor], id_: int) -> Tensor:
    t = tensor_with_id(tensors, id_)
    if t.empty or not t.address or not t.contiguous:
        raise GraphError(f"{t.label}: what a program takes or gives must be whole and here")
    return t
