"""Floats to blocks of every type, by CUDA kernels in the emulation: the references' bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.lower.copy import ENCODERS
from rpc_server.ops.table import ContractError
from rpc_server.types import ENCODABLE
from tests.cuda import emulation
from tests.cuda import harness as cuda
from tests.ops import harness
from tests.ops.tensors import CONTEXT, node, noise, permuted, raw, tensor, values, view
from tests.types.test_against_ggml import samples

pytestmark = cuda.needs_compiler

F32, F16, BF16, I32, I64 = (
    GgmlType.F32,
    GgmlType.F16,
    GgmlType.BF16,
    GgmlType.I32,
    GgmlType.I64,
)
TYPES = sorted(ENCODABLE - FLOATS)

Floats = np.ndarray[Any, Any]


def bytes_by_both(t: Tensor) -> tuple[Floats, Floats]:
    """(reference, kernels): all bytes of the node's memory, run each way from the same memory."""
    before = [(s, raw(s)) for s in (t, *t.src) if s is not None]
    harness.run(t, kernels=False)
    expected = raw(t)
    for s, content in before:
        CONTEXT.memory(s.address, s.nbytes)[...] = content
    cuda.run(t)
    if t.view_src is None:
        assert harness.guards_intact(t), f"{t.label}: wrote outside its memory"
    return expected, raw(t)


def check(t: Tensor) -> None:
    expected, actual = bytes_by_both(t)
    wrong = np.flatnonzero(expected != actual)
    assert not len(wrong), f"{t.label}: bytes {wrong[:20]} of {len(expected)}"


every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)


@every_type
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "optimized"])
def test_bytes_are_the_references(
    type_: GgmlType, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of values that decide what encoders choose, or may mislead them: a row of each kind.

    Optimized code has products and sums in one instruction where it may.
    """
    if not checked:
        monkeypatch.setattr(
            cuda, "unit", lambda of, _: emulation.build(of.label, of.text, checked=False)
        )
    n = 32 * max(TYPE_INFO[type_].block_size, 32)
    rows = np.array([*samples(n).values()], np.float32)
    source = tensor(F32, (n, len(rows)), rows)
    check(node(Op.CPY, type_, source.ne, [source, None]))


@every_type
def test_nan_stays_in_its_block(type_: GgmlType) -> None:
    """What becomes of NaN is nobody's business, but for its neighbours'."""
    block = TYPE_INFO[type_].block_size
    rows = np.random.default_rng(1).standard_normal((5, 3 * block)).astype(np.float32)
    rows[::2, block + 1] = np.nan
    rows[4, block : 2 * block] = np.nan
    source = tensor(F32, (3 * block, 5), rows)
    t = node(Op.CPY, type_, source.ne, [source, None])
    expected, actual = (x.reshape(5, 3, -1) for x in bytes_by_both(t))
    np.testing.assert_array_equal(actual[:, ::2], expected[:, ::2])
    np.testing.assert_array_equal(actual[1::2], expected[1::2])


@every_type
@pytest.mark.parametrize("from_", [F16, BF16], ids=lambda t: t.name)
def test_other_floats(type_: GgmlType, from_: GgmlType) -> None:
    source = noise((2 * TYPE_INFO[type_].block_size, 3, 2), from_)
    check(node(Op.CPY, type_, source.ne, [source, None]))


@every_type
def test_sources_and_results_with_gaps(type_: GgmlType) -> None:
    """Rows that are apart, rows in another order, and results that are part of a larger tensor."""
    block, size = TYPE_INFO[type_].block_size, TYPE_INFO[type_].type_size
    wide = noise((3 * block, 4, 3))
    source = view(wide, (2 * block, 3, 2), (4, wide.nb[1], wide.nb[2], wide.nb[3]), 4 * block)
    check(node(Op.CPY, type_, source.ne, [source, None]))
    check(node(Op.CPY, type_, (3 * block, 3, 4), [permuted(wide, (0, 2, 1, 3)), None]))
    into = tensor(type_, (5 * block, 4, 2), 0.5)
    target = view(into, source.ne, into.nb, size)
    copied = node(Op.CPY, type_, source.ne, [source, target], inplace=target)
    check(copied)


@every_type
@pytest.mark.parametrize("width", [3, 48])
def test_results_of_another_shape(type_: GgmlType, width: int) -> None:
    """Blocks whose elements are in several rows of the source."""
    block = TYPE_INFO[type_].block_size
    source = noise((width, block, 2))
    check(node(Op.CPY, type_, (2 * block, width), [source, None]))


@every_type
def test_scales_beyond_half_precision(type_: GgmlType) -> None:
    """What is decoded again is infinite then, and NaN only where the reference has it."""
    ne = (2 * TYPE_INFO[type_].block_size, 3)
    source = tensor(type_, ne, values(noise(ne)) * 1e7)
    expected, actual = cuda.by_both(node(Op.CPY, F32, ne, [source, None]))
    np.testing.assert_array_equal(actual, expected)


# -- rows by index ---------------------------------------------------------------------------------


def set_rows(
    type_: GgmlType, columns: int, indices: Sequence[int], ids: GgmlType, from_: GgmlType = F32
) -> Tensor:
    """A node that puts rows into two planes of nine that have gaps between them."""
    whole = tensor(type_, (columns + TYPE_INFO[type_].block_size, 9, 2), 0.5)
    table = view(whole, (columns, 9, 2), whole.nb)
    rows = noise((columns, len(indices), 2), from_)
    chosen = tensor(ids, (len(indices),), np.array(indices))
    return node(Op.SET_ROWS, type_, table.ne, [rows, chosen, table], inplace=table)


@every_type
@pytest.mark.parametrize(("ids", "from_"), [(I32, F16), (I64, F32)], ids=["i32", "i64"])
def test_set_rows(type_: GgmlType, ids: GgmlType, from_: GgmlType) -> None:
    """Rows of few blocks, and of more than a block of threads takes at once."""
    for columns in (TYPE_INFO[type_].block_size, 4352):
        check(set_rows(type_, columns, (7, 0, 8), ids, from_))


@every_type
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_set_rows_out_of_range(type_: GgmlType, bad: int) -> None:
    """The graph fails; the other rows are written, and nothing else."""
    columns = TYPE_INFO[type_].block_size
    t, good = (set_rows(type_, columns, (3, last), I64) for last in (bad, 5))
    before = np.array(CONTEXT.view(t))
    with pytest.raises(ContractError):
        cuda.run(t)
    cuda.run(good)
    actual, expected = CONTEXT.view(t), CONTEXT.view(good)
    others = [i for i in range(9) if i != 3]
    np.testing.assert_array_equal(actual[:, :, 3], expected[:, :, 3])
    np.testing.assert_array_equal(actual[:, :, others], before[:, :, others])


# -- sums ------------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("op", [Op.ADD, Op.ADD1])
def test_sums_are_encoded(type_: GgmlType, op: Op) -> None:
    """Blocks are decoded, added to, and encoded again."""
    ne = (2 * TYPE_INFO[type_].block_size, 3, 2)
    source = tensor(type_, ne, values(noise(ne)))
    addend = noise(source.ne if op is Op.ADD else (1,), seed=1)
    check(node(op, type_, source.ne, [source, addend]))


def test_all_types_have_an_encoder() -> None:
    assert set(ENCODERS) == set(TYPES)
