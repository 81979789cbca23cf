"""What real clients sent, behind the cases that say what real clients send."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conformance.suite.registry import load
from protocol.commands import Command
from protocol.graph_payload import GraphPayload
from protocol.observe.events import MessageKind, ObservedMessage
from tests.protocol.captures import Collected, collect
from tests.server.process import ServerProcess, running
from tools.client_captures import USES
from tools.replay.player import Player
from tools.serving.processes import PATIENCE

FOLDER = Path(__file__).parents[1] / "data" / "captures" / "clients"
# Between two processors, as of the golden captures.
BOUND = 1e-4
MOST_BYTES = 700 << 10

every_use = pytest.mark.parametrize("name", USES)


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.pcapng.gz"


@functools.cache
def session(name: str) -> Collected:
    return collect(path_of(name))


def requests(name: str, command: Command) -> list[ObservedMessage]:
    """All requests of one command, in their order."""
    return [
        m
        for _, m in session(name).messages
        if m.kind is MessageKind.REQUEST and m.command is command
    ]


def ranges(name: str, command: Command, cache: bytes) -> list[tuple[int, int]]:
    """Offset and size of each transfer of a part of a cache."""
    found = []
    for m in requests(name, command):
        if bytes(m.fields.tensor.name).startswith(cache):
            size = m.fields.size if command is Command.GET_TENSOR else m.body_size
            found.append((m.fields.offset, size))
    return found


def graphs(name: str) -> list[GraphPayload]:
    return [m.graph for m in requests(name, Command.GRAPH_COMPUTE) if m.graph is not None]  # type: ignore[misc]


def test_each_use_is_there_and_they_are_small() -> None:
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {f"{name}.pcapng.gz" for name in USES}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES


def test_cases_name_captures_that_are_there() -> None:
    named = set()
    for case in load():
        for names in re.findall(r"captures/clients/([a-z-]+(?:, [a-z-]+)*)", case.source):
            named |= set(names.split(", "))
    assert named == set(USES)


@every_use
def test_is_whole(name: str) -> None:
    found = session(name)
    assert not found.others
    assert all(connection.complete for connection in found.connections)
    assert not any(message.missing or message.problem for _, message in found.messages)


def test_slots_are_saved_by_ranges_of_cells() -> None:
    for cache in (b"cache_k_l0", b"cache_v_l0"):
        saved = ranges("slots-flash", Command.GET_TENSOR, cache)
        assert len(saved) == 1
        assert ranges("slots-flash", Command.SET_TENSOR, cache) == saved


def test_slots_without_flash_attention_are_saved_by_channels() -> None:
    saved = ranges("slots", Command.GET_TENSOR, b"cache_v_l0")
    assert ranges("slots", Command.SET_TENSOR, b"cache_v_l0") == saved
    starts, sizes = zip(*saved, strict=True)
    assert len(starts) == 32
    assert len(set(sizes)) == len(set(np.diff(starts))) == 1


@pytest.mark.parametrize("name", ["slots", "parallel", "lora", "speculative"])
def test_tokens_are_graphs_and_runs_again(name: str) -> None:
    assert requests(name, Command.GRAPH_COMPUTE)
    assert requests(name, Command.GET_TENSOR)


def test_a_dry_run_is_connections_that_make_nothing() -> None:
    makers = {
        id(connection)
        for connection, m in session("fit").messages
        if m.command in (Command.ALLOC_BUFFER, Command.GRAPH_COMPUTE)
    }
    idle = [c for c in session("fit").connections if id(c) not in makers]
    assert len(idle) > len(makers) > 0
    asked = {m.command for c, m in session("fit").messages if id(c) not in makers}
    assert {Command.GET_DEVICE_MEMORY, Command.GET_ALIGNMENT, Command.GET_ALLOC_SIZE} <= asked


def test_a_client_that_splits_sends_graphs_with_empty_nodes() -> None:
    sizes = [graph.tensors["ne"] for graph in graphs("tensor")]
    assert any((ne == 0).any() for ne in sizes)


def test_a_draft_model_has_weights_beside_the_others() -> None:
    widths = {
        int(m.fields.tensor.ne[1])
        for m in requests("speculative", Command.SET_TENSOR)
        if b"ffn_gate" in bytes(m.fields.tensor.name)
    }
    assert len(widths) == 2


def test_embeddings_are_pooled_on_the_server() -> None:
    read = {bytes(m.fields.tensor.name) for m in requests("embeddings", Command.GET_TENSOR)}
    assert any(name.startswith(b"result_embd_pooled") for name in read)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running("--threads", "1", "-d", "CPU") as started:
        yield started


@every_use
def test_is_answered_by_this_server_as_by_upstreams(name: str, server: ServerProcess) -> None:
    player = Player("127.0.0.1", server.port, tolerance=BOUND, timeout=PATIENCE)
    result = asyncio.run(player.play(path_of(name)))
    assert result.differences == []
