"""How many launches a graph of a model is: each costs about two microseconds on a card."""

from __future__ import annotations

from collections import Counter

import pytest

import rpc_server.devices.cuda.lower
import rpc_server.ops  # noqa: F401  (both fill their tables)
from protocol.tensor import place_views
from rpc_server.devices.cuda.planner import CudaPlanner, Launch, lower_to_launches
from rpc_server.devices.planning.nodes import lower_node
from tools.bench.launches import model_graph
from tools.gpu_check.llama import LLAMA_8B


def planned(tokens: int, before: int, capability: int, positions: int = 0) -> CudaPlanner:
    """The 8B's launches for so many tokens, with room for so many positions in the cache."""
    graph = model_graph(LLAMA_8B, tokens, before, positions=positions)
    place_views(graph.tensors)
    planner = CudaPlanner(graph.nodes, multiprocessors=82, capability=capability)
    for node in graph.nodes:
        lower_node(node, planner, lambda t: lower_to_launches(t, planner), lambda node, spec: None)
    return planner


def launches(tokens: int, before: int, capability: int) -> Counter[str]:
    """What is launched for so many tokens of the 8B, by the kernels' names."""
    found = planned(tokens, before, capability).launches
    return Counter(x.kernel.name if isinstance(x, Launch) else "cuBLAS" for x in found)


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


@pytest.mark.parametrize("before", [256, 512, 4096, 16384])
def test_a_cache_that_grows_changes_attention_and_nothing_else(before: int) -> None:
    """So a captured graph goes on for the next 256 positions with as many kernels changed."""
    two = [planned(1, at, 86, positions=1 << 15) for at in (before, before + 256)]
    pairs = list(zip(two[0].launches, two[1].launches, strict=True))
    changed = []
    for a, b in pairs:
        assert isinstance(a, Launch)
        assert isinstance(b, Launch)
        assert a.kernel == b.kernel
        if (a.grid, a.shared, a.words.tobytes()) != (b.grid, b.shared, b.words.tobytes()):
            changed.append(a.kernel.name)
    assert changed == ["attention_few"] * LLAMA_8B.layers
    # Scratch is whole pieces of a mebibyte: most often the same.
    assert two[1].scratch_peak - two[0].scratch_peak < 64 << 10
