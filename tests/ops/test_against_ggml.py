"""References against ggml's own CPU backend, loaded from a built llama.cpp.

Ops that move data must agree to the bit; those that compute, to ggml's own bound for backends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from tests.ops import harness
from tests.ops.tensors import CONTEXT, indices, node, noise, params, raw, tensor
from tests.ops.tensors import values as values_of
from tools import upstream

pytestmark = pytest.mark.upstream

F32, F16, BF16, I32, I64 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.I64,
)  # fmt: skip
MAX_NMSE = 1e-7


class InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class Ggml:
    """A context of ggml's C interface in which one op at a time is computed."""

    def __init__(self) -> None:
        folder = upstream.bin_dir()
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
        self._base.ggml_init.argtypes = [InitParams]
        self._cpu.ggml_cpu_init()
        self._context = self.call("ggml_init", InitParams(64 << 20, None, False))

    def close(self) -> None:
        self.call("ggml_free", self._context)

    def call(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that returns a pointer; Python floats and ints are float and int."""
        function = getattr(self._base, name, None) or getattr(self._cpu, name)
        function.restype = ctypes.c_void_p
        function.argtypes = None
        return ctypes.c_void_p(
            function(*(ctypes.c_float(a) if isinstance(a, float) else a for a in arguments))
        )

    def tensor(self, t: Tensor) -> ctypes.c_void_p:
        """A ggml tensor with type, size and bytes of ``t``, which is dense."""
        sizes = [ctypes.c_int64(n) for n in t.ne]
        made = self.call("ggml_new_tensor_4d", self._context, int(t.type), *sizes)
        ctypes.memmove(self.call("ggml_get_data", made), t.address, t.nbytes)
        return made

    def compute(self, function: str, sources: Sequence[Tensor], *arguments: Any) -> Any:
        """``function(context, sources..., arguments...)`` computed: its data's address."""
        made = [self.tensor(s) for s in sources]
        result = self.call(function, self._context, *made, *arguments)
        graph = self.call("ggml_new_graph", self._context)
        self.call("ggml_build_forward_expand", graph, result)
        self.call("ggml_graph_compute_with_ctx", self._context, graph, 1)
        return self.call("ggml_get_data", result).value


@pytest.fixture(scope="module")
def ggml() -> Iterator[Ggml]:
    for name in ("libggml-base.so", "libggml-cpu.so"):
        if not (upstream.bin_dir() / name).is_file():
            pytest.skip(f"no {name} in {upstream.bin_dir()}: run python -m tools.upstream")
    library = Ggml()
    yield library
    library.close()


Spec = tuple[GgmlType, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """An op as ggml builds it and as the wire brings it; ``limit`` bounds index sources."""

    op: Op
    function: str
    result: Spec
    sources: tuple[Spec, ...]
    arguments: tuple[Any, ...] = ()
    words: tuple[int | float, ...] = ()
    limit: int = 0
    exact: bool = False
    name: str = ""

    def __str__(self) -> str:
        types = "-".join(t.name for t, _ in self.sources)
        return f"{self.name or self.op}-{types}-{self.result[0].name}"


A = (64, 5, 3, 2)
HALF = (32, 5, 3, 2)
FLOATS = (F32, F16, BF16)
# ggml's CPU rounds some quantized activations otherwise than its reference encoders.
COPIED = (F32, F16, BF16, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1)


def cases() -> Iterator[Case]:
    for name in ("add", "sub", "mul", "div"):
        op = Op(name.upper())
        for b in ((64, 1, 3, 1), (32, 5, 1, 2), A):
            yield Case(op, f"ggml_{name}", (F32, A), ((F32, A), (F32, b)))
        yield Case(op, f"ggml_{name}", (F16, A), ((F16, A), (F32, A)))
        yield Case(op, f"ggml_{name}", (BF16, A), ((BF16, A), (BF16, A)))
    for name in ("sqr", "sqrt", "log", "sin", "cos"):
        for type_ in FLOATS:
            yield Case(Op(name.upper()), f"ggml_{name}", (type_, A), ((type_, A),))
    for kind in UnaryOp:
        if kind is not UnaryOp.XIELU:
            for type_ in FLOATS:
                a = (type_, A)
                yield Case(
                    Op.UNARY, "ggml_unary", a, (a,), (int(kind),), (int(kind),), name=kind.name
                )
    for unit in GluOp:
        # Two have parameters and builders of their own.
        special: dict[GluOp, tuple[float, ...]] = {
            GluOp.SWIGLU_OAI: (1.5, 0.75), GluOp.SWIGLU_CLAMP: (0.75,),
        }  # fmt: skip
        if unit in special:
            function, arguments = f"ggml_{unit.name.lower()}", special[unit]
            words = (int(unit), 0, *((0.0,) * (2 - len(arguments))), *arguments)
            yield Case(
                Op.GLU, function, (F32, A), ((F32, A),) * 2, arguments, words, name=unit.name
            )
            continue
        for type_ in FLOATS:
            a, half = (type_, A), (type_, HALF)
            both = (int(unit),)
            yield Case(Op.GLU, "ggml_glu_split", a, (a, a), both, both, name=unit.name)
            for swapped in (False, True):
                words = (int(unit), int(swapped))
                yield Case(Op.GLU, "ggml_glu", half, (a,), words, words, name=unit.name)
    yield Case(Op.SCALE, "ggml_scale_bias", (F32, A), ((F32, A),), (1.5, -0.5), (1.5, -0.5))
    yield Case(Op.CLAMP, "ggml_clamp", (F32, A), ((F32, A),), (-0.5, 0.25), (-0.5, 0.25))
    leak = (0.1, ctypes.c_bool(False))
    yield Case(Op.LEAKY_RELU, "ggml_leaky_relu", (F32, A), ((F32, A),), leak, (0.1,))
    yield Case(Op.SILU_BACK, "ggml_silu_back", (F32, A), ((F32, A), (F32, A)))
    yield Case(Op.ADD1, "ggml_add1", (F32, A), ((F32, A), (F32, (1,))))
    ids = (I32, (5, 3))
    yield Case(Op.ADD_ID, "ggml_add_id", (F32, A), ((F32, A), (F32, (64, 7)), ids), limit=7)
    for source in FLOATS:
        for result in COPIED:
            yield Case(Op.CPY, "ggml_cast", (result, A), ((source, A),), (int(result),), exact=True)
    for source in (GgmlType.Q4_0, GgmlType.Q8_0, GgmlType.IQ4_NL):
        yield Case(Op.CPY, "ggml_cast", (F32, A), ((source, A),), (int(F32),), exact=True)
    yield Case(Op.CONT, "ggml_cont", (F16, A), ((F16, A),), exact=True)
    for dim in range(4):
        ne = [n * (2 if i == dim else 1) for i, n in enumerate(A)]
        sources = ((F32, A), (F32, A))
        yield Case(Op.CONCAT, "ggml_concat", (F32, tuple(ne)), sources, (dim,), (dim,), exact=True)
    for table in (F32, F16, BF16, GgmlType.Q4_1, GgmlType.Q8_0):
        rows = ((table, (64, 7, 3)), (I32, (4, 3)))
        yield Case(Op.GET_ROWS, "ggml_get_rows", (F32, (64, 4, 3)), rows, limit=7, exact=True)
    pads = (1, 2, 0, 1, 2, 0, 1, 1)
    padded = tuple(n + pads[2 * i] + pads[2 * i + 1] for i, n in enumerate(A))
    for function, words in (("ggml_pad_ext", pads), ("ggml_pad_ext_circular", (*pads, 1))):
        yield Case(Op.PAD, function, (F32, padded), ((F32, A),), pads, words, exact=True)
    shifts = (3, -2, 1, -1)
    yield Case(Op.ROLL, "ggml_roll", (F32, A), ((F32, A),), shifts, shifts, exact=True)
    yield Case(Op.FILL, "ggml_fill", (F32, A), ((F32, A),), (1.5,), (1.5,), exact=True)
    steps = (-1.5, 2.0, 0.1)
    yield Case(Op.ARANGE, "ggml_arange", (F32, (35,)), (), steps, steps)
    yield Case(Op.DIAG, "ggml_diag", (F32, (6, 6, 2)), ((F32, (6, 1, 2)),), exact=True)
    square = (F32, (6, 6, 2))
    for kind_ in range(4):
        yield Case(Op.TRI, "ggml_tri", square, (square,), (kind_,), (kind_,), exact=True)
    for op in (Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO):
        yield Case(op, f"ggml_{op.lower()}", square, (square,), (2,), (2,), exact=True)
    back = ((F32, (64, 5)), (I32, (5,)), (F32, (64, 7)))
    yield Case(Op.GET_ROWS_BACK, "ggml_get_rows_back", (F32, (64, 7)), back, limit=7)
    yield Case(Op.SUM, "ggml_sum", (F32, (1,)), ((F32, A),))
    for name in ("sum_rows", "mean"):
        yield Case(Op(name.upper()), f"ggml_{name}", (F32, (1, 5, 3, 2)), ((F32, A),))
    yield Case(Op.CUMSUM, "ggml_cumsum", (F32, A), ((F32, A),))
    yield Case(Op.ARGMAX, "ggml_argmax", (I32, (5,)), ((F32, (64, 5)),), exact=True)
    for order in (0, 1):
        yield Case(
            Op.ARGSORT, "ggml_argsort", (I32, A), ((F32, A),), (order,), (order,), exact=True
        )
    top = (I32, (6, 5, 3, 2))
    yield Case(Op.TOP_K, "ggml_top_k", top, ((F32, A),), (6,), exact=True)
    pair = (I32, (64, 5))
    yield Case(Op.COUNT_EQUAL, "ggml_count_equal", (I64, (1,)), (pair, pair), limit=3, exact=True)


def make(case: Case, i: int) -> Tensor:
    """Source ``i`` of a case: indices below its limit, or normally distributed values."""
    type_, ne = case.sources[i]
    if type_ is I32:
        return indices(ne, case.limit, i)
    values = values_of(noise(ne, seed=i)) * 2
    if case.op in (Op.SQRT, Op.LOG):
        values = np.abs(values)
    return tensor(type_, ne, values)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_reference_agrees_with_ggml(ggml: Ggml, case: Case) -> None:
    sources = [make(case, i) for i in range(len(case.sources))]
    address = ggml.compute(case.function, sources, *case.arguments)
    # GET_ROWS_BACK: the third argument only lends its size.
    kept = sources[: 2 if case.op is Op.GET_ROWS_BACK else None]
    t = node(case.op, *case.result, kept, params(*case.words))
    expected_node = tensor(*case.result)
    ctypes.memmove(expected_node.address, address, expected_node.nbytes)
    harness.run(t, kernels=False)
    if case.exact:
        np.testing.assert_array_equal(raw(t), raw(expected_node))
    else:
        error = harness.nmse(values_of(expected_node), values_of(t))
        assert error < MAX_NMSE


@pytest.mark.parametrize("index_type", [I32, I64])
@pytest.mark.parametrize("type_", [*COPIED, GgmlType.IQ4_NL, GgmlType.Q8_0], ids=lambda t: t.name)
def test_set_rows_agrees_with_ggml(ggml: Ggml, type_: GgmlType, index_type: GgmlType) -> None:
    rng = np.random.default_rng(4)
    values = tensor(F32, (64, 3, 4, 2), rng.standard_normal((2, 4, 3, 64)))
    cache, ids = tensor(type_, (64, 7, 4, 2), 0), tensor(index_type, (3, 2))
    CONTEXT.view(ids)[...] = [[[[6, 0, 2], [1, 5, 4]]]]
    expected = tensor(type_, cache.ne)
    address = ggml.compute("ggml_set_rows", [cache, values, ids])
    ctypes.memmove(expected.address, address, expected.nbytes)
    harness.run(node(Op.SET_ROWS, type_, cache.ne, [values, ids], inplace=cache), kernels=False)
    np.testing.assert_array_equal(raw(cache), raw(expected))
