"""Every combination of types that ggml's CPU backend takes, as nodes for a server to compute.

Which these are: ggml-cpu's switches over types in ops.cpp, binary-ops.cpp and unary-ops.cpp, and
its table of conversions. Types are left out where ggml crashes: Q8_1 and Q8_K, which it writes and
multiplies by, but can't decode in a graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from client.builder.nodes import NodeFactory
from client.tensors import Array
from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.tensor import Tensor
from rpc_server.types import ENCODABLE, from_f32

F32, F16, BF16, I8, I16, I32, I64, Q8_0, Q8_1, Q8_K = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I8, GgmlType.I16, GgmlType.I32,
    GgmlType.I64, GgmlType.Q8_0, GgmlType.Q8_1, GgmlType.Q8_K,
)  # fmt: skip
FLOATS = (F32, F16, BF16)
QUANTIZED = tuple(t for t, i in TYPE_INFO.items() if i.quantized)
# What graphs decode: all but the formats of activations.
WEIGHTS = tuple(t for t in QUANTIZED if t not in (Q8_1, Q8_K))
# What graphs write by ggml's from_float.
WRITTEN = (*sorted(ENCODABLE), I32)

EXACT = 0.0
MAX_NMSE = 1e-7
MAX_NMSE_OF_PRODUCTS = 5e-4

Spec = tuple[GgmlType, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A node to compute.

    ``bound`` is the largest NMSE, or EXACT. Integers in sources are below ``limit``; ``permuted``
    sources are views with dimensions 1 and 2 exchanged; with ``into`` the node is a view of that
    source.
    """

    op: Op
    result: Spec
    sources: tuple[Spec, ...]
    params: tuple[int | float, ...] = ()
    bound: float = EXACT
    limit: int = 100
    permuted: tuple[int, ...] = ()
    into: int | None = None
    name: str = ""

    def __str__(self) -> str:
        types = "-".join(s[0].name for s in self.sources)
        views = "-permuted" if self.permuted else ""
        return f"{self.op}{self.name}-{types}-to-{self.result[0].name}{views}"

    def leaf(self, i: int) -> Spec:
        """Type and shape of the leaf that source ``i`` is, or views."""
        type_, ne = self.sources[i]
        if i in self.permuted:
            ne = (ne[0], ne[2], ne[1], *ne[3:])
        return type_, ne

    def content(self, i: int) -> Array:
        """The bytes of that leaf: integers, or normally distributed values."""
        least: float | None = None
        if self.op in (Op.SQRT, Op.LOG):
            least = 0.0
        elif self.op in (Op.ROPE, Op.ROPE_BACK) and i == 2:
            least = 1.0
        return random_content(*self.leaf(i), i + 1, self.limit, least)

    def build(self, graph: NodeFactory, leaves: Sequence[Tensor]) -> Tensor:
        """The node, made of tensors like ``leaf`` of each source."""
        sources = [
            graph_permuted(graph, x) if i in self.permuted else x for i, x in enumerate(leaves)
        ]
        if self.into is not None:
            return graph.view_of(sources[self.into], self.op, sources, self.params)
        return graph.op(self.op, *self.result, sources, self.params)


def graph_permuted(graph: NodeFactory, x: Tensor) -> Tensor:
    ne, nb = (x.ne[0], x.ne[2], x.ne[1], x.ne[3]), (x.nb[0], x.nb[2], x.nb[1], x.nb[3])
    return graph.view_of(x, Op.PERMUTE, (x,), (0, 2, 1, 3), ne=ne, nb=nb)


@functools.cache
def random_content(
    type_: GgmlType, ne: tuple[int, ...], seed: int, limit: int, least: float | None
) -> Array:
    """Values of a tensor as uint8: integers below ``limit``; floats from ``least`` on, if given."""
    rng = np.random.default_rng(seed)
    shape = ne[::-1]
    made: Array
    if type_ in (I8, I16, I32, I64):
        made = rng.integers(0, limit, shape).astype(type_.name.replace("I", "int"))
        return made.reshape(-1).view(np.uint8)
    values = rng.standard_normal(shape) * 3
    if least is not None:
        values = least + np.abs(values)
    if type_ is GgmlType.F64:
        made = values
    elif type_ in ENCODABLE:
        made = from_f32(type_, values.astype(np.float32))
    else:
        made = _blocks(type_, rng, (*shape[:-1], row_size(type_, shape[-1])))
    return made.reshape(-1).view(np.uint8)


def _blocks(type_: GgmlType, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Rows of random codes under a scale of about 0.01, of a type without an encoder."""
    size = TYPE_INFO[type_].type_size
    rows = rng.integers(0, 256, shape, np.uint8)
    blocks = rows.reshape(-1, size)
    if type_ is GgmlType.IQ1_M:
        # A nibble of the scale in each of its last four words.
        words = blocks[:, 48:].view(np.uint16)
        words &= 0x0FFF
        words[:, 3] |= 0x2000
    else:
        blocks[:, :2] = np.full(1, 0.01, np.float16).view(np.uint8)
    return rows


A = (256, 6, 4, 2)
# As many elements in rows that are longer.
WIDE = (1536, 4, 2, 1)


def copies() -> Iterator[Case]:
    sources: tuple[Spec, ...]
    views: tuple[int, ...]
    for type_ in TYPE_INFO:
        yield Case(Op.CPY, (type_, A), ((type_, A), (type_, A)), into=1)
        for views in ((0,), (1,), (0, 1)):
            yield Case(Op.CPY, (type_, A), ((type_, A), (type_, A)), into=1, permuted=views)
        yield Case(Op.CPY, (type_, WIDE), ((type_, A), (type_, WIDE)), into=1, name="-reshaped")
        yield Case(
            Op.CPY, (type_, WIDE), ((type_, A), (type_, WIDE)), into=1, permuted=(0, 1),
            name="-reshaped",
        )  # fmt: skip
        yield Case(Op.CONT, (type_, A), ((type_, A),), permuted=(0,))
        yield Case(Op.DUP, (type_, A), ((type_, A),))
    for source in FLOATS:
        for target in WRITTEN:
            if source is not target:
                yield Case(Op.CPY, (target, A), ((source, A), (target, A)), into=1)
                yield Case(Op.CPY, (target, A), ((source, A),), permuted=(0,))
                sources = ((source, A), (target, WIDE))
                yield Case(Op.CPY, (target, WIDE), sources, into=1, name="-reshaped")
                if not TYPE_INFO[target].quantized and (source is F32 or target is not I32):
                    # ggml's way to blocks, which F16 and BF16 take to I32, too, ends in dense ones.
                    for views in ((1,), (0, 1)):
                        sources = ((source, A), (target, A))
                        yield Case(Op.CPY, (target, A), sources, into=1, permuted=views)
    for source in (*WEIGHTS, I32):
        yield Case(Op.CPY, (F32, A), ((source, A), (F32, A)), into=1)
        for views in ((0,), (1,), (0, 1)):
            yield Case(Op.CPY, (F32, A), ((source, A), (F32, A)), into=1, permuted=views)
        for ne in (WIDE, (64, 24, 4, 2)):
            yield Case(Op.CPY, (F32, ne), ((source, A), (F32, ne)), into=1, name=f"-{ne[0]}")
    for type_ in TYPE_INFO:
        for dim in range(4):
            doubled = tuple(n * (2 if i == dim else 1) for i, n in enumerate(A))
            sources = ((type_, A),) * 2
            yield Case(Op.CONCAT, (type_, doubled), sources, (dim,), name=f"{dim}")
    for type_ in (F32, F16, BF16, I16, I32):
        yield Case(Op.REPEAT, (type_, (512, 12, 4, 4)), ((type_, A),))
    yield Case(Op.REPEAT_BACK, (F32, A), ((F32, (512, 12, 4, 4)),), bound=MAX_NMSE)
    for type_ in (F32, I32):
        words = (1024, 6144, 24576, 1024 * 3 + 64, 0)
        yield Case(Op.SET, (type_, A), ((type_, A), (type_, (100, 3, 2, 1))), words)
        yield Case(
            Op.SET, (type_, A), ((type_, A), (type_, (100, 3, 2, 1))), (*words[:4], 1), into=0
        )
    yield Case(Op.ACC, (F32, A), ((F32, A), (F32, (100, 3, 2, 1))), words)


def rows() -> Iterator[Case]:
    sources: tuple[Spec, ...]
    views: tuple[int, ...]
    for type_ in (*FLOATS, I32, *WEIGHTS):
        result = (I32 if type_ is I32 else F32, (256, 5, 4, 2))
        for views in ((), (0,)):
            sources = ((type_, A), (I32, (5, 4, 2)))
            yield Case(Op.GET_ROWS, result, sources, limit=6, permuted=views)
    for type_ in (F32, F16):
        sources = ((type_, (256, 5)), (I32, (5,)))
        yield Case(Op.GET_ROWS_BACK, (F32, (256, 7)), sources, bound=MAX_NMSE, limit=7)
    for target, source, index in itertools.product(WRITTEN, (F32, F16), (I32, I64)):
        # A row for each index: which of two for the same row comes last, threads decide.
        sources = ((source, (256, 1, 4, 2)), (index, (1, 2, 1)), (target, A))
        for views in ((), (0, 2)):
            yield Case(Op.SET_ROWS, (target, A), sources, limit=6, into=2, permuted=views)


def vec_dot_type(weights: GgmlType) -> GgmlType:
    """What ggml's CPU backend converts the activations of a product with ``weights`` to."""
    if weights in FLOATS:
        return weights
    if weights in (GgmlType.Q4_1, GgmlType.Q5_1):
        return Q8_1
    return Q8_K if TYPE_INFO[weights].block_size == 256 else Q8_0


def products() -> Iterator[Case]:
    sources: tuple[Spec, ...]
    bound = MAX_NMSE_OF_PRODUCTS
    for weights in (*FLOATS, *WEIGHTS):
        inputs = {F32, vec_dot_type(weights)}
        for x in sorted(inputs):
            routed = ((weights, (256, 6, 5)), (x, (256, 2, 3)), (I32, (4, 3)))
            yield Case(Op.MUL_MAT_ID, (F32, (6, 4, 3)), routed, bound=bound, limit=5)
        # F16 and BF16 are widened where products are made in float32.
        for x in FLOATS if weights is F32 else sorted(inputs):
            for n in (1, 7):
                sources = ((weights, (256, 6, 2, 1)), (x, (256, n, 4, 2)))
                result = (F32, (6, n, 4, 2))
                yield Case(Op.MUL_MAT, result, sources, bound=bound, name=f"{n}")
    for weights in (F32, F16, *WEIGHTS):
        sources = ((weights, (256, 5, 2)), (F32, (3, 5, 2)))
        yield Case(Op.OUT_PROD, (F32, (256, 3, 2)), sources, bound=MAX_NMSE)


def attentions() -> Iterator[Case]:
    q, words = (F32, (256, 3, 4, 1)), (0.01, 0.0, 0.0, 0)
    mask = (F16, (64, 3))
    kv = (256, 64, 2, 1)
    pairs = [(t, t) for t in (*FLOATS, *WEIGHTS)]
    pairs += [(F16, Q8_0), (Q8_0, GgmlType.Q4_0), (GgmlType.Q4_K, F32), (BF16, F16)]
    for k, v in pairs:
        sources = (q, (k, kv), (v, kv), mask)
        yield Case(Op.FLASH_ATTN_EXT, (F32, (256, 4, 3, 1)), sources, words, MAX_NMSE_OF_PRODUCTS)


def positions() -> Iterator[Case]:
    """ROPE's modes with their positions, and what masks there are for SOFT_MAX."""
    heads = (256, 3, 5, 2)
    scaling = (10000.0, 0.25, 0.75, 1.3, 32.0, 1.0)
    for op, type_ in itertools.product((Op.ROPE, Op.ROPE_BACK), (F32, F16)):
        for mode in (0, 2, 8, 24, 40):
            multiple = mode >= 8
            n_dims, sections = 128 if mode == 24 else 96, (16, 12, 16, 4) if multiple else (0,) * 4
            words = (0, n_dims, mode, 0, 2048, *scaling, *sections)
            sources = ((type_, heads), (I32, (20 if multiple else 5,)), (F32, (128,)))
            for count in (2, 3):
                yield Case(
                    op, (type_, heads), sources[:count], words, MAX_NMSE, limit=5000,
                    name=f"{mode}",
                )  # fmt: skip
    scores, sinks = (F32, (64, 5, 6, 2)), (F32, (6,))
    masks = ((F32, (64, 5)), (F16, (64, 8, 3, 2)))
    yield Case(Op.SOFT_MAX, scores, (scores,), (0.3, 0.0), MAX_NMSE)
    for mask in masks:
        yield Case(Op.SOFT_MAX, scores, (scores, mask), (0.3, 8.0), MAX_NMSE)
        yield Case(Op.SOFT_MAX, scores, (scores, mask, sinks), (0.3, 0.0), MAX_NMSE)


# Source 0, source 1, result.
BINARY = (
    (F32, F32, F32), (F16, F16, F16), (F16, F32, F16), (F16, F32, F32), (BF16, BF16, BF16),
    (BF16, F32, BF16), (BF16, F32, F32),
)  # fmt: skip


def arithmetic() -> Iterator[Case]:
    for op in (Op.ADD, Op.SUB, Op.MUL, Op.DIV):
        for a, b, result in BINARY:
            for i, ne in enumerate((A, (256, 1, 1, 1), (1, 6, 1, 2), (64, 3, 4, 1))):
                yield Case(op, (result, A), ((a, A), (b, ne)), bound=MAX_NMSE, name=f"{i}")
            yield Case(op, (result, A), ((a, A), (b, A)), bound=MAX_NMSE, permuted=(0, 1))
    for weights in WEIGHTS:
        results = {F32, F16, BF16, I32, Q8_0, GgmlType.Q6_K}
        for result in sorted(results | ({weights} & ENCODABLE)):
            yield Case(Op.ADD, (result, A), ((weights, A), (F32, A)))
        if weights in ENCODABLE:
            # Of one matrix: ggml steps from one to the next by the size of an element.
            yield Case(Op.ADD1, (weights, (256, 6, 4)), ((weights, (256, 6, 4)), (F32, (1,))))
    for a, b, result in BINARY:
        if a is result:
            yield Case(Op.ADD1, (result, A), ((a, A), (b, (1,))), bound=MAX_NMSE)


# Which pairs of types the ops have that take one of each source and result.
SAME = tuple((t, t) for t in FLOATS)
MIXED = (*SAME, (F16, F32), (BF16, F32))
_SAME_ONLY = frozenset({UnaryOp.GELU, UnaryOp.GELU_QUICK, UnaryOp.GELU_ERF, UnaryOp.SILU})


def functions() -> Iterator[Case]:
    for op in (Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS):
        for a, result in MIXED:
            yield Case(op, (result, A), ((a, A),), bound=MAX_NMSE)
    for kind in UnaryOp:
        words = (int(kind), *((0.8, 0.7, 0.5, -1e-6) if kind is UnaryOp.XIELU else ()))
        for a, result in SAME if kind in _SAME_ONLY else MIXED:
            yield Case(Op.UNARY, (result, A), ((a, A),), words, MAX_NMSE, name=kind.name)
    for unit in GluOp:
        types = {GluOp.SWIGLU_OAI: (F32,), GluOp.SWIGLU_CLAMP: (F32, F16)}.get(unit, FLOATS)
        for type_ in types:
            split, halves = ((type_, A), (type_, A)), ((type_, (512, *A[1:])),)
            for swapped, sources in ((0, split), (0, halves), (1, halves)):
                words = (int(unit), swapped, 1.7, 2.5)
                name = f"{unit.name}{len(sources)}{swapped}"
                yield Case(Op.GLU, (type_, A), sources, words, MAX_NMSE, name=name)
    for op, types, params in (
        (Op.SCALE, (F32, BF16), (1.5, -0.5)),
        (Op.CLAMP, (F32, F16), (-0.5, 1.25)),
        (Op.LEAKY_RELU, (F32, F16), (0.1,)),
    ):
        for type_ in types:
            yield Case(op, (type_, A), ((type_, A),), params, MAX_NMSE)
    for type_ in (F32, F16):
        yield Case(Op.FILL, (type_, A), ((type_, A),), (1.7,))
    for type_ in FLOATS:
        yield Case(Op.SUM, (type_, (1,)), ((type_, A),), bound=MAX_NMSE)
    for type_ in (F32, F16):
        yield Case(Op.SILU_BACK, (type_, A), ((type_, A), (type_, A)), bound=MAX_NMSE)


FAMILIES = {
    "copies": copies,
    "rows": rows,
    "products": products,
    "attentions": attentions,
    "positions": positions,
    "arithmetic": arithmetic,
    "functions": functions,
}
