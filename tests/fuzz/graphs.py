"""Graphs and programs: decoded, linked, planned for the CPU, and run on memory between guard pages.

An input is ``dialect u8 | buffers u8 | (what it holds u8, its size u24) each | payload``. Buffers
are known by the handles and addresses of :func:`handle` and :func:`wire_base`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.dialects import Dialect
from protocol.errors import ProtocolError
from protocol.graph_payload import decode_graph, encode_graph
from protocol.split import decode_program, encode_program
from protocol.tensor import Tensor
from rpc_server.devices.base import BufferLike, DeviceError, NotReadyError
from rpc_server.devices.cpu.catalog import Kernel
from rpc_server.devices.cpu.executor import Executor
from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
from rpc_server.devices.cpu.plan import CpuPlan, CpuPlanBuilder
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.devices.cpu.streaming.program import program_items
from rpc_server.devices.planning.program import linked_steps
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph, parse_graph
from tests.fuzz.streams import SPOKEN, promised
from tests.guard.mapping import PAGE, GuardedMemory

MAX_BUFFERS = 24
# Of all buffers of an input that is run.
_MEMORY = 1 << 20
_BUFFER = struct.Struct("<BBH")
# What may precede a payload.
HEAD_BYTES = 2 + MAX_BUFFERS * _BUFFER.size

# What any payload may be answered with instead of a result.
REFUSALS = (ProtocolError, GraphError, DeviceError)

CONTENTS = (
    "zeros", "normal", "random", "int32", "int64", "special", "float16", "ones",
)  # fmt: skip


def handle(index: int) -> int:
    """The handle of buffer number ``index``."""
    return 0x1001 + index


def wire_base(index: int) -> int:
    """Where clients think that the page with the first byte of a buffer begins."""
    return (1 << 44) + (index << 32)


@dataclass(frozen=True, slots=True)
class GraphInput:
    """An input taken apart; ``buffers`` are (index in CONTENTS, size)."""

    spoken: int
    buffers: tuple[tuple[int, int], ...]
    payload: bytes

    @property
    def dialect(self) -> Dialect:
        return SPOKEN[self.spoken % len(SPOKEN)]

    @classmethod
    def decode(cls, data: bytes) -> GraphInput | None:
        """None if it is too short for its buffers."""
        if len(data) < 2:
            return None
        n = data[1] % (MAX_BUFFERS + 1)
        end = 2 + n * _BUFFER.size
        if len(data) < end:
            return None
        rows = [_BUFFER.unpack_from(data, 2 + i * _BUFFER.size) for i in range(n)]
        buffers = tuple((what, high << 16 | low) for what, high, low in rows)
        return cls(data[0], buffers, data[end:])

    def encode(self) -> bytes:
        rows = [_BUFFER.pack(what, size >> 16, size & 0xFFFF) for what, size in self.buffers]
        return bytes((self.spoken, len(self.buffers))) + b"".join(rows) + self.payload


@dataclass(frozen=True, slots=True)
class NoMemory:
    """A buffer of which nothing exists: whoever reads it while planning is found out."""

    base: int
    size: int
    address: int


def nowhere(given: GraphInput) -> dict[int, BufferLike]:
    """The buffers of an input by handle, without memory."""
    found: dict[int, BufferLike] = {}
    for i, (_, size) in enumerate(given.buffers):
        base = wire_base(i) + -size % PAGE
        # Addresses that no process has. Sizes beyond those of memory are among them.
        found[handle(i)] = NoMemory(base, size, (1 << 60) + base)
    return found


def graph(data: bytes) -> bool:
    """The decoder of payloads and the parser, held to what the parser promises."""
    given = GraphInput.decode(data)
    if given is None:
        return False
    buffers = nowhere(given)
    try:
        payload = decode_graph(given.payload, given.dialect)
        promised(encode_graph(payload, given.dialect) == given.payload, "decoded to another graph")
        parsed = parse_graph(payload, given.dialect, buffers.get)
    except REFUSALS:
        return True
    _check_promises(parsed.nodes, buffers.values())
    return True


def _check_promises(nodes: Sequence[Tensor], buffers: Iterable[BufferLike]) -> None:
    places = [(b.address, b.address + b.size) for b in buffers]
    reached: dict[int, Tensor] = {}
    stack = list(nodes)
    while stack:
        t = stack.pop()
        if id(t) in reached:
            continue
        reached[id(t)] = t
        stack += [s for s in (*t.src, t.view_src) if s is not None]
        if t.address:
            inside = any(a <= t.address and t.address + t.nbytes <= b for a, b in places)
            promised(inside, f"{t.label} lies outside its buffer")
    position = {id(t): i for i, t in enumerate(nodes)}
    for i, t in enumerate(nodes):
        for s in t.src:
            promised(s is None or position.get(id(s), -1) <= i, f"{t.label} before its source")


class _Planner(CpuPlanBuilder):
    """Lowers whole graphs without asking for any kernel's code."""

    def _addresses(self, users: Iterable[Kernel]) -> dict[Kernel, int]:
        return dict.fromkeys(users, 0)


class _Threads(Executor):
    """Threads that are never started."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads


@functools.cache
def planner() -> CpuPlanBuilder:
    """Plans for three threads that don't exist."""
    return _Planner(_Threads(3), ScratchArena())


def plan(data: bytes) -> bool:
    """Contracts and lowerings, without memory behind the buffers."""
    given = GraphInput.decode(data)
    if given is None:
        return False
    try:
        payload = decode_graph(given.payload, given.dialect)
        parsed = parse_graph(payload, given.dialect, nowhere(given).get)
        planner().build(parsed)
    except REFUSALS:
        return True
    return True


def program(data: bytes) -> bool:
    """Programs of the split extension: decoded, linked and planned."""
    given = GraphInput.decode(data)
    if given is None:
        return False
    try:
        payload = decode_program(given.payload)
        again = encode_program(payload.steps, payload.tensors, payload.swaps)
        promised(again == given.payload, "decoded to another program")
        steps = linked_steps(payload, given.dialect, nowhere(given).get)
        items = program_items(steps, _peer())
        planner().build_items(items, given.dialect)
    except REFUSALS:
        return True
    return True


@functools.cache
def _peer() -> StreamPeer:
    return StreamPeer("peer", 1.0)


@functools.cache
def _builders() -> tuple[CpuPlanBuilder, CpuPlanBuilder]:
    """By kernels, and by references alone."""
    return CpuPlanBuilder(Executor(1), ScratchArena()), CpuPlanBuilder(None, ScratchArena())


def run(data: bytes) -> bool:
    """Whole graphs on the CPU device: each buffer ends where touching memory is fatal."""
    given = GraphInput.decode(data)
    if given is None or sum(size for _, size in given.buffers) > _MEMORY:
        return False
    try:
        payload = decode_graph(given.payload, given.dialect)
    except REFUSALS:
        return True
    memory: list[GuardedMemory] = []
    try:
        for i, (_, size) in enumerate(given.buffers):
            memory.append(GuardedMemory(size, base=wire_base(i)))
        found: dict[int, BufferLike] = {handle(i): m for i, m in enumerate(memory)}
        for builder in _builders():
            for i, (what, size) in enumerate(given.buffers):
                memory[i].write(content(what, size, i))
            try:
                parsed = parse_graph(payload, given.dialect, found.get)
                _build(builder, parsed).run()
            except NotReadyError:
                # Its kernels are not compiled yet: no business of a fuzzer.
                continue
            except REFUSALS:
                pass
            promised(all(m.canaries_intact for m in memory), "wrote in front of a buffer")
    finally:
        for m in memory:
            m.close()
    return True


def _build(builder: CpuPlanBuilder, graph: LinkedGraph) -> CpuPlan:
    return builder.build(graph, wait=False)


@functools.lru_cache(32)
def content(what: int, size: int, seed: int) -> bytes:
    """``size`` bytes of the kind that ``what`` (modulo their number) names in CONTENTS."""
    kind = CONTENTS[what % len(CONTENTS)]
    random = np.random.default_rng(seed)
    count = size // 2 + 4
    if kind == "zeros":
        return bytes(size)
    if kind == "ones":
        return b"\xff" * size
    if kind == "random":
        return random.bytes(size)
    if kind == "normal":
        return random.standard_normal(count, np.float32).tobytes()[:size]
    if kind == "float16":
        return random.standard_normal(count).astype(np.float16).tobytes()[:size]
    if kind == "special":
        values = random.standard_normal(count, np.float32)
        values[::3] = random.choice([np.nan, np.inf, -np.inf, 0.0, 3e38], len(values[::3]))
        return values.tobytes()[:size]
    dtype = np.int32 if kind == "int32" else np.int64
    return random.integers(0, 4, count, dtype).tobytes()[:size]
