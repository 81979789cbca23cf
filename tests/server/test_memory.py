"""The account of buffers: how many there may be, of one client, of one address, of all."""

from __future__ import annotations

import pytest

from protocol.commands import Command
from rpc_server.session.buffers import AddressSpace, Buffers, OutOfMemoryError
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
