"""Faults of buffers and bytes: bounds, offsets, values, ownership, what is freed."""

from __future__ import annotations

from typing import Any

from protocol.commands import Command
from protocol.requests import Request
from rpc_server.cache.store import TensorCache
from rpc_server.devices.base import Storage
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.session import uploads
from rpc_server.session.buffers import Budget, Buffer, Buffers
from rpc_server.session.context import ServerContext
from rpc_server.session.handlers.tensors import fill
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import Handler, fault, handle, replace_method

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

    def make(right: Any) -> Any:
        def view(self: HostStorage, offset: int, size: int) -> memoryview:
            found = right(self, offset, size)
            return found if len(found) == size else memoryview(bytes(found) + b"\x55")

        return view

    Buffer.locate = locate  # type: ignore[method-assign]
    replace_method(HostStorage, "view", make)


_SLOTS = ("f16", "f32", "bf16", "q80", "q40", "q41", "q50")


@fault("GET_TENSOR starts at the tensor, whatever the offset", "get-the-last-byte",
       *(f"slot-saved-with-flash-attention-{t}" for t in _SLOTS),
       "slot-saved-without-flash-attention-f16",
       "slot-saved-without-flash-attention-f32")  # fmt: skip
def get_ignores_offset() -> None:
    def make(right: Handler) -> Handler:
        def wrong(s: Session, request: Request) -> None:
            request.fields.offset = 0
            right(s, request)

        return wrong

    handle(Command.GET_TENSOR, make)


@fault("SET_TENSOR starts at the tensor, whatever the offset", "set-the-last-byte",
       *(f"slot-restored-with-flash-attention-{t}" for t in _SLOTS),
       "slot-restored-without-flash-attention-f16",
       "slot-restored-without-flash-attention-f32")  # fmt: skip
def set_ignores_offset() -> None:
    def make(right: Any) -> Any:
        def begin(s: Session, upload: Any) -> None:
            upload.fields.offset = 0
            right(s, upload)

        return begin

    replace_method(uploads, "begin", make)


@fault("of a SET_TENSOR of over 1 MiB only the first arrives", "large-upload")
def large_upload_truncated() -> None:
    kept = 1 << 20

    def make(right: Any) -> Any:
        def end(s: Session) -> None:
            if s.upload.direct is not None:
                buffer, start, size, _ = s.upload.direct
                if size > kept:
                    buffer.storage.fill(start + kept, size - kept, 0)
            right(s)

        return end

    replace_method(uploads, "end", make)


@fault("MEMSET_TENSOR fills one byte more", "memset-of-a-part")
def memset_one_too_many() -> None:
    def wrong(s: Session, request: Request) -> None:
        fields = request.fields
        buffer, start = s.locate(fields.tensor, fields.offset, fields.size)
        more = min(fields.size + 1, buffer.size - start)
        fill(s, request.command, buffer, start, more, fields.value)

    handle(Command.MEMSET_TENSOR, lambda right: wrong)


@fault("BUFFER_CLEAR fills with zeros, whatever the value", "clear-values")
def clear_ignores_value() -> None:
    def make(right: Handler) -> Handler:
        def wrong(s: Session, request: Request) -> None:
            request.fields.value = 0
            right(s, request)

        return wrong

    handle(Command.BUFFER_CLEAR, make)


@fault("BUFFER_CLEAR leaves out the last byte", "clear-values")
def clear_one_too_few() -> None:
    def wrong(s: Session, request: Request) -> None:
        buffer = s.buffers.get(request.fields.remote_ptr)
        fill(s, request.command, buffer, 0, max(0, buffer.size - 1), request.fields.value)

    handle(Command.BUFFER_CLEAR, lambda right: wrong)


@fault("COPY_TENSOR writes to the start of the destination's buffer", "copy-within-a-buffer")
def copy_ignores_destination() -> None:
    def make(right: Any) -> Any:
        def copy_from(self: HostStorage, other: Any, src: int, dst: int, size: int) -> None:
            right(self, other, src, 0, size)

        return copy_from

    replace_method(HostStorage, "copy_from", make)


@fault(
    "COPY_TENSOR goes byte by byte from the front, over what it has yet to read",
    "copy-that-overlaps",
)
def copy_ignores_overlap() -> None:
    def copy_from(
        self: HostStorage, other: Storage, src_offset: int, dst_offset: int, size: int
    ) -> None:
        source, target = other.view(src_offset, size), self.view(dst_offset, size)
        for at in range(size):
            target[at] = source[at]

    HostStorage.copy_from = copy_from  # type: ignore[method-assign]


@fault("FREE_BUFFER gives nothing back", "freed-memory-comes-back", options=_LITTLE_MEMORY)
def free_leaks() -> None:
    def release(self: Budget, storage: Any) -> None:
        storage.close()

    Budget.release = release  # type: ignore[method-assign]


@fault("a freed buffer can be used on", "get-tensor-of-freed")
def free_does_nothing() -> None:
    def wrong(s: Session, request: Request) -> None:
        s.buffers.get(request.fields.remote_ptr)
        s.answer_empty(request.command)

    handle(Command.FREE_BUFFER, lambda right: wrong)


@fault(
    "what a client leaves behind is kept",
    "memory-of-ended-connections-comes-back",
    options=_LITTLE_MEMORY,
)
def departed_keep_their_memory() -> None:
    def take_all(self: Buffers) -> list[Buffer]:
        return []

    Buffers.take_all = take_all  # type: ignore[method-assign]


@fault("a client's handles lead to the buffers of all", "get-from-another-clients-buffer")
def buffers_of_others_reachable() -> None:
    everyone: dict[int, Buffer] = {}

    def make(right: Any) -> Any:
        def init(self: Buffers, *args: Any, **more: Any) -> None:
            right(self, *args, **more)
            self._by_handle = everyone

        return init

    def take_all(self: Buffers) -> list[Buffer]:
        return []

    replace_method(Buffers, "__init__", make)
    Buffers.take_all = take_all  # type: ignore[method-assign]


@fault("a buffer of 0 bytes has a handle that is none", "alloc-of-nothing")
def alloc_of_zero_wrong() -> None:
    def make(right: Handler) -> Handler:
        def wrong(s: Session, request: Request) -> None:
            if request.fields.size:
                right(s, request)
                return
            s.answer(request.command, {"remote_ptr": 0x123456, "remote_size": 0})

        return wrong

    handle(Command.ALLOC_BUFFER, make)


@fault(
    "a buffer of a page and more has 64 bytes less than its answer says",
    "alloc-gives-what-was-asked-for",
)
def buffer_smaller_than_told() -> None:
    def make(right: Any) -> Any:
        def allocate(self: Buffers, device: int, size: int, *more: Any) -> Buffer:
            buffer: Buffer = right(self, device, size, *more)
            if size >= 4096:
                buffer.size -= 64
            return buffer

        return allocate

    replace_method(Buffers, "allocate", make)


def keep_freed_memory() -> None:
    """Leave the memory of freed buffers where it is: what still uses it has something to run on."""
    ServerContext.release = lambda self, buffers: None  # type: ignore[method-assign]


@fault("no memory ends the connection", "alloc-of-an-exbibyte")
def no_memory_is_fatal() -> None:
    def allocation_failed(self: Session, size: int, error: Exception) -> None:
        from protocol.errors import ProtocolError

        raise ProtocolError(str(error))

    Session.allocation_failed = allocation_failed  # type: ignore[method-assign]


@fault("the cache's hash is of the first 64 KiB only", "hash-of-large-content", options=_CACHE)
def hash_of_the_beginning() -> None:
    def make(right: Any) -> Any:
        def init(self: TensorCache, folder: Any, fnv: Any, *more: Any, **options: Any) -> None:
            right(self, folder, lambda data: fnv(data[: 64 << 10]), *more, **options)

        return init

    replace_method(TensorCache, "__init__", make)


@fault("a hash that is known brings no data", "model-loaded-twice", options=_CACHE)
def hash_hit_without_data() -> None:
    def load(
        self: TensorCache, digest: int, place: memoryview, user: str = "", wanted: Any = None
    ) -> bool:
        return (self.folder / f"{digest:016x}").exists()

    TensorCache.load = load  # type: ignore[method-assign]


@fault(
    "cached data are served to tensors of another size",
    "hash-of-content-that-does-not-fit",
    options=_CACHE,
)
def hash_hit_of_any_size() -> None:
    def load(
        self: TensorCache, digest: int, place: memoryview, user: str = "", wanted: Any = None
    ) -> bool:
        path = self.folder / f"{digest:016x}"
        if not path.exists():
            return False
        content = path.read_bytes()[: len(place)]
        place[: len(content)] = content
        return True

    TensorCache.load = load  # type: ignore[method-assign]


@fault("every hash is known", "hash-that-is-not-known", "weights-that-nobody-has")
def hash_always_hits() -> None:
    def wrong(s: Session, request: Request) -> None:
        s.answer(request.command, {"result": 1})

    handle(Command.SET_TENSOR_HASH, lambda right: wrong)
