"""What clients make the server keep beside their buffers is counted, bounded and given back."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.types import GgmlType, row_size
from protocol.graph_payload import decode_graph
from protocol.split import ProgramStep, encode_program, split_caps, with_split
from rpc_server.limits import LimitReached
from rpc_server.session.graph_memory import GraphMemory, Share
from tests.server.clients import Bystander
from tests.server.process import ServerProcess, Wire, running, sources, tensor
from tests.server.test_metrics import Scraper

MIB = 1 << 20
SPLIT = with_split(DIALECTS[0])
Fields = list[dict[str, Any]]


def test_it_is_shared_out() -> None:
    """Half of it for an address; one that has little is served whatever the others have."""
    memory = GraphMemory(1600)
    hogs = [Share(memory, address) for address in ("a", "a", "b")]
    hogs[0].take(700, "a plan")
    with pytest.raises(LimitReached, match="its address have 700, all together 700 of 1600"):
        hogs[1].take(101, "a program")
    for size in (800, 750, 800):
        hogs[2].message(size)
    hogs[1].take(100, "a program")
    assert memory.used == 1600
    late = Share(memory, "c")
    late.take(60, "a plan")
    late.message(40)
    with pytest.raises(LimitReached, match=r"a message of 1 bytes.*\(--mem-graphs\)"):
        late.message(41)
    for share in (*hogs, late):
        share.close()
    assert memory.used == 0


class Site:
    """A server with a small account, what it says of that, and a client that must not notice."""

    def __init__(self, server: ServerProcess, bystander: Bystander) -> None:
        self.server = server
        self.bystander = bystander
        self._scraper = Scraper(server)
        self.at_rest = self.used()

    def used(self) -> int:
        return int(self._scraper.values()["graph_memory_bytes"])

    def wait_for_rest(self) -> None:
        self.server.wait_until(lambda: self.used() == self.at_rest, 60, "all of it given back")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running("--threads", "1", "--mem-graphs", "24", "--metrics-port", "0") as made:
        yield made


@pytest.fixture
def site(server: ServerProcess) -> Iterator[Site]:
    with Bystander(server) as bystander:
        made = Site(server, bystander)
        yield made
        made.wait_for_rest()
        bystander.check()
        assert server.alive
        assert "Traceback" not in server.log, server.log


def doublings(wire: Wire, nodes: int) -> tuple[Fields, Fields, int]:
    """So many sums of the same numbers; nodes, leaves, and the buffer."""
    handle, base = wire.alloc(4096)
    leaf = tensor(1, (8,), handle, base)
    op = wire.op("ADD")
    made = [tensor(2 + i, (8,), handle, base + 64, op=op, src=sources(1, 1)) for i in range(nodes)]
    return made, [leaf], handle


def settle(wire: Wire) -> None:
    """Wait until all that was asked for is done: graphs have no answer."""
    wire.call(Command.GET_ALIGNMENT, {"device": 0})


def test_plans(site: Site) -> None:
    """A client keeps as many as fit; they go with a buffer, and with the client."""
    with Wire(site.server.port) as wire:
        nodes, leaves, handle = doublings(wire, 1012)
        for count in range(1000, 1012):
            wire.compute(nodes[:count], leaves)
        settle(wire)
        # Eight of them would take more than half of it, which is all that an address may have.
        assert 8 * MIB < site.used() <= 12 * MIB
        wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})
        assert site.used() == site.at_rest
        wire.compute(*doublings(wire, 1000)[:2])
        settle(wire)
        assert site.used() > site.at_rest


def test_a_plan_that_is_too_large(site: Site) -> None:
    with Wire(site.server.port) as wire:
        nodes, leaves, _ = doublings(wire, 9000)
        wire.send(Command.GRAPH_COMPUTE, wire.graph(nodes, leaves))
        assert wire.closed_by_server()
    site.server.wait_for(
        r"ERROR [^\n]*a (plan|message) of \d+ bytes[^\n]*\(--mem-graphs\); closing"
    )


@contextlib.contextmanager
def split_wire(site: Site) -> Iterator[Wire]:
    """A client that has the split extension."""
    with Wire(site.server.port, SPLIT, hello=False) as wire:
        wire.send(Command.HELLO, split_caps())
        wire.answer(Command.HELLO)
        yield wire


def send_program(wire: Wire, nodes: Fields, leaves: Fields, steps: Sequence[ProgramStep]) -> None:
    tensors = decode_graph(wire.graph(nodes, leaves), SPLIT).tensors
    head = codec(SPLIT.commands[Command.SPLIT_PROGRAM].request).build({"device": 0, "program": 0})
    wire.send(Command.SPLIT_PROGRAM, head, encode_program(steps, tensors))


def whole(nodes: Fields) -> ProgramStep:
    """All nodes in one step."""
    return ProgramStep((), tuple(node["id"] for node in nodes), ())


def test_programs(site: Site) -> None:
    with split_wire(site) as wire:
        nodes, leaves, handle = doublings(wire, 1000)

        def make() -> int:
            send_program(wire, nodes, leaves, [whole(nodes)])
            assert wire.answer(Command.SPLIT_PROGRAM).result == 0
            return site.used() - site.at_rest

        one = make()
        assert one > MIB
        # In the place of the first.
        assert make() == one
        wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})
        assert site.used() == site.at_rest


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([ProgramStep((), (), (1,) * 3)], "takes or gives the same tensor twice"),
        ([ProgramStep((1, 1), (), ())], "takes or gives the same tensor twice"),
        ([ProgramStep((), (), (1,))] * 9, "a program of 1 tensors and 9 transfers"),
    ],
)
def test_programs_that_repeat_themselves(site: Site, steps: list[ProgramStep], why: str) -> None:
    """An id is 8 bytes, what is made of it more than a thousand."""
    with split_wire(site) as wire:
        _, leaves, _ = doublings(wire, 1)
        send_program(wire, [], leaves, steps)
        assert wire.closed_by_server()
    site.server.wait_for(rf"ERROR [^\n]*{why}")


def test_a_client_that_leaves_while_its_program_is_planned(site: Site) -> None:
    """Its answer has nowhere to go, and all that it had is given back nevertheless."""
    with split_wire(site) as wire:
        nodes, leaves, _ = doublings(wire, 3000)
        send_program(wire, nodes, leaves, [whole(nodes)])
        address = wire.socket.getsockname()
    site.server.wait_for(rf"client \d+ \({address[0]}:{address[1]}\): disconnected")


def test_messages_that_are_never_finished(site: Site) -> None:
    """As many as one client may have open: what doesn't fit is closed, before it has come."""
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(site.server.port)) for _ in range(4)]
        for wire in wires:
            wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 5 * MIB))
            with contextlib.suppress(ConnectionError):
                wire.socket.sendall(bytes(5 * MIB - 1))
        site.server.wait_for(r"ERROR [^\n]*a message of \d+ bytes[^\n]*\(--mem-graphs\); closing")
        assert site.used() <= 12 * MIB
        site.bystander.check()


def _product_of_one_row(
    wire: Wire, buffer: tuple[int, int], place: int, width: int, rows: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A product with ``rows`` rows that all lie at one place, and its two sources."""
    handle, base = buffer
    repeated = tensor(1, (width, rows), handle, base, nb=[4, 0, 0, 0])
    row = row_size(GgmlType.Q8_0, width)
    weights = tensor(2, (width,), handle, base + 4 * width, GgmlType.Q8_0)
    weights["nb"] = [row_size(GgmlType.Q8_0, 32), row, row, row]
    product = tensor(3, (1, rows), handle, place, op=wire.op("MUL_MAT"), src=sources(2, 1))
    return product, repeated, weights


def test_memory_beside_small_buffers(site: Site) -> None:
    """Rows that all lie at one place would be rounded one by one, to many times as much."""
    width, rows = 6 << 20, 62
    with Wire(site.server.port) as wire:
        handle, base = wire.alloc(40 * MIB)
        place = base + 32 * MIB
        product, repeated, weights = _product_of_one_row(wire, (handle, base), place, width, rows)
        wire.send(Command.GRAPH_COMPUTE, wire.graph([product], [repeated, weights]))
        assert wire.closed_by_server()
    site.server.wait_for(r"ERROR [^\n]*bytes beside its client's buffers[^\n]*; closing")


@pytest.mark.slow
def test_scratch_is_given_back_by_a_graph_that_fails() -> None:
    """As by one that ends well: the index that is out of range comes behind the product."""
    width, rows = 6 << 20, 18
    with running("--threads", "1") as server, Wire(server.port) as wire:
        handle, base = wire.alloc(256 * MIB)
        place = base + 32 * MIB
        product, repeated, weights = _product_of_one_row(wire, (handle, base), place, width, rows)
        index = tensor(4, (1,), handle, place + MIB, GgmlType.I32)
        rows_of = tensor(
            5, (1, 1), handle, place + 2 * MIB, op=wire.op("GET_ROWS"), src=sources(3, 4)
        )
        wire.set_tensor(index, (rows + 5).to_bytes(4, "little"))
        settle(wire)
        before = server.rss()
        wire.send(Command.GRAPH_COMPUTE, wire.graph([product, rows_of], [repeated, weights, index]))
        assert wire.closed_by_server()
        server.wait_for(r"an index in its data is out of range")
        # The buffer is given back too; what there was of it before is little.
        server.wait_until(lambda: server.rss() - before < 100 * MIB, 60, "memory given back")
