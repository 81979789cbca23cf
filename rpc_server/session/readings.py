"""Which op numbering the graphs of a client are read by, where its protocol version has several.

A graph is read under each numbering that its version may have. Those that read it alike compute the
same. Of those that differ, most make no sense: a node breaks the contract of the op that it would
be. If one is left, that settles it for the connection, and it is remembered for the address; if
several are left, what the address had before decides. If nothing is known, the graph is refused:
each would compute something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from protocol.dialects import Dialect, version_name
from protocol.ggml.ops import TensorFlag
from protocol.graph_payload import GraphPayload
from protocol.numbering import alike, fits
from protocol.numbering_memory import NumberingMemory
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Resolve, parse_graph

Group = list[Dialect]


class Readings:
    """The dialects that graphs of one connection may be read by; used by one thread at a time."""

    def __init__(self, memory: NumberingMemory, address: str, dialects: Iterable[Dialect]) -> None:
        """``dialects`` are what clients of the accepted version may speak, likeliest first."""
        self._memory = memory
        self._address = address
        self._all = list(dialects)
        # What the graphs so far leave of them.
        self.possible = list(self._all)
        # What graphs were read by that left it open: what the address had before.
        self._assumed: Group = []

    def choose(self, graph: GraphPayload, resolve: Resolve) -> Dialect:
        """Return the dialect to read a graph by.

        Raises:
            GraphError: It makes no sense, or a different one under several.
        """
        if len(self.possible) == 1:
            return self.possible[0]
        nodes = _computed(graph, self.possible[0])
        in_range = _in_range(graph.tensors, self.possible)
        groups = alike(nodes, in_range or self.possible)
        if len(groups) == 1 and len(in_range) == len(self.possible):
            return groups[0][0]
        sound = _sound(groups, graph, nodes, resolve)
        if len(sound) == 1:
            self._settle(sound[0])
            return sound[0][0]
        return self._as_before(sound, nodes)

    def _settle(self, group: Group) -> None:
        """The client can only be one of ``group``."""
        self.possible = group
        self._memory.learn(self._address, self._all, group)
        if self._assumed and not _common(self._assumed, group):
            raise GraphError(
                f"earlier graphs were read as those of protocol {_names(self._assumed)}, which its "
                f"address had before, but this one is of {_names(group)}; start the client again, "
                f"or this server with --protocol {group[0].name}"
            )

    def _as_before(self, sound: list[Group], nodes: Any) -> Dialect:
        """Choose among readings that are all sound by what the client, or its address, had."""
        before = self._assumed or self._memory.believed(self._address, self._all)
        known = [group for group in sound if _common(before, group)]
        if len(known) != 1:
            raise GraphError(_ambiguity(known or sound, nodes))
        self._assumed = _common(before, known[0])
        return self._assumed[0]


def _computed(graph: GraphPayload, dialect: Dialect) -> Any:
    """Rows of the tensors that the graph computes."""
    nodes = graph.tensors[np.isin(graph.tensors["id"], graph.nodes)]
    flagged = nodes[nodes["flags"] & TensorFlag.COMPUTE != 0]
    return flagged if len(flagged) or dialect.always_flags else nodes


def _in_range(tensors: Any, dialects: Sequence[Dialect]) -> Group:
    """Those of ``dialects`` that have an op for each number."""
    most = int(tensors["op"].max()) if len(tensors) else 0
    return [d for d in dialects if most < len(d.ops)]


def _sound(groups: list[Group], graph: GraphPayload, nodes: Any, resolve: Resolve) -> list[Group]:
    """The groups by which the graph can be run.

    Raises:
        GraphError: There is none; what is wrong under the one that makes most sense.
    """
    sound: list[Group] = []
    best: tuple[int, GraphError] | None = None
    likely = [group for group in groups if fits(nodes, group[0])]
    for group in likely or groups:
        passed, error = _judge(graph, group[0], resolve)
        if error is None:
            sound.append(group)
        elif best is None or passed > best[0]:
            best = passed, error
    if not sound:
        assert best is not None
        version = version_name(groups[0][0].version)
        raise GraphError(
            f"{best[1]} (no release of protocol {version} would send this graph; forks with ops of "
            "their own, such as ik_llama.cpp, are not served)"
        )
    return sound


def _judge(
    graph: GraphPayload, dialect: Dialect, resolve: Resolve
) -> tuple[int, GraphError | None]:
    """Return how many nodes are sound under ``dialect``, and what is wrong with the next one."""
    # Takes a moment to import: not before the first graph.
    import rpc_server.ops  # noqa: F401  (fills the op table)
    from rpc_server.ops.table import ContractError, check

    passed = 0
    try:
        for node in parse_graph(graph, dialect, resolve).nodes:
            check(node)
            passed += 1
    except ContractError as error:
        return passed, GraphError(str(error))
    except GraphError as error:
        return passed, error
    return passed, None


def _common(some: Iterable[Dialect], others: Iterable[Dialect]) -> Group:
    names = {d.name for d in others}
    return [d for d in some if d.name in names]


def _names(group: Iterable[Dialect]) -> str:
    return " or ".join(d.name for d in group)


def _ambiguity(groups: list[Group], nodes: Any) -> str:
    """Say which node of a graph could be what, and how to tell the server."""
    number = next(int(n) for n in nodes["op"] if len({g[0].ops[n] for g in groups}) > 1)
    meanings = ", ".join(f"{g[0].ops[number]} in {_names(g)}" for g in groups)
    options = " or ".join(f"--protocol {d.name}" for g in groups for d in g)
    return (
        f"a graph that several releases could have sent, each meaning something else by it (op "
        f"{number} is {meanings}); say which release the client is: start this server with "
        f"{options}"
    )
