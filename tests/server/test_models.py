"""A server with --models, as its clients see it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protocol.commands import Command
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from rpc_server.cache.store import TensorCache
from tests.client.test_gguf_file import write
from tests.cuda import emulation
from tests.server.process import ServerProcess, Wire, running, tensor
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens

MIB = 1 << 20
# More than two chunks of a card's pinned pair, and no whole number of pages.
SIZE = 9 * MIB + 1236


def write_model(path: Path, seed: int = 1) -> bytes:
    """Write a file whose tensor 'w' has these bytes, behind another that shifts it."""
    data = np.random.default_rng(seed).bytes(SIZE)
    write(path, {"v": (GgmlType.I8, (40,), bytes(40)), "w": (GgmlType.I8, (SIZE,), data)})
    return data


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An index of this test's own; kernels are those that there are."""
    kernels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ggml-rpc-server"
    own = tmp_path / "caches" / "ggml-rpc-server"
    own.mkdir(parents=True, mode=0o700)
    for folder in kernels.glob("kernels-*"):
        (own / folder.name).symlink_to(folder)
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "caches")}


def indexed(server: Process, path: Path, times: int = 1) -> None:
    """Wait until the server has said so often that it has indexed a file."""
    line = rf"(?s)(?:{re.escape(str(path))}: \d+ tensors.*){{{times}}}"
    server.wait_for(line)


def offer(wire: Wire, data: bytes, expected: int) -> None:
    """Offer a tensor by its hash; where it is there it has to have the right bytes."""
    handle, base = wire.alloc(len(data) + 256)
    t = tensor(1, (len(data) // 4,), handle, base)
    fields = {"tensor": t, "offset": 0, "hash": fnv1a_64(data)}
    assert wire.call(Command.SET_TENSOR_HASH, fields).result == expected
    if expected:
        assert wire.get_tensor(t, len(data)) == data
    wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})


@pytest.fixture
def server(tmp_path: Path, environment: dict[str, str]) -> Iterator[ServerProcess]:
    folder = tmp_path / "models"
    folder.mkdir()
    write_model(folder / "m.gguf")
    with running("--models", str(folder), "--threads", "1", env=environment) as started:
        yield started
        assert started.alive


def test_a_model_on_disk_is_not_sent(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "models" / "m.gguf"
    data = write_model(tmp_path / "same.gguf")
    assert str(tmp_path / "models") in server.log
    indexed(server, path)
    with Wire(server.port) as wire:
        offer(wire, data, 1)
        offer(wire, data[:-4], 0)
        # Of a part of a tensor the client may have the hash too.
        handle, base = wire.alloc(SIZE + 4)
        longer = tensor(1, (SIZE // 4 + 1,), handle, base)
        fields = {"tensor": longer, "offset": 4, "hash": fnv1a_64(data)}
        assert wire.call(Command.SET_TENSOR_HASH, fields).result == 1
        assert wire.get_tensor(longer, SIZE, 4) == data
    # Another content takes its place, while the server runs.
    new = write_model(tmp_path / "new", seed=2)
    os.replace(tmp_path / "new", path)
    indexed(server, path, times=2)
    with Wire(server.port) as wire:
        offer(wire, data, 0)
        offer(wire, new, 1)
        # The file is cut short under the server's hands.
        os.truncate(path, SIZE // 2)
        offer(wire, new, 0)
        server.wait_for("it is cut short")
        path.unlink()
        offer(wire, new, 0)


def test_uploads_under_the_same_hash_replace_nothing(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """The cache has another content under the hash of the operator's: it is not what is served."""
    path = tmp_path / "m.gguf"
    data = write_model(path)
    cache = tmp_path / "cache"
    other = bytes(SIZE)
    # As a client would that made two contents of one hash.
    TensorCache(cache, lambda content, value=0: fnv1a_64(data)).store(memoryview(other))
    assert [p.read_bytes() for p in cache.iterdir() if p.is_file()] == [other]
    options = ("--models", str(path), "--cache-dir", str(cache), "--threads", "1")
    with running(*options, env=environment) as server:
        indexed(server, path)
        with Wire(server.port) as wire:
            offer(wire, data, 1)


@pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)
def test_a_model_goes_from_disk_to_the_card(tmp_path: Path, environment: dict[str, str]) -> None:
    path, port = tmp_path / "m.gguf", free_port()
    data = write_model(path)
    options = ("--port", str(port), "--models", str(path))
    command = [sys.executable, "-m", "tests.cuda.serve", *options]
    with Process(command, env={**environment, "EMULATION": "fast"}) as server:
        server.wait_until(lambda: listens(port), 60, "its port")
        indexed(server, path)
        with Wire(port) as wire:
            offer(wire, data, 1)
        assert server.alive


def test_a_path_that_is_not_there_is_a_wrong_option(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rpc_server", "--models", str(tmp_path / "missing")]
    with Process(command) as server:
        server.wait_for("there is no file or folder")
