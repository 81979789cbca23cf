"""Runs one node by its array reference and by the CPU device's kernels, on tensors made here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from client.tensors import encode_params
from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor, contiguous_strides, padded_sources
from rpc_server.devices.cpu.executor import Executor
from rpc_server.devices.cpu.kernels.interface.layout import activation_form
from rpc_server.devices.cpu.plan import CpuPlanBuilder
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.parse import LinkedGraph
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.table import ContractError, check
from rpc_server.types import from_f32, to_f32

_ids = itertools.count(1)
CONTEXT = ArrayContext()

# Bytes around a tensor's memory that a kernel must leave as they are.
GUARD = 64
GUARD_BYTE = 0xA5

_memory: dict[int, np.ndarray[Any, Any]] = {}


def four(ne: Sequence[int]) -> tuple[int, int, int, int]:
    padded = [*ne, 1, 1, 1, 1][:4]
    return (padded[0], padded[1], padded[2], padded[3])


def tensor(
    type_: GgmlType,
    ne: Sequence[int],
    values: Any = None,
    *,
    nb: tuple[int, int, int, int] | None = None,
    name: str = "",
) -> Tensor:
    """A tensor with memory of its own between guard bytes.

    ``values`` (broadcast to (ne3, ne2, ne1, ne0)) are converted to ``type_``; ``nb`` gives other
    strides than the dense ones (the memory is as large as they need).
    """
    dims = four(ne)
    t = Tensor(
        id=next(_ids),
        name=name or f"t{dims}",
        type=type_,
        op=Op.NONE,
        ne=dims,
        nb=nb or contiguous_strides(type_, dims),
    )
    memory = np.full(t.nbytes + 2 * GUARD + 64, GUARD_BYTE, np.uint8)
    t.address = -(-(int(memory.ctypes.data) + GUARD) // 64) * 64
    _memory[t.id] = memory
    if values is not None:
        CONTEXT.store(t, np.asarray(values))
    return t


def permuted(t: Tensor, axes: Sequence[int]) -> Tensor:
    """A view with dimensions moved as ggml_permute does: dim i of ``t`` becomes dim axes[i]."""
    ne, nb = [0] * 4, [0] * 4
    for i, axis in enumerate(axes):
        ne[axis], nb[axis] = t.ne[i], t.nb[i]
    return view(t, ne, nb)


def view(t: Tensor, ne: Sequence[int], nb: Sequence[int], offset: int = 0) -> Tensor:
    """A view on the memory of ``t``."""
    result = Tensor(
        id=next(_ids),
        name=f"view of {t.name}",
        type=t.type,
        op=Op.VIEW,
        ne=four(ne),
        nb=(nb[0], nb[1], nb[2], nb[3]),
        view_src=t,
        address=t.address + offset,
    )
    result.src = padded_sources([t])
    return result


def params(*words: int | float) -> tuple[int, ...]:
    """op_params from ints and floats (floats by their bits)."""
    return encode_params(words)


def node(
    op: Op,
    type_: GgmlType,
    ne: Sequence[int],
    sources: Sequence[Tensor | None],
    op_params: tuple[int, ...] = (0,) * 16,
    *,
    inplace: Tensor | None = None,
    nb: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """A node with memory of its own, or that of ``inplace``."""
    result = tensor(type_, ne, nb=nb if inplace is None else inplace.nb)
    result.op, result.op_params = op, op_params
    result.src = padded_sources(sources)
    if inplace is not None:
        result.address, result.view_src = inplace.address, inplace
    return result


@functools.cache
def builder(n_threads: int, use_kernels: bool) -> CpuPlanBuilder:
    return CpuPlanBuilder(Executor(n_threads), ScratchArena(), use_kernels=use_kernels)


def run(nodes: Tensor | Sequence[Tensor], *, kernels: bool, n_threads: int = 2) -> None:
    """Plan and run nodes; raises GraphError as a server would."""
    listed = [nodes] if isinstance(nodes, Tensor) else list(nodes)
    builder(n_threads, kernels).build(LinkedGraph(listed, DIALECTS[0])).run()


def raw(t: Tensor) -> np.ndarray[Any, Any]:
    """A copy of the bytes of the tensor's extent."""
    return np.array(CONTEXT.memory(t.address, t.nbytes))


def values(t: Tensor) -> np.ndarray[Any, Any]:
    """A copy of the tensor's values as float32, shape (ne3, ne2, ne1, ne0)."""
    return np.array(CONTEXT.f32(t), np.float32)


def guards_intact(t: Tensor) -> bool:
    """Whether the bytes before and behind the tensor's memory are as they were made."""
    memory = _memory[t.id]
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
    if t.id in _memory and t.view_src is None:
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


def noise(ne: Sequence[int], type_: GgmlType = GgmlType.F32, seed: int = 0) -> Tensor:
    """A tensor of normally distributed values."""
    return tensor(type_, ne, np.random.default_rng(seed).standard_normal(four(ne)[::-1]))


def check_values(t: Tensor, expected: np.ndarray[Any, Any], tolerance: float) -> None:
    """Run a node by its reference; what it must give, and that nothing around it has changed."""
    run(t, kernels=False)
    np.testing.assert_allclose(values(t), expected, rtol=tolerance, atol=tolerance)
    assert guards_intact(t)


def refused(t: Tensor, message: str) -> None:
    """The node breaks its op's contract, and the message says how."""
    with pytest.raises(ContractError, match=message):
        check(t)
