"""What bench times of single kernels, without timing: its nodes, and the table of a profile."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.planner import LOWERINGS, Planner
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.ops.table import check
from tools.bench import ops
from tools.bench.matmul import make_tensor, seconds
from tools.bench.profile import table


@pytest.mark.parametrize("tokens", [1, 3])
def test_all_nodes_that_are_measured_keep_their_contracts_and_have_kernels(tokens: int) -> None:
    names = []
    for name, nodes in ops.cases(tokens, (64,)):
        names.append(name)
        planner = Planner(2, ScratchArena())
        for t in nodes:
            check(t)
            planner.begin(t)
            assert t.op is not None
            assert LOWERINGS[t.op](t, planner), name
        assert planner.take()
    assert len(set(names)) == len(names)
    assert {"SOFT_MAX 64", "FLASH_ATTN_EXT Q8_0 64"} < set(names)


def test_a_matrix_lies_in_the_memory_that_it_is_given() -> None:
    memory = np.zeros(34 * 4 * 3, np.uint8)
    t = make_tensor(GgmlType.Q8_0, 128, 3, memory)
    assert t.ne == (128, 3, 1, 1)
    assert t.address == memory.ctypes.data
    assert t.nbytes == memory.nbytes
    assert t.contiguous


def test_a_call_is_repeated_however_short_the_time_is() -> None:
    calls: list[int] = []
    assert seconds(lambda: calls.append(1), 0.0) >= 0
    assert len(calls) == 4


def test_a_profile_has_the_largest_share_first_and_what_is_left() -> None:
    # Two tokens by single records; the clock took a tenth of them, which no kernel is charged for.
    result: dict[str, object] = {
        "kernels": {
            "norm": {"records": 20, "seconds": 0.2, "bytes": 2 * 10**9},
            "product": {"records": 20, "seconds": 0.8, "bytes": 8 * 10**9},
        },
        "whole": [0.45, 0.45],
        "timed": [0.5, 0.5],
        "records": 20,
    }
    lines = table(result).splitlines()
    assert lines[2].split(" | ")[0] == "| product"
    assert lines[2].split(" | ")[2:4] == ["375000", "83.3%"]
    assert lines[3].split(" | ")[2:4] == ["75000", "16.7%"]
    assert lines[4].startswith("| the rest of the run | | 0 | ")
    assert lines[5] == "| all in one call | 20 | 450000 | | |"
