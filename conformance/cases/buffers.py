"""3: buffers: handles, addresses, sizes, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from conformance.cases.groups import BUFFERS
from conformance.suite import Context, Peer, RemoteBuffer, tensor
from conformance.suite.refusals import Refusal, Send, declare
from conformance.suite.tensors import sources_of
from protocol.commands import Command
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType, nbytes, row_size

_SERVER = "ggml-rpc.cpp rpc_server::"
_NO_HANDLE = 0xDEAD_BEEF_0000
# Types that every llama.cpp since protocol 1.0 has.
_OLD_TYPES = tuple(t for t in GgmlType if t <= GgmlType.TQ2_0)


@BUFFERS.case(1, source=f"{_SERVER}alloc_buffer, since 1.0")
def alloc_gives_what_was_asked_for(c: Context) -> None:
    """llama.cpp lays its tensors out to the last byte that it asked for.

    Sends: ALLOC_BUFFER of 1, 64, 4095 and 1 MiB + 1 bytes
    Expects: a handle that is not 0, and at least the size that was asked for
    """
    peer = c.connect()
    for size in (1, 64, 4095, (1 << 20) + 1):
        answer = peer.call(Command.ALLOC_BUFFER, size=size)
        c.expect(answer.remote_ptr != 0, f"no handle for {size} bytes")
        c.expect(answer.remote_size >= size, f"{answer.remote_size} bytes instead of {size}")
        base = peer.call(Command.BUFFER_GET_BASE, remote_ptr=answer.remote_ptr).base_ptr
        last = tensor(1, (1,), type=GgmlType.I8, buffer=answer.remote_ptr, data=base + size - 1)
        peer.set(last, b"\x5a")
        c.equal(peer.get(last, 1), b"\x5a", f"the last of {size} bytes")


@BUFFERS.case(2, source="ggml-rpc.cpp ggml_backend_rpc_buffer_type_get_alignment, since 1.0")
def base_is_aligned(c: Context) -> None:
    """A client aligns offsets within a buffer and takes the base for aligned.

    Sends: GET_ALIGNMENT, ALLOC_BUFFER and BUFFER_GET_BASE for buffers of odd sizes
    Expects: each base is a multiple of the alignment
    """
    peer = c.connect()
    alignment = peer.call(Command.GET_ALIGNMENT).alignment
    for size in (1, 33, 1000, 4097):
        base = peer.alloc(size).base
        c.expect(base % alignment == 0, f"base {base:#x} is no multiple of {alignment}")
        c.expect(base != 0, f"base 0 of a buffer of {size} bytes")


@BUFFERS.case(3, source=f"{_SERVER}buffer_get_base, since 1.0")
def base_stays(c: Context) -> None:
    """The client asks once and keeps the answer; every tensor's address counts on it.

    Sends: BUFFER_GET_BASE twice
    Expects: the same address
    """
    peer = c.connect()
    buffer = peer.alloc(64)
    again = peer.call(Command.BUFFER_GET_BASE, remote_ptr=buffer.handle).base_ptr
    c.equal(again, buffer.base, "the second base")


@BUFFERS.case(6, source="ggml-backend.cpp ggml_backend_buft_alloc_buffer (size == 0), since 1.0")
def alloc_of_nothing(c: Context) -> None:
    """llama.cpp asks for empty buffers where a device gets no tensors.

    Sends: ALLOC_BUFFER of 0 bytes, and FREE_BUFFER if a handle comes
    Expects: an answer, and the connection goes on
    """
    peer = c.connect()
    answer = peer.call(Command.ALLOC_BUFFER, size=0)
    if answer.remote_ptr:
        peer.call(Command.BUFFER_GET_BASE, remote_ptr=answer.remote_ptr)
        peer.call(Command.FREE_BUFFER, remote_ptr=answer.remote_ptr)
    peer.ping()


@BUFFERS.case(10, source=f"{_SERVER}alloc_buffer, since 1.0")
def buffers_are_apart(c: Context) -> None:
    """Tensors are found by address: two buffers with one address would be one.

    Sends: ALLOC_BUFFER 20 times, of different sizes
    Expects: handles that differ and address ranges that don't overlap
    """
    peer = c.connect()
    buffers = [peer.alloc(64 + 100 * i) for i in range(20)]
    c.equal(len({b.handle for b in buffers}), len(buffers), "how many handles differ")
    ranges = sorted((b.base, b.base + b.size) for b in buffers)
    for (_, end), (start, _) in itertools.pairwise(ranges):
        c.expect(end <= start, f"a buffer ends at {end:#x} and the next starts at {start:#x}")


@BUFFERS.case(11, source=f"{_SERVER}buffer_clear, since 1.0")
def clear_keeps_to_its_buffer(c: Context) -> None:
    """A range that is taken too long damages whatever lies behind it.

    Sends: BUFFER_CLEAR with 3 of the middle one of three buffers
    Expects: the other two are as they were
    """
    peer = c.connect()
    buffers = [peer.alloc(1000) for _ in range(3)]
    for i, buffer in enumerate(buffers):
        peer.set(buffer.whole(), bytes([0x10 + i]) * buffer.size)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=buffers[1].handle, value=3)
    for i, value in enumerate((0x10, 3, 0x12)):
        found = peer.get(buffers[i].whole(), buffers[i].size)
        c.equal(found, bytes([value]) * buffers[i].size, f"buffer {i}")


@BUFFERS.case(12, source=f"{_SERVER}buffer_clear, since 1.0")
def clear_values(c: Context) -> None:
    """The value is a byte, not a number of a tensor's type.

    Sends: BUFFER_CLEAR with 0, 1, 0x7f, 0x80 and 0xff
    Expects: every byte of the buffer has that value
    """
    peer = c.connect()
    buffer = peer.alloc(777)
    for value in (0xFF, 0, 1, 0x7F, 0x80):
        peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=value)
        found = peer.get(buffer.whole(), buffer.size)
        c.equal(found, bytes([value]) * buffer.size, f"the buffer cleared with {value:#x}")


@BUFFERS.case(21, source=f"{_SERVER}alloc_buffer and free_buffer, since 1.0")
def many_buffers(c: Context) -> None:
    """A model of many layers over a split makes hundreds of buffers.

    Sends: 500 times ALLOC_BUFFER, then FREE_BUFFER of all, then ALLOC_BUFFER once more
    Expects: all succeed
    """
    peer = c.connect()
    buffers = [peer.alloc(256) for _ in range(500)]
    for i, buffer in enumerate(buffers):
        peer.set(buffer.leaf(1, (1,)), i.to_bytes(4, "little"))
    for i, buffer in enumerate(buffers):
        c.equal(peer.get(buffer.leaf(1, (1,)), 4), i.to_bytes(4, "little"), f"buffer {i}")
    for buffer in reversed(buffers):
        peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    peer.alloc(256)


@BUFFERS.case(22, source=f"{_SERVER}free_buffer, since 1.0", deadline=60.0)
def freed_memory_comes_back(c: Context) -> None:
    """llama.cpp measures with buffers that it frees again; a leak ends the server in time.

    Sends: 30 times: ALLOC_BUFFER of 256 MiB, a few bytes written at its end, FREE_BUFFER
    Expects: all succeed
    """
    peer = c.connect()
    size = 256 << 20
    free = peer.call(Command.GET_DEVICE_MEMORY).free_mem
    if free < 2 * size:
        c.skip(f"the device has {free >> 20} MiB free only")
    for _ in range(30):
        buffer = peer.alloc(size)
        peer.set(buffer.leaf(1, (4,), at=size - 16), bytes(16))
        peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)


@BUFFERS.case(23, source="open in the protocol: ggml leaves new memory as it is")
def new_memory_is_clean(c: Context) -> None:
    """What was there before may be another client's weights or text.

    Sends: a buffer filled with 0xa5 and freed, then another of the same size, read
    Expects: no 0xa5 in it
    """
    peer = c.connect()
    sizes = (4096, 1 << 20)
    for size in sizes:
        old = peer.alloc(size)
        peer.call(Command.BUFFER_CLEAR, remote_ptr=old.handle, value=0xA5)
        peer.call(Command.FREE_BUFFER, remote_ptr=old.handle)
        new = peer.alloc(size)
        found = peer.get(new.whole(), size)
        if found.count(0xA5) > size // 16:
            c.differs(f"a new buffer of {size} bytes holds what was in the freed one")


@BUFFERS.case(24, source=f"{_SERVER}get_alignment, since 1.0")
def alignment_is_a_power_of_two(c: Context) -> None:
    """ggml rounds up by masking.

    Sends: GET_ALIGNMENT, twice
    Expects: the same power of two both times
    """
    peer = c.connect()
    first = peer.call(Command.GET_ALIGNMENT).alignment
    c.expect(first > 0 and first & (first - 1) == 0, f"the alignment is {first}")
    c.equal(peer.call(Command.GET_ALIGNMENT).alignment, first, "the second alignment")


@BUFFERS.case(25, source=f"{_SERVER}get_max_size, since 1.0")
def max_size_is_usable(c: Context) -> None:
    """llama.cpp cuts its buffers into pieces of this size; 0 would make it cut for ever.

    Sends: GET_MAX_SIZE
    Expects: at least 1 MiB
    """
    peer = c.connect()
    size = peer.call(Command.GET_MAX_SIZE).max_size
    c.expect(size >= 1 << 20, f"the most that a buffer can have is {size} bytes")


@BUFFERS.case(26, source=f"{_SERVER}get_device_memory, since 1.0")
def memory_adds_up(c: Context) -> None:
    """llama.cpp deals layers out by free memory, and divides by the sum.

    Sends: GET_DEVICE_MEMORY
    Expects: free memory that is not more than the total, which is not 0
    """
    peer = c.connect()
    memory = peer.call(Command.GET_DEVICE_MEMORY)
    c.expect(memory.total_mem > 0, "the total is 0")
    c.expect(
        memory.free_mem <= memory.total_mem,
        f"{memory.free_mem} bytes free of {memory.total_mem}",
    )


@BUFFERS.case(
    27,
    source="open in the protocol: the CPU backend tells the machine's memory, GPU backends theirs",
)
def memory_counts_buffers(c: Context) -> None:
    """A client that asks in between plans with what it is told.

    Sends: GET_DEVICE_MEMORY before a buffer of 64 MiB is allocated and filled, with it, and after
    Expects: the same total each time; free memory and the buffer together are not more than it
    """
    peer = c.connect()
    size = 64 << 20
    before = peer.call(Command.GET_DEVICE_MEMORY)
    if before.free_mem < 2 * size:
        c.skip(f"the device has {before.free_mem >> 20} MiB free only")
    buffer = peer.alloc(size)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=1)
    during = peer.call(Command.GET_DEVICE_MEMORY)
    peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    after = peer.call(Command.GET_DEVICE_MEMORY)
    c.equal({during.total_mem, after.total_mem}, {before.total_mem}, "the total")
    if during.free_mem + size > during.total_mem:
        c.differs(f"{during.free_mem} bytes free of {during.total_mem}, with {size} in a buffer")


@BUFFERS.case(28, source=f"{_SERVER}get_alloc_size, ggml_backend_buft_get_alloc_size, since 1.0")
def alloc_size_of_every_type(c: Context) -> None:
    """The client lays tensors out by the answer: a small one makes them overlap.

    Sends: GET_ALLOC_SIZE of a contiguous tensor of each type, of 1, 3 and 512 blocks a row
    Expects: at least the bytes that the tensor has
    """
    peer = c.connect()
    for type_ in _OLD_TYPES:
        block = TYPE_INFO[type_].block_size
        for blocks, rows in ((1, 1), (3, 5), (512, 2)):
            fields = tensor(1, (blocks * block, rows), type=type_)
            size = peer.call(Command.GET_ALLOC_SIZE, tensor=fields).alloc_size
            least = row_size(type_, blocks * block) * rows
            c.expect(
                least <= size <= 64 * least + 4096,
                f"{size} bytes for {rows} rows of {blocks * block} {type_.name}, "
                f"which have {least}",
            )


@BUFFERS.case(29, source="ggml.c ggml_nbytes by way of ggml_backend_buft_get_alloc_size, since 1.0")
def alloc_size_with_strides(c: Context) -> None:
    """The size follows the strides, not the number of elements.

    Sends: GET_ALLOC_SIZE of padded and permuted F32 tensors
    Expects: at least the bytes from the first element to behind the last one
    """
    peer = c.connect()
    shapes = (
        ((8, 4, 1, 1), [4, 64, 256, 256]),
        ((4, 8, 1, 1), [32, 4, 128, 128]),
        ((2, 3, 4, 5), [4, 16, 64, 512]),
    )
    for ne, nb in shapes:
        fields = tensor(1, ne, nb=nb)
        size = peer.call(Command.GET_ALLOC_SIZE, tensor=fields).alloc_size
        least = nbytes(GgmlType.F32, ne, nb)
        c.expect(size >= least, f"{size} bytes for {ne} with strides {nb}, which span {least}")


@BUFFERS.case(
    30, source="ggml-rpc.cpp ggml_backend_rpc_buffer_type_get_alloc_size, sources since 3.6"
)
def alloc_size_of_ops(c: Context) -> None:
    """These two may want room behind their result; the client asks for them by name.

    Sends: GET_ALLOC_SIZE of the results of MUL_MAT_ID and FLASH_ATTN_EXT with their sources
    Expects: at least the bytes of the result
    """
    peer = c.connect()
    experts = tensor(2, (256, 8, 4), type=GgmlType.Q8_0)
    rows, ids = tensor(3, (256, 2, 3)), tensor(4, (2, 3), type=GgmlType.I32)
    op = peer.op(Op.MUL_MAT_ID)
    product = tensor(1, (8, 2, 3), op=op, src=[2, 3, 4] + [0] * 7)
    size = peer.call(
        Command.GET_ALLOC_SIZE, tensor=product, srcs=sources_of(experts, rows, ids)
    ).alloc_size
    c.expect(size >= 8 * 2 * 3 * 4, f"{size} bytes for a MUL_MAT_ID of {8 * 2 * 3 * 4}")
    q, k, v = tensor(2, (64, 1, 4)), tensor(3, (64, 32, 4)), tensor(4, (64, 32, 4))
    attention = tensor(1, (64, 4, 1), op=peer.op(Op.FLASH_ATTN_EXT), src=[2, 3, 4] + [0] * 7)
    size = peer.call(Command.GET_ALLOC_SIZE, tensor=attention, srcs=sources_of(q, k, v)).alloc_size
    c.expect(size >= 64 * 4 * 4, f"{size} bytes for a FLASH_ATTN_EXT of {64 * 4 * 4}")


@BUFFERS.case(32, source=f"{_SERVER}init_tensor, since 1.0")
def init_tensor(c: Context) -> None:
    """llama.cpp sends it for each quantized tensor whose rows may need padding.

    Sends: INIT_TENSOR of a quantized tensor, of a view, and of one without a buffer
    Expects: the connection goes on
    """
    peer = c.connect()
    buffer = peer.alloc(4096)
    whole = buffer.leaf(1, (96, 4), type=GgmlType.Q4_0)
    view = buffer.leaf(2, (32, 4), at=18, type=GgmlType.Q4_0, nb=whole["nb"], view_src=1)
    for fields in (whole, {**view, "view_offs": 18}, tensor(3, (64,))):
        peer.call(Command.INIT_TENSOR, tensor=fields)
    peer.ping()


# -- what must not be served -----------------------------------------------------------------------


@BUFFERS.case(
    7, name="alloc-of-an-exbibyte", source=f"{_SERVER}alloc_buffer, since 1.0", hostile=True
)
def alloc_of_too_much(c: Context) -> None:
    """llama.cpp takes a handle of 0 for 'no memory' and tries something smaller.

    Sends: ALLOC_BUFFER of 2^60 bytes, of 2^64 - 4096 and of 2^64 - 1
    Expects: handle 0 and size 0 each time, and the connection goes on
    """
    peer = c.connect()
    for size in (1 << 60, (1 << 64) - 4096, (1 << 64) - 1):
        answer = peer.call(Command.ALLOC_BUFFER, size=size)
        c.equal((answer.remote_ptr, answer.remote_size), (0, 0), f"handle and size for {size:#x}")
    peer.alloc(64)


def _live_and_freed(peer: Peer) -> tuple[RemoteBuffer, RemoteBuffer]:
    """Two buffers, the second freed; nothing is allocated after it that might get its handle."""
    live, freed = peer.alloc(256), peer.alloc(4096)
    peer.call(Command.FREE_BUFFER, remote_ptr=freed.handle)
    return live, freed


def _of_handle(command: Command, handle: Callable[[Peer], int]) -> Send:
    """Send a request about the buffer that ``handle`` makes up."""
    return lambda c, peer: peer.send(command, remote_ptr=handle(peer), value=1)


def _of_freed(command: Command) -> Send:
    return _of_handle(command, lambda peer: _live_and_freed(peer)[1].handle)


def _in_freed(command: Command) -> Send:
    """Send a request about a tensor in a freed buffer."""

    def send(c: Context, peer: Peer) -> None:
        live, freed = _live_and_freed(peer)
        leaf = freed.leaf(1, (8,))
        ends = {"src": live.leaf(2, (8,)), "dst": leaf}
        fields = ends if command is Command.COPY_TENSOR else {"tensor": leaf, "size": 32}
        peer.send(command, bytes(32) if command is Command.SET_TENSOR else b"", **fields)

    return send


def _of_type(command: Command, type_: int) -> Send:
    return lambda c, peer: peer.send(command, tensor={**tensor(1, (32,)), "type": type_})


_NOT_FOUND = "('buffer not found'), since 1.0"
_IGNORES = "it ignores the request"
declare(
    BUFFERS,
    [
        Refusal(
            4, "get-base-of-freed", "BUFFER_GET_BASE with a handle that was freed",
            _of_freed(Command.BUFFER_GET_BASE), Command.BUFFER_GET_BASE,
            "A freed handle names nothing; taking it for a pointer reads what is something else.",
            f"{_SERVER}buffer_get_base {_NOT_FOUND}",
        ),
        Refusal(
            5, "get-base-of-unknown",
            "BUFFER_GET_BASE with handles never given out: 0, 1, a real one + 8, 2^64 - 1",
            (
                *(
                    _of_handle(Command.BUFFER_GET_BASE, lambda peer, n=n: n)  # type: ignore[misc]
                    for n in (0, 1, (1 << 64) - 1)
                ),
                _of_handle(Command.BUFFER_GET_BASE, lambda peer: peer.alloc(64).handle + 8),
            ),
            Command.BUFFER_GET_BASE, "A handle is looked up, never followed.",
            f"{_SERVER}buffer_get_base {_NOT_FOUND}",
        ),
        Refusal(
            13, "clear-of-unknown", "BUFFER_CLEAR with a handle that was never given out",
            _of_handle(Command.BUFFER_CLEAR, lambda peer: _NO_HANDLE), Command.BUFFER_CLEAR,
            "Filling memory that a client named by a number of its own would be writing anywhere.",
            f"{_SERVER}buffer_clear {_NOT_FOUND}", _IGNORES,
        ),
        Refusal(
            14, "clear-of-freed", "BUFFER_CLEAR with a handle that was freed",
            _of_freed(Command.BUFFER_CLEAR), Command.BUFFER_CLEAR,
            "The memory may belong to somebody else by now.",
            f"{_SERVER}buffer_clear {_NOT_FOUND}", _IGNORES,
        ),
        Refusal(
            15, "free-twice", "FREE_BUFFER twice with the same handle",
            _of_freed(Command.FREE_BUFFER), Command.FREE_BUFFER,
            "Freeing memory twice is how heaps are broken.",
            f"{_SERVER}free_buffer {_NOT_FOUND}", "it ignores the second one",
        ),
        Refusal(
            16, "free-of-unknown",
            "FREE_BUFFER with handles never given out: 0, a real one + 8, an address",
            (
                _of_handle(Command.FREE_BUFFER, lambda peer: 0),
                _of_handle(Command.FREE_BUFFER, lambda peer: peer.alloc(4096).handle + 8),
                _of_handle(Command.FREE_BUFFER, lambda peer: peer.alloc(4096).base + 64),
            ),
            Command.FREE_BUFFER, "A handle is looked up, never followed.",
            f"{_SERVER}free_buffer {_NOT_FOUND}", _IGNORES,
        ),
        *(
            Refusal(
                number, name, f"{command.name} of a tensor in a buffer that was freed",
                _in_freed(command), command,
                "The memory may hold another buffer by now, of another client even.",
                f"{_SERVER}deserialize_tensor (buffers.find), since 1.0", needs=(command,),
            )
            for number, name, command in (
                (17, "set-tensor-in-freed", Command.SET_TENSOR),
                (18, "get-tensor-of-freed", Command.GET_TENSOR),
                (19, "copy-tensor-to-freed", Command.COPY_TENSOR),
                (20, "memset-tensor-in-freed", Command.MEMSET_TENSOR),
            )
        ),
        Refusal(
            31, "alloc-size-of-unknown-type",
            "GET_ALLOC_SIZE of a tensor of type 4 (removed), 9999 and 2^32 - 1",
            tuple(_of_type(Command.GET_ALLOC_SIZE, n) for n in (4, 9999, 0xFFFFFFFF)),
            Command.GET_ALLOC_SIZE,
            "A type is an index into a table; the removed ones have blocks of 0 elements.",
        ),
        Refusal(
            33, "init-tensor-of-unknown-type", "INIT_TENSOR of a tensor of type 9999",
            _of_type(Command.INIT_TENSOR, 9999), Command.INIT_TENSOR,
            "A type is an index into a table.",
        ),
    ],
    source=f"{_SERVER}deserialize_tensor ('invalid tensor type'), since 1.0",
)  # fmt: skip
