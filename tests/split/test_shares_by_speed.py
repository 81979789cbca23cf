"""--tensor-split auto: a coordinator measures its parts when it starts."""

from __future__ import annotations

import numpy as np
import pytest

from client.backend import Backend
from client.split.balance import measure
from protocol.ggml.types import GgmlType
from rpc_server.options import parse_options
from tests.server.process import ServerProcess, running
from tools import split_status

HOST = "127.0.0.1"
SHARE = r"{name}: ([\d.]+) GB/s of weights, \d+ us away: ([\d.]+) % of the rows"


def share(coordinator: ServerProcess, name: str) -> float:
    found = coordinator.wait_for(SHARE.format(name=name))
    assert float(found[1]) > 0
    return float(found[2])


@pytest.mark.slow
async def test_each_part_is_measured_and_gets_rows_by_its_speed() -> None:
    weight = np.random.default_rng(1).standard_normal((4096, 32)).astype(np.float32)
    with running("-t", "1") as worker:
        parts = f"local,{HOST}:{worker.port}"
        options = ("--tensor-split", "auto", "--split-mode", "row")
        # Kernels are compiled here if they have to be; the coordinator finds them.
        async with Backend.connect(HOST, worker.port) as b:
            await measure(b)
        with running("-t", "1", "--split", parts, *options) as coordinator:
            shares = [share(coordinator, "local"), share(coordinator, f"{HOST}:{worker.port}")]
            assert sum(shares) == pytest.approx(100, abs=0.2)
            # One machine, a thread each: neither is left without work.
            assert min(shares) > 2
            async with Backend.connect(HOST, coordinator.port) as b:
                w = await b.tensor(GgmlType.F32, (32, 4096), weight, name="blk.0.ffn_up.weight")
                x = await b.tensor(GgmlType.F32, (32,), np.ones(32))
                got = await b.compute(b.graph.mul_mat(w, x))
                assert np.allclose(got.ravel(), weight.sum(1), rtol=1e-4, atol=1e-4)
                async with await split_status.open_coordinator(HOST, coordinator.port) as c:
                    status = await split_status.read_status(c, "coordinator")
            # Cut at multiples of 32 of 4096 rows.
            for part, percent in zip(status.parts, shares, strict=True):
                assert part.rows == pytest.approx(40.96 * percent, abs=32)


def test_the_option() -> None:
    options = parse_options(["--split", "local,a:1", "--tensor-split", "auto"])
    assert options.tensor_split == "auto"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tensor-split", "auto"],
        ["--split", "local,a:1", "--tensor-split", "automatic"],
        ["--split", "local,a:1", "--tensor-split", "1"],
    ],
)
def test_what_is_no_option(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(wrong)
    assert "--tensor-split" in capsys.readouterr().err
