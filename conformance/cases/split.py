"""10: the split extension (protocol/split.py): asking for it, and cut weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from conformance.cases.groups import SPLIT
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.arrays import PRODUCT_BOUND, Array, Bench, close, same, values, weights
from protocol.commands import Command
from protocol.ggml.types import GgmlType, row_size
from protocol.messages import CONN_CAPS_SIZE, RPC_TENSOR_DTYPE
from protocol.split import (
    MAX_PARTS,
    MAX_PROGRAMS,
    SECRET_SIZE,
    VERSION,
    caps_version,
    encode_program,
    peers_fields,
    split_caps,
    split_commands,
)
from protocol.tensor import Tensor

F32, F16 = GgmlType.F32, GgmlType.F16

SOURCE = "docs/protocol.md, Split extension; protocol/split.py"
# A name by which a server that splits takes an upload for a weight to be cut.
_NAME = "blk.0.ffn_up.weight"


def _proportions(shares: Sequence[float]) -> dict[str, Any]:
    filled = [*shares, *[0.0] * (MAX_PARTS - len(shares))]
    return {"n_proportions": len(shares), "proportions": filled}


def no_tensors() -> Any:
    return np.zeros(0, RPC_TENSOR_DTYPE)


def parts_of(peer: Peer) -> int:
    """Return how many parts weights are cut for; 1 for a server that doesn't split."""
    return max(int(peer.call(Command.SPLIT_QUERY).n_parts), 1)


def _shares(peer: Peer) -> list[float]:
    """Uneven proportions for as many parts as the server has."""
    return [float(3 * i + 1) for i in range(parts_of(peer))]


def _split_buffer(c: Context, peer: Peer, size: int, shares: Sequence[float]) -> RemoteBuffer:
    answer = peer.call(Command.SPLIT_ALLOC_BUFFER, size=size, **_proportions(shares))
    c.expect(answer.remote_ptr != 0, f"no buffer of {size} bytes in proportions {list(shares)}")
    c.expect(answer.remote_size >= size, f"a buffer of {answer.remote_size} bytes, not {size}")
    base = peer.call(Command.BUFFER_GET_BASE, remote_ptr=answer.remote_ptr).base_ptr
    return RemoteBuffer(answer.remote_ptr, base, answer.remote_size, peer.dialect)


def _weight(
    c: Context, b: Bench, type: GgmlType, cols: int, rows: int, seed: int
) -> tuple[Tensor, bytes, Array]:
    """A weight in a split buffer of its own, uploaded; its bytes and its numbers."""
    raw, numbers = weights(type, cols, rows, seed)
    w = b.g.new_tensor(type, (cols, rows), _NAME)
    buffer = _split_buffer(c, b.peer, len(raw), _shares(b.peer))
    w.place(buffer.handle, buffer.base)
    b.set(w, raw)
    return w, raw, numbers


# -- asking for it ---------------------------------------------------------------------------------


@SPLIT.case(1, source=SOURCE)
def asking_harms_nothing(c: Context) -> None:
    """Servers that don't know it look for something else in these bytes, and go on without.

    Sends: HELLO with the extension's mark in its capability bytes
    Expects: a version and an ordinary session; the same mark in the answer, or none at all
    """
    if not c.dialect.hello_size:
        c.skip("HELLO has no capabilities before protocol 4.0")
    peer = c.connect(split=True)
    if caps_version(peer.caps):
        c.expect(caps_version(peer.caps) <= VERSION, f"version {caps_version(peer.caps)}")
    else:
        magic = split_caps()[:8]
        c.expect(not peer.caps.startswith(magic), "half of a mark in the answer")
    b = Bench(peer)
    x = values(64, seed=1)
    (result,) = b.compute(b.g.neg(b.leaf(x)))
    same(c, result, -x, "the result of an ordinary graph")


@SPLIT.case(2, source=SOURCE, split=True)
def not_unasked(c: Context) -> None:
    """llama.cpp's clients may look for their own capabilities in these bytes.

    Sends: HELLO without the mark
    Expects: no mark in the answer
    """
    peer = c.connect()
    c.equal(caps_version(peer.caps), 0, "the version in the answer")


@SPLIT.case(3, source=SOURCE, split=True)
def other_marks(c: Context) -> None:
    """The lower of both versions is spoken, so a newer client can use an older server.

    Sends: HELLO with marks that are none: another text, version 0, a later version
    Expects: an ordinary session; to a later version the server's own
    """
    altered = bytearray(split_caps())
    altered[3] ^= 0x20
    for caps in (bytes(altered), split_caps(0), b"\xff" * CONN_CAPS_SIZE):
        peer = c.connect(hello=False)
        peer.hello(caps)
        c.equal(caps_version(peer.caps), 0, f"the version answered to {caps.hex()}")
        peer.ping()
        peer.close()
    peer = c.connect(hello=False)
    peer.hello(split_caps(VERSION + 7))
    found = caps_version(peer.caps)
    c.expect(0 < found <= VERSION, f"version {found} is answered to {VERSION + 7}")
    peer.ping()


@SPLIT.case(
    4,
    expects=f"the version of HELLO, {MAX_PROGRAMS} programs, at most {MAX_PARTS} parts (0: it "
    "doesn't split)",
    source=SOURCE,
    split=True,
)
def query(c: Context) -> None:
    """A client asks once what it can count on.

    Sends: SPLIT_QUERY
    """
    peer = c.connect(split=True)
    answer = peer.call(Command.SPLIT_QUERY)
    c.equal(answer.version, caps_version(peer.caps), "the version")
    c.equal(answer.max_programs, MAX_PROGRAMS, "max_programs")
    c.expect(answer.n_parts <= MAX_PARTS, f"{answer.n_parts} parts")


@SPLIT.case(5, source=SOURCE, split=True)
def status(c: Context) -> None:
    """What tools show of a server that splits.

    Sends: SPLIT_STATUS
    Expects: as many parts as SPLIT_QUERY says; times that are numbers
    """
    peer = c.connect(split=True)
    answer = peer.call(Command.SPLIT_STATUS)
    c.equal(answer.n_parts, peer.call(Command.SPLIT_QUERY).n_parts, "n_parts")
    numbers = [answer.graph_seconds, *(p.wait_seconds for p in answer.parts)]
    c.expect(all(0 <= n < math.inf for n in numbers), f"times {numbers}")


@SPLIT.case(6, source=SOURCE, split=True, hostile=True)
def device_that_is_not_there(c: Context) -> None:
    """As with every command that names a device.

    Sends: each command of the extension for a device that isn't there
    Expects: the connection is closed
    """
    fields: dict[Command, dict[str, Any]] = {
        Command.SPLIT_QUERY: {},
        Command.SPLIT_ALLOC_BUFFER: {"size": 64, **_proportions([])},
        Command.SPLIT_PROGRAM: {"program": 0},
        Command.SPLIT_RUN: {"program": 0},
        Command.SPLIT_STATUS: {},
        Command.SPLIT_MEMBERS: {},
        Command.SPLIT_ACQUIRE: {"patience_ms": 0},
        Command.SPLIT_RELEASE: {"keep": 0},
        Command.SPLIT_DESCRIBE: {},
        Command.SPLIT_PEERS: peers_fields(b"\1" * SECRET_SIZE, 1.0, 0, [("", 0, False)] * 2),
    }
    known = split_commands(c.facts.split)
    empty = encode_program([], no_tensors())
    for command, given in fields.items():
        if command not in known:
            continue
        peer = c.connect(command.name, split=True)
        body = empty if command is Command.SPLIT_PROGRAM else b""
        peer.send(command, body, device=c.facts.devices + 7, **given)
        c.refused(peer, command)
        peer.close()


@SPLIT.case(
    7,
    sends="SPLIT_DESCRIBE on two connections",
    expects="text in UTF-8 that ends within its field, the same each time; protocols by number",
    source=SOURCE,
    needs=(Command.SPLIT_DESCRIBE,),
    split=True,
)
def description(c: Context) -> None:
    """What a person reads of a server, so it has to be text."""
    told = []
    for _ in range(2):
        answer = c.connect(split=True).call(Command.SPLIT_DESCRIBE)
        fields = ("software", "protocols", "device_name", "device_description")
        values = [bytes(getattr(answer, name)) for name in fields]
        for name, value in zip(fields, values, strict=True):
            c.expect(b"\0" in value, f"{name} does not end within its {len(value)} bytes")
            c.expect(_is_text(value.split(b"\0")[0]), f"{name} is no text: {value!r}")
        protocols = values[1].split(b"\0")[0].decode().split()
        c.expect(bool(protocols), "no protocol")
        numbers = all(p.replace(".", "").isdecimal() for p in protocols)
        c.expect(numbers, f"protocols {protocols}")
        told.append(values)
    c.equal(told[1], told[0], "the description told to another client")


def _is_text(value: bytes) -> bool:
    try:
        return value.decode().isprintable()
    except UnicodeDecodeError:
        return False


# -- cut weights -----------------------------------------------------------------------------------


@SPLIT.case(10, source=SOURCE, split=True)
def buffers(c: Context) -> None:
    """For a server that doesn't split it is ALLOC_BUFFER; one that does cuts what is uploaded.

    Sends: SPLIT_ALLOC_BUFFER without proportions, and with as many as there are parts
    Expects: a buffer as of ALLOC_BUFFER
    """
    peer = c.connect(split=True)
    for shares in ([], [1.0] * parts_of(peer), _shares(peer)):
        buffer = _split_buffer(c, peer, 4096, shares)
        content = bytes(range(256)) * 16
        peer.set(buffer.whole(), content)
        c.equal(peer.get(buffer.whole(), 4096), content, f"the buffer with {shares}")
        peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)


@SPLIT.case(11, source=SOURCE, split=True, hostile=True)
def proportions_that_are_none(c: Context) -> None:
    """A share below zero, or of nothing, has no rows.

    Sends: SPLIT_ALLOC_BUFFER, proportions that are none: negative, NaN, infinite, all zero, 17
    Expects: the connection is closed
    """
    parts = parts_of(c.connect("query", split=True))
    rest = [1.0] * (parts - 1)
    for name, shares in (
        ("-1", [-1.0, *rest]),
        ("NaN", [math.nan, *rest]),
        ("infinite", [math.inf, *rest]),
        ("all zero", [0.0] * parts),
    ):
        peer = c.connect(name, split=True)
        peer.send(Command.SPLIT_ALLOC_BUFFER, size=4096, **_proportions(shares))
        c.refused(peer, Command.SPLIT_ALLOC_BUFFER)
        peer.close()
    for count in (MAX_PARTS + 1, 0xFFFFFFFF):
        peer = c.connect(f"{count} proportions", split=True)
        ones = [1.0] * MAX_PARTS
        peer.send(Command.SPLIT_ALLOC_BUFFER, size=4096, n_proportions=count, proportions=ones)
        c.refused(peer, Command.SPLIT_ALLOC_BUFFER)
        peer.close()


@SPLIT.case(12, source=SOURCE, split=True)
def wrong_number_of_proportions(c: Context) -> None:
    """The client may have asked another server how many there are.

    Sends: SPLIT_ALLOC_BUFFER with fewer or more proportions than there are parts
    Expects: no memory (remote_ptr 0), and the connection goes on; a server that doesn't split may
        give a buffer
    """
    peer = c.connect(split=True)
    parts = parts_of(peer)
    for count in {max(parts - 1, 1), min(parts + 1, MAX_PARTS)} - {parts}:
        answer = peer.call(Command.SPLIT_ALLOC_BUFFER, size=4096, **_proportions([1.0] * count))
        if answer.remote_ptr:
            c.expect(parts == 1, f"a buffer in {count} proportions for {parts} parts")
        peer.ping()


_TYPES = (F32, F16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_K)
# Rows that parts can't share evenly, and rows of which the cut isn't at a round number of bytes.
_SIZES = ((256, 136), (512, 331), (768, 96))


@SPLIT.case(13, source=SOURCE, split=True, deadline=60.0)
def weights_come_back(c: Context) -> None:
    """Where the rows lie is the server's business: as memory it is one tensor.

    Sends: weights of plain and quantized types into split buffers, in uneven proportions
    Expects: the same bytes back, whole and in ranges across rows and cuts
    """
    random = np.random.default_rng(c.seed)
    for type in _TYPES:
        for cols, rows in _SIZES:
            b = Bench(c.connect(split=True))
            w, raw, _ = _weight(c, b, type, cols, rows, seed=2)
            what = f"{type.name} {cols}x{rows}"
            fields = b._wire(w)
            c.equal(b.peer.get(fields, len(raw)), raw, what)
            row = row_size(type, cols)
            starts = [0, row - 1, row * (rows // 3) - 3, *random.integers(0, len(raw) - 1, 4)]
            for start in map(int, starts):
                size = min(int(random.integers(1, 3 * row)), len(raw) - start)
                part = b.peer.get(fields, size, start)
                c.equal(part, raw[start : start + size], f"{what}, {size} bytes from {start} on")
            b.peer.close()


@SPLIT.case(14, source=SOURCE, split=True, deadline=60.0)
def upload_in_pieces(c: Context) -> None:
    """llama.cpp uploads large tensors in pieces of a fixed size, whatever a row takes.

    Sends: a weight in pieces that begin and end within rows, not in order, some of them twice
    Expects: the bytes that were written last
    """
    random = np.random.default_rng(c.seed + 1)
    b = Bench(c.connect(split=True))
    w, raw, _ = _weight(c, b, F16, 550, 136, seed=3)
    now = bytearray(raw)
    fields = b._wire(w)
    for size in (len(now), 71_234, 1, 1099, 1100, 40_000, 2, 5000):
        start = int(random.integers(0, len(now) - size + 1))
        piece = random.bytes(size)
        now[start : start + size] = piece
        b.peer.set(fields, piece, start)
    c.equal(b.peer.get(fields, len(now)), bytes(now), "the weight")


@SPLIT.case(15, source=SOURCE, needs=(Command.MEMSET_TENSOR,), split=True)
def memory_like_any_other(c: Context) -> None:
    """A client doesn't know which of its tensors a server has cut.

    Sends: MEMSET_TENSOR, BUFFER_CLEAR and COPY_TENSOR of a split weight
    Expects: as with any memory; COPY_TENSOR may be answered 0
    """
    b = Bench(c.connect(split=True))
    w, raw, _ = _weight(c, b, F32, 256, 136, seed=4)
    fields, now = b._wire(w), bytearray(raw)
    b.peer.call(Command.MEMSET_TENSOR, tensor=fields, offset=50_001, size=40_003, value=7)
    now[50_001:90_004] = b"\7" * 40_003
    c.equal(b.peer.get(fields, len(now)), bytes(now), "after MEMSET_TENSOR")
    target = b.peer.alloc(len(now))
    to = {**fields, "buffer": target.handle, "data": target.base, "name": b"copy"}
    if b.peer.call(Command.COPY_TENSOR, src=fields, dst=to).result:
        c.equal(b.peer.get(to, len(now)), bytes(now), "the copy")
    b.peer.call(Command.BUFFER_CLEAR, remote_ptr=w.buffer, value=9)
    c.equal(b.peer.get(fields, len(now)), b"\x09" * len(now), "after BUFFER_CLEAR")


@SPLIT.case(16, source=SOURCE, split=True, deadline=120.0)
def products(c: Context) -> None:
    """Each row of a result is of one row of the weight: wrong ranges of rows show as wrong rows.

    Sends: MUL_MAT with split weights of each type, for one and for several tokens
    Expects: the products of the whole weights, within the bound of test-backend-ops (5e-4)
    """
    for type in _TYPES:
        for cols, rows in _SIZES:
            b = Bench(c.connect(split=True))
            w, _, numbers = _weight(c, b, type, cols, rows, seed=5)
            for tokens in (1, 5):
                x = values(tokens, cols, seed=6)
                (result,) = b.compute(b.g.mul_mat(w, b.leaf(x, ne=(cols, tokens))))
                expected = x.astype(np.float64) @ numbers.T.astype(np.float64)
                what = f"{type.name} {cols}x{rows}, {tokens} tokens"
                close(c, result, expected, what, PRODUCT_BOUND)
                _every_row(c, result.reshape(tokens, rows), expected, what)
            b.peer.close()


def _every_row(c: Context, result: Array, expected: Array, what: str) -> None:
    """A row in the wrong place may be lost in the norm of all."""
    scale = np.abs(expected).max()
    wrong = np.flatnonzero(np.abs(result - expected).max(0) > 0.05 * scale)
    if len(wrong):
        c.fail(f"{what}: rows {int(wrong[0])} to {int(wrong[-1])} ({len(wrong)}) are wrong")


@SPLIT.case(17, source="docs/split.md, Rows or blocks", split=True, deadline=60.0)
def split_and_whole(c: Context) -> None:
    """Cutting by rows changes no sum; in other modes the order of sums may change.

    Sends: the same products of a split weight and of the same weight in an ordinary buffer
    Expects: results that differ by rounding at most
    """
    for type in _TYPES:
        b = Bench(c.connect(split=True))
        w, raw, _ = _weight(c, b, type, 512, 331, seed=7)
        whole = b.leaf(raw, type, (512, 331))
        x = b.leaf(values(4, 512, seed=8))
        cut, plain = b.compute(b.g.mul_mat(w, x), b.g.mul_mat(whole, x))
        close(c, cut, plain, f"{type.name}", PRODUCT_BOUND)
        b.peer.close()


@SPLIT.case(18, source=SOURCE, split=True)
def weight_that_is_replaced(c: Context) -> None:
    """What parts keep ready must not outlive what it was made of.

    Sends: another weight into the place of a split one, then its product again
    Expects: the product of the new weight
    """
    b = Bench(c.connect(split=True))
    w, _, _ = _weight(c, b, F32, 256, 136, seed=9)
    x = values(3, 256, seed=10)
    product = b.g.mul_mat(w, b.leaf(x))
    b.compute(product)
    raw, numbers = weights(F32, 256, 136, seed=11)
    b.set(w, raw)
    b.peer.call(Command.GRAPH_RECOMPUTE)
    expected = x.astype(np.float64) @ numbers.T
    close(c, b.get(product), expected, "after the upload", PRODUCT_BOUND)


@SPLIT.case(19, source=SOURCE, split=True, hostile=True)
def freed_weight(c: Context) -> None:
    """As with any buffer that a graph uses.

    Sends: FREE_BUFFER of a split weight, and GRAPH_RECOMPUTE of its product
    Expects: the connection is closed; the memory is free again
    """
    b = Bench(c.connect(split=True))
    w, _, _ = _weight(c, b, F32, 256, 136, seed=12)
    b.compute(b.g.mul_mat(w, b.leaf(values(2, 256, seed=13))))
    b.peer.call(Command.FREE_BUFFER, remote_ptr=w.buffer)
    b.peer.send(Command.GRAPH_RECOMPUTE)
    c.refused(b.peer)
