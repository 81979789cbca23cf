"""What clients do to a server's memory, as data: drawn, shrunk, kept as JSON, done again.

A step names what it works on by small numbers that are taken modulo what there is when it is its
turn (buffers, bytes, earlier results). So any list of steps is a sound session, and stays one when
a search leaves steps out.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from protocol.commands import Command
from protocol.dialects import Dialect

MAX_BUFFERS = 5
MAX_BYTES = 4096


class ActionKind(enum.StrEnum):
    """The kind of a step; those with a command need a dialect that has it."""

    ALLOC = "alloc"
    SET = "set"
    CLEAR = "clear"
    MEMSET = "memset"
    COPY = "copy"
    GET = "get"
    GRAPH = "graph"
    RERUN = "rerun"
    HASH = "hash"
    ASK = "ask"
    FREE = "free"
    RECONNECT = "reconnect"


_NEEDS = {
    ActionKind.MEMSET: Command.MEMSET_TENSOR,
    ActionKind.RERUN: Command.GRAPH_RECOMPUTE,
    ActionKind.HASH: Command.SET_TENSOR_HASH,
}
# How often each is drawn, of the sum.
_WEIGHTS = {
    ActionKind.ALLOC: 4,
    ActionKind.SET: 6,
    ActionKind.CLEAR: 1,
    ActionKind.MEMSET: 2,
    ActionKind.COPY: 3,
    ActionKind.GET: 2,
    ActionKind.GRAPH: 7,
    ActionKind.RERUN: 5,
    ActionKind.HASH: 2,
    ActionKind.ASK: 2,
    ActionKind.FREE: 2,
    ActionKind.RECONNECT: 1,
}


@dataclass(frozen=True, slots=True)
class Action:
    """``client`` does ``kind``; ``a`` and ``b`` choose buffers, ``at`` and ``size`` ranges of them.

    ``seed`` makes contents. ``words`` are the nodes of a graph, see conformance.properties.memory.
    """

    kind: ActionKind
    client: int = 0
    words: tuple[int, ...] = ()
    a: int = 0
    b: int = 0
    at: int = 0
    size: int = 0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields that aren't 0."""
        row: dict[str, Any] = {"kind": self.kind.value, "client": self.client}
        for name in ("a", "b", "at", "size", "seed"):
            if getattr(self, name):
                row[name] = getattr(self, name)
        if self.words:
            row["words"] = list(self.words)
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Action:
        fields = {**row, "kind": ActionKind(row["kind"]), "words": tuple(row.get("words", ()))}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class ActionSequence:
    """Steps of ``clients`` clients; all memory is compared after every ``every`` of them.

    Requests go out in segments of the lengths ``cuts``, in turn; whole if there are none.
    """

    steps: tuple[Action, ...]
    clients: int = 2
    every: int = 1
    cuts: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        steps = [s.to_json() for s in self.steps]
        shape = {"clients": self.clients, "every": self.every, "cuts": list(self.cuts)}
        return {**shape, "steps": steps}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ActionSequence:
        steps = tuple(Action.from_json(row) for row in data["steps"])
        return cls(steps, data["clients"], data["every"], tuple(data["cuts"]))


def step_kinds(dialect: Dialect) -> Sequence[ActionKind]:
    """Return the kinds that this dialect's clients can do, each as often as it is drawn."""
    kinds: list[ActionKind] = []
    for kind, weight in _WEIGHTS.items():
        if kind not in _NEEDS or _NEEDS[kind] in dialect.commands:
            kinds += [kind] * weight
    return kinds


def sessions(
    dialect: Dialect, clients: int = 2, most: int = 24
) -> st.SearchStrategy[ActionSequence]:
    """Return sessions of up to ``most`` steps.

    Each client begins with a buffer that holds something.
    """
    small, large = st.integers(0, 7), st.integers(0, MAX_BYTES - 1)
    drawn = st.builds(
        Action,
        kind=st.sampled_from(step_kinds(dialect)),
        client=st.integers(0, clients - 1),
        a=small,
        b=small,
        at=large,
        size=large,
        seed=st.integers(0, 0xFFFF),
    )
    graphs = st.builds(
        Action,
        kind=st.just(ActionKind.GRAPH),
        client=st.integers(0, clients - 1),
        a=small,
        b=small,
        size=st.integers(0, 63),
        words=st.lists(st.integers(0, 0xFFFFFF), min_size=1, max_size=4).map(tuple),
    )
    one = drawn.flatmap(lambda s: graphs if s.kind is ActionKind.GRAPH else st.just(s))
    # Drawn lists are short by themselves, and some faults take many steps to show.
    lengths = [n for n in (1, 8, 16) if n < most]
    steps = st.sampled_from(lengths).flatmap(
        lambda least: st.lists(one, min_size=least, max_size=most)
    )
    opening = tuple(
        step
        for client in range(clients)
        for step in (
            Action(ActionKind.ALLOC, client, size=1023),
            Action(ActionKind.SET, client, size=MAX_BYTES, seed=client),
        )
    )
    return st.builds(
        lambda chosen, every, cuts: ActionSequence((*opening, *chosen), clients, every, cuts),
        steps,
        st.sampled_from((1, 1, 1, 4)),
        st.just(()) | st.lists(st.integers(1, 400), min_size=1, max_size=4).map(tuple),
    )
