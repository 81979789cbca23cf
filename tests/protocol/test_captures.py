"""Recorded sessions of every protocol version: decoded, encoded again, played again."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import dpkt
import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Body
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.observe.events import MessageKind, ObservedMessage, Side
from protocol.requests import FRAME
from protocol.split import ProgramPayload, encode_program
from tests.addresses import coming_from
from tests.protocol.captures import NAMES, collected, path_of
from tests.server.process import ServerProcess
from tools import captures
from tools.dump.__main__ import main as dump
from tools.replay.player import Player

HOST = "127.0.0.1"
# Between two processors: the bound of the end-to-end tests, which have models of this kind.
BOUND = 1e-4

every_capture = pytest.mark.parametrize("name", NAMES)


def test_there_is_a_capture_of_every_version_and_command() -> None:
    seen, settled = defaultdict(set), set()
    for name in NAMES:
        for _, message in collected(name).messages:
            seen[message.dialect.version].add(message.command)
            settled.add(message.dialect.name)
    assert settled == {d.name for d in DIALECTS}
    for dialect in DIALECTS:
        lacking = set(dialect.commands) - seen[dialect.version]
        # What llama.cpp asks for when it copies between devices or clears a part of a tensor;
        # of these versions only llama.cpp's sessions are recorded, and they do neither.
        allowed = {Command.COPY_TENSOR, Command.MEMSET_TENSOR, Command.SET_TENSOR_HASH}
        own = f"own-{dialect.name}" in NAMES
        assert lacking <= (set() if own else allowed), dialect
    assert set(NAMES) == set(captures.RECIPES)


@every_capture
def test_is_decoded_to_the_text_that_was_read(name: str) -> None:
    texts = []
    for options in captures.RECIPES[name].text:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert dump([str(path_of(name)), "--color", "never", *options]) == 0
        texts.append(output.getvalue())
    assert "\n".join(texts) == path_of(name).with_suffix(".txt").read_text()


@every_capture
def test_nothing_is_left_over(name: str) -> None:
    found = collected(name)
    assert not found.others
    version = name.partition("-")[2]
    assert {c.conversation.dialect.name for c in found.connections if c.conversation.dialect} == {
        version
    }
    # Every answered request has its answer, and all are whole.
    for connection in found.connections:
        assert connection.complete
        assert not connection.conversation.unanswered
    assert not any(message.missing or message.problem for _, message in found.messages)


def payloads(path: Path) -> dict[tuple[int, int], bytes]:
    """The bytes of each TCP stream of a capture, by its ports, straight from the packets."""
    streams: dict[tuple[int, int], bytes] = defaultdict(bytes)
    with path.open("rb") as file:
        for _, data in dpkt.pcapng.Reader(file):
            tcp = dpkt.ethernet.Ethernet(data).data.data
            streams[tcp.sport, tcp.dport] += bytes(tcp.data)
    return streams


def encoded(message: ObservedMessage) -> bytes:
    """The bytes of a message, from what it says."""
    body = bytes(message.body or b"")
    if isinstance(message.graph, GraphPayload):
        body = encode_graph(message.graph, message.dialect)
    elif isinstance(message.graph, ProgramPayload):
        body = encode_program(message.graph.steps, message.graph.tensors)
    if message.kind is MessageKind.REQUEST:
        head = codec(message.spec.request).build(message.fields)
        return FRAME.pack(message.command, len(head) + len(body)) + head + body
    if message.kind is MessageKind.ANSWER:
        head = b""
        if not message.body_size and message.command is not Command.GET_TENSOR:
            head = codec(message.spec.response).build(message.fields)
        return (len(head) + len(body)).to_bytes(8, "little") + head + body
    return body


@every_capture
def test_is_encoded_to_the_same_bytes(name: str) -> None:
    found = collected(name)
    streams: dict[tuple[int, int], bytes] = defaultdict(bytes)
    graphs = 0
    for connection, message in found.messages:
        ports = connection.client_address[1], connection.server_address[1]
        key = ports if message.side is Side.CLIENT else ports[::-1]
        streams[key] += encoded(message)
        graphs += message.spec.body is Body.GRAPH and message.kind is MessageKind.REQUEST
    assert streams == payloads(path_of(name))
    assert graphs or name.startswith("cache")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    cache = tmp_path_factory.mktemp("cache")
    with ServerProcess("--threads", "1", "--cache", env={"LLAMA_CACHE": str(cache)}) as server:
        yield server


@every_capture
def test_is_answered_again_as_it_was(name: str, server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        if name.count("-") > 1:
            # One of several numberings: the server has met the others at this address.
            pinned = ServerProcess("--threads", "1", "--protocol", name.partition("-")[2])
            server = stack.enter_context(pinned)
        # A client of another version at the same address would have to wait.
        stack.enter_context(coming_from(2 + NAMES.index(name)))
        result = asyncio.run(Player(HOST, server.port, tolerance=BOUND).play(path_of(name)))
    assert result.differences == []
    assert result.notes == []
    answers = [
        m
        for _, m in collected(name).messages
        if m.kind in (MessageKind.ANSWER, MessageKind.OUTPUTS)
    ]
    assert result.answers == len(answers)
