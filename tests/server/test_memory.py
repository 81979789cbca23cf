"""The account of buffers: how many there may be, of one client, of one address, of all."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.commands import Command
from rpc_server.session.buffers import (
    AddressSpace,
    BadAddressError,
    Buffer,
    Buffers,
    OutOfMemoryError,
)
from tests.server.clients import Bystander
from tests.server.process import ServerProcess, Wire


def test_mappings_are_shared_among_addresses() -> None:
    space = AddressSpace(mappings=16)
    for _ in range(4):
        space.reserve(1, "a")
    with pytest.raises(OutOfMemoryError, match="one address have 4 buffers"):
        space.reserve(1, "a")
    for _ in range(4):
        space.reserve(1, "b")
    with pytest.raises(OutOfMemoryError, match="all clients together have 8 buffers"):
        space.reserve(1, "c")
    space.give_back("a")
    space.reserve(1, "c")


def test_a_buffer_that_there_is_no_room_for_is_not_counted() -> None:
    space = AddressSpace(mappings=4)
    buffers = Buffers(space, [_Full()], owner="a")  # type: ignore[list-item]
    for _ in range(9):
        with pytest.raises(OutOfMemoryError, match="full"):
            buffers.allocate(0, 8)


class _Full:
    """A budget of a device that has no room."""

    def allocate(self, size: int, proportions: object) -> None:
        raise OutOfMemoryError("full")


@pytest.mark.slow
def test_thousands_of_buffers_come_back(server: ServerProcess) -> None:
    for _ in range(3):
        with Bystander(server) as bystander, Wire(server.port) as wire:
            fields = {"device": 0, "size": 4096}
            given = [wire.call(Command.ALLOC_BUFFER, fields).remote_ptr for _ in range(4097)]
            assert all(given[:4096])
            assert not given[4096]
            server.wait_for(r"no buffer of 4096 bytes: a client has 4096 buffers at most")
            bystander.check()
    server.wait_for(r"disconnected; freed 4096 buffers, 16\.0 MiB")


BASE, SIZE = 1 << 44, 4096
BUFFER = Buffer(5, BASE, SIZE, 0, storage=None)  # type: ignore[arg-type]
NUMBERS = st.integers(0, (1 << 64) - 1) | st.sampled_from(
    [
        at + n & 0xFFFF_FFFF_FFFF_FFFF
        for at in (0, SIZE, BASE, BASE + SIZE, 1 << 63)
        for n in (-64, -1, 0, 1)
    ]
)


@given(data=NUMBERS, offset=NUMBERS, size=NUMBERS)
def test_a_range_is_inside_its_buffer_or_refused(data: int, offset: int, size: int) -> None:
    """Numbers off the wire have 64 bits; their sums don't wrap here."""
    inside = data >= BASE and data + offset + size <= BASE + SIZE
    if inside:
        assert BUFFER.locate(data, offset, size) == data + offset - BASE
        return
    with pytest.raises(BadAddressError):
        BUFFER.locate(data, offset, size)


@pytest.mark.parametrize(
    ("data", "offset", "size"),
    [
        (BASE, 1, SIZE),
        (BASE, SIZE, 1),
        (BASE - 64, 0, 16),
        (BASE - 64, 64, 16),
        (0, 0, 16),
        ((1 << 64) - 8, 0, 16),
        (BASE, (1 << 64) - 64, 16),
        (BASE + (1 << 33), (1 << 64) - (1 << 33), 16),
        (BASE, 8, (1 << 64) - 4),
    ],
)
def test_ranges_that_are_elsewhere(data: int, offset: int, size: int) -> None:
    with pytest.raises(BadAddressError, match=r"are outside the buffer of 4096"):
        BUFFER.locate(data, offset, size)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_handles_and_addresses_are_none_of_the_servers(server: ServerProcess) -> None:
    """They say nothing about where its memory is."""
    with Wire(server.port) as wire:
        given = np.ravel([wire.alloc(size) for size in (64, 1 << 16, 1 << 24)])
        maps = Path(f"/proc/{server.child.pid}/maps").read_text()
    ranges = [
        (int(low, 16), int(high, 16))
        for low, high in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", maps, re.MULTILINE)
    ]
    assert ranges
    assert not [n for n in given for low, high in ranges if low <= int(n) < high]
