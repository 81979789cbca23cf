"""Faults of buffers and bytes: bounds, offsets, values, ownership, what is freed."""

from __future__ import annotations

from typing import Any

from protocol.commands import Command
from protocol.errors import ProtocolError
from protocol.requests import Request
from rpc_server.cache.store import TensorCache
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.session import uploads
from rpc_server.session.buffers import Budget, Buffer, Buffers
from rpc_server.session.context import ServerContext
from rpc_server.session.handlers.tensors import fill
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import Handler, Place, fault, instead_of, put

_LITTLE_MEMORY = ("--mem", "1G")
_CACHE = ("--cache",)


@fault("a byte beyond a buffer's end can be read", "get-tensor-ends-behind-its-buffer")
def bounds_off_by_one() -> None:
    def locate(self: Buffer, data: int, offset: int, size: int) -> int:
        start = data + offset - self.base
        if start < 0 or data < self.base or start + size > self.size + 1:
            from rpc_server.session.buffers import BadAddressError

            raise BadAddressError("outside")
        return start

    def view(right: Any, self: HostStorage, offset: int, size: int) -> memoryview:
        found: memoryview = right(self, offset, size)
        return found if len(found) == size else memoryview(bytes(found) + b"\x55")

    Buffer.locate = locate  # type: ignore[method-assign]
    put((HostStorage, "view"), view)


_SLOTS = (
    *(f"with-flash-attention-{t}" for t in ("f16", "f32", "bf16", "q80", "q40", "q41", "q50")),
    *(f"without-flash-attention-{t}" for t in ("f16", "f32")),
)


def _taken_for(place: Place, **fields: int) -> None:
    """Have what takes a session and a request (or an upload) find these values in its fields."""

    def wrong(right: Any, s: Session, request: Any) -> None:
        for name, value in fields.items():
            setattr(request.fields, name, value)
        right(s, request)

    put(place, wrong)


@fault("GET_TENSOR starts at the tensor, whatever the offset", "get-the-last-byte",
       *(f"slot-saved-{how}" for how in _SLOTS))  # fmt: skip
def get_ignores_offset() -> None:
    _taken_for(Command.GET_TENSOR, offset=0)


@fault("SET_TENSOR starts at the tensor, whatever the offset", "set-the-last-byte",
       *(f"slot-restored-{how}" for how in _SLOTS))  # fmt: skip
def set_ignores_offset() -> None:
    _taken_for((uploads, "begin"), offset=0)


@fault("BUFFER_CLEAR fills with zeros, whatever the value", "clear-values")
def clear_ignores_value() -> None:
    _taken_for(Command.BUFFER_CLEAR, value=0)


@fault("of a SET_TENSOR of over 1 MiB only the first arrives", "large-upload")
@instead_of(uploads, "end")
def large_upload_truncated(right: Any, s: Session) -> None:
    kept = 1 << 20
    if s.upload.direct is not None:
        buffer, start, size, _ = s.upload.direct
        if size > kept:
            buffer.storage.fill(start + kept, size - kept, 0)
    right(s)


@fault("MEMSET_TENSOR fills one byte more", "memset-of-a-part")
@instead_of(Command.MEMSET_TENSOR)
def memset_one_too_many(right: Handler, s: Session, request: Request) -> None:
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, fields.size)
    more = min(fields.size + 1, buffer.size - start)
    fill(s, request.command, buffer, start, more, fields.value)


@fault("BUFFER_CLEAR leaves out the last byte", "clear-values")
@instead_of(Command.BUFFER_CLEAR)
def clear_one_too_few(right: Handler, s: Session, request: Request) -> None:
    buffer = s.buffers.get(request.fields.remote_ptr)
    fill(s, request.command, buffer, 0, max(0, buffer.size - 1), request.fields.value)


@fault("COPY_TENSOR writes to the start of the destination's buffer", "copy-within-a-buffer")
@instead_of(HostStorage, "copy_from")
def copy_ignores_destination(right: Any, *args: Any) -> None:
    storage, other, source, _, size = args
    right(storage, other, source, 0, size)


@fault(
    "COPY_TENSOR goes byte by byte from the front, over what it has yet to read",
    "copy-that-overlaps",
)
@instead_of(HostStorage, "copy_from")
def copy_ignores_overlap(right: Any, *args: Any) -> None:
    storage, other, src_offset, dst_offset, size = args
    source, target = other.view(src_offset, size), storage.view(dst_offset, size)
    for at in range(size):
        target[at] = source[at]


@fault("FREE_BUFFER gives nothing back", "freed-memory-comes-back", options=_LITTLE_MEMORY)
@instead_of(Budget, "release")
def free_leaks(right: Any, self: Budget, storage: Any) -> None:
    storage.close()


@fault("a freed buffer can be used on", "get-tensor-of-freed")
@instead_of(Command.FREE_BUFFER)
def free_does_nothing(right: Handler, s: Session, request: Request) -> None:
    s.buffers.get(request.fields.remote_ptr)
    s.answer_empty(request.command)


@fault(
    "what a client leaves behind is kept",
    "memory-of-ended-connections-comes-back",
    options=_LITTLE_MEMORY,
)
@instead_of(Buffers, "take_all")
def departed_keep_their_memory(right: Any, self: Buffers) -> list[Buffer]:
    return []


@fault("a client's handles lead to the buffers of all", "get-from-another-clients-buffer")
def buffers_of_others_reachable() -> None:
    everyone: dict[int, Buffer] = {}

    def init(right: Any, self: Buffers, *args: Any, **more: Any) -> None:
        right(self, *args, **more)
        self._by_handle = everyone

    put((Buffers, "__init__"), init)
    departed_keep_their_memory()


@fault("a buffer of 0 bytes has a handle that is none", "alloc-of-nothing")
@instead_of(Command.ALLOC_BUFFER)
def alloc_of_zero_wrong(right: Handler, s: Session, request: Request) -> None:
    if request.fields.size:
        right(s, request)
        return
    s.answer(request.command, {"remote_ptr": 0x123456, "remote_size": 0})


@fault(
    "a buffer of a page and more has 64 bytes less than its answer says",
    "alloc-gives-what-was-asked-for",
)
@instead_of(Buffers, "allocate")
def buffer_smaller_than_told(right: Any, self: Buffers, device: int, size: int, *more: Any) -> Any:
    buffer: Buffer = right(self, device, size, *more)
    if size >= 4096:
        buffer.size -= 64
    return buffer


def keep_freed_memory() -> None:
    """Leave the memory of freed buffers where it is: what still uses it has something to run on."""
    ServerContext.release = lambda self, buffers: None  # type: ignore[method-assign]


@fault("no memory ends the connection", "alloc-of-an-exbibyte")
@instead_of(Session, "allocation_failed")
def no_memory_is_fatal(right: Any, self: Session, size: int, error: Exception) -> None:
    raise ProtocolError(str(error))


@fault("the cache's hash is of the first 64 KiB only", "hash-of-large-content", options=_CACHE)
@instead_of(TensorCache, "__init__")
def hash_of_the_beginning(right: Any, *args: Any, **options: Any) -> None:
    cache, folder, fnv, *more = args
    right(cache, folder, lambda data: fnv(data[: 64 << 10]), *more, **options)


@fault("a hash that is known brings no data", "model-loaded-twice", options=_CACHE)
@instead_of(TensorCache, "load")
def hash_hit_without_data(right: Any, self: TensorCache, digest: int, *more: Any) -> bool:
    return (self.folder / f"{digest:016x}").exists()


@fault(
    "cached data are served to tensors of another size",
    "hash-of-content-that-does-not-fit",
    options=_CACHE,
)
@instead_of(TensorCache, "load")
def hash_hit_of_any_size(right: Any, self: TensorCache, digest: int, *more: Any) -> bool:
    path, place = self.folder / f"{digest:016x}", more[0]
    if not path.exists():
        return False
    content = path.read_bytes()[: len(place)]
    place[: len(content)] = content
    return True


@fault("every hash is known", "hash-that-is-not-known", "weights-that-nobody-has")
@instead_of(Command.SET_TENSOR_HASH)
def hash_always_hits(right: Handler, s: Session, request: Request) -> None:
    s.answer(request.command, {"result": 1})
