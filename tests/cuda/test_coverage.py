"""What a GPU can't run is known: ops and types that the differential tester draws."""

from __future__ import annotations

import pytest

from protocol.ggml.ops import VIEWS, Op
from rpc_server.devices.cuda.planner import LOWERINGS
from tests.cuda.coverage import survey

# Functions of the client's process.
NOWHERE = {Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM}


def test_every_op_has_a_kernel() -> None:
    assert set(Op) - set(LOWERINGS) == NOWHERE | VIEWS


@pytest.mark.slow
def test_what_has_no_kernel() -> None:
    """Nothing, in a case of each variant."""
    assert not survey(examples=1)
