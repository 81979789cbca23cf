"""How many launches a graph of a model is: each costs about two microseconds on a card."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

import rpc_server.devices.cuda.lower
import rpc_server.ops  # noqa: F401  (both fill their tables)
from client.builder.graph import Graph, GraphBuilder
from protocol.tensor import Tensor, place_views
from rpc_server.devices.cuda.planner import CudaPlanner, Launch, lower_to_launches
from rpc_server.devices.planning.nodes import lower_node
from tools.gpu_check.llama import LLAMA_8B, SyntheticLlama

# Roots lie so far from one another; nothing reads them.
_APART = 1 << 40


class _Nowhere:
    """A backend without a server: tensors get addresses, and a graph is only ordered."""

    def __init__(self) -> None:
        self.graph = GraphBuilder()
        self._places = itertools.count(1)

    async def allocate(self, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            t.place(1, next(self._places) * _APART)

    async def upload(self, tensor: Tensor, values: Any) -> None:
        pass

    async def prepare(self, outputs: Iterable[Tensor]) -> Graph:
        graph = self.graph.build(outputs)
        await self.allocate(t for t in graph.roots if not t.placed)
        return graph


def launches(tokens: int, before: int, capability: int) -> Counter[str]:
    """What is launched for so many tokens of the 8B, by the kernels' names."""

    async def nodes() -> tuple[Tensor, ...]:
        backend: Any = _Nowhere()
        model = SyntheticLlama(backend, LLAMA_8B, before + tokens)
        await backend.allocate(t for layer in model._matrices for t in layer.values())
        await backend.allocate([model._output, *model._norms.values()])
        await backend.allocate(t for pair in model._caches for t in pair)
        graph: Any = (await model.prepare(tokens, before)).graph
        assert isinstance(graph, Graph)
        place_views(graph.tensors)
        return graph.nodes

    listed = asyncio.run(nodes())
    planner = CudaPlanner(listed, multiprocessors=82, capability=capability)
    for node in listed:
        lower_node(node, planner, lambda t: lower_to_launches(t, planner), lambda node, spec: None)
    return Counter(x.kernel.name if isinstance(x, Launch) else "cuBLAS" for x in planner.launches)


# Capability, and launches: of a token, of a prompt of 512, where tiles or cuBLAS multiply.
@pytest.mark.parametrize(
    ("capability", "token", "prompt"),
    [(60, 276, 859), (61, 276, 449), (80, 276, 1417), (86, 276, 449), (90, 276, 1417)],
)
def test_an_8b(capability: int, token: int, prompt: int) -> None:
    """As docs/gpu.md has it; fewer are better."""
    assert launches(1, 512, capability).total() == token
    assert launches(512, 0, capability).total() == prompt


def test_what_a_layer_of_a_token_is() -> None:
    """Keys are turned and kept at once, and products of one column go together."""
    found = launches(1, 512, 86)
    layers = LLAMA_8B.layers
    # One for queries and keys, which puts these and values into the cache.
    assert (found["rope"], found["set_rows"]) == (layers, 0)
    # Parts of attention are put together by the last of them.
    assert (found["attention_few"], found["attention_join"]) == (layers, 0)
    assert found["multiply_joint"] == found["multiply_gated"] == layers
    # What attention and GLU leave, and norms, is rounded with them.
    assert found["quantize_columns"] == 0
    assert found["normalize"] == 2 * layers + 1
