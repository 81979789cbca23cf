"""What a GPU can't run is known: ops and types that the differential tester draws."""

from __future__ import annotations

from protocol.ggml_ops import VIEWS, Op
from rpc_server.devices.cuda.planner import LOWERINGS
from tests.cuda.coverage import survey

# docs/gpu.md tells what of these has no kernel.
PARTLY = {
    Op.ADD,
    Op.ADD1,
    Op.CPY,
    Op.FLASH_ATTN_EXT,
    Op.MUL_MAT,
    Op.MUL_MAT_ID,
    Op.SET_ROWS,
}
# Functions of the client's process.
NOWHERE = {Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM}


def test_every_op_has_a_kernel() -> None:
    assert set(Op) - set(LOWERINGS) == NOWHERE | VIEWS


def test_what_has_no_kernel() -> None:
    """A case of each variant: nothing but what is listed, and all of that."""
    assert {op for op, _ in survey(examples=1)} == {str(op) for op in PARTLY}
