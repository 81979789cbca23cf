"""The op table has a row for every op, and the op says how many sources it takes."""

from __future__ import annotations

import pickle

import pytest

import rpc_server.ops  # noqa: F401  (fills the table)
from protocol.ggml.ops import VIEWS, Op
from protocol.ggml.types import GgmlType
from rpc_server.ops.table import OPS, ContractError, check, contract, reference
from tests.ops.tensors import node, tensor

F32 = GgmlType.F32
# Functions of the client's own process.
CUSTOM = {Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM}


@pytest.mark.parametrize("op", Op)
def test_every_op_has_a_row(op: Op) -> None:
    row = OPS[op]
    assert row.op is op
    assert row.is_view == (op in VIEWS)
    assert (row.reference is None) == (op in VIEWS or op in CUSTOM)
    assert all(i < op.max_sources for i in row.writes)


def test_an_op_is_its_name_and_says_its_sources() -> None:
    assert Op("ADD") is Op.ADD
    assert (str(Op.ADD), Op.ADD.min_sources, Op.ADD.max_sources) == ("ADD", 2, 2)
    assert (Op.ROPE.min_sources, Op.ROPE.max_sources) == (2, 3)
    assert (Op.SUM.min_sources, Op.ARANGE.max_sources, Op.VIEW.max_sources) == (1, 0, 10)
    assert pickle.loads(pickle.dumps(Op.ROPE)) is Op.ROPE


def test_sources_too_few_or_too_many_are_refused() -> None:
    a = tensor(F32, (4,))
    with pytest.raises(ContractError, match="source 1 is missing"):
        check(node(Op.MUL, F32, (4,), [a]))
    with pytest.raises(ContractError, match="has a source 2, the op takes 2"):
        check(node(Op.MUL, F32, (4,), [a, a, a]))


def test_an_op_is_registered_once() -> None:
    with pytest.raises(RuntimeError, match="two contracts"):
        contract(Op.ADD)(lambda t: None)
    with pytest.raises(RuntimeError, match="two references"):
        reference(Op.ADD)(lambda ctx, t: None)
