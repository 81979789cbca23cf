"""Nodes that ask for what their op can't do, each refused for its own reason.

A client's library makes none of these. Each would read or write what isn't its tensors' memory,
divide by nothing or call what is no function; ``test_hostile.py`` looks for more of the kind.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError
from tests.ops import harness
from tests.ops.tensors import node, params, tensor

F32, I8, I32, I64 = GgmlType.F32, GgmlType.I8, GgmlType.I32, GgmlType.I64


def f32(*ne: int) -> Tensor:
    return tensor(F32, ne, 0)


def rows_of_more_batches() -> Tensor:
    """Indices of more batches than the rows have."""
    return node(Op.GET_ROWS, F32, (4, 1, 2), [f32(4, 1), tensor(I32, (1, 2), 0)])


def rows_into_fewer() -> Tensor:
    """A result that is smaller than what is fetched."""
    return node(Op.GET_ROWS, F32, (4, 1), [f32(4, 4), tensor(I32, (256,), 0)])


def rows_into_narrower() -> Tensor:
    return node(Op.GET_ROWS, F32, (4, 32), [f32(64, 4), tensor(I32, (32,), 0)])


def rows_set_in_more_batches() -> Tensor:
    """The stride of a dimension of 1 is no part of a tensor's extent."""
    into = f32(4, 1)
    return node(
        Op.SET_ROWS, F32, (4, 1), [f32(4, 1, 2), tensor(I64, (1,), 0)], nb=into.nb[:2] + (4096,) * 2
    )


def part_by_strides_that_cancel_out(op: Op) -> Tensor:
    """One corner is inside, the others aren't."""
    return node(op, F32, (4, 4, 4), [f32(4, 4, 4), f32(4, 2, 2)], params(-4096, 4096, 0, 0))


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "shapes": (lambda: node(Op.ADD, F32, (8,), [f32(8), f32(5)]), "ADD"),
    "missing": (lambda: node(Op.ADD, F32, (8,), [f32(8)]), "source 1 is missing"),
    "none": (lambda: node(Op.ADD, F32, (8,), []), "source 0 is missing"),
    "larger result": (lambda: node(Op.ADD, F32, (64,), [f32(8), f32(8)]), "ADD"),
    "types": (lambda: node(Op.ADD, F32, (8,), [f32(8), tensor(I8, (8,))]), "ADD"),
    "copy": (lambda: node(Op.CPY, F32, (8,), [f32(64), f32(8)]), "CPY"),
    "product": (lambda: node(Op.MUL_MAT, F32, (4, 4), [f32(32, 4), f32(64, 4)]), "MUL_MAT"),
    "pool": (lambda: node(Op.POOL_2D, F32, (4, 4), [f32(8, 8)]), "POOL_2D"),
    "dimension": (lambda: node(Op.CONCAT, F32, (16,), [f32(8), f32(8)], params(9)), "CONCAT"),
    "rotation": (
        lambda: node(
            Op.ROPE, F32, (8, 1, 2), [f32(8, 1, 2), tensor(I32, (2,), 0)],
            params(0, 4096, 0, 0, 0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0),
        ),
        "ROPE",
    ),
    "function": (lambda: node(Op.UNARY, F32, (8,), [f32(8)], params(999)), "UNARY"),
    "gate": (lambda: node(Op.GLU, F32, (8,), [f32(8), f32(8)], params(999)), "GLU"),
    "rows, batches": (rows_of_more_batches, "GET_ROWS"),
    "rows, fewer": (rows_into_fewer, "GET_ROWS"),
    "rows, narrower": (rows_into_narrower, "GET_ROWS"),
    "rows set": (rows_set_in_more_batches, "SET_ROWS"),
    "part added": (lambda: part_by_strides_that_cancel_out(Op.ACC), "ACC"),
    "part set": (lambda: part_by_strides_that_cancel_out(Op.SET), "SET"),
    "states": (
        lambda: node(
            Op.GATED_DELTA_NET, F32, (8, 8),
            [f32(4, 1, 4), f32(4, 2, 4), f32(4, 2, 4), f32(1, 2, 4), f32(1, 2, 4), f32(4, 4, 2)],
            params(1 << 20),
        ),
        "GATED_DELTA_NET",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_node_is_refused(what: str) -> None:
    make, says = REFUSED[what]
    harness.refused(make(), says)


# What is wrong stands in a tensor, so that nothing before the run sees it.


def scan_from(state: int) -> Tensor:
    shapes = [(2, 3, 4, 2), (3, 4, 2, 1), (4, 2, 1), (2, 4), (2, 2, 2, 1), (2, 2, 2, 1)]
    ids = tensor(I32, (1,), state)
    return node(Op.SSM_SCAN, F32, (72,), [*(f32(*ne) for ne in shapes), ids], params(1))


def experts(expert: int) -> Tensor:
    sources = [f32(32, 4, 4), f32(32, 1, 1), tensor(I32, (2, 1), [0, expert])]
    return node(Op.MUL_MAT_ID, F32, (4, 2, 1), sources)


INDEXED: dict[str, tuple[Callable[[int], Tensor], tuple[int, ...]]] = {
    "get rows": (
        lambda i: node(Op.GET_ROWS, F32, (8, 2), [f32(8, 4), tensor(I32, (2,), [0, i])]),
        (4, -1, 1 << 30),
    ),
    "set rows": (
        lambda i: node(Op.SET_ROWS, F32, (8, 4), [f32(8, 2), tensor(I64, (2,), [0, i])]),
        (4, -1, 1 << 40),
    ),
    "experts": (experts, (4, -1, 1 << 30)),
    "scan": (scan_from, (3, 1 << 24, -1, -(1 << 31))),
}


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize(
    ("what", "index"), [(what, i) for what, (_, wrong) in INDEXED.items() for i in wrong]
)
def test_index_is_refused(what: str, index: int, kernels: bool) -> None:
    made = INDEXED[what][0](index)
    with pytest.raises(GraphError, match=made.op.value):
        harness.run(made, kernels=kernels)
    assert harness.guards_intact(made)
