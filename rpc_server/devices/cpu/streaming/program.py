"""The worker's side of the split extension: a program off the wire becomes items of a plan."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

from protocol.dialects import Dialect
from protocol.ggml.ops import Op
from protocol.responses import encode_size
from protocol.split import ProgramPayload, ProgramSwap
from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
from rpc_server.devices.cpu.streaming.transfer import Receive, Send, Swap, Transfer
from rpc_server.devices.planning.group import LinkGroup
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Resolve, check_order, parse_tensors, tensor_with_id

# Outputs of a step that are larger in all go out one by one, while the next is computed.
_TOGETHER_UP_TO = 64 << 10
# How often tensors go over the stream in one run, on average, at most.
_MOST_TRANSFERS = 8


def program_items(
    payload: ProgramPayload,
    dialect: Dialect,
    resolve: Resolve,
    peer: StreamPeer,
    group: LinkGroup | None = None,
) -> list[Tensor | Transfer]:
    """Return nodes and transfers of a program in the order of execution.

    ``group`` is what the client's swaps are made in. Raises GraphError: for what parse_tensors
    refuses, for what is taken, given or exchanged and is not whole and here, for an input that a
    node computes, and for swaps without a group of as many.
    """
    tensors = parse_tensors(payload.tensors, dialect, resolve)
    _check_transfers(payload)
    items: list[Tensor | Transfer] = []
    computed: list[Tensor] = []
    swaps = deque(payload.swaps)
    for number, step in enumerate(payload.steps):
        inputs = [_placed(tensors, i) for i in step.inputs]
        nodes = [tensor_with_id(tensors, i) for i in step.nodes]
        outputs = [_placed(tensors, i) for i in step.outputs]
        items += [Receive.whole(peer, t) for t in inputs]
        if payload.swaps:
            items += _as_computed(nodes, outputs, peer, framed=True)
        elif sum(t.nbytes for t in outputs) <= _TOGETHER_UP_TO:
            items += [*nodes, *Send.adjacent(peer, outputs)]
        else:
            items += _as_computed(nodes, outputs, peer)
        while swaps and swaps[0].step == number:
            items.append(_swap(swaps.popleft(), tensors, group))
        computed += nodes
    check_order(computed)
    return items


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


def _as_computed(
    nodes: list[Tensor], outputs: list[Tensor], peer: StreamPeer, *, framed: bool = False
) -> list[Tensor | Transfer]:
    """Each output is sent as soon as it and those before it are there; ``framed``: by its size."""

    def send(t: Tensor) -> Send:
        return Send.whole(peer, t, prefix=encode_size(t.nbytes) if framed else b"")

    items: list[Tensor | Transfer] = []
    due, missing = deque(outputs), {id(t) for t in nodes}
    for node in nodes:
        items.append(node)
        missing.discard(id(node))
        while due and id(due[0]) not in missing:
            items.append(send(due.popleft()))
    return items + [send(t) for t in due]


def _swap(swap: ProgramSwap, tensors: dict[int, Tensor], group: LinkGroup | None) -> Swap:
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
    return Swap(group.peers, found[group.number], received)


def _placed(tensors: dict[int, Tensor], id_: int) -> Tensor:
    t = tensor_with_id(tensors, id_)
    if t.empty or not t.address or not t.contiguous:
        raise GraphError(f"{t.label}: what a program takes or gives must be whole and here")
    return t
