"""Holds what a server computed of a graph against numpy, node by node.

Each node is judged by what it made of the values that the server itself had before, so errors
don't add up along a graph, and the first node that is wrong is the one that is reported. What later
nodes have written over is carried on as numpy has it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import numpy.typing as npt

from client.tensors import NUMPY_TYPES
from conformance.differential.case import GraphCase
from conformance.differential.compare import (
    DEFAULT_NMSE,
    PRODUCT_NMSE,
    CaseMemory,
    Check,
    difference,
)
from conformance.differential.endpoint import Endpoint
from conformance.differential.explore import Mismatch
from conformance.differential.runner import CaseRunner, Image, ServerRefused
from conformance.properties.evaluate import Evaluated, evaluate
from conformance.suite.context import Context
from conformance.suite.errors import CaseEnded
from protocol.commands import Command
from protocol.ggml.ops import VIEWS, Op, TensorFlag
from protocol.ggml.types import GgmlType
from protocol.graph_payload import encode_graph
from protocol.tensor import Tensor
from tools.serving.processes import PATIENCE

Array = npt.NDArray[Any]

# How much of its norm a node may change by others' rounding and still be compared (squared).
_STEADY = 1e-9
# One rounding to F32.
_EPS = 2.0**-24
_WHOLE = 0x7FFF_FFFF


def last_writers(case: GraphCase, image: Image) -> npt.NDArray[np.int32]:
    """Return for each byte of the image the node that wrote it last, -1 if none did."""
    writers = np.full(len(image.data), -1, np.int32)
    memory = CaseMemory(np.empty(0, np.uint8), image.offsets)
    for i, t in enumerate(case.graph.nodes):
        if t.op not in VIEWS and t.nelements:
            _of_elements(writers, memory, t)[...] = i
    return writers


def _of_elements(per_byte: Array, memory: CaseMemory, t: Tensor) -> Array:
    """Return what an array with an item for each byte has for the elements of ``t``."""
    root = t if t.view_src is None else t.view_src
    start = memory.offsets[root] + (t.view_offs if t.view_src is not None else 0)
    item = per_byte.itemsize
    shape = (*reversed(t.ne), NUMPY_TYPES[t.type].itemsize)
    strides = (*(item * n for n in reversed(t.nb)), item)
    return np.ndarray(shape, per_byte.dtype, per_byte, start * item, strides)


def check(case: GraphCase, image: Image, actual: CaseMemory) -> None:
    """Raise Mismatch if ``actual``, a server's memory after the graph ran, is not right."""
    quiet = image.untouched(case)
    changed = np.flatnonzero(quiet & (actual.image != image.data))
    if len(changed):
        raise Mismatch(f"wrote outside its tensors: byte {int(changed[0])} of the image")
    writers = last_writers(case, image)
    ours = CaseMemory(image.data.copy(), image.offsets)
    inner: dict[Tensor, Evaluated] = {}
    for i, t in enumerate(case.graph.nodes):
        if t.op in VIEWS or not t.nelements:
            continue
        result = _expected(t, ours, inner)
        if not t.flags & TensorFlag.OUTPUT:
            # A server may compute it together with what reads it, and leave its memory alone.
            inner[t] = result
            ours.array(t)[...] = result.values
            continue
        got = actual.array(t)
        final = (_of_elements(writers, ours, t) == i).all(-1)
        wrong = _wrong(result, got) & final
        if wrong.any():
            raise Mismatch(f"node {i}, {_label(t)}: {_worst(result, got, wrong)}")
        into = ours.array(t)
        into[...] = np.where(final, got, result.values.astype(got.dtype))


def _expected(t: Tensor, ours: CaseMemory, inner: dict[Tensor, Evaluated]) -> Evaluated:
    sources = [s for s in t.src if s is not None and s is not t]
    result = evaluate(t, [ours.array(s) for s in sources])
    if not inner or sources[0] not in inner:
        return result
    # A product, of which the first factor is as far off as it was allowed to be.
    first, factors = inner[sources[0]], ours.array(sources[1]).astype(np.float64)
    values = first.values * factors
    return Evaluated(values, (first.tolerance + np.abs(first.values) * _EPS) * np.abs(factors))


def _wrong(result: Evaluated, got: Array) -> npt.NDArray[np.bool_]:
    want = result.values
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = want.astype(got.dtype)
        off = np.abs(got.astype(np.float64) - want)
        near = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        if isinstance(result.tolerance, np.ndarray) or result.tolerance:
            # One rounding to the result's type comes on top.
            near |= off <= result.tolerance + np.abs(want) * _EPS
    return np.asarray(~near)


def _worst(result: Evaluated, got: Array, wrong: npt.NDArray[np.bool_]) -> str:
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(wrong, np.abs(got.astype(np.float64) - result.values), -1.0)
    gap = np.where(wrong & ~np.isfinite(gap), np.inf, gap)
    at = np.unravel_index(int(gap.argmax()), gap.shape)
    where = ", ".join(str(int(i)) for i in reversed(at))
    tolerance = np.broadcast_to(result.tolerance, gap.shape)[at]
    return (
        f"[{where}] is {got[at]}, expected {result.values[at]} (within {tolerance:.3g}; "
        f"{int(wrong.sum())} of {wrong.size} off)"
    )


def _label(t: Tensor) -> str:
    return f"{t.op} {'x'.join(map(str, t.ne))}{' in place' if t.view_src is not None else ''}"


def conditioned(case: GraphCase, image: Image) -> set[int]:
    """Return the nodes whose values hardly depend on how earlier ones were rounded.

    Found by computing twice, the second time with every inexact node off by a little: what that
    changes much can't be compared between two servers, each of which rounds in its own way.
    """
    plain, moved = (CaseMemory(image.data.copy(), image.offsets) for _ in range(2))
    random = np.random.default_rng(0)
    steady = set()
    for i, t in enumerate(case.graph.nodes):
        if t.op in VIEWS or not t.nelements:
            continue
        first, second = (_expected(t, memory, {}) for memory in (plain, moved))
        values = second.values
        if isinstance(first.tolerance, np.ndarray):
            values = values + first.tolerance * random.choice((-1.0, 1.0), values.shape)
        plain.array(t)[...] = first.values
        moved.array(t)[...] = values
        with np.errstate(invalid="ignore", over="ignore"):
            gap = float(((plain.array(t) - moved.array(t)).astype(np.float64) ** 2).sum())
            norm = float((plain.array(t).astype(np.float64) ** 2).sum())
        if gap <= _STEADY * norm:
            steady.add(i)
    return steady


def run(context: Context, case: GraphCase, image: Image, *, stepwise: bool = False) -> CaseMemory:
    """Return a server's memory after the graph ran once.

    ``stepwise`` runs each node as a graph of its own.

    All tensors lie in one buffer. Raises what ends a case.
    """
    peer = context.connect()
    try:
        buffer = peer.alloc(len(image.data))
        for root, offset in image.offsets.items():
            root.place(buffer.handle, buffer.base + offset)
        whole = buffer.leaf(_WHOLE, (len(image.data),), type=GgmlType.I8)
        peer.set(whole, image.data.tobytes())
        payload = case.graph.payload(peer.dialect)
        graphs = [payload.nodes]
        if stepwise:
            computed = [t.id for t in case.graph.nodes if t.op not in VIEWS]
            graphs = [np.array([i], np.uint64) for i in computed]
        for nodes in graphs:
            payload.nodes = nodes
            peer.send(Command.GRAPH_COMPUTE, encode_graph(payload, peer.dialect))
            answer = peer.answer(Command.GRAPH_COMPUTE)
            if answer is not None and answer.result:
                raise Mismatch(f"GRAPH_COMPUTE is answered {answer.result}")
        data = peer.get(whole, len(image.data))
    finally:
        peer.close()
        for root in image.offsets:
            root.place(0, 0)
    return CaseMemory(np.frombuffer(data, np.uint8), image.offsets)


class Reference:
    """Another server to hold results against."""

    def __init__(self, endpoint: Endpoint, *, timeout: float = PATIENCE) -> None:
        self._loop = asyncio.new_event_loop()
        self._runner = CaseRunner(endpoint, timeout=timeout)

    def close(self) -> None:
        """Hang up."""
        self._loop.run_until_complete(self._runner.close())
        self._loop.close()

    def run(self, case: GraphCase, image: Image) -> CaseMemory:
        """Return its memory after the graph. Raises Refused, TimeoutError."""
        return self._loop.run_until_complete(self._runner.run(case, image))


def judge(context: Context, case: GraphCase, reference: Reference | None = None) -> None:
    """Raise Mismatch for what the server under test computes otherwise than numpy.

    The graph runs as a whole and node by node: what a planner makes of neighbours must not show.
    With a reference, its results are held against numpy's too, and those that hardly depend on
    rounding against each other.
    """
    image = Image.of(case)
    actual = None
    for stepwise in (False, True):
        how = "node by node: " if stepwise else ""
        try:
            memory = run(context, case, image, stepwise=stepwise)
            check(case, image, memory)
        except (CaseEnded, Mismatch) as error:
            raise Mismatch(f"{how}{error}") from None
        actual = actual or memory
    if reference is None:
        return
    assert actual is not None
    try:
        expected = reference.run(case, image)
        check(case, image, expected)
    except (ServerRefused, TimeoutError, Mismatch) as error:
        raise Mismatch(f"the reference: {error or 'no answer in time'}") from None
    _compare(case, image, expected, actual)


def _compare(case: GraphCase, image: Image, expected: CaseMemory, actual: CaseMemory) -> None:
    writers = last_writers(case, image)
    steady = conditioned(case, image)
    for i, t in enumerate(case.graph.nodes):
        if i not in steady or not t.flags & TensorFlag.OUTPUT:
            continue
        if not (_of_elements(writers, actual, t) == i).all():
            continue
        halves = t.op is Op.MUL_MAT and t.src[0] is not None and t.src[0].type != t.type
        bound = PRODUCT_NMSE if halves else DEFAULT_NMSE
        wrong = difference(Check(bound=bound), t, expected, actual)
        if wrong:
            raise Mismatch(f"node {i}, {_label(t)}: unlike the reference's: {wrong}")
