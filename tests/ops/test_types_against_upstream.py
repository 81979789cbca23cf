"""Types of all ops: references, and some kernels, against llama.cpp's own server.

Kernels of types that only few models have are held against the references, not here: there are
hundreds, and each would have to be compiled.
"""

from __future__ import annotations

import numpy as np
import pytest

from client.backend import Backend
from client.errors import ConnectionLost
from client.tensors import Array
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.types import to_f32
from tests.ops import harness
from tests.ops.tensors import CONTEXT, params, permuted, tensor
from tests.ops.tensors import node as node_of
from tests.ops.tensors import raw as raw_of
from tests.ops.type_cases import EXACT, FAMILIES, MAX_NMSE, Case
from tests.upstream_server import Endpoint

pytestmark = pytest.mark.upstream

# ggml's CPU has vector code that rounds to these otherwise than its reference: a step apart in few
# elements.
ROUNDED_OTHERWISE = {GgmlType.Q8_0, GgmlType.Q8_1, GgmlType.Q8_K}
MAX_ROUNDED_OTHERWISE = 0.01

# ggml_op_hint of a product: source 0 is such a matrix.
HADAMARD = 1


async def computed(backend: Backend, case: Case) -> Array:
    """The bytes of the case's result."""
    leaves = []
    for i in range(len(case.sources)):
        leaves.append(await backend.tensor(*case.leaf(i), case.content(i).tobytes()))
    node = case.build(backend.graph, leaves)
    plan = await backend.prepare(node)
    await plan.run()
    raw = await backend.connection.get_tensor(node)
    await plan.free()
    for leaf in leaves:
        await backend.connection.free_buffer(leaf.buffer)
    return raw


async def upstreams(backend: Backend, case: Case) -> Array:
    """The same by upstream's server, which ends where an op isn't for these types."""
    try:
        return await computed(backend, case)
    except ConnectionLost as error:
        pytest.fail(f"{case}: {error}")


def decoded(type_: GgmlType, raw: Array) -> Array:
    if type_ in (GgmlType.I32, GgmlType.I64, GgmlType.I16, GgmlType.I8):
        return raw.view(type_.name.replace("I", "int")).astype(np.float64)
    values: Array = to_f32(type_, raw)
    return values


def difference(case: Case, expected: Array, actual: Array) -> str:
    """What is wrong with the result, or nothing."""
    type_ = case.result[0]
    if np.array_equal(expected, actual):
        return ""
    x, y = decoded(type_, expected), decoded(type_, actual)
    if case.bound == EXACT and not TYPE_INFO[type_].quantized:
        # Zeros may differ in their sign.
        return "" if np.array_equal(x, y, equal_nan=True) else f"{(x != y).sum()} values differ"
    if case.bound == EXACT and type_ not in ROUNDED_OTHERWISE:
        return f"{(expected != actual).sum()} of {len(actual)} bytes differ"
    if case.bound == EXACT:
        apart = np.abs(x - y)
        few = (apart != 0).mean() < MAX_ROUNDED_OTHERWISE
        near = apart.max() <= np.abs(x).max() / 127 * 1.01
        return "" if few and near else f"{(apart != 0).mean():.2%} differ, by up to {apart.max()}"
    error = harness.nmse(x, y)
    return "" if error < case.bound else f"NMSE {error:.3g}"


def by_reference(case: Case) -> Array:
    """The bytes of the case's result, computed here."""
    sources = []
    for i in range(len(case.sources)):
        leaf = tensor(*case.leaf(i))
        CONTEXT.memory(leaf.address, leaf.nbytes)[...] = case.content(i)
        sources.append(permuted(leaf, (0, 2, 1, 3)) if i in case.permuted else leaf)
    inplace = None if case.into is None else sources[case.into]
    words = params(*case.params)
    node = node_of(case.op, *case.result, sources, words, inplace=inplace)
    harness.run(node, kernels=False)
    return raw_of(node)


# The whole matrix of types takes part in these tests, a few of them in those of the server.
COMMON = {
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.I64, GgmlType.Q8_0,
    GgmlType.Q4_0,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
async def test_references(family: str, upstream: Endpoint) -> None:
    wrong = {}
    async with Backend.connect(upstream.host, upstream.port) as backend:
        for case in FAMILIES[family]():
            expected = await upstreams(backend, case)
            if what := difference(case, expected, by_reference(case)):
                wrong[str(case)] = what
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
async def test_server(family: str, upstream: Endpoint, ours: Endpoint) -> None:
    wrong = {}
    async with (
        Backend.connect(upstream.host, upstream.port) as theirs,
        Backend.connect(ours.host, ours.port) as own,
    ):
        for case in FAMILIES[family]():
            if {type_ for type_, _ in (case.result, *case.sources)} <= COMMON:
                expected = await upstreams(theirs, case)
                if what := difference(case, expected, await computed(own, case)):
                    wrong[str(case)] = what
    assert not wrong


def hadamard(n: int) -> Array:
    """The orthonormal Hadamard matrix of a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Array = matrix / np.sqrt(np.float32(n))
    return scaled


@pytest.mark.parametrize("type_", [GgmlType.F32, GgmlType.F16], ids=lambda t: t.name)
async def test_product_said_to_be_by_a_hadamard_matrix(
    type_: GgmlType, upstream: Endpoint, ours: Endpoint
) -> None:
    # Upstream then transforms source 1 by itself and reads nothing of source 0.
    results = []
    for endpoint in (upstream, ours):
        async with Backend.connect(endpoint.host, endpoint.port) as backend:
            matrix = await backend.tensor(GgmlType.F32, (64, 64), hadamard(64))
            x = np.random.default_rng(1).standard_normal((5, 64))
            inputs = await backend.tensor(type_, (64, 5), x)
            product = (matrix, inputs)
            node = backend.graph.op(Op.MUL_MAT, GgmlType.F32, (64, 5), product, (0, HADAMARD))
            results.append(await backend.compute(node))
    assert harness.nmse(*results) < MAX_NMSE
