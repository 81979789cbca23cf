"""What lowerings ask of shapes: how kernels walk them, and the halves of a GLU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from rpc_server.devices.planning.shapes import (
    gated_and_gate,
    is_flat,
    rows_and_width,
    touched_elements,
)
from tests.ops.tensors import CONTEXT, node, params, permuted, tensor

F32 = GgmlType.F32


def test_dense_tensors_are_walked_as_one_row() -> None:
    t = tensor(F32, (5, 3, 2))
    assert is_flat(t)
    assert rows_and_width(t, t) == (1, 30)


def test_others_are_walked_row_by_row() -> None:
    t, other = tensor(F32, (5, 3, 2)), permuted(tensor(F32, (5, 2, 3)), (0, 2, 1, 3))
    assert not is_flat(other)
    assert rows_and_width(t, other) == (6, 5)


def test_rows_of_one_element_may_say_any_stride() -> None:
    t = tensor(F32, (1, 4))
    assert not is_flat(replace(t, nb=(2 * t.nb[0], *t.nb[1:])))


def test_a_glu_has_two_sources_or_the_halves_of_one() -> None:
    x, gate = tensor(F32, (6, 2)), tensor(F32, (6, 2))
    assert gated_and_gate(node(Op.GLU, F32, (6, 2), [x, gate])) == (x, gate)
    values = np.arange(12, dtype=np.float32).reshape(1, 1, 2, 6)
    CONTEXT.store(x, values)
    for swapped in (0, 1):
        t = node(Op.GLU, F32, (3, 2), [x], params(0, swapped))
        halves = [np.array(CONTEXT.f32(half)) for half in gated_and_gate(t)]
        expected = [values[..., :3], values[..., 3:]]
        assert all(map(np.array_equal, halves, expected[::-1] if swapped else expected))


def test_of_a_table_only_the_rows_that_are_named_are_touched() -> None:
    table, ids, rows = tensor(F32, (8, 1000)), tensor(GgmlType.I32, (3,)), tensor(F32, (8, 3))
    assert touched_elements(node(Op.GET_ROWS, F32, (8, 3), [table, ids])) == 24 + 24 + 3
    stored = node(Op.SET_ROWS, F32, (8, 1000), [rows, ids, table])
    assert touched_elements(stored) == 24 + 24 + 3
    assert touched_elements(node(Op.ADD, F32, (8, 3), [rows, rows])) == 3 * 24
