"""3: buffers: handles, addresses, sizes, memory."""

from __future__ import annotations

import itertools

from conformance.cases.groups import BUFFERS
from conformance.suite import Context, Peer, RemoteBuffer, tensor
from conformance.suite.tensors import sources_of
from protocol.commands import Command
from protocol.ggml.ops import Op
from protocol.ggml.types import (
    TYPE_INFO,
    GgmlType,
    nbytes,
    row_size,
)

_SERVER = "ggml-rpc.cpp rpc_server::"
_NO_HANDLE = 0xDEAD_BEEF_0000
# Types that every llama.cpp since protocol 1.0 has.
_OLD_TYPES = tuple(t for t in GgmlType if t <= GgmlType.TQ2_0)


def _freed(peer: Peer) -> RemoteBuffer:
    """A buffer that was freed; nothing is allocated after it, which might get the same handle."""
    return _live_and_freed(peer)[1]


def _live_and_freed(peer: Peer) -> tuple[RemoteBuffer, RemoteBuffer]:
    live = peer.alloc(256)
    buffer = peer.alloc(4096)
    peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    return live, buffer


@BUFFERS.case(
    1,
    sends="ALLOC_BUFFER of 1, 64, 4095 and 1 MiB + 1 bytes",
    expects="a handle that is not 0, and at least the size that was asked for",
    source=f"{_SERVER}alloc_buffer, since 1.0",
)
def alloc_gives_what_was_asked_for(c: Context) -> None:
    """llama.cpp lays its tensors out to the last byte that it asked for."""
    peer = c.connect()
    for size in (1, 64, 4095, (1 << 20) + 1):
        answer = peer.call(Command.ALLOC_BUFFER, size=size)
        c.expect(answer.remote_ptr != 0, f"no handle for {size} bytes")
        c.expect(answer.remote_size >= size, f"{answer.remote_size} bytes instead of {size}")
        base = peer.call(Command.BUFFER_GET_BASE, remote_ptr=answer.remote_ptr).base_ptr
        last = tensor(1, (1,), type=GgmlType.I8, buffer=answer.remote_ptr, data=base + size - 1)
        peer.set(last, b"\x5a")
        c.equal(peer.get(last, 1), b"\x5a", f"the last of {size} bytes")


@BUFFERS.case(
    2,
    sends="GET_ALIGNMENT, ALLOC_BUFFER and BUFFER_GET_BASE for buffers of odd sizes",
    expects="each base is a multiple of the alignment",
    source="ggml-rpc.cpp ggml_backend_rpc_buffer_type_get_alignment, since 1.0",
)
def base_is_aligned(c: Context) -> None:
    """A client aligns offsets within a buffer and takes the base for aligned."""
    peer = c.connect()
    alignment = peer.call(Command.GET_ALIGNMENT).alignment
    for size in (1, 33, 1000, 4097):
        base = peer.alloc(size).base
        c.expect(base % alignment == 0, f"base {base:#x} is no multiple of {alignment}")
        c.expect(base != 0, f"base 0 of a buffer of {size} bytes")


@BUFFERS.case(
    3,
    sends="BUFFER_GET_BASE twice",
    expects="the same address",
    source=f"{_SERVER}buffer_get_base, since 1.0",
)
def base_stays(c: Context) -> None:
    """The client asks once and keeps the answer; every tensor's address counts on it."""
    peer = c.connect()
    buffer = peer.alloc(64)
    again = peer.call(Command.BUFFER_GET_BASE, remote_ptr=buffer.handle).base_ptr
    c.equal(again, buffer.base, "the second base")


@BUFFERS.case(
    4,
    sends="BUFFER_GET_BASE with a handle that was freed",
    expects="the connection is closed",
    source=f"{_SERVER}buffer_get_base ('buffer not found'), since 1.0",
    hostile=True,
)
def get_base_of_freed(c: Context) -> None:
    """A freed handle names nothing; taking it for a pointer reads memory that is something else."""
    peer = c.connect()
    peer.send(Command.BUFFER_GET_BASE, remote_ptr=_freed(peer).handle)
    c.refused(peer, Command.BUFFER_GET_BASE)


@BUFFERS.case(
    5,
    sends="BUFFER_GET_BASE with handles that were never given out: 0, 1, a real one + 8, 2^64 - 1",
    expects="the connection is closed each time",
    source=f"{_SERVER}buffer_get_base ('buffer not found'), since 1.0",
    hostile=True,
)
def get_base_of_unknown(c: Context) -> None:
    """A handle is an address to upstream's server: following a made-up one crashes."""
    for wrong in (0, 1, None, (1 << 64) - 1):
        peer = c.connect()
        handle = peer.alloc(64).handle + 8 if wrong is None else wrong
        peer.send(Command.BUFFER_GET_BASE, remote_ptr=handle)
        c.refused(peer, Command.BUFFER_GET_BASE)
        peer.close()


@BUFFERS.case(
    6,
    sends="ALLOC_BUFFER of 0 bytes, and FREE_BUFFER if a handle comes",
    expects="an answer, and the connection goes on",
    source="ggml-backend.cpp ggml_backend_buft_alloc_buffer (size == 0), since 1.0",
)
def alloc_of_nothing(c: Context) -> None:
    """llama.cpp asks for empty buffers where a device gets no tensors."""
    peer = c.connect()
    answer = peer.call(Command.ALLOC_BUFFER, size=0)
    if answer.remote_ptr:
        peer.call(Command.BUFFER_GET_BASE, remote_ptr=answer.remote_ptr)
        peer.call(Command.FREE_BUFFER, remote_ptr=answer.remote_ptr)
    peer.ping()


def _declare_too_much(number: int, size: int, name: str) -> None:
    @BUFFERS.case(
        number,
        name=f"alloc-of-{name}",
        sends=f"ALLOC_BUFFER of {size:#x} bytes",
        expects="handle 0 and size 0, and the connection goes on",
        source=f"{_SERVER}alloc_buffer (buffer == nullptr), since 1.0",
        why="llama.cpp takes a handle of 0 for 'no memory' and tries something smaller.",
        hostile=True,
    )
    def check(c: Context) -> None:
        peer = c.connect()
        answer = peer.call(Command.ALLOC_BUFFER, size=size)
        c.equal(answer.remote_ptr, 0, "the handle")
        c.equal(answer.remote_size, 0, "the size")
        peer.alloc(64)


_declare_too_much(7, 1 << 60, "an-exbibyte")
_declare_too_much(8, (1 << 64) - 1, "all-that-64-bits-count")
_declare_too_much(9, (1 << 64) - 4096, "nearly-all-that-64-bits-count")


@BUFFERS.case(
    10,
    sends="ALLOC_BUFFER 20 times, of different sizes",
    expects="handles that differ and address ranges that don't overlap",
    source=f"{_SERVER}alloc_buffer, since 1.0",
)
def buffers_are_apart(c: Context) -> None:
    """Tensors are found by address: two buffers with one address would be one."""
    peer = c.connect()
    buffers = [peer.alloc(64 + 100 * i) for i in range(20)]
    c.equal(len({b.handle for b in buffers}), len(buffers), "how many handles differ")
    ranges = sorted((b.base, b.base + b.size) for b in buffers)
    for (_, end), (start, _) in itertools.pairwise(ranges):
        c.expect(end <= start, f"a buffer ends at {end:#x} and the next starts at {start:#x}")


@BUFFERS.case(
    11,
    sends="BUFFER_CLEAR with 3 of the middle one of three buffers",
    expects="the other two are as they were",
    source=f"{_SERVER}buffer_clear, since 1.0",
)
def clear_keeps_to_its_buffer(c: Context) -> None:
    """A range that is taken too long damages whatever lies behind it."""
    peer = c.connect()
    buffers = [peer.alloc(1000) for _ in range(3)]
    for i, buffer in enumerate(buffers):
        peer.set(buffer.whole(), bytes([0x10 + i]) * buffer.size)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=buffers[1].handle, value=3)
    for i, value in enumerate((0x10, 3, 0x12)):
        found = peer.get(buffers[i].whole(), buffers[i].size)
        c.equal(found, bytes([value]) * buffers[i].size, f"buffer {i}")


@BUFFERS.case(
    12,
    sends="BUFFER_CLEAR with 0, 1, 0x7f, 0x80 and 0xff",
    expects="every byte of the buffer has that value",
    source=f"{_SERVER}buffer_clear, since 1.0",
)
def clear_values(c: Context) -> None:
    """The value is a byte, not a number of a tensor's type."""
    peer = c.connect()
    buffer = peer.alloc(777)
    for value in (0xFF, 0, 1, 0x7F, 0x80):
        peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=value)
        found = peer.get(buffer.whole(), buffer.size)
        c.equal(found, bytes([value]) * buffer.size, f"the buffer cleared with {value:#x}")


@BUFFERS.case(
    13,
    sends="BUFFER_CLEAR with a handle that was never given out",
    expects="the connection is closed",
    source=f"{_SERVER}buffer_clear ('buffer not found'), since 1.0",
    hostile=True,
)
def clear_of_unknown(c: Context) -> None:
    """Filling memory that a client named by a number of its own would be writing anywhere."""
    peer = c.connect()
    peer.send(Command.BUFFER_CLEAR, remote_ptr=_NO_HANDLE, value=1)
    c.refused(peer, Command.BUFFER_CLEAR, differs="it ignores the request")


@BUFFERS.case(
    14,
    sends="BUFFER_CLEAR with a handle that was freed",
    expects="the connection is closed",
    source=f"{_SERVER}buffer_clear ('buffer not found'), since 1.0",
    hostile=True,
)
def clear_of_freed(c: Context) -> None:
    """The memory may belong to somebody else by now."""
    peer = c.connect()
    peer.send(Command.BUFFER_CLEAR, remote_ptr=_freed(peer).handle, value=1)
    c.refused(peer, Command.BUFFER_CLEAR, differs="it ignores the request")


@BUFFERS.case(
    15,
    sends="FREE_BUFFER twice with the same handle",
    expects="the connection is closed",
    source=f"{_SERVER}free_buffer ('buffer not found'), since 1.0",
    hostile=True,
)
def free_twice(c: Context) -> None:
    """Freeing memory twice is how heaps are broken."""
    peer = c.connect()
    peer.send(Command.FREE_BUFFER, remote_ptr=_freed(peer).handle)
    c.refused(peer, Command.FREE_BUFFER, differs="it ignores the second one")


@BUFFERS.case(
    16,
    sends="FREE_BUFFER with handles that were never given out: 0, a real one + 8, the base address",
    expects="the connection is closed each time",
    source=f"{_SERVER}free_buffer ('buffer not found'), since 1.0",
    hostile=True,
)
def free_of_unknown(c: Context) -> None:
    """A handle is an address to upstream's server: freeing a made-up one breaks its heap."""
    for wrong in ("none", "beside", "base"):
        peer = c.connect(wrong)
        buffer = peer.alloc(4096)
        handle = {"none": 0, "beside": buffer.handle + 8, "base": buffer.base + 64}[wrong]
        peer.send(Command.FREE_BUFFER, remote_ptr=handle)
        c.refused(peer, Command.FREE_BUFFER, differs="it ignores the request")
        peer.close()


def _declare_use_after_free(number: int, name: str, command: Command) -> None:
    @BUFFERS.case(
        number,
        name=f"{name}-freed",
        sends=f"{command.name} of a tensor in a buffer that was freed",
        expects="the connection is closed",
        source=f"{_SERVER}deserialize_tensor (buffers.find), since 1.0",
        why="The memory may hold another buffer by now, of another client even.",
        needs=(command,),
        hostile=True,
    )
    def check(c: Context) -> None:
        peer = c.connect()
        live, freed = _live_and_freed(peer)
        leaf = freed.leaf(1, (8,))
        if command is Command.SET_TENSOR:
            peer.send(command, bytes(32), tensor=leaf)
        elif command is Command.COPY_TENSOR:
            peer.send(command, src=live.leaf(2, (8,)), dst=leaf)
        else:
            peer.send(command, tensor=leaf, size=32, value=1)
        c.refused(peer, command)


_declare_use_after_free(17, "set-tensor-in", Command.SET_TENSOR)
_declare_use_after_free(18, "get-tensor-of", Command.GET_TENSOR)
_declare_use_after_free(19, "copy-tensor-to", Command.COPY_TENSOR)
_declare_use_after_free(20, "memset-tensor-in", Command.MEMSET_TENSOR)


@BUFFERS.case(
    21,
    sends="500 times ALLOC_BUFFER, then FREE_BUFFER of all, then ALLOC_BUFFER once more",
    expects="all succeed",
    source=f"{_SERVER}alloc_buffer and free_buffer, since 1.0",
)
def many_buffers(c: Context) -> None:
    """A model of many layers over a split makes hundreds of buffers."""
    peer = c.connect()
    buffers = [peer.alloc(256) for _ in range(500)]
    for i, buffer in enumerate(buffers):
        peer.set(buffer.leaf(1, (1,)), i.to_bytes(4, "little"))
    for i, buffer in enumerate(buffers):
        c.equal(peer.get(buffer.leaf(1, (1,)), 4), i.to_bytes(4, "little"), f"buffer {i}")
    for buffer in reversed(buffers):
        peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    peer.alloc(256)


@BUFFERS.case(
    22,
    sends="30 times: ALLOC_BUFFER of 256 MiB, a few bytes written at its end, FREE_BUFFER",
    expects="all succeed",
    source=f"{_SERVER}free_buffer, since 1.0",
    deadline=60.0,
)
def freed_memory_comes_back(c: Context) -> None:
    """llama.cpp measures with buffers that it frees again; a leak ends the server in time."""
    peer = c.connect()
    size = 256 << 20
    free = peer.call(Command.GET_DEVICE_MEMORY).free_mem
    if free < 2 * size:
        c.skip(f"the device has {free >> 20} MiB free only")
    for _ in range(30):
        buffer = peer.alloc(size)
        peer.set(buffer.leaf(1, (4,), at=size - 16), bytes(16))
        peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)


@BUFFERS.case(
    23,
    sends="a buffer filled with 0xa5 and freed, then another of the same size, read",
    expects="no 0xa5 in it",
    source="open in the protocol: ggml leaves new memory as it is",
)
def new_memory_is_clean(c: Context) -> None:
    """What was there before may be another client's weights or text."""
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


@BUFFERS.case(
    24,
    sends="GET_ALIGNMENT, twice",
    expects="the same power of two both times",
    source=f"{_SERVER}get_alignment, since 1.0",
)
def alignment_is_a_power_of_two(c: Context) -> None:
    """ggml rounds up by masking."""
    peer = c.connect()
    first = peer.call(Command.GET_ALIGNMENT).alignment
    c.expect(first > 0 and first & (first - 1) == 0, f"the alignment is {first}")
    c.equal(peer.call(Command.GET_ALIGNMENT).alignment, first, "the second alignment")


@BUFFERS.case(
    25,
    sends="GET_MAX_SIZE",
    expects="at least 1 MiB",
    source=f"{_SERVER}get_max_size, since 1.0",
)
def max_size_is_usable(c: Context) -> None:
    """llama.cpp cuts its buffers into pieces of this size; 0 would make it cut for ever."""
    peer = c.connect()
    size = peer.call(Command.GET_MAX_SIZE).max_size
    c.expect(size >= 1 << 20, f"the most that a buffer can have is {size} bytes")


@BUFFERS.case(
    26,
    sends="GET_DEVICE_MEMORY",
    expects="free memory that is not more than the total, which is not 0",
    source=f"{_SERVER}get_device_memory, since 1.0",
)
def memory_adds_up(c: Context) -> None:
    """llama.cpp deals layers out by free memory, and divides by the sum."""
    peer = c.connect()
    memory = peer.call(Command.GET_DEVICE_MEMORY)
    c.expect(memory.total_mem > 0, "the total is 0")
    c.expect(
        memory.free_mem <= memory.total_mem,
        f"{memory.free_mem} bytes free of {memory.total_mem}",
    )


@BUFFERS.case(
    27,
    sends="GET_DEVICE_MEMORY before a buffer of 64 MiB is allocated and filled, with it, and after",
    expects="the same total each time; free memory and the buffer together are not more than it",
    source="open in the protocol: the CPU backend tells the machine's memory, GPU backends theirs",
)
def memory_counts_buffers(c: Context) -> None:
    """A client that asks in between plans with what it is told."""
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


@BUFFERS.case(
    28,
    sends="GET_ALLOC_SIZE of a contiguous tensor of each type, of 1, 3 and 512 blocks a row",
    expects="at least the bytes that the tensor has",
    source=f"{_SERVER}get_alloc_size, ggml_backend_buft_get_alloc_size, since 1.0",
)
def alloc_size_of_every_type(c: Context) -> None:
    """The client lays tensors out by the answer: a small one makes them overlap."""
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


@BUFFERS.case(
    29,
    sends="GET_ALLOC_SIZE of padded and permuted F32 tensors",
    expects="at least the bytes from the first element to behind the last one",
    source="ggml.c ggml_nbytes by way of ggml_backend_buft_get_alloc_size, since 1.0",
)
def alloc_size_with_strides(c: Context) -> None:
    """The size follows the strides, not the number of elements."""
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
    30,
    sends="GET_ALLOC_SIZE of the results of MUL_MAT_ID and FLASH_ATTN_EXT with their sources",
    expects="at least the bytes of the result",
    source="ggml-rpc.cpp ggml_backend_rpc_buffer_type_get_alloc_size, sources since 3.6",
)
def alloc_size_of_ops(c: Context) -> None:
    """These two may want room behind their result; the client asks for them by name."""
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


@BUFFERS.case(
    31,
    sends="GET_ALLOC_SIZE of a tensor of type 4 (removed), 9999 and 2^32 - 1",
    expects="the connection is closed each time",
    source=f"{_SERVER}deserialize_tensor ('invalid tensor type'), since 1.0",
    hostile=True,
)
def alloc_size_of_unknown_type(c: Context) -> None:
    """A type is an index into a table; the removed ones have blocks of 0 elements."""
    for type_ in (4, 9999, 0xFFFFFFFF):
        peer = c.connect(f"type {type_}")
        fields = {**tensor(1, (32,)), "type": type_}
        peer.send(Command.GET_ALLOC_SIZE, tensor=fields)
        c.refused(peer, Command.GET_ALLOC_SIZE)
        peer.close()


@BUFFERS.case(
    32,
    sends="INIT_TENSOR of a quantized tensor, of a view, and of one without a buffer",
    expects="the connection goes on",
    source=f"{_SERVER}init_tensor, since 1.0",
)
def init_tensor(c: Context) -> None:
    """llama.cpp sends it for each quantized tensor whose rows may need padding."""
    peer = c.connect()
    buffer = peer.alloc(4096)
    whole = buffer.leaf(1, (96, 4), type=GgmlType.Q4_0)
    view = buffer.leaf(2, (32, 4), at=18, type=GgmlType.Q4_0, nb=whole["nb"], view_src=1)
    for fields in (whole, {**view, "view_offs": 18}, tensor(3, (64,))):
        peer.call(Command.INIT_TENSOR, tensor=fields)
    peer.ping()


@BUFFERS.case(
    33,
    sends="INIT_TENSOR of a tensor of type 9999",
    expects="the connection is closed",
    source=f"{_SERVER}deserialize_tensor ('invalid tensor type'), since 1.0",
    hostile=True,
)
def init_tensor_of_unknown_type(c: Context) -> None:
    """A type is an index into a table."""
    peer = c.connect()
    peer.send(Command.INIT_TENSOR, tensor={**tensor(1, (32,)), "type": 9999})
    c.refused(peer, Command.INIT_TENSOR)


@BUFFERS.case(
    34,
    sends="INIT_TENSOR of a tensor that reaches 4 bytes beyond its buffer",
    expects="the connection is closed, or goes on where there is nothing to initialise",
    source=f"{_SERVER}deserialize_tensor (GGML_ASSERT of the end), since 1.0",
    hostile=True,
)
def init_tensor_beyond_its_buffer(c: Context) -> None:
    """Upstream's server checks this by an assertion, which ends it and all its clients."""
    peer = c.connect()
    buffer = peer.alloc(256)
    peer.send(Command.INIT_TENSOR, tensor=buffer.leaf(1, (8,), at=buffer.size - 28))
    peer.outcome(Command.INIT_TENSOR)
