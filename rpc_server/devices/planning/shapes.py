"""How kernels walk tensors: what lowerings of every device ask of shapes."""

from __future__ import annotations

from dataclasses import replace

from protocol.ggml.ops import Op
from protocol.tensor import Tensor


def touched_elements(node: Tensor) -> int:
    """Return about how many elements a node reads and writes.

    A table whose rows are named by indices counts with those rows.
    """
    if node.op is Op.GET_ROWS:
        one_by_one: tuple[Tensor | None, ...] = (node, node, node.src[1])
    elif node.op is Op.SET_ROWS:
        one_by_one = (node.src[0], node.src[0], node.src[1])
    else:
        one_by_one = (node, *node.src)
    return sum(t.nelements for t in one_by_one if t is not None)


def is_flat(t: Tensor) -> bool:
    """Return whether it is dense and says so: rows of one element may have any first stride."""
    return t.contiguous and t.nb[0] == t.type_size


def rows_and_width(t: Tensor, *others: Tensor) -> tuple[int, int]:
    """Return how a kernel walks tensors of one shape: (1, all elements) if all are dense."""
    if all(is_flat(x) for x in (t, *others)):
        return 1, t.nelements
    return t.nrows, t.ne[0]


def _half(t: Tensor, width: int, second: bool) -> Tensor:
    """A view on ``width`` elements of every row, its first ones or those behind them."""
    offset = width * t.type_size if second else 0
    return replace(t, ne=(width, *t.ne[1:]), address=t.address + offset)


def gated_and_gate(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return what GLU node ``t`` gates, and the gate.

    They are its sources, or halves of its source's rows.
    """
    x, gate = t.src[0], t.src[1]
    assert x is not None
    if gate is not None:
        return x, gate
    width, swapped = x.ne[0] // 2, bool(t.param_i32(1))
    return _half(x, width, swapped), _half(x, width, not swapped)
