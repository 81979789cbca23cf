"""By which numbering a client's graphs are read: settled, remembered, believed, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.builder.graph import GraphBuilder
from protocol.dialects import DIALECTS, Dialect, compatible_dialects, find_dialects
from protocol.ggml.ops import (
    OPS_101,
    GluOp,
    Op,
    UnaryOp,
)
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.numbering import alike, canonical_params, reading, wire_params
from protocol.numbering_memory import NumberingMemory
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import parse_graph
from rpc_server.ops.table import ContractError, check
from rpc_server.session.readings import Readings

F32 = GgmlType.F32
HERE = "192.168.1.7"
SEVERAL = [d for d in DIALECTS if len(compatible_dialects(d)) > 1]
Build = Callable[[GraphBuilder], Tensor]


@dataclass(frozen=True)
class Buffer:
    base: int = 0x1000
    size: int = 1 << 24
    address: int = 0x7000_0000


def resolve(handle: int) -> Buffer:
    return Buffer()


def payload(dialect: Dialect, build: Build) -> GraphPayload:
    """The graph that a client of ``dialect`` sends."""
    g = GraphBuilder()
    graph = g.build(build(g))
    at = Buffer.base
    for t in graph.roots:
        t.place(1, at)
        at += -(-t.nbytes // 64) * 64
    return graph.payload(dialect)


def x(g: GraphBuilder, *ne: int) -> Tensor:
    return g.new_tensor(F32, ne or (8, 4))


def unary(g: GraphBuilder) -> Tensor:
    """What only one numbering makes sense of."""
    return g.neg(x(g))


def product(g: GraphBuilder) -> Tensor:
    return g.mul(x(g), x(g))


def readings(dialect: Dialect, memory: NumberingMemory, address: str = HERE) -> Readings:
    return Readings(memory, address, sorted(compatible_dialects(dialect), key=DIALECTS.index))


def dialect_of(text: str) -> Dialect:
    return find_dialects(text)[0]


@pytest.mark.parametrize("dialect", SEVERAL, ids=lambda d: d.name)
def test_a_graph_that_one_numbering_makes_sense_of_settles_it(dialect: Dialect) -> None:
    memory = NumberingMemory()
    first = readings(dialect, memory)
    assert first.choose(payload(dialect, unary), resolve) is dialect
    assert first.possible == [dialect]
    # Now whatever comes, on this connection and on the next ones of the address.
    later = readings(dialect, memory)
    for build in (
        product,
        lambda g: g.pad(x(g), 1, 2),
        lambda g: g.pool_2d(x(g), 1, (2, 2), (2, 2)),
    ):
        graph = payload(dialect, build)
        for r in (first, later):
            chosen = r.choose(graph, resolve)
            assert ops(graph, chosen) == ops(graph, dialect)


def ops(graph: GraphPayload, dialect: Dialect) -> list[tuple[Op, tuple[int, ...]]]:
    """What the nodes of a graph are under a dialect."""
    return [(t.op, t.op_params) for t in parse_graph(graph, dialect, resolve).nodes]


def test_nothing_is_known_and_it_is_refused_with_words_that_help() -> None:
    dialect = dialect_of("2.0-82")
    with pytest.raises(
        GraphError, match=r"op 6 is SUB in 2\.0\.0-90 or .*MUL in .*--protocol"
    ) as e:
        readings(dialect, NumberingMemory()).choose(payload(dialect, product), resolve)
    for each in compatible_dialects(dialect):
        assert f"--protocol {each.name}" in str(e.value)


def test_what_another_address_had_is_not_believed() -> None:
    dialect, memory = dialect_of("2.0-82"), NumberingMemory()
    readings(dialect, memory, "192.168.1.8").choose(payload(dialect, unary), resolve)
    with pytest.raises(GraphError, match="several releases"):
        readings(dialect, memory).choose(payload(dialect, product), resolve)


def test_two_releases_behind_one_address_are_not_taken_for_each_other() -> None:
    memory, graphs = NumberingMemory(), {}
    for text in ("2.0-82", "2.0-88"):
        dialect = dialect_of(text)
        readings(dialect, memory).choose(payload(dialect, unary), resolve)
        graphs[dialect] = payload(dialect, product)
    for graph in graphs.values():
        with pytest.raises(GraphError, match="several releases"):
            readings(dialect_of("2.0"), memory).choose(graph, resolve)


def test_what_was_believed_turns_out_wrong() -> None:
    """Then the results so far were wrong: the connection can't go on, and the next one knows."""
    old, new, memory = dialect_of("2.0-82"), dialect_of("2.0-88"), NumberingMemory()
    readings(new, memory).choose(payload(new, unary), resolve)
    r = readings(old, memory)
    assert r.choose(payload(old, product), resolve) is new
    with pytest.raises(GraphError, match=r"earlier graphs .* 2\.0\.0-88.* this one .* 2\.0\.0-82"):
        r.choose(payload(old, unary), resolve)
    # Both are known now.
    with pytest.raises(GraphError, match="several releases"):
        readings(old, memory).choose(payload(old, product), resolve)


def test_graphs_that_all_read_alike_settle_nothing() -> None:
    dialect, memory = dialect_of("4.0.0"), NumberingMemory()
    r = readings(dialect, memory)
    graph = payload(dialect, lambda g: g.mul_mat(x(g, 8, 4), x(g, 8, 2)))
    assert ops(graph, r.choose(graph, resolve)) == ops(graph, dialect)
    assert len(r.possible) == 4
    assert memory.believed(HERE, r.possible) == []


def test_a_graph_that_makes_no_sense_is_refused_by_the_reading_that_makes_most() -> None:
    dialect = dialect_of("2.0-82")
    graph = payload(dialect, lambda g: g.soft_max(g.neg(product(g))))
    graph.tensors["nb"][-1] = 3
    with pytest.raises(GraphError, match=r"SOFT_MAX|aligned"):
        readings(dialect, NumberingMemory()).choose(graph, resolve)


def test_a_fork_with_ops_of_its_own_gets_one_clear_line() -> None:
    """ik_llama.cpp says protocol 2.0 and has more ops than any release of it."""
    dialect = dialect_of("2.0-90")
    graph = payload(dialect, unary)
    graph.tensors["op"][-1] = 95
    with pytest.raises(GraphError, match=r"no release of protocol 2\.0\.0 .*ik_llama\.cpp"):
        readings(dialect, NumberingMemory()).choose(graph, resolve)


def test_the_memory_is_bounded() -> None:
    memory, dialect = NumberingMemory(most=3), dialect_of("4.0.0")
    version = compatible_dialects(dialect)
    for i in range(9):
        memory.learn(f"10.0.0.{i}", version, [dialect])
        memory.long_names(f"10.0.0.{i}")
    assert len(memory) == 3
    assert memory.believed("10.0.0.8", version) == [dialect]
    assert memory.believed("10.0.0.1", version) == []
    assert not memory.long_names("10.0.0.8")
    assert memory.long_names("10.0.0.1")


def test_more_evidence_narrows_what_is_believed() -> None:
    memory = NumberingMemory()
    version = compatible_dialects(dialect_of("4.0.3"))
    memory.learn(HERE, version, version[:3])
    memory.learn(HERE, version, version[1:2])
    assert memory.believed(HERE, version) == version[1:2]


# -- any graph -----------------------------------------------------------------------------------

# What a graph may be made of: from what is so far to the next tensor, all of F32.
STEPS: dict[str, Callable[[GraphBuilder, Tensor], Tensor]] = {
    "add": lambda g, t: g.add(t, g.new_tensor(F32, t.ne)),
    "mul": lambda g, t: g.mul(t, g.new_tensor(F32, t.ne)),
    "sub": lambda g, t: g.sub(t, g.new_tensor(F32, t.ne)),
    "sqr": lambda g, t: g.sqr(t),
    "sqrt": lambda g, t: g.sqrt(t),
    "scale": lambda g, t: g.scale(t, 0.5),
    "sum_rows": lambda g, t: g.sum_rows(t),
    "mean": lambda g, t: g.mean(t),
    "norm": lambda g, t: g.norm(t, 1e-5),
    "rms_norm": lambda g, t: g.rms_norm(t, 1e-5),
    "l2_norm": lambda g, t: g.l2_norm(t, 1e-5),
    "cont": lambda g, t: g.cont(t),
    "concat": lambda g, t: g.concat(t, g.new_tensor(F32, t.ne), 1),
    "soft_max": lambda g, t: g.soft_max(t),
    "clamp": lambda g, t: g.clamp(t, -1.0, 1.0),
    "pad": lambda g, t: g.pad(t, 1, 2),
    "upscale": lambda g, t: g.upscale(t, 2, 0),
    "pool_2d": lambda g, t: g.pool_2d(t, 1, (2, 2), (2, 2)),
    "leaky_relu": lambda g, t: g.leaky_relu(t, 0.1),
    "silu": lambda g, t: g.silu(t),
    "gelu_erf": lambda g, t: g.gelu_erf(t),
    "mul_mat": lambda g, t: g.mul_mat(g.new_tensor(F32, (t.ne[0], 6)), t),
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEVERAL),
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4),
    st.sampled_from([(8, 4), (2, 2), (4, 1)]),
)
def test_a_graph_computes_what_its_client_means_or_is_refused(
    dialect: Dialect, names: list[str], ne: tuple[int, int]
) -> None:
    def build(g: GraphBuilder) -> Tensor:
        made = x(g, *ne)
        for name in names:
            made = STEPS[name](g, made)
        return made

    try:
        graph = payload(dialect, build)
    except ValueError:
        return  # This release lacks the op, or the shape doesn't suit it.
    meant = ops(graph, dialect)
    r = readings(dialect, NumberingMemory())
    if len(alike(graph.tensors, [d for d in r.possible if _sound(graph, d)])) > 1:
        with pytest.raises(GraphError, match="several releases"):
            r.choose(graph, resolve)
        return
    chosen = r.choose(graph, resolve)
    assert ops(graph, chosen) == meant
    # Whatever numbering is left reads it so, too.
    for other in r.possible:
        assert ops(graph, other) == meant


def _sound(graph: GraphPayload, dialect: Dialect) -> bool:
    """Whether every node can be run under ``dialect``."""
    try:
        for node in parse_graph(graph, dialect, resolve).nodes:
            check(node)
    except (GraphError, ContractError):
        return False
    return True


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_functions_travel_by_the_numbers_of_the_release(dialect: Dialect) -> None:
    numbering = dialect.numbering
    for op, functions in ((Op.UNARY, UnaryOp), (Op.GLU, GluOp)):
        for function in functions:
            params = (int(function), 7, *[0] * 14)
            if function not in numbering.functions[op]:
                with pytest.raises(ValueError, match="no function"):
                    wire_params(numbering, op, params)
                continue
            sent = tuple(wire_params(numbering, op, params))
            assert sent[1:] == params[1:]
            assert canonical_params(numbering, op, sent) == params
        beyond = (len(numbering.functions[op]), *[0] * 15)
        assert canonical_params(numbering, op, beyond)[0] not in set(functions)
    assert tuple(wire_params(numbering, Op.SCALE, (5,))) == (5,)
    # Nonsense stays what it is.
    assert tuple(wire_params(numbering, Op.UNARY, (999,))) == (999,)


@pytest.mark.parametrize("text", ["2.0-82", "2.0-86", "2.0-88"])
def test_old_padding_says_nothing_and_pads_behind(text: str) -> None:
    dialect = dialect_of(text)
    graph = payload(dialect, lambda g: g.pad(x(g, 5, 4), 1, 2))
    assert not graph.tensors["op_params"].any()
    assert ops(graph, dialect)[0] == (Op.PAD, (0, 1, 0, 2, *[0] * 12))
    with pytest.raises(ValueError, match="pads behind"):
        payload(dialect, lambda g: g.pad_ext(x(g, 5, 4), (1, 0, 0, 0), (0, 0, 0, 0)))


def test_readings_are_equal_where_the_same_is_done() -> None:
    """Silu has the same number in all, GELU_ERF and the ops around it don't."""
    texts = ("2.0-82", "3.0", "3.6.0", "7.0")
    words: set[Any] = set()
    for text in texts:
        dialect = dialect_of(text)
        graph = payload(dialect, lambda g: g.gelu_erf(g.silu(product(g))))
        words.add(reading(graph.tensors, dialect.numbering).tobytes())
    assert len(words) == 1
    (word,) = reading(payload(dialect, unary).tensors[-1:], dialect.numbering)
    assert OPS_101[word >> 16] is Op.UNARY


def test_alike_groups_in_order() -> None:
    dialects = find_dialects("4.0")
    tensors = payload(dialects[0], unary).tensors
    assert [[d.name for d in group] for group in alike(tensors, dialects)] == [
        [d.name] for d in dialects
    ]
