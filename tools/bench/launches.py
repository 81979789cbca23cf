"""How long it takes to plan a model's launches on a GPU, without one.

    python -m tools.bench.launches

Graphs of a Llama 3 8B in Q4_K_M, a token and a prompt of 512, from their message on: node by node;
by kinds where none is known yet; where all are known (the same model at other addresses). And the
token again when the cache has grown by 256 positions, which makes new kinds of some nodes. Medians
of milliseconds of a processor.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import rpc_server.devices.cuda.lower
import rpc_server.ops  # noqa: F401  (both fill their tables)
from client.builder.graph import Graph, GraphBuilder
from protocol.dialects import DIALECTS
from protocol.graph_payload import GraphPayload
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kinds import LaunchMemory
from rpc_server.devices.cuda.planner import CudaPlanner, lower_to_launches
from rpc_server.devices.planning.nodes import lower_node
from rpc_server.graph.parse import parse_graph
from tools.arguments import command_line
from tools.gpu_check.llama import LLAMA_8B, LlamaShape, SyntheticLlama

# Roots lie so far from one another; nothing reads them.
_APART = 1 << 40

# What is planned for: an RTX 3090's multiprocessors.
_MULTIPROCESSORS = 82


class _Nowhere:
    """A backend without a server: tensors get addresses, and a graph is only ordered."""

    def __init__(self, begin: int) -> None:
        self.graph = GraphBuilder()
        self._begin = begin
        self._places = itertools.count(1)

    async def allocate(self, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            t.place(1, self._begin + next(self._places) * _APART)

    async def upload(self, tensor: Tensor, values: Any) -> None:
        pass

    async def prepare(self, outputs: Iterable[Tensor]) -> Graph:
        graph = self.graph.build(outputs)
        await self.allocate(t for t in graph.roots if not t.placed)
        return graph


def model_graph(
    shape: LlamaShape, tokens: int, before: int, begin: int = 0, positions: int = 0
) -> Graph:
    """Return the graph of so many tokens behind others; tensors lie nowhere, ``begin`` on.

    ``positions`` is what the cache has room for, if that is more than is used.
    """

    async def made() -> Graph:
        backend: Any = _Nowhere(begin)
        model = SyntheticLlama(backend, shape, max(before + tokens, positions))
        await backend.allocate(t for layer in model._matrices for t in layer.values())
        await backend.allocate([model._output, *model._norms.values()])
        await backend.allocate(t for pair in model._caches for t in pair)
        graph: Any = (await model.prepare(tokens, before)).graph
        assert isinstance(graph, Graph)
        return graph

    return asyncio.run(made())


@dataclass(frozen=True)
class _Everywhere:
    """A buffer in which everything lies."""

    base: int = 0
    size: int = 1 << 62
    address: int = 0


def resolve(handle: int) -> _Everywhere:
    """Return the buffer of any handle: the one in which everything lies."""
    return _Everywhere()


def _by_nodes(payload: GraphPayload, capability: int) -> None:
    graph = parse_graph(payload, DIALECTS[0], resolve)
    planner = CudaPlanner(graph.nodes, _MULTIPROCESSORS, capability)
    for node in graph.nodes:
        lower_node(node, planner, lambda t: lower_to_launches(t, planner), lambda node, spec: None)


def _by_kinds(payload: GraphPayload, memory: LaunchMemory) -> None:
    graph = parse_graph(payload, DIALECTS[0], resolve)
    memory.plan(graph, lambda size: 0)


def _timed(run: Callable[[], None]) -> float:
    started = time.thread_time()
    run()
    return (time.thread_time() - started) * 1e3


def measure(shape: LlamaShape, tokens: int, rounds: int, capability: int) -> dict[str, float]:
    """Return milliseconds by what is planned, medians of so many rounds."""
    before = 512 if tokens == 1 else 0
    payload, moved, grown = (
        model_graph(shape, tokens, at, begin).payload(DIALECTS[0])
        for at, begin in ((before, 0), (before, 1 << 20), (before + 256, 0))
    )
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        memory = LaunchMemory(_MULTIPROCESSORS, capability)
        for name, run in (
            ("node by node", partial(_by_nodes, payload, capability)),
            ("no kind known", partial(_by_kinds, payload, memory)),
            ("all kinds known", partial(_by_kinds, moved, memory)),
            ("cache grown", partial(_by_kinds, grown, memory)),
        ):
            found.setdefault(name, []).append(_timed(run))
    return {name: median(values) for name, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.bench.launches", __doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=7, metavar="N", help="of each (%(default)s)")
    add("--capability", type=int, default=86, metavar="N", help="86 for 8.6 (%(default)s)")
    options = parser.parse_args(arguments)
    for tokens in (1, 512):
        for name, value in measure(LLAMA_8B, tokens, options.rounds, options.capability).items():
            print(f"{tokens:4} tokens, {name:16}{value:8.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
