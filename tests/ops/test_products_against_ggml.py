"""References of products, norms, rope, attention and recurrences against ggml's own CPU backend.

The bounds are those that ggml's own tests hold its backends to: its products round activations to
the weights' precision, which the references don't.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.rope import Mode
from tests.ops import harness
from tests.ops.tensors import four, indices, node, params, tensor
from tests.ops.tensors import values as values_of
from tests.ops.test_against_ggml import Ggml
from tests.ops.test_against_ggml import ggml as ggml  # the fixture

pytestmark = pytest.mark.upstream

F32, F16, BF16, Q4_0, Q4_1, Q8_0, I32 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q8_0,
    GgmlType.I32,
)  # fmt: skip
MAX_NMSE = 1e-7
MAX_NMSE_OF_PRODUCTS = 5e-4

Spec = tuple[GgmlType, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """An op as ggml builds it (function, its arguments behind the sources) and as the wire has it.

    A source None is NULL for ggml. ``limit`` bounds integers in sources, ``add`` is what sets the
    last source, which the function doesn't take.
    """

    op: Op
    function: str
    result: Spec
    sources: tuple[Spec | None, ...]
    arguments: tuple[Any, ...] = ()
    words: tuple[int | float, ...] = ()
    limit: int = 5000
    bound: float = MAX_NMSE
    add: str = ""
    name: str = ""

    def __str__(self) -> str:
        types = "-".join("none" if s is None else s[0].name for s in self.sources)
        return f"{self.op}-{types}-{self.name}"


def products() -> Iterator[Case]:
    bound = MAX_NMSE_OF_PRODUCTS
    for type_ in (F32, F16, BF16, Q4_0, Q4_1, Q8_0):
        for n in (1, 9):
            ab: tuple[Spec, ...] = ((type_, (64, 5, 2)), (F32, (64, n, 4, 3)))
            yield Case(
                Op.MUL_MAT, "ggml_mul_mat", (F32, (5, n, 4, 3)), ab, bound=bound, name=f"{n}"
            )
        for inputs in (1, 2):
            abc = ((type_, (64, 5, 6)), (F32, (64, inputs, 3)), (I32, (2, 3)))
            yield Case(
                Op.MUL_MAT_ID, "ggml_mul_mat_id", (F32, (5, 2, 3)), abc, limit=6, bound=bound,
                name=f"{inputs}",
            )  # fmt: skip
    for type_ in (F16, F32):
        ab = ((F16, (64, 5)), (type_, (64, 3)))
        yield Case(Op.MUL_MAT, "ggml_mul_mat", (F32, (5, 3)), ab, bound=bound)
    ab = ((F32, (6, 7, 2)), (F32, (3, 7, 4)))
    yield Case(Op.OUT_PROD, "ggml_out_prod", (F32, (6, 3, 4)), ab, bound=bound)
    for type_ in (F16, Q8_0):
        ab = ((type_, (64, 7, 2)), (F32, (3, 7, 2)))
        yield Case(Op.OUT_PROD, "ggml_out_prod", (F32, (64, 3, 2)), ab, bound=bound)


def norms() -> Iterator[Case]:
    a = (F32, (67, 5, 6, 2))
    for name in ("norm", "rms_norm", "l2_norm"):
        for eps in (1e-6, 10.0):
            yield Case(Op(name.upper()), f"ggml_{name}", a, (a,), (eps,), (eps,), name=f"{eps}")
    for groups in (1, 2, 4, 5, 9):
        words = (groups, 1e-5)
        yield Case(Op.GROUP_NORM, "ggml_group_norm", a, (a,), words, words, name=f"{groups}")
    yield Case(Op.RMS_NORM_BACK, "ggml_rms_norm_back", a, (a, a), (1e-5,), (1e-5,))


def softmaxes() -> Iterator[Case]:
    a = (F32, (67, 5, 6, 2))
    sinks = (F32, (6,))
    for mask in (None, (F32, (67, 5)), (F16, (67, 8, 3, 2)), (F16, (67, 5, 6, 1))):
        for bias in (0.0, 8.0) if mask else (0.0,):
            words = (0.3, bias)
            for add, sources in (("", (a, mask)), ("ggml_soft_max_add_sinks", (a, mask, sinks))):
                function = "ggml_soft_max_ext"
                name = f"{bias}-{mask}"
                yield Case(Op.SOFT_MAX, function, a, sources, words, words, add=add, name=name)
    words = (0.3, 0.0)
    yield Case(Op.SOFT_MAX_BACK, "ggml_soft_max_ext_back", a, (a, a), words, words)


def ropes() -> Iterator[Case]:
    scalings = ((1.0, 0.0, 1.0, 32.0, 1.0), (0.25, 0.75, 1.3, 32.0, 1.0), (0.5, 1.0, 1.0, 1.0, 1.0))
    for mode in Mode:
        multiple = mode >= Mode.MROPE
        n_dims = 32 if mode == Mode.VISION else 48
        sections = (8, 12, 8, 4) if multiple else (0, 0, 0, 0)
        positions = (I32, (20 if multiple else 5,))
        for i, scaling in enumerate(scalings):
            for type_ in (F32, F16):
                for factors in (None, (F32, (32,))):
                    a = (type_, (64, 3, 5, 2))
                    n_ctx = 0 if i == 2 else 2048
                    rest = (int(mode), n_ctx, 10000.0, *scaling)
                    words = (0, n_dims, int(mode), 0, n_ctx, 10000.0, *scaling, *sections)
                    array = (ctypes.c_int * 4)(*sections)
                    arguments = (n_dims, array, *rest) if multiple else (n_dims, *rest)
                    kind = "multi" if multiple else "ext"
                    for back in ("", "_back"):
                        yield Case(
                            Op.ROPE_BACK if back else Op.ROPE, f"ggml_rope_{kind}{back}", a,
                            (a, positions, factors), arguments, words, name=f"{mode.name}-{i}",
                        )  # fmt: skip


def attentions() -> Iterator[Case]:
    for type_ in (F32, F16, BF16, Q8_0, Q4_0):
        for n_kv, tokens in ((96, 1), (600, 1), (96, 70)):
            for bias, softcap in ((0.0, 0.0), (8.0, 0.0), (0.0, 5.0)):
                q = (F32, (64, tokens, 6, 1))
                kv = ((type_, (64, n_kv, 2)), (type_, (96, n_kv, 2)))
                words = (0.125, bias, softcap)
                for add in ("", "ggml_flash_attn_ext_add_sinks"):
                    sources: tuple[Spec, ...] = (q, *kv, (F16, (n_kv, tokens)))
                    sources += ((F32, (6,)),) if add else ()
                    yield Case(
                        Op.FLASH_ATTN_EXT, "ggml_flash_attn_ext", (F32, (96, 6, tokens)), sources,
                        words, words, bound=MAX_NMSE_OF_PRODUCTS, add=add,
                        name=f"{n_kv}-{tokens}-{bias}-{softcap}",
                    )  # fmt: skip


def recurrences() -> Iterator[Case]:
    conv = ((F32, (7, 6, 3)), (F32, (4, 6)))
    yield Case(Op.SSM_CONV, "ggml_ssm_conv", (F32, (6, 4, 3)), conv)
    for n_state, n_decay, heads, groups, kept in (
        (16, 16, 6, 1, 1), (32, 1, 6, 3, 1), (32, 1, 6, 2, 3), (32, 1, 4, 4, 5),
    ):  # fmt: skip
        x = (4, heads, 5, 2)
        scan = (
            (F32, (n_state, 4, heads, 3)), (F32, x), (F32, x[1:]), (F32, (n_decay, heads)),
            (F32, (n_state, groups, 5, 2)), (F32, (n_state, groups, 5, 2)), (I32, (2,)),
        )  # fmt: skip
        size = 4 * heads * 5 * 2 + kept * n_state * 4 * heads * 2
        yield Case(
            Op.SSM_SCAN, "ggml_ssm_scan", (F32, (size,)), scan, (ctypes.c_int64(kept),), (kept,),
            limit=3, name=f"{n_decay}-{groups}-{kept}",
        )  # fmt: skip
    for sequences in (1, 2):
        rows, result = (F32, (64, 3, 4)), (F32, (192, 4 + 64 * sequences))
        states = (F32, (64 * 64 * 3, sequences))
        name = f"{sequences}"
        wkv6 = (rows, rows, rows, (F32, (64, 3)), rows, states)
        yield Case(Op.RWKV_WKV6, "ggml_rwkv_wkv6", result, wkv6, name=name)
        yield Case(Op.RWKV_WKV7, "ggml_rwkv_wkv7", result, (*(rows,) * 6, states), name=name)
        yield Case(
            Op.GATED_LINEAR_ATTN, "ggml_gated_linear_attn", result, (*(rows,) * 4, states),
            (0.25,), (0.25,), name=name,
        )  # fmt: skip


def signals() -> Iterator[Case]:
    a = (9, 8, 3, 2)
    for x, result in ((F32, F32), (F32, F16), (F16, F16)):
        yield im2col((F16, (3, 2, 5, 4)), (x, (9, 7, 5, 2)), (result, (30, 4, 4, 2)), two=True)
        yield im2col((F16, (3, 5)), (x, (9, 5, 2)), (result, (15, 4, 2)), two=False)
    for kind in (0, 1):
        for type_ in (F32, F16):
            for k, s, p in ((2, 2, 0), (3, 1, 1), (1, 3, 1)):
                ne0, ne1 = ((n + 2 * p - k) // s + 1 for n in a[:2])
                of, name = ((type_, a),), f"{kind}-{k}"
                line = (kind, k, s, p)
                area = (kind, k, k, s, s, p, p)
                floats = (*area[:5], float(p), float(p))
                result_ = (F32, (ne0, 8, 3, 2))
                yield Case(Op.POOL_1D, "ggml_pool_1d", result_, of, line, line, name=name)
                result_ = (F32, (ne0, ne1, 3, 2))
                yield Case(Op.POOL_2D, "ggml_pool_2d", result_, of, floats, area, name=name)
    for mode in (0, 1, 2, 0x100, 0x101, 0x102, 0x201):
        for size in ((18, 16, 3, 2), (5, 3, 6, 2), (1, 1, 3, 4)):
            yield Case(
                Op.UPSCALE, "ggml_interpolate", (F32, size), ((F32, a),),
                (*map(ctypes.c_int64, size), mode), (mode,), name=f"{mode}-{size[0]}",
            )  # fmt: skip
    for dim in (8, 9):
        yield Case(
            Op.TIMESTEP_EMBEDDING, "ggml_timestep_embedding", (F32, (dim, 5)), ((F32, (5,)),),
            (dim, 1000), (dim, 1000), name=f"{dim}",
        )  # fmt: skip


def im2col(kernel: Spec, x: Spec, result: Spec, *, two: bool) -> Case:
    words = (2, 3, 1, 2, 2, 1) if two else (2, 0, 1, 0, 2, 1)
    arguments = (*words, ctypes.c_bool(two), int(result[0]))
    return Case(
        Op.IM2COL, "ggml_im2col", result, (kernel, x), arguments, (*words, int(two)),
        name=f"{1 + two}-{result[0].name}",
    )  # fmt: skip


def make(case: Case, i: int) -> Tensor | None:
    """Source ``i``: integers below the limit, a mask with holes, or normally distributed values."""
    spec = case.sources[i]
    if spec is None:
        return None
    type_, ne = spec
    if type_ is I32:
        return indices(ne, case.limit, i)
    rng, shape = np.random.default_rng(i), four(ne)[::-1]
    values = rng.standard_normal(shape).astype(np.float32)
    if (case.op, i) == (Op.FLASH_ATTN_EXT, 3):
        values[..., 1:][rng.random((*shape[:3], shape[3] - 1)) < 0.3] = -np.inf
    if case.op in (Op.ROPE, Op.ROPE_BACK) and i == 2:
        values = 1 + abs(values)
    if case.op is Op.SSM_SCAN and i == 3:
        # Decays are negative exponents; positive ones would only show what overflows.
        values = -abs(values)
    return tensor(type_, ne, values)


def by_ggml(ggml: Ggml, case: Case, sources: list[Tensor | None]) -> np.ndarray[Any, Any]:
    """The case's values as ggml computes them."""
    added = sources[-1] if case.add else None
    given = sources[:-1] if case.add else sources
    made = [None if s is None else ggml.tensor(s) for s in given]
    result = ggml.call(case.function, ggml._context, *made, *case.arguments)
    if added is not None:
        ggml.call(case.add, result, ggml.tensor(added))
    graph = ggml.call("ggml_new_graph", ggml._context)
    ggml.call("ggml_build_forward_expand", graph, result)
    ggml.call("ggml_graph_compute_with_ctx", ggml._context, graph, 1)
    copy = tensor(*case.result)
    address = ggml.call("ggml_get_data", result).value
    assert address is not None
    ctypes.memmove(copy.address, address, copy.nbytes)
    return values_of(copy)


ALL = [*products(), *norms(), *softmaxes(), *ropes(), *attentions(), *recurrences(), *signals()]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_reference_agrees_with_ggml(ggml: Ggml, case: Case) -> None:
    sources = [make(case, i) for i in range(len(case.sources))]
    expected = by_ggml(ggml, case, sources)
    t = node(case.op, *case.result, sources, params(*case.words))
    harness.run(t, kernels=False)
    assert harness.nmse(expected, values_of(t)) < case.bound
