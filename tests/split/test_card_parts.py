"""A coordinator over parts with emulated cards, and over such and processors: it is one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from client.backend import Backend
from client.tensors import Array
from protocol.ggml.types import GgmlType
from tests.cuda import emulation
from tests.split.cluster import CardWorker, Coordinator, WorkerProcess, backend, status
from tests.split.weights import content, nmse, values, weight

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

F32, Q8_0 = GgmlType.F32, GgmlType.Q8_0


@pytest.fixture(scope="module")
def cards() -> Iterator[list[WorkerProcess]]:
    with CardWorker() as first, CardWorker() as second:
        yield [first, second]


# By numbers of cards, a processor's server, the coordinator's own share.
ARRANGEMENTS = (("0",), ("0", "1"), ("0", "worker"), ("1", "local"))


async def gated(b: Backend, type_: GgmlType, columns: int) -> list[Array]:
    """A block of a feed-forward network, twice; in tensor mode it stays on the parts."""
    g, width, hidden = b.graph, 256, 512
    made = {
        name: await weight(b, type_, ne, content(type_, ne, seed=i), name=f"blk.0.{name}.weight")
        for i, (name, ne) in enumerate(
            {
                "ffn_gate": (width, hidden),
                "ffn_up": (width, hidden),
                "ffn_down": (hidden, width),
            }.items()
        )
    }
    x = await b.tensor(F32, (width, columns))
    up = g.mul_mat(made["ffn_up"], x)
    y = g.mul_mat(made["ffn_down"], g.mul(g.silu(g.mul_mat(made["ffn_gate"], x)), up))
    plan = await b.prepare(y)
    results = []
    for seed in range(3):
        await b.upload(x, values(columns, width, seed=seed))
        await plan.run()
        results.append(await b.download(y))
    return results


@pytest.mark.parametrize("mode", ["row", "tensor"])
@pytest.mark.parametrize("parts", ARRANGEMENTS, ids="-".join)
async def test_results_are_those_of_one_server(
    parts: Sequence[str], mode: str, cards: list[WorkerProcess], whole: WorkerProcess
) -> None:
    """Of weights in blocks and not, of one column and several."""
    named: dict[str, WorkerProcess | str] = {
        "0": cards[0],
        "1": cards[1],
        "worker": whole,
        "local": "local",
    }
    with Coordinator([named[p] for p in parts], "--split-mode", mode) as coordinator:
        for type_ in (F32, Q8_0):
            for columns in (1, 5, 30):
                async with backend(whole) as b:
                    expected = await gated(b, type_, columns)
                async with backend(coordinator) as b:
                    got = await gated(b, type_, columns)
                    assert all(part.exchanges for part in (await status(b)).parts[:1])
                for one, other in zip(got, expected, strict=True):
                    assert np.isfinite(one).all()
                    assert nmse(one, other) < 1e-6
        assert "ERROR" not in coordinator.log
