"""Much work for a device that others want too: planning, single nodes, programs that wait."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from protocol.commands import Command
from protocol.ggml.types import GgmlType, row_size
from tools.neighbour.attack import MIB, Attacker, AttackWire, attack, floats, many
from tools.wire import tensor

PLANNING, ONE_NODE, QUEUES, WAITING = (
    "graphs that take long to plan",
    "a single node that takes long",
    "graphs after graphs",
    "programs and leases that are held and not used",
)


@attack(PLANNING)
def graph_of_many_ops(a: Attacker) -> None:
    """A graph of 30,000 nodes of six ops, new each time"""
    wire, handle, base = a.buffer(65536)
    leaf = tensor(1, (64, 4), handle, base)
    ops = ("ADD", "MUL", "SUB", "DIV", "ADD", "MUL")
    nodes = []
    for i, op in enumerate(ops * 5000):
        nodes.append(wire.op_of(2 + i, op, (64, 4), (handle, base + 4096), 1, 1))
    wire.run(nodes[: 30_000 - int(time.monotonic() * 1000) % 100], [leaf])


@attack(PLANNING)
def views_of_views(a: Attacker) -> None:
    """A chain of 10,000 views, each of the one before, and a node at its end"""
    wire, handle, base = a.buffer(65536)
    nodes = [tensor(1, (64,), handle, base)]
    for i in range(2, 10_002):
        view = wire.op_of(i, "VIEW", (64,), (handle, base), i - 1)
        nodes.append({**view, "view_src": i - 1})
    last = wire.op_of(10_002, "ADD", (64,), (handle, base + 4096), 10_001, 1)
    wire.run([*nodes[1:], last], nodes[:1])


@attack(PLANNING)
def always_a_new_graph(a: Attacker) -> None:
    """The same 2,000 nodes, with one number changed each time so that no plan fits"""
    wire, handle, base = a.buffer(65536)
    leaf = tensor(1, (64,), handle, base)
    node = wire.op_of(2, "SCALE", (64,), (handle, base + 4096), 1, params=floats(1.0, 0.0))
    nodes = many(node, 2000, 2)
    number = 0
    while not a.over:
        number += 1
        nodes[0]["op_params"] = [*floats(1.0, number), *[0] * 14]
        wire.run(nodes, [leaf])


@attack(PLANNING)
def nodes_without_kernels(a: Attacker) -> None:
    """5,000 nodes of ops that run as array code"""
    wire, handle, base = a.buffer(MIB)
    leaf = tensor(1, (16, 16), handle, base)
    node = wire.op_of(2, "TRI", (16, 16), (handle, base + 4096), 1)
    wire.run(many(node, 5000, 2), [leaf])


def _node(a: Attacker, op: str, ne: tuple[int, ...], *shapes: tuple[int, ...],
          params: tuple[int, ...] = (), types: tuple[GgmlType, ...] = (),
          result: GgmlType = GgmlType.F32) -> None:  # fmt: skip
    """Compute one node of sources that were never written."""
    wire = a.connect()
    given = [*types, *[GgmlType.F32] * len(shapes)][: len(shapes)]
    sizes = [
        row_size(t, s[0]) * int(np.prod(s[1:], dtype=np.int64))
        for t, s in zip(given, shapes, strict=True)
    ]
    total = 4 * int(np.prod(ne, dtype=np.int64))
    starts = np.cumsum([0, *[-(-size // 256) * 256 for size in sizes]]).tolist()
    handle, base = wire.alloc(starts[-1] + total)
    leaves = [
        tensor(i + 1, s, handle, base + at, t)
        for i, (s, t, at) in enumerate(zip(shapes, given, starts, strict=False))
    ]
    ids = range(1, len(shapes) + 1)
    place = (handle, base + starts[-1])
    made = wire.op_of(100, op, ne, place, *ids, params=params, type=int(result))
    wire.run([made], leaves)


@attack(ONE_NODE)
def a_wide_product(a: Attacker) -> None:
    """One MUL_MAT of Q8_0 weights, 4096 x 4096, and 2048 columns"""
    _node(a, "MUL_MAT", (4096, 2048), (4096, 4096), (4096, 2048), types=(GgmlType.F16,))


@attack(ONE_NODE)
def outer_products(a: Attacker) -> None:
    """One OUT_PROD of 2048 x 2048 x 2048, which runs as array code"""
    _node(a, "OUT_PROD", (2048, 2048), (2048, 2048), (2048, 2048))


@attack(ONE_NODE)
def one_long_sort(a: Attacker) -> None:
    """One ARGSORT of rows of a million"""
    _node(a, "ARGSORT", (1 << 20, 8), (1 << 20, 8), result=GgmlType.I32)


@attack(ONE_NODE)
def one_long_sum(a: Attacker) -> None:
    """One CUMSUM of 64 million numbers in a single row"""
    _node(a, "CUMSUM", (1 << 26,), (1 << 26,))


@attack(ONE_NODE)
def one_convolution(a: Attacker) -> None:
    """One IM2COL of 64 channels, 512 x 512, and 5 x 5 windows"""
    params = (1, 1, 2, 2, 1, 1, 1)
    _node(a, "IM2COL", (1600, 512, 512), (5, 5, 64, 1), (512, 512, 64), params=params)


@attack(ONE_NODE)
def one_attention(a: Attacker) -> None:
    """One FLASH_ATTN_EXT of 4096 tokens on 4096, with eight heads"""
    q, kv = (64, 4096, 8), (64, 4096, 8)
    types = (GgmlType.F32, GgmlType.F16, GgmlType.F16)
    _node(a, "FLASH_ATTN_EXT", (64, 8, 4096), q, kv, kv, params=floats(0.125), types=types)


@attack(ONE_NODE)
def one_softmax(a: Attacker) -> None:
    """One SOFT_MAX of 8192 rows of 8192"""
    _node(a, "SOFT_MAX", (8192, 8192), (8192, 8192), params=floats(1.0, 0.0))


@attack(ONE_NODE)
def one_scan(a: Attacker) -> None:
    """One RWKV_WKV6 of 4096 tokens, step by step"""
    s = (64, 16, 4096)
    _node(a, "RWKV_WKV6", (1024, 4096 + 64), s, s, s, (64, 16), s, (65536, 1))


def _long_graph(wire: AttackWire, n: int, nodes: int) -> tuple[list[dict[str, Any]], list[Any]]:
    handle, base = wire.alloc(8 * n * n)
    x = tensor(1, (n, n), handle, base)
    node = wire.op_of(2, "MUL_MAT", (n, n), (handle, base + 4 * n * n), 1, 1)
    return many(node, nodes, 2), [x]


@attack(QUEUES)
def graphs_of_many_clients(a: Attacker) -> None:
    """Ten clients with a graph each that computes all the time"""
    wires = [a.connect() for _ in range(10)]
    payloads = [wire.graph(*_long_graph(wire, 256, 200)) for wire in wires]
    for wire, payload in zip(wires, payloads, strict=True):
        wire.send(Command.GRAPH_COMPUTE, payload)
    while not a.over:
        for wire in wires:
            wire.post(Command.GRAPH_RECOMPUTE, {"device": 0})
        wires[0].settle()


@attack(QUEUES)
def recomputed_without_a_pause(a: Attacker) -> None:
    """50 GRAPH_RECOMPUTEs at once, and again"""
    wire = a.connect()
    wire.run(*_long_graph(wire, 512, 20))
    while not a.over:
        wire.pipeline(Command.GRAPH_RECOMPUTE, [{"device": 0}] * 50)
        wire.settle()


@attack(QUEUES)
def a_long_graph(a: Attacker) -> None:
    """One graph of 2,000 products of 512 x 512, and hang up at the end"""
    wire = a.connect()
    wire.send(Command.GRAPH_COMPUTE, wire.graph(*_long_graph(wire, 512, 2000)))
    a.hold()


@attack(QUEUES)
def graphs_that_fail_late(a: Attacker) -> None:
    """A long graph whose last node has an index out of range"""
    wire = a.connect()
    nodes, leaves = _long_graph(wire, 512, 40)
    handle, base = wire.alloc(MIB)
    index = tensor(5000, (1,), handle, base, GgmlType.I32)
    wire.set_tensor(index, (512).to_bytes(4, "little"))
    last = wire.op_of(5001, "GET_ROWS", (512, 1), (handle, base + 4096), 1, 5000)
    wire.run([*nodes, last], [*leaves, index])


def _step(wire: AttackWire) -> None:
    handle, base = wire.alloc(MIB)
    leaf = tensor(1, (65536,), handle, base)
    node = wire.op_of(2, "ADD", (65536,), (handle, base + MIB // 2), 1, 1)
    wire.program(0, [node], [leaf], inputs=(1,), outputs=(2,))


@attack(WAITING)
def input_in_bursts(a: Attacker) -> None:
    """A program whose input of 256 KiB comes in bursts of 100 bytes"""
    wire = a.coordinate()
    _step(wire)
    wire.call(Command.SPLIT_RUN, {"device": 0, "program": 0})
    while not a.over:
        wire.socket.sendall(bytes(100))
        time.sleep(0.03)


@attack(WAITING)
def output_that_nobody_takes(a: Attacker) -> None:
    """A program that is run again and again and whose results stay in the socket"""
    wire = a.coordinate()
    _step(wire)
    wire.socket.settimeout(0.5)
    while not a.over:
        wire.post(Command.SPLIT_RUN, {"device": 0, "program": 0})
        wire.socket.sendall(bytes(262_144))


@attack(WAITING)
def lease_without_a_program(a: Attacker) -> None:
    """SPLIT_ACQUIRE, and then nothing"""
    wire = a.coordinate()
    wire.call(Command.SPLIT_ACQUIRE, {"device": 0, "patience_ms": 1000})
    a.hold()


@attack(WAITING)
def many_wait_for_a_lease(a: Attacker) -> None:
    """30 coordinators that all ask for the same lease, and for a second one meanwhile"""
    wires = [a.coordinate() for _ in range(30)]
    for wire in wires:
        fields = {"device": 0, "patience_ms": 60_000}
        wire.pipeline(Command.SPLIT_ACQUIRE, [fields, fields])
    a.hold()


@attack(WAITING)
def hangs_up_within_a_program(a: Attacker) -> None:
    """A program that has had half of its input when its client ends"""
    wire = a.coordinate()
    _step(wire)
    wire.call(Command.SPLIT_RUN, {"device": 0, "program": 0})
    wire.socket.sendall(bytes(131_072))
