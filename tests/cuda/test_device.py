"""The CUDA device through the real server, on the stand-in for CuPy and the emulated card."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.backend import Backend
from protocol.commands import Command
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from protocol.split import VERSION, caps_version, split_caps
from tests.cuda import emulation
from tests.server.process import tensor
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens
from tools.wire import Wire

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

MIB = 1 << 20
F32 = GgmlType.F32


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def port(cache: Path) -> Iterator[int]:
    chosen = free_port()
    options = ("--cache-dir", str(cache), "--log-level", "debug")
    command = [sys.executable, "-m", "tests.cuda.serve", "--port", str(chosen), *options]
    with Process(command) as server:
        server.wait_until(lambda: listens(chosen), 60, "its port")
        yield chosen


@pytest.fixture
def wire(port: int) -> Iterator[Wire]:
    with Wire(port) as connection:
        yield connection


def test_the_card_is_the_default_device(wire: Wire) -> None:
    """Memory is the card's, to the byte."""
    before = wire.call(Command.GET_DEVICE_MEMORY, {"device": 0})
    handle, _ = wire.alloc(3 * MIB + 5)
    after = wire.call(Command.GET_DEVICE_MEMORY, {"device": 0})
    assert before.total_mem == 4 << 30
    assert before.free_mem - after.free_mem == 3 * MIB + 5
    wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})
    assert wire.call(Command.GET_DEVICE_MEMORY, {"device": 0}).free_mem == before.free_mem


def test_new_memory_is_zero_and_too_much_is_refused(wire: Wire) -> None:
    handle, base = wire.alloc(1000)
    assert wire.get_tensor(tensor(1, (250,), handle, base), 1000) == bytes(1000)
    with pytest.raises(MemoryError):
        wire.alloc(5 << 30)


def test_bytes_come_back_through_pinned_memory(wire: Wire) -> None:
    """More than two chunks; then parts of it, filled, cleared, and copied to another buffer."""
    size = 10 * MIB + 12
    data = np.random.default_rng(3).integers(0, 256, size, np.uint8).tobytes()
    handle, base = wire.alloc(size)
    t = tensor(1, (size // 4,), handle, base)
    wire.set_tensor(t, data)
    assert wire.get_tensor(t, size) == data
    assert wire.get_tensor(t, 7, 5 * MIB + 1) == data[5 * MIB + 1 : 5 * MIB + 8]
    other, place = wire.alloc(size)
    copy = tensor(2, (size // 4,), other, place)
    assert wire.call(Command.COPY_TENSOR, {"src": t, "dst": copy}).result == 1
    wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 7})
    assert wire.get_tensor(t, size) == bytes([7]) * size
    assert wire.get_tensor(copy, size) == data


def test_uploads_one_after_the_other_keep_apart(wire: Wire) -> None:
    """Small ones share pinned chunks: none is written over before the card has copied it."""
    handle, base = wire.alloc(64 * 256)
    for i in range(64):
        wire.set_tensor(tensor(1, (64,), handle, base + 256 * i), bytes([i]) * 256)
    whole = wire.get_tensor(tensor(1, (64 * 64,), handle, base), 64 * 256)
    assert whole == b"".join(bytes([i]) * 256 for i in range(64))


def test_the_cache_fills_the_card(wire: Wire, cache: Path) -> None:
    data = np.random.default_rng(4).integers(0, 256, 11 * MIB, np.uint8).tobytes()
    handle, base = wire.alloc(len(data))
    t = tensor(1, (len(data) // 4,), handle, base)
    fields = {"tensor": t, "offset": 0, "hash": fnv1a_64(data)}
    assert wire.call(Command.SET_TENSOR_HASH, fields).result == 0
    wire.call(Command.SET_TENSOR, {"tensor": t, "offset": 0, "cache_flag": 1}, data)
    wire.get_tensor(t, 4)
    assert (cache / f"{fnv1a_64(data):016x}").read_bytes() == data
    wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 0})
    assert wire.call(Command.SET_TENSOR_HASH, fields).result == 1
    assert wire.get_tensor(t, len(data)) == data


async def test_a_graph_that_is_run_again_is_captured(port: int) -> None:
    """Three runs with new inputs: the first by launches, the others as one captured graph."""
    async with Backend.connect("127.0.0.1", port) as backend:
        x = await backend.tensor(F32, (64, 2))
        w = await backend.tensor(GgmlType.F16, (64, 8), np.ones((8, 64), np.float16))
        y = backend.graph.mul_mat(w, backend.graph.sqr(x))
        plan = await backend.prepare(y)
        for value in (1.0, 2.0, 3.0):
            await backend.upload(x, np.full((2, 64), value, np.float32))
            await plan.run()
            result = np.asarray(await backend.download(y)).ravel()
            np.testing.assert_array_equal(result, np.full(16, 64 * value * value, np.float32))


def test_the_split_extension_is_offered(port: int) -> None:
    """How it is kept is seen in test_program.py."""
    with Wire(port, hello=False) as connection:
        connection.send(Command.HELLO, split_caps())
        answer = connection.answer(Command.HELLO)
    assert caps_version(bytes(answer.conn_caps)) == VERSION


def test_without_a_gpu_the_reason_is_one_line() -> None:
    """Where CuPy is missing, or has no GPU to use."""
    command = [sys.executable, "-m", "rpc_server", "--port", "0", "--device", "cuda"]
    with Process(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}) as server:
        assert server.child.wait(60) == 1
        (line,) = [x for x in server.log.splitlines() if x]
    assert line.startswith("error: unknown device 'cuda' (")
    assert "this machine has: CPU" in line
