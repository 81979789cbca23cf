"""4.80 to 4.104: COPY_TENSOR and MEMSET_TENSOR."""

from __future__ import annotations

from collections.abc import Callable

from conformance.cases.groups import TENSORS
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.filled import SIZE, check_content, filled
from conformance.suite.refusals import Refusal, Send, declare
from conformance.suite.tensors import Fields
from protocol.commands import Command
from protocol.ggml.types import GgmlType

_SERVER = "ggml-rpc.cpp rpc_server::"
# -- copy ------------------------------------------------------------------------------------------


def _copies(c: Context, peer: Peer, src: Fields, dst: Fields) -> bool:
    """Copy; False if the server says that it can't."""
    result = peer.call(Command.COPY_TENSOR, src=src, dst=dst).result
    c.expect(result in (0, 1), f"the result is {result}")
    return bool(result)


@TENSORS.case(80, source=f"{_SERVER}copy_tensor, since 1.0")
def copy_within_a_buffer(c: Context) -> None:
    """llama.cpp moves parts of its cache like this.

    Sends: COPY_TENSOR of 64 bytes within a buffer
    Expects: result 1, and the bytes are there
    """
    peer, buffer, content = filled(c)
    if not _copies(c, peer, buffer.leaf(1, (16,)), buffer.leaf(2, (16,), at=1024)):
        c.differs("the result is 0: the server doesn't copy within a buffer")
    expected = content[:1024] + content[:64] + content[1088:]
    check_content(c, peer, buffer, expected)


@TENSORS.case(81, source=f"{_SERVER}copy_tensor, since 1.0")
def copy_between_buffers(c: Context) -> None:
    """Both are memory of one server: nothing has to go by way of the client.

    Sends: COPY_TENSOR from one buffer to another
    Expects: result 1, and the bytes are there; the source is as before
    """
    peer, one, content = filled(c)
    other = peer.alloc(SIZE)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=other.handle, value=0)
    if not _copies(c, peer, one.leaf(1, (16,), at=100), other.leaf(2, (16,), at=200)):
        c.differs("the result is 0: the server doesn't copy between buffers")
    expected = bytes(200) + content[100:164] + bytes(other.size - 264)
    check_content(c, peer, other, expected, "the destination")
    check_content(c, peer, one, content, "the source")


@TENSORS.case(82, source=f"{_SERVER}copy_tensor, since 1.0")
def copy_onto_itself(c: Context) -> None:
    """A copy without effect is still sound.

    Sends: COPY_TENSOR of a tensor onto itself
    Expects: nothing changes
    """
    peer, buffer, content = filled(c)
    _copies(c, peer, buffer.leaf(1, (16,)), buffer.leaf(2, (16,)))
    check_content(c, peer, buffer, content)


@TENSORS.case(
    83,
    source="open in the protocol: the CPU backend copies by memcpy, which must not overlap",
    hostile=True,
)
def copy_that_overlaps(c: Context) -> None:
    """What comes of the overlap is undefined; what lies around it isn't.

    Sends: COPY_TENSOR of 1024 bytes to 256 bytes further
    Expects: nothing changes outside the destination; in it, what the source had
    """
    peer, buffer, content = filled(c)
    copied = _copies(c, peer, buffer.leaf(1, (256,)), buffer.leaf(2, (256,), at=256))
    found = peer.get(buffer.whole(), buffer.size)
    c.equal(found[:256], content[:256], "what lies before the destination")
    c.equal(found[1280:], content[1280:], "what lies behind the destination")
    if copied and found[256:1280] != content[:1024]:
        c.differs("the overlap was copied in an order that changes the source first")


@TENSORS.case(
    84, source="ggml-cpu/ggml-cpu.cpp ggml_backend_cpu_buffer_cpy_tensor: copies bytes, since 1.0"
)
def copy_of_another_shape(c: Context) -> None:
    """A copy of memory knows no shapes.

    Sends: COPY_TENSOR of 16 F32 as (16) to a tensor of (4, 4), of I32
    Expects: result 1 and the same bytes, or result 0
    """
    peer, buffer, content = filled(c)
    dst = buffer.leaf(2, (4, 4), at=1024, type=GgmlType.I32)
    if _copies(c, peer, buffer.leaf(1, (16,)), dst):
        c.equal(peer.get(dst, 64), content[:64], "the destination")


# -- memset ----------------------------------------------------------------------------------------


def _declare_memset(number: int, name: str, start: int, size: int, value: int) -> None:
    sends = f"MEMSET_TENSOR of {size} bytes at {start} with {value:#x}"
    source, needs = f"{_SERVER}memset_tensor, since 5.0", (Command.MEMSET_TENSOR,)

    @TENSORS.case(number, name=f"memset-{name}", sends=sends, source=source, needs=needs)
    def check(c: Context) -> None:
        """llama.cpp clears single tensors of its cache with it.

        Expects: these bytes have the value, all others are as before
        """
        peer, buffer, content = filled(c)
        part = buffer.leaf(1, (256,), at=512)
        peer.call(Command.MEMSET_TENSOR, tensor=part, offset=start, size=size, value=value)
        at = 512 + start
        expected = content[:at] + bytes([value]) * size + content[at + size :]
        check_content(c, peer, buffer, expected)


_declare_memset(100, "of-all", 0, 1024, 0)
_declare_memset(101, "of-a-part", 100, 33, 0xFF)
_declare_memset(102, "of-the-last-byte", 1023, 1, 0x80)
_declare_memset(103, "of-nothing", 16, 0, 0xFF)


# -- what must not be served -----------------------------------------------------------------------


def _copy(ends: Callable[[RemoteBuffer], tuple[Fields, Fields]]) -> Send:
    def send(c: Context, peer: Peer) -> None:
        src, dst = ends(peer.alloc(SIZE))
        peer.send(Command.COPY_TENSOR, src=src, dst=dst)

    return send


_LOST = f"{_SERVER}copy_tensor ('error deserializing tensors'), since 1.0"
_UNKNOWN: Fields = {"buffer": 0xDEAD_BEEF_0000}
declare(
    TENSORS,
    [
        Refusal(
            number, f"copy-{name}", f"COPY_TENSOR {wrong}", _copy(ends), Command.COPY_TENSOR,
            "A copy both reads and writes by addresses that the client computed.", source,
        )
        for number, name, wrong, source, ends in (
            (
                85, "to-behind-its-buffer",
                "of 256 bytes to a tensor of 16 at the end of its buffer",
                f"{_SERVER}copy_tensor ('out-of-bounds write'), since 1.0",
                lambda b: (b.leaf(1, (64,)), b.leaf(2, (4,), at=b.size - 16)),
            ),
            (
                90, "from-an-unknown-buffer",
                "of a source in a buffer that was never given out", _LOST,
                lambda b: (b.leaf(1, (16,), **_UNKNOWN), b.leaf(2, (16,))),
            ),
            (
                91, "to-an-unknown-buffer",
                "to a destination in a buffer that was never given out", _LOST,
                lambda b: (b.leaf(1, (16,)), b.leaf(2, (16,), **_UNKNOWN)),
            ),
            (
                92, "of-an-unknown-type", "of a source of type 9999",
                f"{_SERVER}deserialize_tensor ('invalid tensor type'), since 1.0",
                lambda b: ({**b.leaf(1, (16,)), "type": 9999}, b.leaf(2, (16,))),
            ),
        )
    ]
    + [
        Refusal(
            104, "memset-in-an-unknown-buffer",
            "MEMSET_TENSOR of a tensor in a buffer that was never given out",
            lambda c, peer: peer.send(
                Command.MEMSET_TENSOR, tensor=peer.alloc(64).leaf(1, (8,), **_UNKNOWN), size=16
            ),
            Command.MEMSET_TENSOR,
            "Filling memory that a client named by a number of its own would be writing anywhere.",
            f"{_SERVER}memset_tensor ('error deserializing tensor'), since 5.0",
            needs=(Command.MEMSET_TENSOR,),
        )
    ],
)  # fmt: skip
