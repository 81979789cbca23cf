"""Pages that are made large: which ones, with what inside, and what the system may answer."""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from rpc_server.devices.cpu import pages
from rpc_server.devices.cpu.pages import MappingPages, large_page
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.devices.cpu.storage import HostStorage

_MADVISE = pages._madvise
SMALL = mmap.PAGESIZE
LARGE = large_page()

pytestmark = pytest.mark.skipif(not LARGE, reason="this system has no large pages")


class Memory:
    """A mapping with room for some large pages, the first of which begins at ``begin``."""

    def __init__(self, large: int) -> None:
        self._map = mmap.mmap(-1, (large + 1) * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = np.frombuffer(self._map, np.uint8)
        self.address = int(whole.ctypes.data)
        offset = -self.address % LARGE
        self.begin = self.address + offset
        self.bytes = whole[offset : offset + large * LARGE]
        self.pages = MappingPages(self.begin, large * LARGE)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The background looks after nothing: tests do what it would do."""
    monkeypatch.setattr(pages._keeper, "add", lambda mapping: None)


class System:
    """Stands in for the system: remembers advice, and answers with the errors it was given."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []
        self.errors: dict[int, int] = {}

    def __call__(self, begin: int, end: int, advice: int) -> int:
        if threading.current_thread() is pages._keeper._thread:
            # It looks after what tests of other modules have left.
            return _MADVISE(begin, end, advice)
        self.told.append((begin, end, advice))
        return self.errors.get(advice, 0)

    def asked(self, advice: int) -> list[tuple[int, int]]:
        return [(begin, end) for begin, end, what in self.told if what == advice]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    made = System()
    monkeypatch.setattr(pages, "_madvise", made)
    return made


def tells_pages() -> bool:
    """Whether the system says of a page that it was written."""
    memory = Memory(1)
    memory.bytes[:SMALL] = 1
    return pages._in_use(memory.begin, SMALL)


needs_pagemap = pytest.mark.skipif(
    LARGE != 0 and not tells_pages(), reason="/proc/self/pagemap doesn't tell here"
)


# -- what is made large


@needs_pagemap
def test_only_where_every_small_page_is_written() -> None:
    memory = Memory(5)
    whole, all_but_one, read, second = (memory.bytes[i * LARGE :][:LARGE] for i in range(4))
    whole[::SMALL] = 1
    all_but_one[SMALL::SMALL] = 1
    second[::SMALL] = 1
    assert not read[::SMALL].any()
    if pages._in_use(memory.begin + LARGE, LARGE):
        pytest.skip("this system gives large pages without being asked")
    assert list(memory.pages.small()) == [memory.begin, memory.begin + 3 * LARGE]


@needs_pagemap
def test_bytes_are_the_same_and_it_is_counted_until_they_are_dropped() -> None:
    memory = Memory(3)
    content = np.random.default_rng(1).integers(0, 256, LARGE, np.uint8)
    memory.bytes[:LARGE] = content
    (place,) = memory.pages.small()
    error = memory.pages.enlarge(place)
    assert np.array_equal(memory.bytes[:LARGE], content)
    if error or not memory.pages.large_bytes():
        pytest.skip(f"the system has no large page to give: {error}")
    assert memory.pages.large_bytes() == LARGE
    assert not list(memory.pages.small())
    # Part of it is given back: the rest is there, in small pages.
    assert memory.pages.drop(memory.begin, SMALL) == (memory.begin, memory.begin + SMALL)
    assert memory.pages.large_bytes() == 0
    assert not memory.bytes[:SMALL].any()
    assert np.array_equal(memory.bytes[SMALL:LARGE], content[SMALL:])


def test_a_system_that_does_not_obey_is_asked(system: System) -> None:
    memory = Memory(2)
    system.errors[pages._COLLAPSE] = errno.EINVAL
    assert memory.pages.enlarge(memory.begin) == 0
    assert system.asked(mmap.MADV_HUGEPAGE) == [(memory.begin, memory.begin + LARGE)]
    # It may take long, or never be done.
    assert memory.pages.large_bytes() == 0


@needs_pagemap
def test_one_look_ends_where_the_system_has_no_more(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(4)
    memory.bytes[::SMALL] = 1
    keeper = pages._Keeper()
    keeper._mappings.add(memory.pages)
    system.errors[pages._COLLAPSE] = errno.ENOMEM
    assert keeper._look() == 0
    assert len(system.asked(pages._COLLAPSE)) == 1
    system.errors.clear()
    assert keeper._look() == 4
    assert keeper.large_bytes() == 4 * LARGE
    # What is large is not asked for again.
    assert keeper._look() == 0
    keeper.remove(memory.pages)
    assert keeper.large_bytes() == 0


def test_nothing_is_asked_of_a_mapping_that_was_closed(system: System) -> None:
    memory = Memory(2)
    memory.pages.close()
    assert memory.pages.enlarge(memory.begin) == 0
    assert not system.told


# -- uploads


def upload(memory: Memory, offset: int, size: int) -> None:
    memory.pages.populate(memory.begin + offset, size)
    memory.pages._work[-1].result()


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 3 * LARGE),
        (SMALL, 5 * LARGE),
        (LARGE - SMALL, 2 * LARGE + 2 * SMALL),
        (100, 20 * LARGE),
        (LARGE // 2, LARGE),
        (0, SMALL),
    ],
)
def test_an_upload_gets_large_pages_inside_of_itself(
    system: System, offset: int, size: int
) -> None:
    memory = Memory(24)
    upload(memory, offset, size)
    begin, end = memory.begin + offset, memory.begin + offset + size
    at = -(-begin // SMALL) * SMALL
    for first, last in system.asked(pages._POPULATE):
        assert first == at
        at = last
    # Every page of it is made ready, once.
    assert at == end // SMALL * SMALL
    asked = system.asked(mmap.MADV_HUGEPAGE)
    for first, last in asked:
        assert begin <= first < last <= end
        assert first % LARGE == last % LARGE == 0
    whole = max(0, end // LARGE - -(-begin // LARGE))
    assert sum(last - first for first, last in asked) == whole * LARGE


def test_an_upload_goes_on_with_small_pages_where_large_ones_take_long(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(np.arange(1000) * 0.01)
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    memory = Memory(24)
    upload(memory, 0, 24 * LARGE)
    # The next one, to the same buffer, doesn't try again.
    upload(memory, 0, 12 * LARGE)
    asked = sum(end - begin for begin, end in system.asked(mmap.MADV_HUGEPAGE))
    assert asked == max(LARGE, pages._ASK)
    ready = [end for _, end in system.asked(pages._POPULATE)]
    assert memory.begin + 24 * LARGE in ready
    assert ready[-1] == memory.begin + 12 * LARGE


def test_pages_beside_an_upload_stay_untouched() -> None:
    memory = Memory(6)
    first, size = LARGE + SMALL, 3 * LARGE
    upload(memory, first, size)
    present = pages._in_memory(memory.begin, 6 * LARGE)
    if not present.any():
        pytest.skip("this system can't make pages ready")
    assert np.array_equal(np.flatnonzero(present), np.arange(first, first + size, SMALL) // SMALL)


# -- whose pages


def test_scratch_is_looked_after_as_far_as_graphs_use_it() -> None:
    arena = ScratchArena(64 << 20)
    assert arena._pages._looked_after == 0
    arena.address(0, 5 * LARGE)
    arena.address(0, 3 * LARGE)
    assert arena._pages._looked_after in (4, 5)
    arena.trim(2 * LARGE)
    assert arena._pages._looked_after in (1, 2)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(pages.OFF_VARIABLE, "off")
    large_page.cache_clear()
    yield
    monkeypatch.undo()
    large_page.cache_clear()


def test_without_large_pages_none_is_asked_for(system: System, without: None) -> None:
    storage = HostStorage(4 * LARGE)
    storage.place(0, storage.size)
    storage._pages._work[-1].result()
    assert system.asked(pages._POPULATE)
    assert not system.asked(mmap.MADV_HUGEPAGE)
    assert not list(storage._pages.small())
    storage.close()


def test_a_buffer_that_is_filled_anew_reads_so() -> None:
    storage = HostStorage(3 * LARGE)
    view = np.frombuffer(storage.view(0, storage.size), np.uint8)
    view[:] = 7
    for place in storage._pages.small():
        storage._pages.enlarge(place)
    storage.fill(SMALL // 2, 2 * LARGE, 0)
    assert not view[SMALL // 2 : SMALL // 2 + 2 * LARGE].any()
    assert (view[SMALL // 2 + 2 * LARGE :] == 7).all()
    assert (view[: SMALL // 2] == 7).all()
    assert ctypes.string_at(storage.address, 1) == b"\x07"
