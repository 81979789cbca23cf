"""Weights that are mapped: shared until one is written to, whatever happens to their files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.mapped import MappedStorage
from rpc_server.models.files import held, open_file
from rpc_server.models.library import Models
from rpc_server.models.mapping import Mappings
from tests.client.test_gguf_file import write
from tests.models.conftest import Indexer, settle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux only")

SIZE = 300_000
START = 70_001


class Client:
    """An owner that runs no graphs, and says what became of it."""

    def __init__(self) -> None:
        self.lost = ""
        self.moves = 0
        self.leave: Callable[[], None] = lambda: None

    def quietly(self, work: Callable[[], None]) -> None:
        work()

    def lose(self, reason: str) -> None:
        self.lost = reason
        self.leave()

    def moved(self) -> None:
        self.moves += 1


class Site:
    """A file with two tensors, its index, and what is mapped of it."""

    def __init__(self, folder: Path, indexer: Indexer, available: int = 1 << 40) -> None:
        self.path = folder / "m.gguf"
        random = np.random.default_rng(9)
        self.data = [random.bytes(SIZE), random.bytes(SIZE)]
        tensors = {f"t{i}": (GgmlType.I8, (SIZE,), d) for i, d in enumerate(self.data)}
        settle(write(self.path, tensors))
        self.models: Models = indexer(self.path)
        self.mappings = Mappings(available=lambda: available)
        self.client = Client()

    def storage(self, which: int = 0, start: int = START) -> MappedStorage:
        """A buffer of zeros, with one of the tensors laid over it."""
        storage = MappedStorage(SIZE + 200_000)
        assert self.map(storage, which, start)
        return storage

    def map(self, storage: MappedStorage, which: int, start: int) -> bool:
        data = self.data[which]
        with self.models.open(fnv1a_64(data), SIZE) as content:
            assert content is not None
            client = self.client
            return storage.map(start, content, self.mappings, client, client.moved)


@pytest.fixture
def site(tmp_path: Path, indexer: Indexer) -> Iterator[Site]:
    made = Site(tmp_path, indexer)
    with open_file(made.path) as file, held(file) as hold:
        if hold is None:
            pytest.skip("files of this file system can't be held")
    yield made
    made.mappings.close()


def content(storage: MappedStorage, offset: int = START, size: int = SIZE) -> bytes:
    return bytes(storage.view(offset, size))


def test_a_file_is_held_as_long_as_something_of_it_is_mapped(site: Site) -> None:
    with site.models.open(fnv1a_64(site.data[0]), SIZE) as of_file:
        assert of_file is not None
        assert not site.mappings.holds(of_file)
        first, second = site.storage(0), site.storage(1)
        for storage in (first, second):
            assert site.mappings.holds(of_file)
            storage.close()
        assert not site.mappings.holds(of_file)


def pages(path: Path) -> dict[str, int]:
    """Kilobytes of all mappings of a file in this process, as /proc/self/smaps names them."""
    found: dict[str, int] = {}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            ours = line.endswith(str(path))
        elif ours and words[-1] == "kB":
            found[words[0][:-1]] = found.get(words[0][:-1], 0) + int(words[1])
    return found


def test_a_weight_is_read_where_the_file_is(site: Site) -> None:
    storage = site.storage()
    assert content(storage) == site.data[0]
    assert content(storage, START + 5000, 100) == site.data[0][5000:5100]
    mapped = pages(site.path)
    assert mapped["Size"] * 1024 >= SIZE
    assert mapped["Anonymous"] == 0
    # The buffer's own pages are untouched.
    assert site.client.moves == 0
    storage.close()
    assert not pages(site.path)


def resident(path: Path) -> int:
    return pages(path).get("Rss", 0) * 1024


def test_a_weight_is_brought_in_before_somebody_reads_it(site: Site) -> None:
    # Another may be closed before its turn has come.
    site.storage(1).close()
    storage = site.storage()
    for _ in range(6000):
        if resident(site.path) >= SIZE:
            break
        time.sleep(0.01)
    else:
        pytest.fail(f"{resident(site.path)} of {SIZE} bytes are there after a minute")
    storage.close()


def test_a_weight_is_not_brought_in_where_memory_is_short(site: Site) -> None:
    asked = threading.Event()

    def available() -> int:
        asked.set()
        return SIZE

    site.mappings = Mappings(available=available)
    storage = site.storage()
    assert asked.wait(60)
    # Waits until what was begun is done.
    site.mappings.close()
    assert resident(site.path) == 0
    assert content(storage) == site.data[0]
    storage.close()


def test_clients_share_a_weight_until_one_writes_to_it(site: Site) -> None:
    one, two = site.storage(), site.storage()
    assert content(one) == content(two) == site.data[0]
    assert pages(site.path)["Anonymous"] == 0
    # As a graph does that computes into its weights.
    address = one.overlays[0].address
    np.frombuffer(one.view(START, SIZE), np.uint8)[:10] = 7
    assert one.overlays[0].address == address
    assert content(one) == bytes([7] * 10) + site.data[0][10:]
    assert content(two) == site.data[0]
    assert site.path.read_bytes().find(site.data[0]) > 0, "the file is as it was"
    assert 0 < pages(site.path)["Anonymous"] <= 8
    one.close()
    two.close()


def test_what_clients_write_stays_in_place(site: Site) -> None:
    """Uploads, fills and copies: inside of a weight, over it, over its edges."""
    model = bytearray(SIZE + 200_000)
    storage = site.storage()
    model[START : START + SIZE] = site.data[0]

    def agree() -> None:
        assert content(storage, 0, len(model)) == bytes(model)

    storage.place(START + 4000, 50)[:] = b"p" * 50
    model[START + 4000 : START + 4050] = b"p" * 50
    storage.fill(START + 9000, 60, 3)
    model[START + 9000 : START + 9060] = bytes([3]) * 60
    storage.copy_from(storage, START + 4000, START + 20_000, 50)
    model[START + 20_000 : START + 20_050] = b"p" * 50
    assert len(storage.overlays) == 1
    assert site.client.moves == 0
    assert content(storage) == model[START : START + SIZE]
    storage.fill(START - 100, 200, 9)
    model[START - 100 : START + 100] = bytes([9]) * 200
    assert not storage.overlays
    assert site.client.moves == 1, "plans for the old address are out of date"
    agree()
    storage.close()


def test_a_range_over_the_edge_is_read_from_both_sides(site: Site) -> None:
    storage = site.storage()
    assert content(storage, START - 10, 20) == bytes(10) + site.data[0][:10]
    assert site.client.moves == 1
    assert content(storage) == site.data[0]
    storage.close()


def test_a_whole_upload_over_a_weight_needs_no_copy_of_it(site: Site) -> None:
    storage = site.storage()
    storage.place(0, SIZE + 200_000)[:] = bytes([5]) * (SIZE + 200_000)
    assert content(storage) == bytes([5]) * SIZE
    storage.close()


def test_copies_between_buffers_find_the_weight(site: Site) -> None:
    storage, other = site.storage(), MappedStorage(SIZE)
    other.copy_from(storage, START, 0, SIZE)
    assert content(other, 0) == site.data[0]
    storage.close()
    other.close()


def test_two_weights_do_not_lie_over_one_another(site: Site) -> None:
    storage = MappedStorage(2 * SIZE + 100)
    assert site.map(storage, 0, 50)
    assert not site.map(storage, 1, 58)
    assert site.map(storage, 1, 50 + SIZE)
    assert content(storage, 50) == site.data[0]
    assert content(storage, 50 + SIZE) == site.data[1]
    storage.close()


def test_a_weight_lies_inside_of_its_buffer(site: Site) -> None:
    """What is behind the buffer is memory of somebody else."""
    storage = MappedStorage(SIZE + 10)
    assert not site.map(storage, 0, -1)
    assert not site.map(storage, 0, 11)
    assert site.map(storage, 0, 10)
    storage.close()


# -- files that change


def writer(code: str, path: Path) -> subprocess.Popen[bytes]:
    """Another process that does something to a file."""
    return subprocess.Popen([sys.executable, "-c", f"path = {str(path)!r}\n{code}"])


CHANGES = {
    "cut short": "open(path, 'r+b').truncate(100)",
    "emptied": "open(path, 'wb')",
    "written to": "f = open(path, 'r+b'); f.seek(-400000, 2); f.write(b'x' * 390000)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_leaves_weights_as_they_were(change: str, site: Site) -> None:
    storages = [site.storage(i, START + i) for i in (0, 1)]
    # Some of it was written to: that stays too.
    storages[0].view(START, 4)[:] = b"mine"
    addresses = [s.overlays[0].address for s in storages]
    process = writer(CHANGES[change], site.path)
    assert process.wait(60) == 0, "the writer goes on"
    assert content(storages[0]) == b"mine" + site.data[0][4:]
    assert content(storages[1], START + 1) == site.data[1]
    assert [s.overlays[0].address for s in storages] == addresses, "plans are as good as before"
    assert site.client.moves == 0
    assert not pages(site.path)
    assert not site.client.lost
    for storage in storages:
        storage.close()


def test_readers_see_the_same_bytes_all_the_time(site: Site) -> None:
    storage = site.storage()
    overlay = storage.overlays[0]
    wanted = np.frombuffer(site.data[0], np.uint8)
    done, wrong = threading.Event(), []

    def read() -> None:
        view = np.frombuffer(storage.view(START, SIZE), np.uint8)
        while not done.is_set():
            if not np.array_equal(view, wanted):
                wrong.append("other bytes")
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert writer(CHANGES["emptied"], site.path).wait(60) == 0
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert overlay.tensor.owned
    storage.close()


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_file_that_loses_its_name_stays_mapped(change: str, site: Site) -> None:
    storage = site.storage()
    if change == "deleted":
        site.path.unlink()
    else:
        write(site.path.with_name("new"), {"t": (GgmlType.I8, (4,), b"abcd")})
        os.replace(site.path.with_name("new"), site.path)
    assert content(storage) == site.data[0]
    assert not storage.overlays[0].tensor.owned
    storage.close()


def test_without_memory_for_a_copy_the_client_goes(tmp_path: Path, indexer: Indexer) -> None:
    site = Site(tmp_path, indexer, available=1000)
    with open_file(site.path) as file, held(file) as hold:
        if hold is None:
            pytest.skip("files of this file system can't be held")
    storage = site.storage()
    site.client.leave = storage.close
    assert writer(CHANGES["emptied"], site.path).wait(60) == 0
    assert "is being written to, and there is no memory for a copy" in site.client.lost
    site.mappings.close()


def test_a_file_open_for_writing_is_not_mapped(site: Site) -> None:
    storage = MappedStorage(SIZE)
    with site.path.open("r+b"):
        assert not site.map(storage, 0, 0)
    assert site.map(storage, 0, 0)
    storage.close()


def test_a_file_can_be_written_to_when_nothing_is_mapped_any_more(site: Site) -> None:
    site.storage().close()
    descriptor = os.open(site.path, os.O_WRONLY | os.O_NONBLOCK)
    os.close(descriptor)


def test_there_is_a_most_of_mappings(tmp_path: Path, indexer: Indexer) -> None:
    site = Site(tmp_path, indexer)
    site.mappings = Mappings(most=1)
    with open_file(site.path) as file, held(file) as hold:
        if hold is None:
            pytest.skip("files of this file system can't be held")
    storage, other = site.storage(), MappedStorage(SIZE)
    assert not site.map(other, 0, 0)
    storage.close()
    assert site.map(other, 0, 0)
    other.close()
    site.mappings.close()
