"""The worker's side of the split extension: a program's steps become items of a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from protocol.responses import encode_size
from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
from rpc_server.devices.cpu.streaming.transfer import Receive, Send, Swap, Transfer
from rpc_server.devices.planning.group import LinkGroup
from rpc_server.devices.planning.program import LinkedStep

# Outputs of a step that are larger in all go out one by one, while the next is computed.
_TOGETHER_UP_TO = 64 << 10


def program_items(
    steps: Sequence[LinkedStep], peer: StreamPeer, group: LinkGroup | None = None
) -> list[Tensor | Transfer]:
    """Return nodes and transfers of a program in the order of execution.

    ``group`` is what its swaps are made in; of a program that has some outputs are framed.
    """
    items: list[Tensor | Transfer] = []
    framed = any(step.swaps for step in steps)
    for step in steps:
        items += [Receive.whole(peer, t) for t in step.inputs]
        if framed:
            items += _as_computed(step, peer, framed=True)
        elif sum(t.nbytes for t in step.outputs) <= _TOGETHER_UP_TO:
            items += [*step.nodes, *Send.adjacent(peer, step.outputs)]
        else:
            items += _as_computed(step, peer)
        for swap in step.swaps:
            assert group is not None
            items.append(Swap(group.peers, swap.sent, swap.received))
    return items


def _as_computed(
    step: LinkedStep, peer: StreamPeer, *, framed: bool = False
) -> list[Tensor | Transfer]:
    """Each output is sent as soon as it and those before it are there; ``framed``: by its size."""

    def send(t: Tensor) -> Send:
        return Send.whole(peer, t, prefix=encode_size(t.nbytes) if framed else b"")

    items: list[Tensor | Transfer] = []
    due, missing = deque(step.outputs), {id(t) for t in step.nodes}
    for node in step.nodes:
        items.append(node)
        missing.discard(id(node))
        while due and id(due[0]) not in missing:
            items.append(send(due.popleft()))
    return items + [send(t) for t in due]
