"""9.41 to 9.59: graphs whose ops get what they can't compute: operands, parameters, indices."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from conformance.cases.attacks import INDEX_WHY, Attack, graph_fails, refused_graph
from conformance.cases.groups import HOSTILE
from conformance.suite import Context
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType


def _declare_op_number(number: int, name: str, shown: str, op: Callable[[Context], int]) -> None:
    @HOSTILE.case(
        number,
        name=name,
        sends=f"a node of op {shown}",
        expects="the connection is closed (up to 3.4 the answer may be a failure instead)",
        why=INDEX_WHY,
        source="ggml-cpu.c ggml_compute_forward (GGML_ABORT), since 1.0",
        hostile=True,
    )
    def check(c: Context) -> None:
        attack = Attack(c)
        attack.send([attack.add(2, 1, 1, op=op(c))], [attack.leaf(1)])
        graph_fails(c, attack, None)


# Some numbers behind the last: ops that a server of the same protocol may have had in between.
_declare_op_number(41, "op-behind-the-last", "N + 20, of N ops", lambda c: len(c.dialect.ops) + 20)
_declare_op_number(42, "op-4000", "4000", lambda c: 4000)
_declare_op_number(43, "op-2-32", "2^32 - 1", lambda c: 0xFFFFFFFF)

_ASSERTS = "Upstream's ops check their operands by assertions, if at all, which end the server."


@refused_graph(
    44,
    "shapes-that-do-not-fit",
    "ADD of 8 and 5 elements",
    _ASSERTS,
    "ggml-cpu binary-ops.cpp (GGML_ASSERT ggml_can_repeat), since 1.0",
)
def _shapes(a: Attack) -> None:
    a.send([a.add(2, 1, 3)], [a.leaf(1), a.leaf(3, (5,), at=64)])


@refused_graph(
    45,
    "operand-that-is-missing",
    "ADD of one source only",
    "An op reads as many sources as it has; a missing one is no address.",
    "ggml-cpu ops.cpp reads src[1], since 1.0",
)
def _missing_operand(a: Attack) -> None:
    a.send([a.add(2, 1)], [a.leaf(1)])


@refused_graph(
    46,
    "result-larger-than-its-operands",
    "ADD of 8 elements into a result of 64",
    _ASSERTS,
    "ggml-cpu binary-ops.cpp (GGML_ASSERT ggml_are_same_shape), since 1.0",
)
def _larger_result(a: Attack) -> None:
    a.send([a.node(2, Op.ADD, 1, 1, ne=(64,))], [a.leaf(1)])


@refused_graph(
    47,
    "copy-of-another-size",
    "CPY of 64 elements into 8",
    "The copy would go on behind its destination.",
    "ggml-cpu ops.cpp ggml_compute_forward_dup (GGML_ASSERT ggml_nelements), since 1.0",
)
def _copy_size(a: Attack) -> None:
    copy = a.node(3, Op.CPY, 1, 2)
    a.send([copy], [a.leaf(1, (64,)), a.leaf(2, (8,), at=32 << 10)])


@refused_graph(
    48,
    "product-of-shapes-that-do-not-fit",
    "MUL_MAT of rows of 32 and of 64 elements",
    _ASSERTS,
    "ggml-cpu.c ggml_compute_forward_mul_mat, since 1.0",
)
def _product(a: Attack) -> None:
    product = a.node(3, Op.MUL_MAT, 1, 2, ne=(4, 4))
    a.send([product], [a.leaf(1, (32, 4)), a.leaf(2, (64, 4), at=4096)])


def _declare_rows(number: int, name: str, indices: Sequence[int], shown: str) -> None:
    why = "The index is data, so nothing before the op can check it; an address comes of it."

    @refused_graph(
        number,
        f"get-rows-{name}",
        f"GET_ROWS of 4 rows by index {shown}",
        why,
        "ggml-cpu ops.cpp ggml_compute_forward_get_rows (GGML_ASSERT i01), since 1.0",
    )
    def get(a: Attack) -> None:
        rows = a.node(3, Op.GET_ROWS, 1, 2, ne=(8, len(indices)))
        a.send([rows], [a.leaf(1, (8, 4)), a.integers(2, indices)])


_declare_rows(49, "behind-the-last", (0, 4), "4")
_declare_rows(50, "negative", (0, -1), "-1")
_declare_rows(51, "far-away", (1 << 30, 0), "2^30")


@refused_graph(
    52,
    "set-rows-far-away",
    "SET_ROWS into 4 rows by index 2^40",
    "The index is data, so nothing before the op can check it; memory is written by it.",
    "ggml-cpu ops.cpp ggml_compute_forward_set_rows (GGML_ASSERT i1), since its op exists",
)
def _set_rows(a: Attack) -> None:
    index = a.buffer.leaf(2, (2,), 16 << 10, GgmlType.I64)
    a.peer.set(index, struct.pack("<2q", 0, 1 << 40))
    target = a.leaf(3, (8, 4), at=32 << 10)
    rows = a.node(4, Op.SET_ROWS, 1, 2, 3, ne=(8, 4), view_src=3)
    a.send([rows], [a.leaf(1, (8, 2)), index, target])


@refused_graph(
    53,
    "mul-mat-id-of-no-expert",
    "MUL_MAT_ID of 4 experts by index 4",
    "The index is data, so nothing before the op can check it; an address comes of it.",
    "ggml-cpu.c ggml_compute_forward_mul_mat_id (assert i02 < n_as), since 1.0",
)
def _mul_mat_id(a: Attack) -> None:
    ids = a.integers(3, (0, 4))
    ids = {**ids, "ne": [2, 1, 1, 1], "nb": [4, 8, 8, 8]}
    product = a.node(4, Op.MUL_MAT_ID, 1, 2, 3, ne=(4, 2, 1))
    a.send([product], [a.leaf(1, (32, 4, 4)), a.leaf(2, (32, 1, 1), at=8192), ids])


@refused_graph(
    54,
    "pool-by-steps-of-0",
    "POOL_2D with a kernel of 0 and steps of 0",
    "Dividing by it is the end of a process.",
    "ggml-cpu ops.cpp ggml_compute_forward_pool_2d, since 1.0",
    differs="it computes something",
)
def _pool(a: Attack) -> None:
    pool = a.node(2, Op.POOL_2D, 1, ne=(4, 4), op_params=[0] * 16)
    a.send([pool], [a.leaf(1, (8, 8))])


@refused_graph(
    55,
    "concat-in-dimension-9",
    "CONCAT in dimension 9",
    "The parameter is an index into the four dimensions.",
    "ggml-cpu ops.cpp ggml_compute_forward_concat (GGML_ASSERT dim), since 1.0",
)
def _concat(a: Attack) -> None:
    params = [9] + [0] * 15
    a.send([a.node(3, Op.CONCAT, 1, 1, ne=(16,), op_params=params)], [a.leaf(1)])


@refused_graph(
    56,
    "rope-of-more-than-there-is",
    "ROPE of 4096 dimensions of rows of 8",
    "It would turn what lies behind the row.",
    "ggml-cpu ops.cpp ggml_compute_forward_rope (GGML_ASSERT n_dims <= ne0), since 1.0",
)
def _rope(a: Attack) -> None:
    params = [0, 4096, 0, 0, 0, *struct.unpack("<6i", struct.pack("<6f", 1e4, 1, 0, 1, 32, 1))]
    positions = a.integers(2, (0, 1))
    rope = a.node(3, Op.ROPE, 1, 2, ne=(8, 1, 2), op_params=params + [0] * 5)
    a.send([rope], [a.leaf(1, (8, 1, 2)), positions])


@refused_graph(
    57,
    "unary-function-999",
    "UNARY of function 999",
    INDEX_WHY,
    "ggml-cpu ops.cpp ggml_compute_forward_unary (GGML_ABORT), since 1.0",
)
def _unary(a: Attack) -> None:
    a.send([a.node(2, Op.UNARY, 1, op_params=[999] + [0] * 15)], [a.leaf(1)])


@refused_graph(
    58,
    "sources-of-the-wrong-type",
    "ADD of I8 to F32",
    _ASSERTS,
    "ggml-cpu binary-ops.cpp (GGML_ABORT 'unsupported types'), since 1.0",
)
def _wrong_type(a: Attack) -> None:
    a.send([a.add(2, 1, 3)], [a.leaf(1), a.buffer.leaf(3, (8,), 64, GgmlType.I8)])


@refused_graph(
    59,
    "glu-function-999",
    "GLU of function 999",
    INDEX_WHY,
    "ggml-cpu ops.cpp ggml_compute_forward_glu (GGML_ABORT), since 1.0",
)
def _glu(a: Attack) -> None:
    a.send([a.node(2, Op.GLU, 1, 1, op_params=[999] + [0] * 15)], [a.leaf(1)])
