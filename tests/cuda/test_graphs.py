"""Captured graphs that go on when a cache has grown: kernels of them get other records.

The driver is a stand-in's, called as the real one is: through C functions.
"""

from __future__ import annotations

import ctypes
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest

from client.backend import Backend
from rpc_server.devices.cuda import toolkit
from rpc_server.devices.cuda.card import Card
from rpc_server.devices.cuda.graphs import (
    CALLS,
    GraphCalls,
    KernelLaunch,
    KernelParameters,
    UpdateError,
)
from rpc_server.devices.cuda.kernels import kernel
from tests.cuda import emulation, standin
from tests.cuda.test_queues import Serving, serving
from tools.gpu_check.llama import SMALL, ModelStep, SyntheticLlama

__all__ = ["serving"]

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)


def test_parameters_lie_as_the_drivers_header_has_them() -> None:
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h, on machines of 64 bits."""
    offsets = {
        name: getattr(KernelParameters, name).offset for name, _ in KernelParameters._fields_
    }
    assert offsets == {
        "func": 0, "grid": 8, "block": 20, "shared": 32, "values": 40, "extra": 48, "kern": 56,
        "context": 64,
    }  # fmt: skip
    assert ctypes.sizeof(KernelParameters) == 72


class Captured:
    """A captured graph of some launches, with a copy before and one behind them."""

    def __init__(self) -> None:
        self.card = Card(0)
        self.stream = self.card.stream()
        self.pinned = self.card.pinned(64)
        self.memory = self.card.allocate(64)
        function = self.card.function(kernel("fill", "fill"))
        self.launches = [
            KernelLaunch(function, np.full(8, n, np.int64), (n + 1, 1, 1), 32, 0) for n in range(4)
        ]
        self.graph = self.card.capture(self.stream, self._enqueue)

    def _enqueue(self) -> None:
        self.card.to_device(self.memory, self.pinned.address, 64, self.stream)
        for launch in self.launches:
            self.card.launch(launch, self.stream)
        self.card.to_host(self.pinned.address, self.memory, 64, self.stream)

    def change(self, **changed: KernelLaunch) -> None:
        """``changed`` by their numbers with an n before them."""
        calls = GraphCalls(toolkit.driver())
        calls.change(self.graph, self.launches, {int(name[1:]): x for name, x in changed.items()})

    def will_do(self) -> list[tuple[int, tuple[int, ...], tuple[int, ...], int]]:
        """The first word, grid, block and shared memory of what is launched."""
        jobs = [job for job in self.graph.instance if isinstance(job, standin._KernelJob)]
        return [
            (int(job.record.view(np.int64)[0]), job.grid, job.block, job.shared) for job in jobs
        ]

    def another(self, of: int, word: int, grid: int, shared: int = 0) -> KernelLaunch:
        words = np.full(8, word, np.int64)
        return KernelLaunch(self.launches[of].function, words, (grid, 2, 1), 64, shared)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Captured]:
    """On a card that computes nothing."""
    monkeypatch.setattr(standin, "COMPUTES", False)
    with standin.installed():
        yield Captured()


def test_kernels_are_listed_in_their_order(captured: Captured) -> None:
    """Copies between them are none."""
    nodes = GraphCalls(toolkit.driver()).kernels(captured.graph)
    assert nodes == captured.graph.nodes[1:5]


def test_what_is_changed_is_and_nothing_else(captured: Captured) -> None:
    captured.change(n1=captured.another(1, 77, 9), n3=captured.another(3, 78, 5, 128))
    assert captured.will_do() == [
        (0, (1, 1, 1), (32, 1, 1), 0),
        (77, (9, 2, 1), (64, 1, 1), 0),
        (2, (3, 1, 1), (32, 1, 1), 0),
        (78, (5, 2, 1), (64, 1, 1), 128),
    ]
    # Once more, from what is there by now: the driver still tells what was captured.
    captured.change(n1=captured.launches[1])
    assert captured.will_do()[1] == (1, (2, 1, 1), (32, 1, 1), 0)


def test_a_kernel_that_is_not_what_was_captured_is_left_alone(captured: Captured) -> None:
    before, launches = captured.will_do(), captured.launches
    captured.launches = [launches[0], launches[2], launches[1], launches[3]]
    with pytest.raises(UpdateError, match="not what it was captured as"):
        captured.change(n1=captured.another(1, 77, 9))
    captured.launches = launches[:3]
    with pytest.raises(UpdateError, match="4 kernels in a graph of 3"):
        captured.change(n1=captured.another(1, 77, 9))
    assert captured.will_do() == before


def test_what_the_driver_refuses_is_told(captured: Captured) -> None:
    with pytest.raises(UpdateError, match="cuGraphExecKernelNodeSetParams_v2 returns 1"):
        captured.change(n1=captured.another(1, 77, 9, 1 << 20))
    with pytest.raises(UpdateError, match="cuGraphGetRootNodes returns 400"):
        GraphCalls(toolkit.driver()).kernels(types.SimpleNamespace(graph=1))


def _two_ways(node: Any, nodes: Any, count: Any) -> int:
    count[0] = 2
    return 0


def test_a_graph_that_forks_is_not_listed(captured: Captured) -> None:
    driver = toolkit.driver()
    name = "cuGraphNodeGetDependentNodes"
    setattr(driver, name, ctypes.CFUNCTYPE(ctypes.c_int, *CALLS[name])(_two_ways))
    with pytest.raises(UpdateError, match="one line"):
        GraphCalls(driver).kernels(captured.graph)


@pytest.mark.parametrize("missing", CALLS)
def test_a_driver_without_a_call(missing: str) -> None:
    """As one before CUDA 12."""
    with standin.installed():
        driver = toolkit.driver()
        delattr(driver, missing)
        with pytest.raises(UpdateError, match=f"no {missing}"):
            GraphCalls(driver)


# -- plans -----------------------------------------------------------------------------------------


class Decoding:
    """A small model whose graphs are run one after the other, and how many were captured."""

    def __init__(self, client: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self._client = client
        self._model = SyntheticLlama(client, SMALL, 1024)
        self.captures = 0
        capture = Card.capture

        def counted(card: Card, stream: Any, enqueue: Callable[[], None]) -> Any:
            self.captures += 1
            return capture(card, stream, enqueue)

        monkeypatch.setattr(Card, "capture", counted)

    async def load(self) -> None:
        """Fill weights and cache, and reserve places for the largest graph."""
        await self._model.load(1)
        self._anywhere = self._model._places
        await self._model.reserve(2)
        self._reserved = self._model._places

    async def graph(self, tokens: int, before: int) -> ModelStep:
        """That of so many tokens behind others."""
        self._model._places = self._reserved
        return await self._model.prepare(tokens, before)

    async def elsewhere(self, tokens: int, before: int) -> ModelStep:
        """The same, with tensors in memory of their own."""
        self._model._places = self._anywhere
        return await self._model.prepare(tokens, before)

    async def logits(self, step: ModelStep, times: int = 1) -> np.ndarray[Any, Any]:
        """What it says, the same each time."""
        found = []
        for _ in range(times):
            await step.graph.run()
            found.append(np.array(await self._client.download(step.logits)).ravel())
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
        return found[0]

    async def require_same(
        self, steps: Sequence[ModelStep], said: Sequence[np.ndarray[Any, Any]]
    ) -> None:
        """Run each once more: it says what it did."""
        for step, expected in zip(steps, said, strict=True):
            np.testing.assert_array_equal(await self.logits(step), expected)


async def test_a_cache_that_grows_needs_no_new_capture(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next 256 positions are the same graph, with a few records changed; nothing is launched
    by itself.
    """
    async with serving.client() as client:
        decoding = Decoding(client, monkeypatch)
        await decoding.load()
        first = await decoding.graph(1, 100)
        said = await decoding.logits(first, 3)
        assert decoding.captures == 1
        for before in (300, 600):
            standin.given.clear()
            grown = await decoding.graph(1, before)
            seen = await decoding.logits(grown, 3)
            assert decoding.captures == 1
            assert (standin.given["kernel"], standin.given["graph"]) == (0, 3)
            # Attention of two layers.
            assert standin.given["changed kernel"] == SMALL.layers
            one_by_one = await decoding.logits(await decoding.elsewhere(1, before))
            np.testing.assert_array_equal(seen, one_by_one)
            assert standin.given["kernel"] > 20
        # What was there before comes again, as if nothing had been.
        first = await decoding.graph(1, 100)
        np.testing.assert_array_equal(await decoding.logits(first, 3), said)
        assert decoding.captures == 1


async def test_a_graph_that_is_otherwise_different_is_captured(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tokens, or elsewhere in memory: each has a graph of its own, and keeps it."""
    async with serving.client() as client:
        decoding = Decoding(client, monkeypatch)
        await decoding.load()
        steps = [await decoding.graph(1, 100), await decoding.elsewhere(1, 100)]
        steps.append(await decoding.elsewhere(2, 100))
        said = [await decoding.logits(step, 2) for step in steps]
        assert decoding.captures == 3
        np.testing.assert_array_equal(said[0], said[1])
        await decoding.require_same(steps, said)
        assert decoding.captures == 3


async def test_two_plans_that_take_turns_have_a_graph_each(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that another took over captures its own when it comes again, and both keep theirs."""
    async with serving.client() as client:
        decoding = Decoding(client, monkeypatch)
        await decoding.load()
        steps = [await decoding.graph(1, 100), await decoding.graph(1, 300)]
        said = [await decoding.logits(step, 2) for step in steps]
        assert decoding.captures == 1
        for _ in range(3):
            await decoding.require_same(steps, said)
        assert decoding.captures == 2


def _refuse(*_: Any) -> int:
    return 801


@pytest.mark.parametrize("why", ["no library", "refused"])
async def test_without_the_driver_graphs_are_captured_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """Where it has no such calls, or says that it doesn't do that: the latter is told once."""
    driver: Any = None
    if why == "refused":
        driver, name = standin.driver(), "cuGraphExecKernelNodeSetParams_v2"
        setattr(driver, name, ctypes.CFUNCTYPE(ctypes.c_int, *CALLS[name])(_refuse))
    caplog.set_level(logging.WARNING)
    with standin.installed(), mock.patch.object(toolkit, "driver", return_value=driver):
        served = Serving()
        await served.start()
        async with served.client() as client:
            decoding = Decoding(client, monkeypatch)
            await decoding.load()
            for before in (100, 300, 600):
                seen = await decoding.logits(await decoding.graph(1, before), 3)
                expected = await decoding.logits(await decoding.elsewhere(1, before))
                np.testing.assert_array_equal(seen, expected)
            assert decoding.captures == 3
        await served.server.stop()
    told = [r for r in caplog.records if "captured graphs can't be changed" in r.getMessage()]
    assert len(told) == (why == "refused")
