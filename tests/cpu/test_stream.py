"""Kernels that wait for a socket: whoever waits beside busy threads sleeps instead of trying."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from rpc_server.devices.cpu.catalog import stream_receive
from rpc_server.devices.cpu.executor import Executor, RecordProgram
from rpc_server.devices.cpu.kernels.interface.stream import (
    SLEEPS_UNTIL,
    STAGING_BYTES,
    StreamPeer,
)
from rpc_server.devices.cpu.kernels.intrinsics import RECORD_WORDS
from rpc_server.devices.cpu.turns import PauseWord
from rpc_server.native.folder import Folder
from rpc_server.native.library import Library

_SIZE = 1000
_FIRST_EXTRA = 128
# One wait is enough on most machines, where the scheduler gives the core away at the first try.
_MOST_WAITS = 200


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Address of the kernel that receives."""
    library = Library(Folder(tmp_path_factory.mktemp("kernels"), "0"), 2)
    library.request([stream_receive])
    yield library.address(stream_receive)
    library.close()


class _Receiving:
    """A plan of one step that receives ``_SIZE`` bytes."""

    def __init__(self, kernel: int) -> None:
        self.near, self.far = socket.socketpair()
        self.peer = StreamPeer("somebody", 20)
        self.received = np.zeros(_SIZE, np.uint8)
        self._pause = PauseWord()
        words = [self.peer.stream.address, 0, self.received.ctypes.data, _SIZE, 1, _SIZE]
        words += [self.peer.staging_address, STAGING_BYTES, self._pause.address]
        record = np.zeros(RECORD_WORDS, np.int64)
        record[_FIRST_EXTRA : _FIRST_EXTRA + len(words)] = words
        self._program = RecordProgram([kernel], [record])
        self._executor = Executor(1, self._pause)

    def run(self, data: bytes, delay: float) -> None:
        """Receive ``data``, which comes after ``delay`` seconds."""
        self.peer.stream.open(self.near.fileno())
        sending = threading.Timer(delay, self.far.sendall, (data,))
        sending.start()
        try:
            assert self._executor.run(self._program) == (0, -1)
        finally:
            sending.join()
        assert self.received.tobytes() == data

    def close(self) -> None:
        self._executor.close()
        self.near.close()
        self.far.close()


@pytest.fixture
def receiving(kernel: int) -> Iterator[_Receiving]:
    with contextlib.closing(_Receiving(kernel)) as made:
        yield made


@contextlib.contextmanager
def _on_a_core_with_others() -> Iterator[None]:
    """Stay on one core, where another process computes all the time."""
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    busy = (
        "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\n"
        "print(flush=True)\nwhile True: pass"
    )
    with subprocess.Popen([sys.executable, "-c", busy, str(core)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            os.sched_setaffinity(0, {core})
            yield
        finally:
            os.sched_setaffinity(0, allowed)
            other.kill()


def test_beside_busy_threads_it_sleeps_for_a_while(receiving: _Receiving) -> None:
    stream = receiving.peer.stream
    with _on_a_core_with_others():
        for number in range(_MOST_WAITS):
            receiving.run(bytes([number % 256]) * _SIZE, 0.002)
            if stream.count(SLEEPS_UNTIL):
                break
    # It was sent to sleep for a while, not for good.
    assert 0 < stream.count(SLEEPS_UNTIL) < time.monotonic_ns() + 1_000_000_000


def test_what_sleeps_at_once_receives_all(receiving: _Receiving) -> None:
    receiving.peer.stream._words[SLEEPS_UNTIL] = time.monotonic_ns() + 60_000_000_000
    for number in range(5):
        receiving.run(bytes([number]) * _SIZE, 0.01)
