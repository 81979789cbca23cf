"""What takes one client long holds nobody else: memory is filled in pieces, requests take turns."""

from __future__ import annotations

import functools
import select
import threading
from typing import Any

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.split import ProgramStep, encode_program, split_caps, with_split
from rpc_server import turns
from rpc_server.devices.cpu.storage import HostStorage
from tests.server.clients import Bystander
from tests.server.process import ServerProcess, Wire, tensor

# -- pieces


@pytest.mark.parametrize("backwards", [False, True])
def test_pieces_are_all_of_it_one_after_the_other(backwards: bool) -> None:
    size = 3 * turns.PIECE + 5
    seen: list[tuple[int, int]] = []
    turns.in_pieces(lambda at, n: seen.append((at, n)), size, backwards=backwards).result()
    whole = [(number * turns.PIECE, turns.PIECE) for number in range(3)]
    assert sorted(seen) == [*whole, (3 * turns.PIECE, 5)]
    assert seen == sorted(seen, reverse=backwards)


def test_nothing_is_done_of_no_bytes() -> None:
    turns.in_pieces(lambda at, n: pytest.fail(f"{n} bytes at {at}"), 0).result()


def test_work_that_nobody_wants_any_more_ends() -> None:
    seen: list[int] = []
    wanted = turns.in_pieces(
        lambda at, n: seen.append(at), 9 * turns.PIECE, wanted=lambda: len(seen) < 2
    )
    wanted.result()
    assert len(seen) == 2


def test_what_a_piece_raises_ends_the_work() -> None:
    def work(at: int, n: int) -> None:
        if at:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        turns.in_pieces(work, 3 * turns.PIECE).result()


def test_pieces_of_several_take_turns() -> None:
    """Neither waits for all of the other."""
    order: list[str] = []
    gate = threading.Event()

    def hold(at: int, n: int) -> None:
        gate.wait()

    def note(name: str, at: int, n: int) -> None:
        order.append(name)

    turns.in_pieces(hold, 1)
    works = [turns.in_pieces(functools.partial(note, name), 3 * turns.PIECE) for name in ("a", "b")]
    gate.set()
    for work in works:
        work.result()
    assert order == ["a", "b", "a", "b", "a", "b"]


# -- host memory


@pytest.mark.parametrize("value", [0, 7])
@pytest.mark.parametrize(
    ("start", "size"),
    [(0, 4 << 20), (1, (4 << 20) - 1), (4095, 2 << 20), (5000, 3000), (100, 0), (4096, 1 << 20)],
)
def test_fill_changes_these_bytes_alone(start: int, size: int, value: int) -> None:
    storage = HostStorage(4 << 20)
    view = np.frombuffer(storage.view(0, storage.size), np.uint8)
    view[:] = 3
    storage.fill(start, size, value)
    expected = np.full(storage.size, 3, np.uint8)
    expected[start : start + size] = value
    assert np.array_equal(view, expected)


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, 20 << 20, np.uint8)


@pytest.mark.parametrize(("source", "target"), [(0, 5 << 20), (5 << 20, 0), (0, 1), (1, 0)])
def test_copies_that_overlap_arrive_whole(
    server: ServerProcess, content: np.ndarray, source: int, target: int
) -> None:
    size = 15 << 20
    with Wire(server.port) as wire:
        handle, base = wire.alloc(len(content))
        whole = tensor(1, (len(content) // 4,), handle, base)
        wire.set_tensor(whole, content.tobytes())
        part = [tensor(2, (size // 4,), handle, base + at) for at in (source, target)]
        assert wire.call(Command.COPY_TENSOR, {"src": part[0], "dst": part[1]}).result == 1
        expected = content.copy()
        expected[target : target + size] = content[source : source + size]
        assert wire.get_tensor(whole, len(content)) == expected.tobytes()


# -- others meanwhile


def _post(wire: Wire, command: Command, fields: dict[str, Any], body: bytes = b"") -> None:
    """Send a request and don't wait for its answer."""
    wire.send(command, codec(wire.dialect.commands[command].request).build(fields), body)


def _waiting(wire: Wire) -> bool:
    """Whether the server has not answered yet."""
    return not select.select([wire.socket], [], [], 0)[0]


@pytest.mark.parametrize("what", ["clear", "memset", "copy"])
def test_others_are_served_while_one_fills_gigabytes(server: ServerProcess, what: str) -> None:
    size, times = 256 << 20, 60
    with Bystander(server) as bystander, Wire(server.port) as wire:
        handle, base = wire.alloc(2 * size)
        first = tensor(1, (size // 4,), handle, base)
        second = tensor(1, (size // 4,), handle, base + size)
        requests: dict[str, tuple[Command, dict[str, Any]]] = {
            "clear": (Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 1}),
            "memset": (
                Command.MEMSET_TENSOR,
                {"tensor": first, "offset": 0, "size": size, "value": 1},
            ),
            "copy": (Command.COPY_TENSOR, {"src": first, "dst": second}),
        }
        for _ in range(times):
            _post(wire, *requests[what])
        _post(wire, Command.GET_TENSOR, {"tensor": first, "offset": 0, "size": 4})
        for _ in range(3):
            bystander.check()
            with Wire(server.port) as other:
                other.call(Command.GET_DEVICE_MEMORY, {"device": 0})
        assert what == "copy" or _waiting(wire), "too little work to see anything by"
    server.wait_for(r"disconnected; freed 1 buffers, 512\.0 MiB")


def test_memory_of_one_that_left_is_there_for_the_next(server: ServerProcess) -> None:
    """Though it goes back in pieces: who asks meanwhile waits for it."""
    with Wire(server.port) as wire:
        free = wire.call(Command.GET_DEVICE_MEMORY, {"device": 0}).total_mem
    size = free * 6 // 10
    for _ in range(4):
        with Wire(server.port) as wire:
            handle, base = wire.alloc(size)
            part = tensor(1, (64 << 20,), handle, base)
            _post(
                wire,
                Command.MEMSET_TENSOR,
                {"tensor": part, "offset": 0, "size": 1 << 28, "value": 1},
            )


def test_a_program_of_nothing_but_steps_is_refused(server: ServerProcess) -> None:
    body = encode_program([ProgramStep((), (), ())] * 200_000, np.zeros(0))
    dialect = with_split(DIALECTS[0])
    with Bystander(server), Wire(server.port, dialect, hello=False) as wire:
        wire.send(Command.HELLO, split_caps())
        wire.answer(Command.HELLO)
        _post(wire, Command.SPLIT_PROGRAM, {"device": 0, "program": 0}, body)
        server.wait_for(r"a program of 200000 steps, the limit is 131072 \(--max-graph-nodes\)")
