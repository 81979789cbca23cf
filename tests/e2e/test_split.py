"""llama.cpp through a coordinator that splits a model over workers: what it says is what one says.

The model never knows: weights are cut by rows, activations travel as F32, and workers of this
project compute each row as the unsplit server does. Then all logits are equal to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from client.backend import HASH_THRESHOLD
from tests.e2e import llama
from tests.e2e.cards import emulated_card
from tests.e2e.conftest import Serve, StartLlamaServer, needs_own_server
from tests.e2e.logits import Request, compute, nmse
from tests.e2e.test_generation import PLAIN_PROMPTS
from tests.split.relay import Relay
from tests.upstream_server import running_upstream
from tools.models import write_large_model
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

    A protocol version among them is upstream's server that speaks it, ``card`` one of ours with an
    emulated card; ``cuda0`` and ``cuda1`` are emulated cards of the coordinator's own.
    """
    with contextlib.ExitStack() as stack:

        def start(kinds: Sequence[str], *options: str) -> llama.RpcServer:
            parts = []
            for i, kind in enumerate(kinds):
                if kind == "ours":
                    worker = llama.RpcServer(log_folder, "--threads", "1")
                    stack.callback(worker.stop)
                    parts.append(worker.address)
                elif kind == "card":
                    parts.append(stack.enter_context(emulated_card(log_folder)))
                elif kind in UPSTREAM:
                    log = log_folder / f"split-worker-{id(stack)}-{i}.log"
                    server = running_upstream(log, "-t", "1", build=UPSTREAM[kind])
                    endpoint = stack.enter_context(server)
                    parts.append(f"{endpoint.host}:{endpoint.port}")
                else:
                    parts.append(kind)
            mode = () if "--split-mode" in options else ("--split-mode", "row")
            cards = 2 if any(kind.startswith("cuda") for kind in kinds) else 0
            words = ("--split", ",".join(parts), *mode, *options)
            coordinator = llama.RpcServer(log_folder, *words, cards=cards)
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
        (("ours", "ours"), ("--split-mode", "tensor")),
        (("local", "ours"), ("--split-mode", "tensor")),
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


@pytest.mark.parametrize("kinds", [("ours", "ours"), ("local", "ours")], ids="-".join)
def test_parts_that_add_up_by_themselves(
    kinds: Sequence[str], split: StartSplit, rpc: str, model_folder: Path
) -> None:
    """All layers of a model whose attention can be cut are one exchange."""
    model = llama.random_model(model_folder, "qwen2", "F32")
    linked, here = (
        split(kinds, "--split-mode", "tensor", "--split-sums", sums) for sums in ("parts", "here")
    )
    arguments = (str(model), TEXT, TOKENS, SINGLE)
    addresses = (rpc, linked.address, here.address)
    expected, *got = compute([Request(*arguments, rpc=address) for address in addresses])
    assert expected.std() > 1
    for logits in got:
        assert nmse(logits, expected) < 1e-6
    assert "the parts are linked" in linked.log
    for coordinator in (linked, here):
        for word in ("ERROR", "WARNING", "comes here"):
            assert word not in coordinator.log


def test_a_model_takes_memory_on_the_workers_only(split: StartSplit) -> None:
    """What stays here is what isn't cut: norms, caches, the graph's memory."""
    model = llama.smollm2("F16")
    coordinator = split(["ours", "ours"])
    before = coordinator.rss()
    llama.completion(model, PLAIN_PROMPTS[0], 2, rpc=coordinator.address)
    assert coordinator.peak_rss() - before < model.stat().st_size / 2


@pytest.mark.parametrize(
    ("kinds", "options"),
    [(("ours", "ours"), ()), (("upstream", "local"), ("-ctk", "q8_0", "-ctv", "q8_0"))],
    ids=str,
)
def test_several_slots_in_tensor_mode(
    kinds: Sequence[str],
    options: Sequence[str],
    split: StartSplit,
    rpc: str,
    llama_server: StartLlamaServer,
    model_folder: Path,
) -> None:
    """Sequences with a cache of their own each, which graphs store to and read in any number."""
    model = llama.random_model(model_folder, "qwen2", "F16")
    prompts = PLAIN_PROMPTS[:3]
    coordinator = split(kinds, "--split-mode", "tensor")

    def texts(address: str) -> list[list[llama.Token]]:
        server = llama_server(model, "-fa", "on", *options, rpc=address, slots=3)
        answers = server.generate_at_once(prompts, 16)
        server.stop()
        return answers

    expected, got = texts(rpc), texts(coordinator.address)
    gaps = [llama.gap_where_different(*pair) for pair in zip(expected, got, strict=True)]
    assert all(gap is None or gap < llama.NEAR_TIE for gap in gaps), gaps
    llama.run(
        "llama-batched-bench",
        *("-m", model, "-c", 1024, "-npp", 32, "-ntg", 8, "-npl", "1,2,4", "-fa", "on", "-t", 1),
        *options,
        *llama.device_options(coordinator.address),
    )
    assert "ERROR" not in coordinator.log
    # The cache stays with the heads.
    assert "comes here" not in coordinator.log
    assert "goes by rows" not in coordinator.log


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        ((165, 165), ("--split-mode", "tensor")),
        ((300, 20), ("--tensor-split", "auto", "--split-mode", "row")),
    ],
    ids=str,
)
def test_what_fits_by_what_is_told_loads(
    memory: Sequence[int], options: Sequence[str], serve: Serve
) -> None:
    """llama.cpp puts on the device as much as it is told there is, without a margin."""
    model = llama.smollm2("F16")
    workers = [serve("--threads", "1", "--mem", str(size)) for size in memory]
    names = ",".join(worker.address for worker in workers)
    coordinator = serve("--split", names, *options)
    expected = llama.completion(model, PLAIN_PROMPTS[0], 6)
    # Without -ngl, so that llama.cpp decides.
    ordinary = llama.completion_arguments(model, PLAIN_PROMPTS[0], 6)
    ordinary = ordinary[: -len(llama.device_options(None))]
    place = ["--rpc", coordinator.address, "--fit-target", "0"]
    assert llama.told(llama.whole_text, "llama-completion", *ordinary, *place) == expected
    assert all(worker.alive for worker in workers)
    for word in ("ERROR", "no buffer of"):
        assert word not in coordinator.log


@pytest.mark.slow
def test_two_coordinators_over_the_same_workers(log_folder: Path, expected_text: str) -> None:
    """They name the workers in opposite orders, and neither waits for a timeout."""
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> llama.RpcServer:
            server = llama.RpcServer(log_folder, *options)
            stack.callback(server.stop)
            return server

        workers = [start("--threads", "1") for _ in range(2)]
        names = [w.address for w in workers]
        coordinators = [
            start(
                *("--split", ",".join(order), "--tensor-split", "1,1", "--split-mode", "row"),
                *("--split-timeout", "60"),
            )
            for order in (names, names[::-1])
        ]

        def generate(coordinator: llama.RpcServer) -> str:
            return llama.completion(model, PLAIN_PROMPTS[0], COUNT, rpc=coordinator.address)

        with ThreadPoolExecutor(2) as pool:
            texts = list(pool.map(generate, coordinators))
        assert texts == [expected_text] * 2
        for server in (*workers, *coordinators):
            assert "ERROR" not in server.log


def test_a_model_loads_from_the_workers_disks(log_folder: Path, tmp_path: Path) -> None:
    """The second load sends the workers what llama.cpp never offers by its hash, no more."""
    model = tmp_path / "model.gguf"
    write_large_model(model, 240 << 20, "F32")
    sizes = [int(t.n_bytes) for t in GGUFReader(model).tensors]
    small = sum(n for n in sizes if n <= HASH_THRESHOLD)
    assert small < 0.07 * sum(sizes)
    with contextlib.ExitStack() as stack:

        def start(name: str, *options: str) -> llama.RpcServer:
            cache = ("--cache-dir", str(tmp_path / name))
            server = llama.RpcServer(log_folder, *cache, *options)
            stack.callback(server.stop)
            return server

        workers = [start(f"worker-{i}", "--threads", "1") for i in range(2)]
        relays = [Relay(w.port) for w in workers]
        sent, logits = [0], []
        for _ in range(2):
            coordinator = start(
                "coordinator",
                *("--split", ",".join(r.address for r in relays)),
                *("--tensor-split", "2,1", "--split-mode", "tensor"),
            )
            logits += compute([Request(str(model), TEXT, 8, 1, rpc=coordinator.address)])
            sent.append(sum(r.sent for r in relays))
            assert "ERROR" not in coordinator.log
        assert sent[1] > 0.9 * sum(sizes)
        assert sent[2] - sent[1] < small + 0.01 * sum(sizes)
        assert np.array_equal(logits[0], logits[1])
        for relay in relays:
            relay.close()
