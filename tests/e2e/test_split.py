"""llama.cpp through a coordinator that splits a model over workers: what it says is what one says.

The model never knows: weights are cut by rows, activations travel as F32, and workers of this
project compute each row as the unsplit server does. Then all logits are equal to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.e2e import llama
from tests.e2e.conftest import needs_own_server
from tests.e2e.logits import Request, compute, nmse
from tests.e2e.test_generation import PLAIN_PROMPTS
from tests.upstream_server import running_upstream
from tools.upstream import DEFAULT_BUILD, DIALECT_BUILDS

pytestmark = needs_own_server

COUNT = 16
# Upstream's servers by what the tests call them: the newest, and those of older protocols.
UPSTREAM = {"upstream": DEFAULT_BUILD, **DIALECT_BUILDS}
TEXT = (llama.DATA / "harbour.txt").read_text()
# Of a text, so many tokens at once and so many one by one.
TOKENS, SINGLE = 40, 4

StartSplit = Callable[..., llama.RpcServer]


@pytest.fixture
def split(log_folder: Path) -> Iterator[StartSplit]:
    """Starts workers and a coordinator: ``split(["ours", "upstream", "local"], *options)``.

    A protocol version among them is upstream's server that speaks it.
    """
    with contextlib.ExitStack() as stack:

        def start(kinds: Sequence[str], *options: str) -> llama.RpcServer:
            parts = []
            for i, kind in enumerate(kinds):
                if kind == "ours":
                    worker = llama.RpcServer(log_folder, "--threads", "1")
                    stack.callback(worker.stop)
                    parts.append(worker.address)
                elif kind in UPSTREAM:
                    log = log_folder / f"split-worker-{id(stack)}-{i}.log"
                    server = running_upstream(log, "-t", "1", build=UPSTREAM[kind])
                    endpoint = stack.enter_context(server)
                    parts.append(f"{endpoint.host}:{endpoint.port}")
                else:
                    parts.append(kind)
            coordinator = llama.RpcServer(log_folder, "--split", ",".join(parts), *options)
            stack.callback(coordinator.stop)
            return coordinator

        yield start


@pytest.fixture(scope="module")
def expected_text(server: llama.RpcServer) -> str:
    """What the unsplit server says."""
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    return llama.completion(model, PLAIN_PROMPTS[0], COUNT, rpc=server.address)


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (("ours", "ours", "ours"), ("--tensor-split", "1,0,3")),
        (("upstream", "upstream"), ()),
        (("upstream", "ours", "upstream"), ("--tensor-split", "2,1,1")),
        (("upstream", "local", "ours"), ()),
        (("ours", "upstream"), ("--split-wire", "f16")),
        (("6.0.0", "5.1.0", "5.0.0"), ()),
        (("5.0.0", "ours", "6.0.0"), ("--split-mode", "tensor")),
        (("ours", "upstream", "ours"), ("--split-mode", "tensor")),
    ],
    ids=lambda words: "-".join(words).replace("--", ""),
)
def test_the_text_is_that_of_one_server(
    kinds: Sequence[str], options: Sequence[str], split: StartSplit, expected_text: str
) -> None:
    coordinator = split(kinds, *options)
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    text = llama.completion(model, PLAIN_PROMPTS[0], COUNT, rpc=coordinator.address)
    assert text == expected_text
    assert "ERROR" not in coordinator.log


@pytest.mark.parametrize(
    ("architecture", "weight_type"), [("smollm2", llama.SMOLLM2_TYPE), ("qwen3moe", "Q8_0")]
)
def test_all_logits_are_those_of_one_server(
    architecture: str, weight_type: str, split: StartSplit, rpc: str, model_folder: Path
) -> None:
    """Row by row, to the bit: with two workers, and with a share that is computed here."""
    model = (
        llama.smollm2(weight_type)
        if architecture == "smollm2"
        else llama.random_model(model_folder, architecture, weight_type)
    )
    two, mixed = split(["ours", "ours"]), split(["local", "ours"], "--tensor-split", "3,1")
    expected, *got = compute(
        [
            Request(str(model), TEXT, TOKENS, SINGLE, rpc=address)
            for address in (rpc, two.address, mixed.address)
        ]
    )
    assert np.isfinite(expected).all()
    assert expected.std() > 1
    for logits in got:
        assert np.array_equal(logits, expected), f"NMSE {nmse(logits, expected)}"


def test_tensor_mode_costs_no_accuracy(split: StartSplit, rpc: str, model_folder: Path) -> None:
    """Sums of parts are rounded in another order, and no more than that."""
    model = llama.random_model(model_folder, "qwen3moe", "F32")
    coordinator = split(["ours", "ours"], "--split-mode", "tensor")
    expected, got = compute(
        [
            Request(str(model), TEXT, TOKENS, SINGLE, rpc=address)
            for address in (rpc, coordinator.address)
        ]
    )
    assert expected.std() > 1
    assert nmse(got, expected) < 1e-6


def test_a_model_takes_memory_on_the_workers_only(split: StartSplit) -> None:
    """What stays here is what isn't cut: norms, caches, the graph's memory."""
    model = llama.smollm2("F16")
    coordinator = split(["ours", "ours"])
    before = coordinator.rss()
    llama.completion(model, PLAIN_PROMPTS[0], 2, rpc=coordinator.address)
    assert coordinator.peak_rss() - before < model.stat().st_size / 2
