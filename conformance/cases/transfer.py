"""4.1 to 4.77: SET_TENSOR, GET_TENSOR and the borders of all that names a range of bytes."""

from __future__ import annotations

import random
from collections.abc import Callable

from conformance.cases.groups import TENSORS
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.filled import SIZE, check_content, filled
from conformance.suite.tensors import Fields
from protocol.commands import Command
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size

_SERVER = "ggml-rpc.cpp rpc_server::"
_2_64 = 1 << 64
_OLD_TYPES = tuple(t for t in GgmlType if t <= GgmlType.TQ2_0)


# -- set and get -----------------------------------------------------------------------------------


@TENSORS.case(
    1,
    sends="SET_TENSOR of a whole buffer, then GET_TENSOR",
    expects="the bytes that were sent",
    source=f"{_SERVER}set_tensor and get_tensor, since 1.0",
)
def set_then_get(c: Context) -> None:
    """What a model's weights need first of all."""
    peer, buffer, content = filled(c)
    check_content(c, peer, buffer, content, "what comes back")


def _declare_region(number: int, name: str, start: int, size: int) -> None:
    shown = f"{size} bytes at {start} of {SIZE}"

    @TENSORS.case(
        number,
        name=f"set-{name}",
        sends=f"SET_TENSOR of {shown}, then GET_TENSOR of all",
        expects="these bytes are new, all others as before",
        source=f"{_SERVER}set_tensor (offset), since 1.0",
        why="llama.cpp uploads large tensors in pieces.",
    )
    def set_region(c: Context) -> None:
        peer, buffer, content = filled(c)
        new = bytes(b ^ 0xFF for b in content[start : start + size])
        peer.set(buffer.whole(), new, start)
        expected = content[:start] + new + content[start + size :]
        check_content(c, peer, buffer, expected)

    @TENSORS.case(
        number + 6,
        name=f"get-{name}",
        sends=f"GET_TENSOR of {shown}",
        expects="exactly these bytes",
        source=f"{_SERVER}get_tensor (offset, size), since 1.0",
        why="llama.cpp reads logits of single tokens out of the middle.",
    )
    def get_region(c: Context) -> None:
        peer, buffer, content = filled(c)
        found = peer.get(buffer.whole(), size, start)
        c.equal(found, content[start : start + size], "what comes")


for _number, (_name, _start, _length) in enumerate(
    (
        ("the-first-byte", 0, 1),
        ("the-last-byte", SIZE - 1, 1),
        ("the-middle", 1000, 777),
        ("the-first-half", 0, SIZE // 2),
        ("the-second-half", SIZE // 2, SIZE // 2),
        ("all-but-one-byte", 1, SIZE - 1),
    ),
    2,
):
    _declare_region(_number, _name, _start, _length)


@TENSORS.case(
    14,
    sends="SET_TENSOR without data and GET_TENSOR of 0 bytes, at the start of a buffer",
    expects="nothing changes, an answer of 0 bytes comes, and the connection goes on",
    source="ggml-backend.cpp ggml_backend_tensor_set (size == 0), since 1.0",
)
def transfer_of_nothing(c: Context) -> None:
    """Tensors of no elements exist; their transfer is sound."""
    peer, buffer, content = filled(c)
    peer.set(buffer.whole(), b"")
    c.equal(peer.get(buffer.whole(), 0), b"", "the answer to GET_TENSOR")
    check_content(c, peer, buffer, content)


@TENSORS.case(
    15,
    sends="SET_TENSOR and GET_TENSOR of a tensor that starts 256 bytes into its buffer",
    expects="offsets count from the tensor's data, not from the buffer's base",
    source=f"{_SERVER}set_tensor (in_tensor->data + offset), since 1.0",
)
def offset_counts_from_the_tensor(c: Context) -> None:
    """Every tensor but the first lies somewhere within its buffer."""
    peer, buffer, content = filled(c)
    part = buffer.leaf(1, (64,), at=256)
    peer.set(part, b"\x42" * 16, 32)
    c.equal(peer.get(part, 16, 32), b"\x42" * 16, "what comes of the tensor")
    expected = content[:288] + b"\x42" * 16 + content[304:]
    check_content(c, peer, buffer, expected)


@TENSORS.case(
    16,
    sends="SET_TENSOR and GET_TENSOR of a view (view_src, view_offs 512, data at 512)",
    expects="the view's bytes lie where its data points, view_offs isn't added to it",
    source="ggml-rpc.cpp serialize_tensor: data is the view's own, since 1.0",
)
def view_is_where_its_data_is(c: Context) -> None:
    """The client has added the offset already."""
    peer, buffer, content = filled(c)
    view = buffer.leaf(2, (8,), at=512, view_src=1, view_offs=512)
    c.equal(peer.get(view, 32), content[512:544], "the view")
    peer.set(view, bytes(32))
    check_content(c, peer, buffer, content[:512] + bytes(32) + content[544:])


@TENSORS.case(
    17,
    sends="SET_TENSOR and GET_TENSOR of a transposed tensor (strides 4 * 8, 4)",
    expects="bytes as they lie in memory; strides play no part",
    source="ggml-backend.cpp ggml_backend_tensor_set: offset and size are of memory, since 1.0",
)
def strides_play_no_part(c: Context) -> None:
    """A transfer moves memory, not elements."""
    peer, buffer, content = filled(c)
    transposed = buffer.leaf(1, (8, 8), nb=[32, 4, 256, 256])
    c.equal(peer.get(transposed, 256), content[:256], "the tensor")
    peer.set(transposed, content[256:512])
    c.equal(peer.get(buffer.whole(), 256), content[256:512], "the start of the buffer")


@TENSORS.case(
    18,
    sends="SET_TENSOR and GET_TENSOR of two rows of each type",
    expects="the bytes that were sent, whatever they would mean as numbers",
    source=f"{_SERVER}set_tensor, since 1.0",
)
def every_type_is_bytes(c: Context) -> None:
    """Weights are never converted on the way."""
    peer, buffer, _ = filled(c, 64 << 10)
    for type_ in _OLD_TYPES:
        ne0 = 4 * TYPE_INFO[type_].block_size
        leaf = buffer.leaf(1, (ne0, 2), type=type_)
        content = random.Random(type_).randbytes(2 * row_size(type_, ne0))
        peer.set(leaf, content)
        c.equal(peer.get(leaf, len(content)), content, f"{type_.name}")


@TENSORS.case(
    19,
    sends="a tensor whose name fills all 64 bytes without a zero, and one that is no UTF-8",
    expects="both are transferred as any other",
    source="ggml.c ggml_set_name: takes 63 bytes at most, since 1.0",
)
def names_of_any_bytes(c: Context) -> None:
    """A name is there for people only."""
    peer, buffer, content = filled(c)
    for name in (b"n" * 64, b"\xff\xfe\x80\x00rest", b""):
        c.equal(peer.get(buffer.leaf(1, (8,), name=name), 32), content[:32], f"{name[:4]!r}")


@TENSORS.case(
    20,
    sends="SET_TENSOR and GET_TENSOR of a tensor whose id is 0",
    expects="it is transferred as any other",
    source=f"{_SERVER}set_tensor: ids matter in graphs only, since 1.0",
)
def id_of_zero(c: Context) -> None:
    """Ids name tensors within one graph; a transfer has no other tensor to name."""
    peer, buffer, _ = filled(c)
    leaf = buffer.leaf(0, (8,))
    peer.set(leaf, bytes(range(32)))
    c.equal(peer.get(leaf, 32), bytes(range(32)), "what comes back")


@TENSORS.case(
    21,
    sends="SET_TENSOR and GET_TENSOR right behind each other, 200 times, read at the end",
    expects="each GET_TENSOR sees the SET_TENSOR before it",
    source="ggml-rpc.cpp rpc_serve_client: one request after the other",
)
def pipelined_transfers_see_each_other(c: Context) -> None:
    """A client of 6.0 or later reads its logits like this."""
    peer, buffer, _ = filled(c)
    leaf = buffer.leaf(1, (1,))
    for i in range(200):
        peer.send(Command.SET_TENSOR, i.to_bytes(4, "little"), tensor=leaf)
        peer.send(Command.GET_TENSOR, tensor=leaf, size=4)
    for i in range(200):
        peer.answer(Command.SET_TENSOR)
        c.equal(peer.answer(Command.GET_TENSOR), i.to_bytes(4, "little"), f"answer {i}")


# -- bounds ----------------------------------------------------------------------------------------


def _at(buffer: RemoteBuffer, data: int) -> Fields:
    """256 bytes that are said to lie at an address, whatever lies there."""
    return buffer.leaf(1, (256,), type=GgmlType.I8, data=data % _2_64)


# By name: the tensor, the offset into it, how many bytes; and what is wrong with it.
_OUTSIDE: tuple[tuple[str, str, Callable[[RemoteBuffer], tuple[Fields, int, int]]], ...] = (
    ("ends-behind-its-buffer", "one byte too many", lambda b: (b.whole(), 1, b.size)),
    ("starts-behind-its-buffer", "an offset of the size", lambda b: (b.whole(), b.size, 1)),
    ("far-behind-its-buffer", "an offset of 2^40", lambda b: (b.whole(), 1 << 40, 16)),
    ("offset-that-wraps", "an offset of 2^64 - 64", lambda b: (b.whole(), _2_64 - 64, 16)),
    (
        "offset-that-wraps-into-the-buffer",
        "data far behind, and an offset that comes back by way of 2^64",
        lambda b: (_at(b, b.base + (1 << 33)), _2_64 - (1 << 33), 16),
    ),
    ("before-its-buffer", "data 64 bytes before the base", lambda b: (_at(b, b.base - 64), 0, 16)),
    ("at-address-0", "data that is 0", lambda b: (_at(b, 0), 0, 16)),
    (
        "at-the-end-of-addresses",
        "data at 2^64 - 8",
        lambda b: (_at(b, _2_64 - 8), 0, 16),
    ),
)


def _declare_outside(
    number: int,
    name: str,
    wrong: str,
    region: Callable[[RemoteBuffer], tuple[Fields, int, int]],
) -> None:
    bounds = "out of buffer bounds"

    def declare(
        command: Command, number: int, send: Callable[[Peer, Fields, int, int], None]
    ) -> None:
        verb = command.name.lower().replace("_", "-")

        @TENSORS.case(
            number,
            name=f"{verb}-{name}",
            sends=f"{command.name} with {wrong}",
            expects="the connection is closed, and nothing was written",
            source=f"{_SERVER}{command.name.lower()} ('{bounds}'), deserialize_tensor",
            why="Addresses are the client's arithmetic; a range is checked without wrapping.",
            needs=(command,),
            hostile=True,
        )
        def check(c: Context) -> None:
            peer, buffer, _ = filled(c)
            fields, offset, size = region(buffer)
            send(peer, fields, offset, size)
            c.refused(peer, command)

    def send_set(peer: Peer, fields: Fields, offset: int, size: int) -> None:
        peer.send(Command.SET_TENSOR, b"\xee" * size, tensor=fields, offset=offset)

    def send_get(peer: Peer, fields: Fields, offset: int, size: int) -> None:
        peer.send(Command.GET_TENSOR, tensor=fields, offset=offset, size=size)

    def send_memset(peer: Peer, fields: Fields, offset: int, size: int) -> None:
        peer.send(Command.MEMSET_TENSOR, tensor=fields, offset=offset, size=size, value=0xEE)

    declare(Command.SET_TENSOR, number, send_set)
    declare(Command.GET_TENSOR, number + 10, send_get)
    declare(Command.MEMSET_TENSOR, number + 20, send_memset)


for _number, (_name, _wrong, _region) in enumerate(_OUTSIDE, 31):
    _declare_outside(_number, _name, _wrong, _region)


def _declare_size(number: int, command: Command, size: int, shown: str) -> None:
    verb = command.name.lower().replace("_", "-")

    @TENSORS.case(
        number,
        name=f"{verb}-of-{shown.replace(' ', '').replace('^', '-')}-bytes",
        sends=f"{command.name} with offset 8 and a size of {shown}",
        expects="the connection is closed",
        source=f"{_SERVER}{command.name.lower()} ('out of buffer bounds'), since 1.0",
        why="Offset and size wrap to a small number when they are added in 64 bits.",
        needs=(command,),
        hostile=True,
    )
    def check(c: Context) -> None:
        peer, buffer, _ = filled(c)
        peer.send(command, tensor=buffer.whole(), offset=8, size=size)
        c.refused(peer, command)


_declare_size(61, Command.GET_TENSOR, _2_64 - 4, "2^64 - 4")
_declare_size(62, Command.GET_TENSOR, 1 << 63, "2^63")
_declare_size(63, Command.MEMSET_TENSOR, _2_64 - 4, "2^64 - 4")
_declare_size(64, Command.MEMSET_TENSOR, 1 << 63, "2^63")


@TENSORS.case(
    65,
    sends="SET_TENSOR of 32 bytes into a tensor of 16, with room behind it in the buffer",
    expects="the connection is closed and nothing is written, or the bytes go to the buffer",
    source="ggml-backend.cpp ggml_backend_tensor_set (GGML_ASSERT 'tensor write out of bounds')",
    hostile=True,
)
def set_beyond_its_tensor(c: Context) -> None:
    """Nobody's memory but the client's own; upstream's server ends by the assertion."""
    peer, buffer, _ = filled(c)
    peer.send(Command.SET_TENSOR, b"\xee" * 32, tensor=buffer.leaf(1, (4,)))
    peer.outcome(Command.SET_TENSOR)


@TENSORS.case(
    66,
    sends="GET_TENSOR of 32 bytes of a tensor of 16, with room behind it in the buffer",
    expects="the connection is closed, or the buffer's bytes come",
    source="ggml-backend.cpp ggml_backend_tensor_get (GGML_ASSERT 'tensor read out of bounds')",
    hostile=True,
)
def get_beyond_its_tensor(c: Context) -> None:
    """Nobody's memory but the client's own; upstream's server ends by the assertion."""
    peer, buffer, content = filled(c)
    peer.send(Command.GET_TENSOR, tensor=buffer.leaf(1, (4,)), size=32)
    outcome = peer.outcome(Command.GET_TENSOR)
    if not outcome.closed:
        c.equal(outcome.answer, content[:32], "what comes")


@TENSORS.case(
    67,
    sends="MEMSET_TENSOR of 32 bytes of a tensor of 16, with room behind it in the buffer",
    expects="the connection is closed and nothing is written, or the buffer's bytes are set",
    source=f"{_SERVER}memset_tensor ('out of tensor bounds'), since 5.0",
    needs=(Command.MEMSET_TENSOR,),
    hostile=True,
)
def memset_beyond_its_tensor(c: Context) -> None:
    """Nobody's memory but the client's own."""
    peer, buffer, _ = filled(c)
    peer.send(Command.MEMSET_TENSOR, tensor=buffer.leaf(1, (4,)), size=32, value=1)
    peer.outcome(Command.MEMSET_TENSOR)


def _declare_bad_tensor(number: int, name: str, wrong: str, change: Fields, source: str) -> None:
    @TENSORS.case(
        number,
        name=f"get-of-{name}",
        sends=f"GET_TENSOR of a tensor with {wrong}",
        expects="the connection is closed",
        source=source,
        why="Sizes follow from type, shape and strides; each is the client's word.",
        hostile=True,
    )
    def check(c: Context) -> None:
        peer, buffer, _ = filled(c)
        peer.send(Command.GET_TENSOR, tensor={**buffer.leaf(1, (32,)), **change}, size=16)
        c.refused(peer, Command.GET_TENSOR, differs="it only looks at the bytes that are asked for")


_TYPE_CHECK = f"{_SERVER}deserialize_tensor ('invalid tensor type'), since 1.0"
_declare_bad_tensor(70, "type-9999", "type 9999", {"type": 9999}, _TYPE_CHECK)
_declare_bad_tensor(
    71, "a-removed-type", "type 4, which ggml has removed", {"type": 4}, _TYPE_CHECK
)
_declare_bad_tensor(
    72,
    "an-unknown-buffer",
    "a buffer that was never given out",
    {"buffer": 0xDEAD_BEEF_0000},
    f"{_SERVER}get_tensor ('error deserializing tensor'), since 1.0",
)
_declare_bad_tensor(
    73,
    "no-buffer",
    "buffer 0",
    {"buffer": 0},
    f"{_SERVER}get_tensor ('error deserializing tensor'), since 1.0",
)


def _declare_large_tensor(number: int, name: str, wrong: str, change: Fields) -> None:
    @TENSORS.case(
        number,
        name=f"get-of-{name}",
        sends=f"GET_TENSOR of 16 bytes of a tensor with {wrong}",
        expects="the connection is closed, or the bytes come, which are within the buffer",
        source=f"{_SERVER}deserialize_tensor (GGML_ASSERT of the end), since 1.0",
        why="Upstream's server checks it by an assertion, which ends it and all its clients.",
        hostile=True,
    )
    def check(c: Context) -> None:
        peer, buffer, content = filled(c)
        peer.send(Command.GET_TENSOR, tensor={**buffer.leaf(1, (32,)), **change}, size=16)
        outcome = peer.outcome(Command.GET_TENSOR)
        if not outcome.closed:
            c.equal(outcome.answer, content[:16], "what comes")


_declare_large_tensor(
    74, "a-shape-beyond-its-buffer", "2^20 elements in 4096 bytes", {"ne": [1 << 20, 1, 1, 1]}
)
_declare_large_tensor(
    75,
    "strides-beyond-its-buffer",
    "a stride of 2^31",
    {"ne": [1, 2, 1, 1], "nb": [4, 1 << 31] * 2},
)
_declare_large_tensor(
    76, "a-shape-that-wraps", "2^128 elements", {"ne": [0xFFFFFFFF] * 4, "nb": [0xFFFFFFFF] * 4}
)
_declare_large_tensor(77, "no-elements", "no elements", {"ne": [0, 1, 1, 1]})
