"""Which graphs of a client are remembered, how they are found, and what is counted for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from protocol.dialects import DIALECTS, Dialect
from rpc_server.limits import LimitReached
from rpc_server.session import plan_cache
from rpc_server.session.graph_memory import GraphMemory, Share
from rpc_server.session.plan_cache import PlanCache

MIB = 1 << 20


@dataclass
class Nothing:
    """A plan of a graph without nodes."""

    nbytes: int = 0
    scratch: int = 0
    dialect: Dialect = DIALECTS[0]
    shared: bool = False
    brief: bool = False

    def run(self) -> None: ...

    def stop(self) -> None: ...


def graph(number: int, size: int) -> bytearray:
    return bytearray(number.to_bytes(4, "little") * (size // 4))


def test_few_large_ones_are_bounded_by_their_bytes() -> None:
    memory = GraphMemory(90 * MIB)
    share = Share(memory, "a")
    cache = PlanCache(share)
    graphs = [graph(i, 12 * MIB) for i in range(4)]
    for one in graphs:
        cache.add(one, Nothing(3 * MIB), 1)
    # Beside the newest they may have what the client's share leaves.
    assert [cache.find(one) is not None for one in graphs] == [False, True, True, True]
    assert memory.used == share.nbytes == 45 * MIB
    with pytest.raises(LimitReached, match=r"a plan of .* \(--mem-graphs\)"):
        cache.add(bytearray(50 * MIB), Nothing(3 * MIB), 1)
    cache.clear()
    assert memory.used == share.nbytes == 0


def test_many_small_ones_are_kept() -> None:
    """A token of a split model has a graph for each exchange, and they come again in order."""
    cache = PlanCache(Share(GraphMemory(1 << 30), "a"))
    graphs = [graph(i, 40_000) for i in range(129)]
    for one in graphs:
        cache.add(one, Nothing(), 1)
    for one in graphs:
        assert cache.find(one) is not None


def test_of_many_the_least_used_go() -> None:
    cache = PlanCache(Share(GraphMemory(1 << 30), "a"))
    graphs = [graph(i, MIB) for i in range(40)]
    plans = [Nothing() for _ in graphs]
    for one, plan in zip(graphs, plans, strict=True):
        assert cache.find(graphs[0]) == ((plans[0], 1) if one is not graphs[0] else None)
        cache.add(one, plan, 1)
    kept = [i for i, one in enumerate(graphs) if cache.find(one) is not None]
    assert kept == [0, *range(40 - 31, 40)]


def test_the_last_is_the_one_that_ran_last() -> None:
    cache = PlanCache(Share(GraphMemory(1 << 30), "a"))
    assert cache.last is None
    first, second = Nothing(), Nothing()
    cache.add(graph(1, 64), first, 3)
    cache.add(graph(2, 64), second, 5)
    assert cache.last == (second, 5)
    assert cache.find(graph(1, 64)) == (first, 3)
    assert cache.last is not None
    assert cache.last[0] is first
    cache.clear()
    assert cache.last is None


def test_graphs_that_differ_where_nobody_looks_are_told_apart() -> None:
    cache = PlanCache(Share(GraphMemory(1 << 30), "a"))
    one, other = graph(1, 8000), graph(1, 8000)
    other[1000] ^= 1
    assert plan_cache._fingerprint(one) == plan_cache._fingerprint(other)
    plans = Nothing(), Nothing()
    cache.add(one, plans[0], 1)
    assert cache.find(other) is None
    cache.add(other, plans[1], 1)
    found = [cache.find(x) for x in (one, other)]
    assert [f is not None and f[0] is p for f, p in zip(found, plans, strict=True)] == [True, True]


def test_what_is_counted_is_what_is_kept(seed: int) -> None:
    """Any order of looking and adding; everything is given back."""
    chosen = random.Random(seed)
    memory = GraphMemory(64 * MIB)
    share = Share(memory, "a")
    cache = PlanCache(share)
    for _ in range(2000):
        one = graph(chosen.randrange(60), chosen.choice([64, 4096, 3 * MIB]))
        if cache.find(one) is None:
            cache.add(one, Nothing(chosen.randrange(MIB)), 1)
        assert cache.find(one) is not None
        held = list(cache._plans.values())
        assert share.nbytes == sum(known.nbytes for known in held) == cache._nbytes
        assert sum(map(len, cache._alike.values())) == len(held)
    cache.clear()
    assert memory.used == share.nbytes == cache._nbytes == 0
    assert not cache._alike
