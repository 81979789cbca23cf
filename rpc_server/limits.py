"""What clients may take, and for how long: every bound of the server, and its option."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.requests import Limits

# What a peer has to move within --stall-timeout, if the message isn't over before: one that
# trickles a byte a second is no better than one that says nothing.
STALL_BYTES = 64 << 10
# Answers that were not taken, above which no further request of that client is handled.
UNSENT_BYTES = 256 << 10
# What a graph may take beside its client's buffers, and as many bytes again as these have: rows
# that are rounded or unpacked, arrays of nodes that have no kernel.
SCRATCH_BYTES = 256 << 20


class LimitReached(Exception):  # noqa: N818 - says what happened
    """A client is at a limit, and its connection ends; the message names what and how much.

    ``option`` is the option of the command line that sets the limit.
    """

    def __init__(self, option: str, what: str) -> None:
        super().__init__(f"{what} ({option})")
        self.option = option


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bytes, counts and seconds; None where there is no limit.

    ``message`` bounds graphs and programs: uploads are bounded by the buffer they go to.
    """

    memory_per_client: int | None = None
    # Of messages, plans and programs of all clients; None: as suits the machine.
    graph_memory: int | None = None
    message: int = 64 << 20
    graph_nodes: int = 1 << 17
    graph_tensors: int = 1 << 18
    clients: int = 256
    clients_per_address: int = 128
    handshake: float = 10.0
    idle: float | None = None
    stall: float | None = 60.0
    graph: float | None = 3600.0
    peer: float = 120.0
    drain: float = 10.0

    @property
    def framing(self) -> Limits:
        """The part that the reader holds requests against."""
        return Limits(graph_bytes=self.message)

    def check_graph(self, nodes: int, tensors: int) -> None:
        """Raise LimitReached for a graph that is too large."""
        if nodes > self.graph_nodes:
            raise LimitReached(
                "--max-graph-nodes", f"a graph of {nodes} nodes, the limit is {self.graph_nodes}"
            )
        if tensors > self.graph_tensors:
            raise LimitReached(
                "--max-graph-tensors",
                f"a graph of {tensors} tensors, the limit is {self.graph_tensors}",
            )

    def check_program(self, steps: int, ids: int) -> None:
        """Raise LimitReached for more steps than nodes are allowed, or ids that say too much.

        A step that computes nothing and moves nothing isn't sent by anyone, and an id is one of a
        tensor that is computed, or comes or goes between two steps.
        """
        if steps > self.graph_nodes:
            raise LimitReached(
                "--max-graph-nodes", f"a program of {steps} steps, the limit is {self.graph_nodes}"
            )
        most = self.graph_nodes + 2 * self.graph_tensors
        if ids > most:
            raise LimitReached(
                "--max-graph-tensors", f"a program that names {ids} tensors, the limit is {most}"
            )
