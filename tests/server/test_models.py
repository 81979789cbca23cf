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
from rpc_server.models.files import held, open_file
from tests.client.test_gguf_file import write
from tests.cuda import emulation
from tests.server.process import ServerProcess, Wire, running, sources, tensor
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens

MIB = 1 << 20
# The index is made with a low priority: on a busy machine it waits for everybody.
_PATIENCE = 240.0
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
    server.wait_for(line, _PATIENCE)


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


@pytest.mark.slow
def test_a_model_on_disk_is_not_sent(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "models" / "m.gguf"
    data = write_model(tmp_path / "same.gguf")
    server.wait_for(rf"models +: [^\n]*{re.escape(str(tmp_path / 'models'))}")
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
        server.wait_for("it is cut short", _PATIENCE)
        path.unlink()
        offer(wire, new, 0)


def test_a_load_by_hashes_is_told_in_one_line(server: ServerProcess, tmp_path: Path) -> None:
    """The first weight of a file is mapped on a thread, those behind it at once."""
    data = write_model(tmp_path / "same.gguf")
    indexed(server, tmp_path / "models" / "m.gguf")
    with Wire(server.port) as wire:
        handle, base = wire.alloc(3 * 10 * MIB)
        weights = [tensor(1 + i, (SIZE // 4,), handle, base + i * 10 * MIB) for i in range(3)]
        for t in weights:
            fields = {"tensor": t, "offset": 0, "hash": fnv1a_64(data)}
            assert wire.call(Command.SET_TENSOR_HASH, fields).result == 1
        assert [wire.get_tensor(t, SIZE) for t in weights] == [data] * 3
    server.wait_for(r"3 tensors, 27\.0 MiB in [^\n]*, 27\.0 MiB of it from the cache", _PATIENCE)


@pytest.mark.slow
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


def shared_pages(server: ServerProcess, path: Path) -> dict[str, int]:
    """Kilobytes of all that a server has mapped of a file, as /proc/PID/smaps names them."""
    found: dict[str, int] = {}
    ours = False
    for line in Path(f"/proc/{server.child.pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = line.endswith(str(path))
        elif ours and words[-1] == "kB":
            found[words[0][:-1]] = found.get(words[0][:-1], 0) + int(words[1])
    return found


class Doubler:
    """A client that computes w + w over a weight that it has offered by its hash."""

    def __init__(self, wire: Wire, data: bytes) -> None:
        self.wire, self.data = wire, data
        n = len(data) // 4
        self.handle, base = wire.alloc(len(data) + 4096)
        out, at = wire.alloc(len(data))
        self.weight = tensor(1, (n,), self.handle, base + 1024)
        fields = {"tensor": self.weight, "offset": 0, "hash": fnv1a_64(data)}
        assert wire.call(Command.SET_TENSOR_HASH, fields).result == 1
        self.sum = tensor(2, (n,), out, at, op=wire.op("ADD"), src=sources(1, 1))
        # In place, as a graph that changes its weights.
        self.scaled = {**self.weight, "id": 3, "op": wire.op("SCALE"), "src": sources(1)}
        half = int(np.float32(0.5).view(np.int32))
        self.scaled["op_params"] = [half, *[0] * 15]

    def doubled(self, *, again: bool = False) -> bytes:
        """Compute, by a new graph or the last one ``again``; the result."""
        if again:
            self.wire.call(Command.GRAPH_RECOMPUTE, {"device": 0})
        else:
            self.wire.compute([self.sum], [self.weight])
        return self.wire.get_tensor(self.sum, len(self.data))


def numbers(path: Path) -> bytes:
    """Write a file with a tensor of sound numbers, and return their bytes."""
    values = np.random.default_rng(4).standard_normal(SIZE // 4).astype("<f4")
    data = values.tobytes()
    first, whole = (GgmlType.F32, (10,), bytes(40)), (GgmlType.F32, (len(values),), data)
    write(path, {"v": first, "w": whole})
    return data


@pytest.fixture
def mapping(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[ServerProcess, Path]]:
    """A server with a model that it can map, indexed."""
    path = tmp_path / "m.gguf"
    numbers(path)
    with open_file(path) as file, held(file) as hold:
        if hold is None:
            pytest.skip("files of this file system can't be held, so nothing is mapped")
    with running("--models", str(path), "--threads", "1", env=environment) as server:
        indexed(server, path)
        yield server, path
        assert server.alive


@pytest.mark.slow
def test_clients_compute_with_the_same_pages(mapping: tuple[ServerProcess, Path]) -> None:
    server, path = mapping
    data = numbers(path.with_name("same.gguf"))
    twice = (2 * np.frombuffer(data, "<f4")).tobytes()
    with Wire(server.port) as a, Wire(server.port) as b:
        first = Doubler(a, data)
        assert first.doubled() == twice
        second = Doubler(b, data)
        assert second.doubled() == twice
        pages = shared_pages(server, path)
        # Each has all of it, as pages of the file, and the two share them: half counts for each.
        assert pages["Rss"] >= 2 * (SIZE >> 10)
        assert pages["Anonymous"] == 0
        assert pages["Pss"] <= 1.05 * (SIZE >> 10)
        # What one client writes to its weight is its own.
        a.compute([first.scaled], [first.weight])
        assert first.doubled() == data
        assert second.doubled() == twice
    assert path.read_bytes() == path.with_name("same.gguf").read_bytes()


@pytest.mark.slow
def test_a_copy_of_a_weight_is_a_clients_own(tmp_path: Path, environment: dict[str, str]) -> None:
    """With --no-mmap nothing of the file is mapped, and clients notice no difference."""
    path = tmp_path / "m.gguf"
    data = numbers(path)
    options = ("--models", str(path), "--no-mmap", "--threads", "1")
    with running(*options, env=environment) as server:
        indexed(server, path)
        with Wire(server.port) as wire:
            client = Doubler(wire, data)
            assert client.doubled() == (2 * np.frombuffer(data, "<f4")).tobytes()
            assert not shared_pages(server, path)
            # Whoever changes the file has nobody to wait for.
            os.truncate(path, 100)
            assert wire.get_tensor(client.weight, SIZE) == data
        assert "is about to be written to" not in server.log


@pytest.mark.slow
def test_a_file_that_is_cut_short_hurts_no_client(mapping: tuple[ServerProcess, Path]) -> None:
    server, path = mapping
    data = numbers(path.with_name("same.gguf"))
    twice = (2 * np.frombuffer(data, "<f4")).tobytes()
    with Wire(server.port) as wire:
        client = Doubler(wire, data)
        assert client.doubled() == twice
        # Waits until the server has its own copy.
        os.truncate(path, 100)
        assert client.doubled(again=True) == twice
        assert client.doubled() == twice
        assert wire.get_tensor(client.weight, SIZE) == data
        server.wait_for("is about to be written to")
    with Wire(server.port) as wire:
        offer(wire, data, 0)


@pytest.mark.slow
def test_what_lies_over_the_edge_of_a_weight_is_right(mapping: tuple[ServerProcess, Path]) -> None:
    server, path = mapping
    data = numbers(path.with_name("same.gguf"))
    with Wire(server.port) as wire:
        client = Doubler(wire, data)
        assert client.doubled() == (2 * np.frombuffer(data, "<f4")).tobytes()
        # 100 numbers before it, and 100 of it.
        over = tensor(4, (200,), client.handle, client.weight["data"] - 400)
        out, at = wire.alloc(800)
        result = tensor(5, (200,), out, at, op=wire.op("ADD"), src=sources(4, 4))
        wire.compute([result], [over])
        expected = bytes(400) + (2 * np.frombuffer(data[:400], "<f4")).tobytes()
        assert wire.get_tensor(result, 800) == expected
        # The same graph as at first; where the weight is has changed meanwhile.
        wire.call(Command.MEMSET_TENSOR, {"tensor": over, "offset": 0, "size": 800, "value": 0})
        expected = bytes(400) + (2 * np.frombuffer(data[400:], "<f4")).tobytes()
        assert client.doubled() == expected


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
