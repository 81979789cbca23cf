"""4.1 to 4.77: SET_TENSOR, GET_TENSOR and the borders of all that names a range of bytes."""

from __future__ import annotations

import random

from conformance.cases.groups import TENSORS
from conformance.suite import Context, Peer
from conformance.suite.filled import SIZE, check_content, filled
from conformance.suite.refusals import Refusal, Send, declare, endured
from conformance.suite.tensors import Fields
from protocol.commands import Command
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size

_SERVER = "ggml-rpc.cpp rpc_server::"
_2_64 = 1 << 64
_UNKNOWN: Fields = {"buffer": 0xDEAD_BEEF_0000}
_OLD_TYPES = tuple(t for t in GgmlType if t <= GgmlType.TQ2_0)


# -- set and get -----------------------------------------------------------------------------------


@TENSORS.case(1, source=f"{_SERVER}set_tensor and get_tensor, since 1.0")
def set_then_get(c: Context) -> None:
    """What a model's weights need first of all.

    Sends: SET_TENSOR of a whole buffer, then GET_TENSOR
    Expects: the bytes that were sent
    """
    peer, buffer, content = filled(c)
    check_content(c, peer, buffer, content, "what comes back")


def _declare_region(number: int, name: str, start: int, size: int) -> None:
    shown = f"{size} bytes at {start} of {SIZE}"

    source = f"{_SERVER}set_tensor (offset), since 1.0"
    sends = f"SET_TENSOR of {shown}, then GET_TENSOR of all"

    @TENSORS.case(number, name=f"set-{name}", sends=sends, source=source)
    def set_region(c: Context) -> None:
        """llama.cpp uploads large tensors in pieces.

        Expects: these bytes are new, all others as before
        """
        peer, buffer, content = filled(c)
        new = bytes(b ^ 0xFF for b in content[start : start + size])
        peer.set(buffer.whole(), new, start)
        expected = content[:start] + new + content[start + size :]
        check_content(c, peer, buffer, expected)

    source = f"{_SERVER}get_tensor (offset, size), since 1.0"

    @TENSORS.case(number + 6, name=f"get-{name}", sends=f"GET_TENSOR of {shown}", source=source)
    def get_region(c: Context) -> None:
        """llama.cpp reads logits of single tokens out of the middle.

        Expects: exactly these bytes
        """
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


@TENSORS.case(14, source="ggml-backend.cpp ggml_backend_tensor_set (size == 0), since 1.0")
def transfer_of_nothing(c: Context) -> None:
    """Tensors of no elements exist; their transfer is sound.

    Sends: SET_TENSOR without data and GET_TENSOR of 0 bytes, at the start of a buffer
    Expects: nothing changes, an answer of 0 bytes comes, and the connection goes on
    """
    peer, buffer, content = filled(c)
    peer.set(buffer.whole(), b"")
    c.equal(peer.get(buffer.whole(), 0), b"", "the answer to GET_TENSOR")
    check_content(c, peer, buffer, content)


@TENSORS.case(15, source=f"{_SERVER}set_tensor (in_tensor->data + offset), since 1.0")
def offset_counts_from_the_tensor(c: Context) -> None:
    """Every tensor but the first lies somewhere within its buffer.

    Sends: SET_TENSOR and GET_TENSOR of a tensor that starts 256 bytes into its buffer
    Expects: offsets count from the tensor's data, not from the buffer's base
    """
    peer, buffer, content = filled(c)
    part = buffer.leaf(1, (64,), at=256)
    peer.set(part, b"\x42" * 16, 32)
    c.equal(peer.get(part, 16, 32), b"\x42" * 16, "what comes of the tensor")
    expected = content[:288] + b"\x42" * 16 + content[304:]
    check_content(c, peer, buffer, expected)


@TENSORS.case(16, source="ggml-rpc.cpp serialize_tensor: data is the view's own, since 1.0")
def view_is_where_its_data_is(c: Context) -> None:
    """The client has added the offset already.

    Sends: SET_TENSOR and GET_TENSOR of a view (view_src, view_offs 512, data at 512)
    Expects: the view's bytes lie where its data points, view_offs isn't added to it
    """
    peer, buffer, content = filled(c)
    view = buffer.leaf(2, (8,), at=512, view_src=1, view_offs=512)
    c.equal(peer.get(view, 32), content[512:544], "the view")
    peer.set(view, bytes(32))
    check_content(c, peer, buffer, content[:512] + bytes(32) + content[544:])


@TENSORS.case(
    17, source="ggml-backend.cpp ggml_backend_tensor_set: offset and size are of memory, since 1.0"
)
def strides_play_no_part(c: Context) -> None:
    """A transfer moves memory, not elements.

    Sends: SET_TENSOR and GET_TENSOR of a transposed tensor (strides 4 * 8, 4)
    Expects: bytes as they lie in memory; strides play no part
    """
    peer, buffer, content = filled(c)
    transposed = buffer.leaf(1, (8, 8), nb=[32, 4, 256, 256])
    c.equal(peer.get(transposed, 256), content[:256], "the tensor")
    peer.set(transposed, content[256:512])
    c.equal(peer.get(buffer.whole(), 256), content[256:512], "the start of the buffer")


@TENSORS.case(18, source=f"{_SERVER}set_tensor, since 1.0")
def every_type_is_bytes(c: Context) -> None:
    """Weights are never converted on the way.

    Sends: SET_TENSOR and GET_TENSOR of two rows of each type
    Expects: the bytes that were sent, whatever they would mean as numbers
    """
    peer, buffer, _ = filled(c, 64 << 10)
    for type_ in _OLD_TYPES:
        ne0 = 4 * TYPE_INFO[type_].block_size
        leaf = buffer.leaf(1, (ne0, 2), type=type_)
        content = random.Random(type_).randbytes(2 * row_size(type_, ne0))
        peer.set(leaf, content)
        c.equal(peer.get(leaf, len(content)), content, f"{type_.name}")


@TENSORS.case(19, source="ggml.c ggml_set_name: takes 63 bytes at most, since 1.0")
def names_of_any_bytes(c: Context) -> None:
    """A name is there for people only.

    Sends: a tensor whose name fills all 64 bytes without a zero, and one that is no UTF-8
    Expects: both are transferred as any other
    """
    peer, buffer, content = filled(c)
    for name in (b"n" * 64, b"\xff\xfe\x80\x00rest", b""):
        c.equal(peer.get(buffer.leaf(1, (8,), name=name), 32), content[:32], f"{name[:4]!r}")


@TENSORS.case(20, source=f"{_SERVER}set_tensor: ids matter in graphs only, since 1.0")
def id_of_zero(c: Context) -> None:
    """Ids name tensors within one graph; a transfer has no other tensor to name.

    Sends: SET_TENSOR and GET_TENSOR of a tensor whose id is 0
    Expects: it is transferred as any other
    """
    peer, buffer, _ = filled(c)
    leaf = buffer.leaf(0, (8,))
    peer.set(leaf, bytes(range(32)))
    c.equal(peer.get(leaf, 32), bytes(range(32)), "what comes back")


@TENSORS.case(21, source="ggml-rpc.cpp rpc_serve_client: one request after the other")
def pipelined_transfers_see_each_other(c: Context) -> None:
    """A client of 6.0 or later reads its logits like this.

    Sends: SET_TENSOR and GET_TENSOR right behind each other, 200 times, read at the end
    Expects: each GET_TENSOR sees the SET_TENSOR before it
    """
    peer, buffer, _ = filled(c)
    leaf = buffer.leaf(1, (1,))
    for i in range(200):
        peer.send(Command.SET_TENSOR, i.to_bytes(4, "little"), tensor=leaf)
        peer.send(Command.GET_TENSOR, tensor=leaf, size=4)
    for i in range(200):
        peer.answer(Command.SET_TENSOR)
        c.equal(peer.answer(Command.GET_TENSOR), i.to_bytes(4, "little"), f"answer {i}")


# -- bounds ----------------------------------------------------------------------------------------


# By name: the tensor, the offset into it, how many bytes; and what is wrong with it.


_RANGED = (Command.SET_TENSOR, Command.GET_TENSOR, Command.MEMSET_TENSOR)


def _ranged(command: Command, offset: int, size: int) -> Send:
    """Send a request about a range of bytes, counted from the start of a buffer of SIZE."""

    def send(c: Context, peer: Peer) -> None:
        buffer = peer.alloc(SIZE)
        # A server may give more than was asked for.
        at = offset + (buffer.size - SIZE if offset == SIZE else 0)
        some = size + (buffer.size - SIZE if size == SIZE else 0)
        if command is Command.SET_TENSOR:
            peer.send(command, b"\xee" * some, tensor=buffer.whole(), offset=at)
        else:
            peer.send(command, tensor=buffer.whole(), offset=at, size=some, value=0xEE)

    return send


def _outside(number: int, name: str, wrong: str, offset: int, size: int) -> list[Refusal]:
    """A range that isn't all in its buffer, by each command that has one."""
    return [
        Refusal(
            number + 10 * i, f"{_verb(command)}-{name}", f"{command.name} with {wrong}",
            _ranged(command, offset, size), command, needs=(command,),
        )
        for i, command in enumerate(_RANGED)
    ]  # fmt: skip


def _verb(command: Command) -> str:
    return command.name.lower().replace("_", "-")


def _sized(number: int, command: Command, size: int, shown: str) -> Refusal:
    name = f"{_verb(command)}-of-{shown.replace(' ', '').replace('^', '-')}-bytes"
    return Refusal(
        number, name, f"{command.name} with offset 8 and a size of {shown}",
        _ranged(command, 8, size), command,
        "Offset and size wrap to a small number when they are added in 64 bits.", needs=(command,),
    )  # fmt: skip


declare(
    TENSORS,
    [
        *_outside(31, "ends-behind-its-buffer", "one byte too many", 1, SIZE),
        *_outside(32, "starts-behind-its-buffer", "an offset of the size", SIZE, 1),
        *_outside(33, "far-behind-its-buffer", "an offset of 2^40", 1 << 40, 16),
        *_outside(34, "offset-that-wraps", "an offset of 2^64 - 64", _2_64 - 64, 16),
        _sized(61, Command.GET_TENSOR, _2_64 - 4, "2^64 - 4"),
        _sized(62, Command.GET_TENSOR, 1 << 63, "2^63"),
        _sized(63, Command.MEMSET_TENSOR, _2_64 - 4, "2^64 - 4"),
        _sized(64, Command.MEMSET_TENSOR, 1 << 63, "2^63"),
    ],
    expects="the connection is closed, and nothing was written",
    why="Addresses are the client's arithmetic; a range is checked without wrapping.",
    source=f"{_SERVER}set_tensor, get_tensor, memset_tensor ('out of buffer bounds')",
)


def _get_of(change: Fields) -> Send:
    """Send GET_TENSOR of 16 bytes of a tensor of which something is wrong."""
    return lambda c, peer: peer.send(
        Command.GET_TENSOR, tensor={**peer.alloc(SIZE).leaf(1, (32,)), **change}, size=16
    )


_LOST = f"{_SERVER}get_tensor ('error deserializing tensor'), since 1.0"
declare(
    TENSORS,
    [
        Refusal(
            number, f"get-of-{name}", f"GET_TENSOR of a tensor with {wrong}", _get_of(change),
            Command.GET_TENSOR, source=source,
            differs="it only looks at the bytes that are asked for",
        )
        for number, name, wrong, change, source in (
            (70, "type-9999", "type 9999", {"type": 9999}, ""),
            (71, "a-removed-type", "type 4, which ggml has removed", {"type": 4}, ""),
            (72, "an-unknown-buffer", "a buffer that was never given out", _UNKNOWN, _LOST),
            (73, "no-buffer", "buffer 0", {"buffer": 0}, _LOST),
        )
    ],
    why="Sizes follow from type, shape and strides; each is the client's word.",
    source=f"{_SERVER}deserialize_tensor ('invalid tensor type'), since 1.0",
)  # fmt: skip
declare(
    TENSORS,
    [
        Refusal(
            67, "memset-beyond-its-tensor",
            "MEMSET_TENSOR of 32 bytes of a tensor of 16, with room behind it in the buffer",
            lambda c, peer: peer.send(
                Command.MEMSET_TENSOR, tensor=peer.alloc(SIZE).leaf(1, (4,)), size=32, value=1
            ),
            Command.MEMSET_TENSOR, needs=(Command.MEMSET_TENSOR,),
        )
    ],
    expects="the connection is closed and nothing is written, or the buffer's bytes are set",
    why="Nobody's memory but the client's own.",
    source=f"{_SERVER}memset_tensor ('out of tensor bounds'), since 5.0",
    judge=endured,
)  # fmt: skip
