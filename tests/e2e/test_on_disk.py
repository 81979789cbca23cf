"""llama.cpp of several releases over servers that have the model's file on a disk of their own.

What it says is what it says when it sends the weights; bytes on their way are counted by a relay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFReader

from rpc_server.cache.store import HASH_THRESHOLD
from tests.e2e import llama
from tests.e2e.conftest import Serve, needs_own_server
from tests.split.relay import Relay
from tools import models, upstream
from tools.serving.processes import Process

pytestmark = needs_own_server

COUNT = 8
# Handshakes, graphs, inputs of nodes: what travels beside weights.
OTHER = 2 << 20


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Path:
    """One layer as of a model of a billion parameters: three of its matrices are over 10 MiB."""
    return models.write_large_model(model_folder / "on-disk.gguf", 60 << 20)


@pytest.fixture(scope="module")
def small_bytes(model: Path) -> int:
    """Bytes of tensors that llama.cpp sends without asking."""
    sizes = [int(t.n_bytes) for t in GGUFReader(model).tensors]
    assert sum(sizes) > 50 << 20
    return sum(size for size in sizes if size <= HASH_THRESHOLD)


def start_with(serve: Serve, model: Path, *options: str) -> llama.RpcServer:
    """Start a server that has the file, and wait until it is indexed."""
    server = serve("--models", str(model), *options)
    # The index is made with a low priority: on a busy machine it waits for everybody.
    server.wait_for(r"tensors, .*indexed", 240.0)
    return server


def say(model: Path, rpc: str, version: str = "7.0.0") -> str:
    build = upstream.DIALECT_BUILDS[version]
    return llama.completion(model, "the", COUNT, rpc=rpc, build=build)


@pytest.fixture
def relays() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def before(stack: contextlib.ExitStack, server: llama.RpcServer) -> Relay:
    """Put a relay before a server."""
    relay = Relay(server.port)
    stack.callback(relay.close)
    return relay


@pytest.mark.parametrize("version", ["7.0.0", "5.1.0", "4.0.0"])
def test_clients_send_only_what_is_small(
    version: str, model: Path, small_bytes: int, serve: Serve, relays: contextlib.ExitStack
) -> None:
    if upstream.find_program("llama-completion", upstream.DIALECT_BUILDS[version]) is None:
        pytest.skip(f"no client of protocol {version}; run python -m tools.upstream --dialects")
    sends = before(relays, serve("--protocol", version))
    expected = say(model, sends.address, version)
    assert sends.sent > model.stat().st_size * 9 // 10
    offers = before(relays, start_with(serve, model, "--protocol", version))
    assert say(model, offers.address, version) == expected
    assert offers.sent < small_bytes + OTHER


def test_one_worker_has_the_file_and_one_has_not(
    model: Path, small_bytes: int, serve: Serve, relays: contextlib.ExitStack
) -> None:
    has = start_with(serve, model, "--threads", "1")
    has_not = serve("--threads", "1")
    parts = [before(relays, has), before(relays, has_not)]
    addresses = ",".join(part.address for part in parts)
    options = ("--threads", "1", "--tensor-split", "1,1", "--split-mode", "row")
    split = serve("--split", addresses, *options)
    expected = say(model, serve().address)
    assert say(model, split.address) == expected
    # Half of each weight over 10 MiB comes from the disk of the one.
    half = (model.stat().st_size - small_bytes) // 2
    assert parts[0].sent < small_bytes + OTHER
    assert parts[1].sent > half * 9 // 10
    # It is lost, and comes back: a new start of the client has its weights from the disk again.
    has.kill()
    with Process(has.command) as again:
        again.wait_for(r"tensors, indexed before", 240.0)
        split.wait_for(rf"(?s)(worker \S+:{parts[0].port}: protocol.*){{2}}", 60.0)
        parts[0].sent = 0
        assert say(model, split.address) == expected
        assert parts[0].sent < small_bytes + OTHER
        assert split.alive
