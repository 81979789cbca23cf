"""Much work for little that is sent: the event loop has others to serve."""

from __future__ import annotations

import struct
import time

import numpy as np

from protocol.commands import Command
from protocol.messages import RPC_TENSOR_DTYPE
from protocol.split import ProgramStep, encode_program
from tools.neighbour.attack import MIB, Attacker, attack, many
from tools.wire import tensor

FILLS = "fills, clears and copies of gigabytes"
DECODING = "messages that take long to decode"
FREEING = "memory that takes long to give back"
TALKING = "connections that are begun and not gone on with"


@attack(FILLS)
def memsets_that_overlap(a: Attacker) -> None:
    """64 MEMSET_TENSORs of 64 MiB each, one byte further each, in one go"""
    wire, handle, base = a.buffer(65 * MIB)
    whole = tensor(1, (16 * MIB,), handle, base)
    fields = [{"tensor": whole, "offset": 0, "size": 64 * MIB - n, "value": n} for n in range(64)]
    wire.pipeline(Command.MEMSET_TENSOR, fields)
    wire.answers(Command.MEMSET_TENSOR, 64)


@attack(FILLS)
def copies_of_overlapping_halves(a: Attacker) -> None:
    """48 COPY_TENSORs of 96 MiB within one buffer, forwards and backwards"""
    wire, handle, base = a.buffer(128 * MIB)
    low, high = (tensor(i, (24 * MIB,), handle, base + i * MIB) for i in (0, 16))
    pairs = [(low, high), (high, low)] * 24
    wire.pipeline(Command.COPY_TENSOR, [{"src": src, "dst": dst} for src, dst in pairs])
    wire.answers(Command.COPY_TENSOR, len(pairs))


@attack(FILLS)
def clears_of_many_buffers(a: Attacker) -> None:
    """BUFFER_CLEARs of 200 buffers of 1 MiB, five times each, none of them waited for"""
    wire = a.connect()
    handles = [wire.alloc(MIB)[0] for _ in range(200)]
    for value in range(1, 6):
        fields = [{"remote_ptr": handle, "value": value} for handle in handles]
        wire.pipeline(Command.BUFFER_CLEAR, fields)
    wire.answers(Command.BUFFER_CLEAR, 1000)


@attack(FILLS)
def answers_that_are_large(a: Attacker) -> None:
    """GET_TENSORs of 32 MiB, many asked for at once and taken slowly"""
    wire, handle, base = a.buffer(32 * MIB)
    whole = tensor(1, (8 * MIB,), handle, base)
    wire.pipeline(Command.GET_TENSOR, [{"tensor": whole, "offset": 0, "size": 32 * MIB}] * 20)
    while not a.over:
        wire.read(MIB)


@attack(DECODING)
def small_requests_by_the_thousand(a: Attacker) -> None:
    """2,000 GET_ALLOC_SIZEs in one go, answers left untaken for a while"""
    wire = a.connect()
    one = tensor(1, (64, 64))
    fields = {"device": 0, "tensor": one, "srcs": [one] * 10}
    count = 2000
    wire.pipeline(Command.GET_ALLOC_SIZE, [fields] * count)
    time.sleep(0.2)
    wire.answers(Command.GET_ALLOC_SIZE, count)


@attack(DECODING)
def graph_of_nothing_but_leaves(a: Attacker) -> None:
    """A graph of 100,000 tensors and no node"""
    wire, handle, base = a.buffer(4096)
    wire.run([], many(tensor(1, (8,), handle, base), 100_000, 1))


@attack(DECODING)
def program_whose_ids_repeat(a: Attacker) -> None:
    """A program of a step that names the same tensor 200,000 times as its output"""
    wire = a.coordinate()
    handle, base = wire.alloc(4096)
    leaf = tensor(1, (8,), handle, base)
    row = np.zeros(1, RPC_TENSOR_DTYPE)
    for name, value in leaf.items():
        row[0][name] = value
    body = encode_program([ProgramStep((), (), (1,) * 200_000)], row)
    wire.call(Command.SPLIT_PROGRAM, {"device": 0, "program": 0}, body)


@attack(DECODING)
def graphs_that_are_sent_slowly(a: Attacker) -> None:
    """A graph of 16 MiB that arrives in pieces of 1 KiB, on four connections"""
    wires = [a.connect() for _ in range(4)]
    for wire in wires:
        wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 16 * MIB))
    while not a.over:
        for wire in wires:
            wire.socket.sendall(bytes(1024))


@attack(DECODING)
def tensors_in_reverse_order(a: Attacker) -> None:
    """A graph of 20,000 nodes in a chain, with the last tensor first"""
    wire, handle, base = a.buffer(4096)
    leaf = tensor(1, (8,), handle, base)
    chain = [wire.op_of(2 + i, "ADD", (8,), (handle, base + 64), 1 + i, 1) for i in range(20_000)]
    backwards = wire.graph(chain[::-1], [leaf])
    wire.send(Command.GRAPH_COMPUTE, backwards)
    wire.settle()


@attack(FREEING)
def many_leave_at_once(a: Attacker) -> None:
    """40 connections that have written 8 MiB each end at the same time"""
    wires = [a.connect() for _ in range(40)]
    for wire in wires:
        handle, _ = wire.alloc(8 * MIB)
        wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 1})


@attack(FREEING)
def buffers_freed_one_by_one(a: Attacker) -> None:
    """FREE_BUFFERs of 1000 buffers in one go"""
    wire = a.connect()
    handles = [wire.alloc(65536)[0] for _ in range(1000)]
    wire.pipeline(Command.FREE_BUFFER, [{"remote_ptr": handle} for handle in handles])
    wire.answers(Command.FREE_BUFFER, 1000)


@attack(FREEING)
def taken_and_given_back(a: Attacker) -> None:
    """512 MiB allocated, cleared with ones and freed, without a pause"""
    wire, handle, _ = a.buffer(512 * MIB)
    wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 1})
    wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})


@attack(FREEING)
def leaves_within_a_fill(a: Attacker) -> None:
    """A client that hangs up while 1 GiB of its memory is being filled"""
    wire, handle, _ = a.buffer(1024 * MIB)
    wire.post(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 3})
    time.sleep(0.05)


@attack(TALKING)
def hellos_and_nothing_more(a: Attacker) -> None:
    """Connections that say HELLO and end, as fast as they can be made"""
    for _ in range(50):
        with a.connect():
            pass


@attack(TALKING)
def half_a_hello(a: Attacker) -> None:
    """60 connections that stop within HELLO"""
    for _ in range(60):
        a.connect(hello=False).socket.sendall(b"\x0e\x18")
    a.hold()


@attack(TALKING)
def what_is_no_protocol(a: Attacker) -> None:
    """HTTP, TLS and noise sent to the port, and not ended"""
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(range(256)) * 64):
        a.socket(a.where.port).sendall(content)
    time.sleep(0.05)


@attack(TALKING)
def other_versions_are_asked_for(a: Attacker) -> None:
    """HELLOs of every length, each ended after the answer: what are others offered then?"""
    before = a.connect().version
    for size in (0, 24, 0, 24):
        made = a.socket(a.where.port)
        made.sendall(struct.pack("<BQ", Command.HELLO, size) + bytes(size))
        made.recv(64)
        made.close()
    if a.connect().version != before:
        a.found("a client is offered another version because of others")
