"""Runs one node by its array reference and by the CPU device's kernels, and compares."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from protocol.dialects import DIALECTS
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.executor import Executor
from rpc_server.devices.cpu.kernels.interface.layout import activation_form
from rpc_server.devices.cpu.plan import CpuPlanBuilder
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.parse import LinkedGraph
from rpc_server.ops.table import ContractError, check
from rpc_server.types import from_f32, to_f32
from tests.ops.tensors import CONTEXT, GUARD_BYTE, MEMORY, raw, values


@functools.cache
def builder(n_threads: int, use_kernels: bool) -> CpuPlanBuilder:
    return CpuPlanBuilder(Executor(n_threads), ScratchArena(), use_kernels=use_kernels)


def run(nodes: Tensor | Sequence[Tensor], *, kernels: bool, n_threads: int = 2) -> None:
    """Plan and run nodes; raises GraphError as a server would."""
    listed = [nodes] if isinstance(nodes, Tensor) else list(nodes)
    builder(n_threads, kernels).build(LinkedGraph(listed, DIALECTS[0])).run()


def guards_intact(t: Tensor) -> bool:
    """Whether the bytes before and behind the tensor's memory are as they were made."""
    memory = MEMORY[t.id]
    start = t.address - int(memory.ctypes.data)
    return bool(
        (memory[:start] == GUARD_BYTE).all() and (memory[start + t.nbytes :] == GUARD_BYTE).all()
    )


def ran(t: Tensor) -> np.ndarray[Any, Any]:
    """The values of a node after its reference has run; what lies around it is untouched."""
    run(t, kernels=False)
    if t.view_src is None:
        assert guards_intact(t)
    return values(t)


def by_both(t: Tensor, n_threads: int = 2) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(reference, kernels): the node's values run each way from the same memory.

    Fails if a kernel is missing, or writes outside the node's memory.
    """
    touched = {t.address: t, **{s.address: s for s in t.src if s is not None}}
    before = [(s, raw(s)) for s in touched.values()]
    run(t, kernels=False)
    expected = values(t)
    for s, content in before:
        CONTEXT.memory(s.address, s.nbytes)[...] = content
    plan = builder(n_threads, True).build(LinkedGraph([t], DIALECTS[0]))
    assert not plan.interpreted, f"no kernel for {t.label}"
    plan.run()
    if t.id in MEMORY and t.view_src is None:
        assert guards_intact(t), f"{t.label}: wrote outside its memory"
    return expected, values(t)


def rounded(x: np.ndarray[Any, Any], weights: GgmlType) -> np.ndarray[Any, Any]:
    """Activations (..., ne0) as ggml's CPU backend rounds them for a product with these weights.

    Half a step more or less than its x86 code does: see the encoders in rpc_server/types.
    """
    form = GgmlType(activation_form(weights))
    if form is GgmlType.F32:
        return x
    if form is GgmlType.F16:
        return x.astype(np.float16).astype(np.float32)
    block, n = TYPE_INFO[form].block_size, x.shape[-1]
    # Our units may be part filled where ggml's blocks may not.
    whole = np.zeros((*x.shape[:-1], -(-n // block) * block), np.float32)
    whole[..., :n] = x
    codes = from_f32(form, whole, np)
    if form is GgmlType.BF16:
        wide: np.ndarray[Any, Any] = codes.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32)
    decoded: np.ndarray[Any, Any] = to_f32(form, codes, np)[..., :n]
    return decoded


def rounded_source(t: Tensor, weights: GgmlType) -> np.ndarray[Any, Any]:
    """The float64 values of ``t`` as references multiply them: rounded for quantized weights."""
    x = values(t)
    if TYPE_INFO[weights].quantized and not t.quantized:
        x = rounded(x, weights)
    return x.astype(np.float64)


def nmse(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    """Normalized mean squared error; infinities and NaNs must agree exactly (else inf)."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected.shape != actual.shape:
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return float("inf")
    error = float(((expected[finite] - actual[finite]) ** 2).sum())
    norm = float((expected[finite] ** 2).sum())
    return error / norm if norm else error


def check_values(t: Tensor, expected: np.ndarray[Any, Any], tolerance: float) -> None:
    """Run a node by its reference; what it must give, and that nothing around it has changed."""
    run(t, kernels=False)
    np.testing.assert_allclose(values(t), expected, rtol=tolerance, atol=tolerance)
    assert guards_intact(t)


def refused(t: Tensor, message: str) -> None:
    """The node breaks its op's contract, and the message says how."""
    with pytest.raises(ContractError, match=message):
        check(t)
