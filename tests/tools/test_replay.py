"""Recorded sessions are played with the server's own numbers, and differences are found."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from protocol import negotiation
from protocol.codec import codec
from protocol.commands import Command
from protocol.messages import RPC_TENSOR_DTYPE, RpcTensor
from protocol.observe.conversation import Conversation
from protocol.observe.events import MessageKind, ObservedMessage, Side
from protocol.split import ProgramPayload
from tests.protocol.captures import NAMES, collected, path_of
from tests.upstream_server import running_upstream
from tools import upstream
from tools.capture.files import CaptureWriter, read_capture
from tools.replay.__main__ import main
from tools.replay.compare import compare, nmse
from tools.replay.player import Player, ReplayResult
from tools.replay.rewrite import Rewriter
from tools.serving.processes import PATIENCE

HOST = "127.0.0.1"
HANDLES, ADDRESSES = 0x5000_0000, 0x7700_0000_0000
# Changes the bytes of an answer, given the recorded one.
Change = Callable[[ObservedMessage, bytearray], bytes | bytearray | None]


class Actor:
    """A server that answers what was recorded, with numbers of its own.

    Each connection is answered as the next recorded one. ``change`` may alter an answer, or end the
    connection in its place (None). ``received`` are the requests of each connection.
    """

    def __init__(self, name: str, change: Change | None = None) -> None:
        self._change = change
        self._answers: dict[int, list[ObservedMessage]] = defaultdict(list)
        for connection, message in collected(name).messages:
            if message.side is Side.SERVER:
                self._answers[connection.number].append(message)
        self.received: dict[int, list[ObservedMessage]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, HOST, 0)
        async with server:
            yield server.sockets[0].getsockname()[1]
            # What comes last has no answer: it is read once its client has hung up.
            await asyncio.wait_for(asyncio.gather(*self._tasks, return_exceptions=True), PATIENCE)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = len(self.received) + 1
        requests = self.received.setdefault(number, [])
        conversation = Conversation(keep=1 << 62)
        # Who tries again gets the answers of the last one.
        due = iter(self._answers[min(number, max(self._answers))])
        answer = next(due, None)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                for event in conversation.feed(Side.CLIENT, data):
                    assert isinstance(event, ObservedMessage), event
                    requests.append(event)
                while answer is not None and self._may_follow(answer, requests):
                    changed = self._translated(answer)
                    if changed is None:
                        writer.close()
                        return
                    writer.write(changed)
                    for event in conversation.feed(Side.SERVER, answer.data):
                        if isinstance(event, ObservedMessage) and event.side is Side.CLIENT:
                            requests.append(event)
                    answer = next(due, None)
            writer.close()

    def _may_follow(self, answer: ObservedMessage, requests: list[ObservedMessage]) -> bool:
        wanted = MessageKind.INPUTS if answer.kind is MessageKind.OUTPUTS else MessageKind.REQUEST
        return any(
            r.number == answer.number and r.kind is wanted and r.step == answer.step
            for r in requests
        )

    def _translated(self, answer: ObservedMessage) -> bytes | bytearray | None:
        data = bytearray(answer.data)
        if answer.command in (Command.ALLOC_BUFFER, Command.BUFFER_GET_BASE):
            declared = codec(answer.spec.response)
            fields = declared.parse(data, 8)
            if answer.command is Command.ALLOC_BUFFER:
                fields.remote_ptr += HANDLES
            else:
                fields.base_ptr += ADDRESSES
            data[8:] = declared.build(fields)
        return self._change(answer, data) if self._change else data


def play(name: str, change: Change | None = None) -> tuple[ReplayResult, Actor]:
    async def run() -> tuple[ReplayResult, Actor]:
        actor = Actor(name, change)
        async with actor.serving() as port:
            return await Player(HOST, port, timeout=PATIENCE).play(path_of(name)), actor

    return asyncio.run(run())


def numbers(message: ObservedMessage) -> list[tuple[int, int]]:
    """Handle and address of all that a request names."""
    found: list[tuple[int, int]] = []
    for value in vars(message.fields).values() if message.fields is not None else ():
        for tensor in value if isinstance(value, tuple) else (value,):
            if hasattr(tensor, "view_src"):
                found.append((tensor.buffer, tensor.data))
    if message.fields is not None and hasattr(message.fields, "remote_ptr"):
        found.append((message.fields.remote_ptr, 0))
    if message.graph is not None:
        tensors = message.graph.tensors
        found += zip(tensors["buffer"].tolist(), tensors["data"].tolist(), strict=True)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_requests_carry_the_servers_numbers_and_nothing_else_changes(name: str) -> None:
    result, actor = play(name)
    assert result.differences == []
    recorded: dict[int, list[ObservedMessage]] = defaultdict(list)
    for connection, message in collected(name).messages:
        if message.side is Side.CLIENT:
            recorded[connection.number].append(message)
    translated = 0
    for number, messages in recorded.items():
        for was, now in zip(messages, actor.received[number], strict=True):
            assert len(was.data) == len(now.data)
            for (handle, address), (new_handle, new_address) in zip(
                numbers(was), numbers(now), strict=True
            ):
                # Not yet placed where a size is asked for; zero then, and zero it stays.
                assert new_handle == (handle + HANDLES if handle else 0)
                assert new_address == (address + ADDRESSES if handle and address else address)
                translated += bool(handle)
            if not numbers(was):
                assert was.data == now.data
    assert translated


def test_a_different_value_is_found_and_told() -> None:
    def change(answer: ObservedMessage, data: bytearray) -> bytearray:
        if answer.command is Command.GET_TENSOR:
            values = np.frombuffer(data, "<f4", offset=8)
            values[3] += 1
        return data

    result, _ = play("own-3.6.1", change)
    assert len(result.differences) == 3
    assert "GET_TENSOR SOFT_MAX 'node_3' F32 16x2" in result.differences[0]
    assert "1 of 32 values differ" in result.differences[0]
    assert "[3]" in result.differences[0]


@pytest.mark.parametrize(
    ("command", "field", "text"),
    [
        (Command.COPY_TENSOR, 8, "result is 0, recorded: 1"),
        (Command.SET_TENSOR_HASH, 8, "result is 1, recorded: 0"),
        (Command.ALLOC_BUFFER, 8, "remote_ptr is False, recorded: True"),
    ],
)
def test_a_different_answer_is_found_and_told(command: Command, field: int, text: str) -> None:
    def change(answer: ObservedMessage, data: bytearray) -> bytearray:
        if answer.command is command:
            wide = command is Command.ALLOC_BUFFER
            data[field : field + (8 if wide else 1)] = bytes(8) if wide else bytes([1 - data[8]])
        return data

    result, _ = play("own-3.6.1", change)
    assert text in result.differences[0]


def test_a_server_that_hangs_up_is_told() -> None:
    result, _ = play(
        "own-3.6.1", lambda answer, data: None if answer.command is Command.GET_TENSOR else data
    )
    assert len(result.differences) == 1
    assert "GET_TENSOR" in result.differences[0]
    assert "no answer from the server: it closed the connection" in result.differences[0]


def test_figures_of_the_machine_are_not_compared() -> None:
    def change(answer: ObservedMessage, data: bytearray) -> bytearray:
        if answer.command in (Command.GET_DEVICE_MEMORY, Command.GET_MAX_SIZE):
            data[8:16] = (1 << 33).to_bytes(8, "little")
        return data

    assert play("own-3.6.1", change)[0].differences == []


def test_a_server_that_wants_more_room_is_noted() -> None:
    def change(answer: ObservedMessage, data: bytearray) -> bytearray:
        if answer.command is Command.GET_ALLOC_SIZE:
            data[8:16] = (1 << 20).to_bytes(8, "little")
        return data

    result, _ = play("own-3.6.1", change)
    assert result.differences == []
    assert len(result.notes) == 2
    assert "the server wants 1048576 bytes, the recording has room for 544" in result.notes[0]


def test_a_number_that_is_no_buffers_does_not_meet_one() -> None:
    rewriter = Rewriter()
    rewriter.allocated(0x1001, 0x2002)
    rewriter.based(0x1001, 0x10_0000, 0x70_0000)
    assert rewriter.handle(0x1001) == 0x2002
    assert rewriter.handle(0) == 0
    assert rewriter.handle(0x3003) == 0x3003
    assert rewriter.handle(0x2002) not in (0x2002, 0x1001, 0)
    assert rewriter.address(0x1001, 0x10_0040) == 0x70_0040
    assert rewriter.address(0x3003, 0x10_0040) == 0x10_0040
    assert rewriter.address(0x1001, 0) == 0


def test_nmse() -> None:
    a = np.array([1, 2, np.inf, np.nan], np.float32)
    assert nmse(a, a) == 0
    assert nmse(a, np.array([1, 3, np.inf, np.nan], np.float32)) == pytest.approx(0.2)
    assert nmse(a, np.array([1, 2, -np.inf, np.nan], np.float32)) == np.inf
    assert nmse(a, np.array([1, 2, 3, np.nan], np.float32)) == np.inf
    assert nmse(np.zeros(2, np.float32), np.ones(2, np.float32)) == np.inf


def test_tolerance_is_for_f32_only() -> None:
    (answer, *_) = [
        m
        for _, m in collected("own-3.6.1").messages
        if m.command is Command.GET_TENSOR and m.kind is MessageKind.ANSWER
    ]
    body = bytes(answer.body or b"")
    near = (np.frombuffer(body, "<f4") * np.float32(1 + 1e-6)).tobytes()
    assert near != body
    assert not compare(answer, near).equal
    assert compare(answer, near, 1e-9).equal
    assert answer.request is not None
    tensor = answer.request.fields.tensor
    tensor.type, was = 26, tensor.type
    try:
        assert "bytes differ" in compare(answer, near, 1e-9).text
    finally:
        tensor.type = was
    assert "4 bytes instead of" in compare(answer, bytes(4), 1e-9).text


def test_tensors_of_programs_are_translated() -> None:
    (program,) = {
        m.fields.program: m
        for _, m in collected("split-7.0.0").messages
        if m.command is Command.SPLIT_PROGRAM
        and m.kind is MessageKind.REQUEST
        and not m.fields.program
    }.values()
    assert isinstance(program.graph, ProgramPayload)
    handle = int(program.graph.tensors["buffer"].max())
    rewriter = Rewriter()
    rewriter.allocated(handle, 0x42)
    sent = rewriter.request(program)
    size = RpcTensor.sizeof() * len(program.graph.tensors)
    tensors = np.frombuffer(sent[-size:], RPC_TENSOR_DTYPE)
    was = program.graph.tensors["buffer"] == handle
    assert (tensors["buffer"][was] == 0x42).all()
    assert was.any()


def test_the_beginning_of_a_recording_is_played_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = path_of("own-3.6.1").read_bytes()
    path = tmp_path / "cut.pcapng"
    path.write_bytes(whole[: len(whole) * 2 // 3])

    async def run() -> ReplayResult:
        async with Actor("own-3.6.1").serving() as port:
            return await Player(HOST, port, timeout=PATIENCE).play(path)

    result = asyncio.run(run())
    assert result.differences == []
    assert 10 < result.requests < 32


def test_holes_in_a_recording_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "holes.pcapng"
    frames = list(read_capture(path_of("own-3.6.1")))
    # The twelfth message of the client.
    sent = [i for i, f in enumerate(frames) if bytes(f.data[6:12]).endswith(b"\x01")]
    with path.open("wb") as file:
        writer = CaptureWriter(file)
        for i, frame in enumerate(frames):
            if i != sent[12]:
                writer.write(frame)

    async def run() -> int:
        async with Actor("own-3.6.1").serving() as port:
            words = [str(path), "--to", f"{HOST}:{port}", "--timeout", f"{PATIENCE:g}"]
            return await asyncio.to_thread(main, words)

    assert asyncio.run(run()) == 2
    assert "bytes were not recorded" in capsys.readouterr().err


def test_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unused_tcp_port: int
) -> None:
    nowhere = f"{HOST}:{unused_tcp_port}"
    assert main([str(path_of("own-3.6.1")), "--to", nowhere]) == 2
    assert f"no connection to {nowhere}" in capsys.readouterr().err
    no_capture = tmp_path / "no.pcapng"
    no_capture.write_bytes(b"this is no capture")
    assert main([str(no_capture), "--to", nowhere]) == 2
    assert "can't play" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        main([str(no_capture)])
    assert raised.value.code == 2


def test_the_command_line_tells_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    def change(answer: ObservedMessage, data: bytearray) -> bytearray:
        if answer.command is Command.GET_TENSOR:
            data[8] ^= 1
        return data

    async def run(actor: Actor, *options: str) -> int:
        async with actor.serving() as port:
            words = [str(path_of("own-3.6.1")), "--to", f"{HOST}:{port}", *options]
            return await asyncio.to_thread(main, words)

    assert asyncio.run(run(Actor("own-3.6.1"))) == 0
    output = capsys.readouterr().out
    assert "no difference" in output
    assert "1 connections, 32 requests, 26 answers" in output
    assert asyncio.run(run(Actor("own-3.6.1", change))) == 1
    output = capsys.readouterr().out
    assert "3 differences; the first:" in output
    assert "GET_TENSOR" in output
    assert asyncio.run(run(Actor("own-3.6.1", change), "--tolerance", "1e-9")) == 0
    assert "the largest NMSE of F32 data is" in capsys.readouterr().out


def test_a_server_of_another_version_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As long as it waits for the server to come round.
    monkeypatch.setattr(negotiation, "WORKING", 0.1)

    def change(answer: ObservedMessage, data: bytearray) -> bytearray:
        if answer.command is Command.HELLO:
            data[8:11] = bytes([3, 0, 0])
        return data

    async def run() -> int:
        async with Actor("own-3.6.1", change).serving() as port:
            words = [str(path_of("own-3.6.1")), "--to", f"{HOST}:{port}"]
            return await asyncio.to_thread(main, words)

    assert asyncio.run(run()) == 2
    error = capsys.readouterr().err
    assert "the server speaks protocol 3.0.0, the recording is of 3.6.1" in error


@pytest.mark.upstream
@pytest.mark.parametrize("version", ["7.0.0", "6.0.0", "5.1.0", "5.0.0"])
def test_llama_cpps_server_answers_as_ours_did(version: str, tmp_path: Path) -> None:
    build = upstream.DIALECT_BUILDS[version]
    with running_upstream(tmp_path / "log", "-t", "1", build=build) as server:
        player = Player(server.host, server.port, tolerance=1e-4, timeout=PATIENCE)
        result = asyncio.run(player.play(path_of(f"llama-{version}")))
    assert result.differences == []
    # Computed, not echoed.
    assert result.worst_nmse > 0


@pytest.mark.upstream
def test_llama_cpps_server_answers_as_it_did(tmp_path: Path) -> None:
    with running_upstream(tmp_path / "log", "-t", "1") as server:
        player = Player(server.host, server.port, tolerance=1e-4, timeout=PATIENCE)
        result = asyncio.run(player.play(path_of("upstream-7.0.0")))
    assert result.differences == []
