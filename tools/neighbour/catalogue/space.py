"""What the server keeps for clients: bounded, and given back."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import time

from protocol.commands import Command
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType, row_size
from tools.neighbour.attack import MIB, Attacker, attack, many
from tools.wire import tensor

KEPT_GRAPHS = "programs and plans that are kept"
SCRATCH = "memory beside buffers"
MAPPINGS = "buffers without number"
SMALL_FILES = "small uploads that are to be kept"
HALF_OPEN = "half-open TLS connections"
METRICS = "connections to the port of metrics"
# How long one waits for a page at most.
_PAGE_SECONDS = 20.0


@attack(KEPT_GRAPHS)
def programs_made_anew(a: Attacker) -> None:
    """64 programs of 200 nodes, each made again and again"""
    wire = a.coordinate()
    handle, base = wire.alloc(65536)
    leaf = tensor(1, (64,), handle, base)
    node = wire.op_of(2, "ADD", (64,), (handle, base + 4096), 1, 1)
    for number in range(64):
        wire.program(number, many(node, 200, 2), [leaf])


@attack(KEPT_GRAPHS)
def plans_of_many_connections(a: Attacker) -> None:
    """30 connections that have a graph of 1,000 nodes kept each"""
    wires = [a.connect() for _ in range(30)]
    for wire in wires:
        handle, base = wire.alloc(65536)
        leaf = tensor(1, (64,), handle, base)
        node = wire.op_of(2, "ADD", (64,), (handle, base + 4096), 1, 1)
        wire.run(many(node, 1000, 2), [leaf])
        if a.over:
            break


@attack(KEPT_GRAPHS)
def messages_almost_whole(a: Attacker) -> None:
    """20 graphs of 8 MiB, each but for its last byte"""
    wires = [a.connect() for _ in range(20)]
    for wire in wires:
        wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 8 * MIB))
        wire.socket.sendall(bytes(8 * MIB - 1))
    a.hold()


def _repeated(a: Attacker, op: str, width: int, rows: int, type_: GgmlType) -> None:
    wire = a.connect()
    place = -(-4 * width // 256) * 256
    handle, base = wire.alloc(place + row_size(type_, width) + MIB)
    x = tensor(1, (width, rows), handle, base, nb=[4, 0, 0, 0])
    row = row_size(type_, width)
    weights = tensor(2, (width,), handle, base + place, type_)
    weights["nb"] = [row_size(type_, 32), row, row, row]
    if op == "MUL_MAT":
        end = base + place + row
        wire.run([wire.op_of(3, op, (1, rows), (handle, end - end % 64 + 64), 2, 1)], [x, weights])
        return
    wire.run([wire.op_of(3, op, (1,), (handle, base + place), 1)], [x])


@attack(SCRATCH)
def one_row_many_times(a: Attacker) -> None:
    """A product with one row of a million that counts as sixty, with a stride of 0"""
    _repeated(a, "MUL_MAT", 1 << 20, 60, GgmlType.Q8_0)


@attack(SCRATCH)
def one_large_row_many_times(a: Attacker) -> None:
    """The same with 24 MiB that count as 1.4 GiB"""
    _repeated(a, "MUL_MAT", 6 << 20, 60, GgmlType.Q8_0)


@attack(SCRATCH)
def arrays_of_one_row(a: Attacker) -> None:
    """A sum of one row of 4 MiB that counts as sixty, by whatever computes it"""
    _repeated(a, "SUM", 1 << 20, 60, GgmlType.F32)


@attack(MAPPINGS)
def pages_of_many_clients(a: Attacker) -> None:
    """20 connections with 500 buffers of a page each"""
    for wire in [a.connect() for _ in range(20)]:
        for _ in range(500):
            wire.alloc(4096)
    a.hold()


@attack(MAPPINGS)
def buffers_that_come_and_go(a: Attacker) -> None:
    """Buffers of growing sizes, every second one freed"""
    wire = a.connect()
    for n in range(1, 400):
        handle, _ = wire.alloc(4096 * n)
        if n % 2:
            wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})


@attack(MAPPINGS)
def all_there_is(a: Attacker) -> None:
    """Buffers of 256 MiB until there is no room, none of it written to"""
    wire = a.connect()
    with contextlib.suppress(MemoryError):
        while not a.over:
            wire.alloc(256 * MIB)
    a.hold()


def _keep(a: Attacker, size: int, count: int) -> None:
    wire, handle, base = a.buffer(MIB)
    leaf = tensor(1, (size,), handle, base, GgmlType.I8)
    for _ in range(count):
        wire.call(
            Command.SET_TENSOR, {"tensor": leaf, "offset": 0, "cache_flag": 1}, os.urandom(size)
        )
    # What a client sent before it hangs up is still kept, so it would be seen as left behind.
    wire.settle()


@attack(SMALL_FILES)
def a_page_at_a_time(a: Attacker) -> None:
    """Uploads of 4 KiB, all different, all to be kept"""
    _keep(a, 4096, 200)


@attack(SMALL_FILES)
def a_byte_at_a_time(a: Attacker) -> None:
    """Uploads of a single byte, to be kept"""
    _keep(a, 1, 200)


@attack(SMALL_FILES)
def kept_by_many(a: Attacker) -> None:
    """Uploads of 64 KiB to be kept, from ten connections at once"""
    wires = [a.connect() for _ in range(10)]
    leaves = []
    for wire in wires:
        handle, base = wire.alloc(65536)
        leaves.append(tensor(1, (65536,), handle, base, GgmlType.I8))
    while not a.over:
        for wire, leaf in zip(wires, leaves, strict=True):
            fields = {"tensor": leaf, "offset": 0, "cache_flag": 1}
            wire.post(Command.SET_TENSOR, fields, os.urandom(65536))
        wires[-1].settle()


@attack(SMALL_FILES)
def hashes_of_nothing(a: Attacker) -> None:
    """SET_TENSOR_HASH of contents that nobody has, for large tensors"""
    wire, handle, base = a.buffer(64 * MIB)
    leaf = tensor(1, (16 * MIB,), handle, base)
    for number in range(100):
        offer = {"tensor": leaf, "offset": 0, "hash": number}
        if wire.call(Command.SET_TENSOR_HASH, offer).result:
            a.found("a content is served that nobody has uploaded")


@attack(SMALL_FILES, server="read-only")
def uploads_where_nothing_is_kept(a: Attacker) -> None:
    """Uploads to be kept, then offered by their hash, on a server with --cache-read-only"""
    wire, handle, base = a.buffer(MIB)
    for size in (1, 4096, 65536):
        leaf = tensor(1, (size,), handle, base, GgmlType.I8)
        content = os.urandom(size)
        fields = {"tensor": leaf, "offset": 0, "cache_flag": 1}
        wire.call(Command.SET_TENSOR, fields, content)
        offer = {"tensor": leaf, "offset": 0, "hash": fnv1a_64(content)}
        if wire.call(Command.SET_TENSOR_HASH, offer).result:
            a.found("what a client uploaded is served by its hash")
    if any(name for name in os.listdir(a.where.cache) if not name.startswith(".")):
        a.found("a file is kept")


@attack(HALF_OPEN)
def tls_that_stops_early(a: Attacker) -> None:
    """40 connections to the TLS port that send a few bytes of a handshake"""
    for _ in range(40):
        a.socket(a.where.tls_port).sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01")
    a.hold()


@attack(HALF_OPEN)
def tls_without_a_token(a: Attacker) -> None:
    """TLS handshakes that are finished, and no token after them"""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    held = []
    for _ in range(12):
        with contextlib.suppress(OSError):
            held.append(context.wrap_socket(a.socket(a.where.tls_port)))
    time.sleep(min(0.3, a.seconds))


@attack(HALF_OPEN)
def plain_words_to_tls(a: Attacker) -> None:
    """What is no TLS at all, sent to the TLS port as fast as it takes connections"""
    for _ in range(20):
        with a.socket(a.where.tls_port) as made:
            made.sendall(bytes(64))


def _ask(a: Attacker) -> None:
    """Ask for a page, and report it if there is none."""
    with contextlib.suppress(OSError), a.socket(a.where.metrics_port) as made:
        # Not how fast is asked, but whether at all.
        made.settimeout(_PAGE_SECONDS)
        made.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        if made.recv(64).startswith(b"HTTP/1.1 200"):
            return
    a.found("nobody else gets a page of the metrics' port")


@attack(METRICS)
def headers_that_never_end(a: Attacker) -> None:
    """40 requests for metrics whose header goes on line by line"""
    held: list[socket.socket] = [a.socket(a.where.metrics_port) for _ in range(40)]
    for made in held:
        with contextlib.suppress(OSError):
            made.sendall(b"GET /metrics HTTP/1.1\r\nX: 1\r\n")
    _ask(a)


@attack(METRICS)
def pages_that_nobody_takes(a: Attacker) -> None:
    """40 requests for metrics whose answers are not read"""
    for _ in range(40):
        made = a.socket(a.where.metrics_port)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        with contextlib.suppress(OSError):
            made.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    _ask(a)


@attack(METRICS)
def a_line_without_end(a: Attacker) -> None:
    """A request for metrics of 100 KB in one line"""
    made = a.socket(a.where.metrics_port)
    with contextlib.suppress(OSError):
        made.sendall(b"GET /" + b"a" * 100_000)
    _ask(a)
