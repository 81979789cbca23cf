"""One connection's state as the wire's rules see it: each request checked, and its plain answer.

``ServedSession.answer`` gives what a correct server answers, or raises Refused where it would close
the connection. What is sent in a scenario may be something else; that is not decided here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from conformance.serve.graphs import GraphState, check_graph
from conformance.serve.memory import Addresses, Block, HashStore, ServedMemory
from conformance.serve.rules import Notes
from conformance.serve.tensors import TensorView, describe, view_of
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, Dialect
from protocol.errors import ProtocolError
from protocol.ggml.hashing import fnv1a_64
from protocol.graph_payload import decode_graph
from protocol.messages import MAX_SOURCES
from protocol.requests import Request, UploadStart

T = TypeVar("T")

HASH_THRESHOLD = 10 << 20
# llama.cpp asks for the room of quantized tensors whose rows aren't multiples of this.
_PADDED_ROW = 512


class RequestRefused(Exception):  # noqa: N818
    """A correct server closes the connection here; the message says why."""


@dataclass(frozen=True, slots=True)
class Properties:
    """The properties that the server tells of itself.

    ``pad`` is what it wants behind a quantized tensor.
    """

    devices: int = 1
    alignment: int = 64
    max_size: int = 1 << 62
    total: int = 64 << 30
    # What GET_DEVICE_MEMORY answers; None for what is there.
    told_memory: tuple[int, int] | None = None
    pad: int = 0
    # ALLOC_BUFFER gives this much more than was asked for.
    spare: int = 0
    # Allocations after this many are refused; None for none but those beyond the memory.
    allocations: int | None = None
    copies: bool = True
    # Whether data over 10 MiB are kept and served by their hash.
    caches: bool = False
    # ggml_status of graphs, where they are answered.
    graph_status: int = 0


@dataclass(slots=True)
class _Offer:
    """A hash that was answered: with 0 (data are due) or 1 (none are)."""

    tensor: TensorView
    offset: int
    digest: int
    hit: bool


@dataclass(slots=True)
class _Upload:
    tensor: TensorView
    offset: int
    size: int
    target: memoryview
    offer: _Offer | None


@dataclass(slots=True)
class ServedSession:
    """The state of one connection; ``notes`` takes what is found."""

    dialect: Dialect
    properties: Properties
    addresses: Addresses
    store: HashStore
    notes: Notes
    # What GET_ALLOC_SIZE answered, by device and layout: a client keeps it for later connections.
    _asked: dict[Any, int]
    memory: ServedMemory = field(init=False)
    _allocations: int = 0
    _graphs: dict[int, GraphState] = field(default_factory=dict)
    _offers: dict[tuple[int, int], _Offer] = field(default_factory=dict)
    _prepared: set[tuple[int, int]] = field(default_factory=set)
    _upload: _Upload | None = None

    def __post_init__(self) -> None:
        self.memory = ServedMemory(self.addresses, self.properties.total)

    # -- life

    def ended(self) -> None:
        """Take note that the client has ended the connection, all its messages complete."""
        left = self.memory.live
        nbytes = sum(block.size for block in left)
        self.notes.check(
            "buffer/all-freed",
            not left,
            f"{len(left)} buffers with {nbytes} bytes were left when the connection ended",
        )
        for offer in self._offers.values():
            if not offer.hit:
                self.notes.check(
                    "hash/data", False, f"{offer.tensor.name!r}: no data came after the miss"
                )

    # -- answers

    def answer(self, request: Request) -> bytes | memoryview | None:
        """Return the payload of the plain answer to a request, None for a command without one."""
        spec = self.dialect.commands[request.command]
        answer = _HANDLERS[request.command](self, request)
        if spec.answer is Answer.NEVER:
            return None
        if spec.answer is Answer.DATA:
            assert isinstance(answer, memoryview)
            return answer
        assert not isinstance(answer, memoryview)
        return codec(spec.response).build(answer or {})

    def _device(self, request: Request) -> int:
        index = int(getattr(request.fields, "device", 0))
        self._check_device(request.command, index)
        return index

    def _check_device(self, command: Command, index: int) -> None:
        count = self.properties.devices
        self._require(
            "device/exists", index < count, f"{command.name} for device {index} of {count}"
        )

    def _require(self, rule: str, kept: bool, otherwise: str) -> None:
        if not self.notes.check(rule, kept, otherwise):
            raise RequestRefused(otherwise)

    def _found(self, rule: str, what: T | None, otherwise: str) -> T:
        self._require(rule, what is not None, otherwise)
        assert what is not None
        return what

    def _device_count(self, request: Request) -> Mapping[str, Any]:
        return {"device_count": self.properties.devices}

    def _get_alignment(self, request: Request) -> Mapping[str, Any]:
        self._device(request)
        return {"alignment": self.properties.alignment}

    def _get_max_size(self, request: Request) -> Mapping[str, Any]:
        self._device(request)
        return {"max_size": self.properties.max_size}

    def _get_device_memory(self, request: Request) -> Mapping[str, Any]:
        self._device(request)
        told = self.properties.told_memory or (self.memory.free, self.properties.total)
        return {"free_mem": told[0], "total_mem": told[1]}

    def _get_alloc_size(self, request: Request) -> Mapping[str, Any]:
        device = self._device(request)
        tensor = self._tensor(request.fields.tensor)
        for source in getattr(request.fields, "srcs", ())[:MAX_SOURCES]:
            if source.id:
                self._tensor(source)
        size = tensor.nbytes + (self.properties.pad if tensor.info.quantized else 0)
        self._asked[(device, *tensor.layout)] = size
        return {"alloc_size": size}

    # -- buffers

    def _alloc_buffer(self, request: Request) -> Mapping[str, Any]:
        device = self._device(request)
        size = int(request.fields.size)
        limit = self.properties.max_size
        self.notes.check(
            "buffer/max-size", size <= limit, f"a buffer of {size} bytes, the largest is {limit}"
        )
        refuse = self._allocations == self.properties.allocations or size > limit
        block = None if refuse else self.memory.allocate(size + self.properties.spare, device)
        if block is None:
            return {"remote_ptr": 0, "remote_size": 0}
        self._allocations += 1
        return {"remote_ptr": block.handle, "remote_size": block.size}

    def _block(self, what: str, handle: int) -> Block:
        otherwise = f"{what}: {handle:#x} is no buffer of this connection"
        block = self._found("buffer/handle", self.memory.find(handle), otherwise)
        self._require(
            "buffer/freed", not block.freed, f"{what}: buffer {handle:#x} was freed before"
        )
        return block

    def _named(self, request: Request) -> Block:
        return self._block(request.command.name, int(request.fields.remote_ptr))

    def _buffer_get_base(self, request: Request) -> Mapping[str, Any]:
        return {"base_ptr": self._named(request).base}

    def _free_buffer(self, request: Request) -> None:
        block = self._named(request)
        self._prepared = {key for key in self._prepared if key[0] != block.handle}
        self.memory.release(block)
        # As a server does: a graph may have used it.
        self._graphs.clear()

    def _buffer_clear(self, request: Request) -> None:
        self._named(request).data[:] = request.fields.value

    # -- tensors

    def _tensor(self, fields: Any) -> TensorView:
        tensor = view_of(fields)
        self._require(
            "tensor/type", tensor is not None, f"{describe(fields)} is of no type or has no blocks"
        )
        assert tensor is not None
        return tensor

    def _placed(self, command: Command, fields: Any) -> tuple[TensorView, Block]:
        """A tensor off the wire, which has to have memory."""
        tensor = self._tensor(fields)
        what = f"{command.name} of {tensor.name!r}"
        block = self._block(what, tensor.buffer)
        self.check_place(what, tensor, block)
        return tensor, block

    def check_place(self, what: str, tensor: TensorView, block: Block) -> None:
        """Check where a tensor lies; raises Refused where that is not in its buffer."""
        self._require(
            "tensor/inside",
            block.contains(tensor.data, tensor.nbytes),
            f"{what}: {tensor.nbytes} bytes at {tensor.data - block.base:+d} of a buffer "
            f"of {block.size}",
        )
        if tensor.view_src:
            return
        alignment = self.properties.alignment
        self.notes.check(
            "tensor/alignment",
            tensor.data % alignment == 0,
            f"{what}: it lies {tensor.data % alignment} bytes off a multiple of {alignment}",
        )
        asked = self._asked.get((block.device, *tensor.layout))
        if asked is not None:
            self.notes.check(
                "tensor/alloc-size",
                block.contains(tensor.data, asked),
                f"{what}: {asked} bytes at {tensor.data - block.base} were asked for, "
                f"the buffer has {block.size}",
            )

    def begin_upload(self, upload: UploadStart) -> memoryview:
        """Return where the bytes of a SET_TENSOR belong."""
        command = Command.SET_TENSOR
        tensor, block = self._placed(command, upload.fields.tensor)
        offset, size = int(upload.fields.offset), upload.size
        what = f"SET_TENSOR of {tensor.name!r}"
        self._require(
            "set/range",
            offset + size <= tensor.nbytes,
            f"{what}: {size} bytes from {offset} on, the tensor has {tensor.nbytes}",
        )
        self._check_room(what, tensor, block)
        offer = self._offers.pop((tensor.data, offset), None)
        if offer is not None:
            if offer.hit:
                self.notes.check("hash/hit", False, f"{what}: {size} bytes came after the hit")
                offer = None
            else:
                self.notes.check("hash/data", True, "")
                self.notes.check(
                    "hash/large",
                    size > HASH_THRESHOLD,
                    f"{what}: offered by their hash, though only {size} bytes",
                )
        start = tensor.data + offset - block.base
        target = block.view(start, size)
        self._upload = _Upload(tensor, offset, size, target, offer)
        return target

    def _check_room(self, what: str, tensor: TensorView, block: Block) -> None:
        """Of tensors that lie for good, none may lie in the room that another one asked for."""
        if tensor.view_src:
            return
        reserved = self._asked.get((block.device, *tensor.layout), tensor.nbytes)
        if tensor.info.quantized and tensor.ne[0] % _PADDED_ROW:
            asked = (block.device, *tensor.layout) in self._asked
            self.notes.check("alloc-size/asked", asked, f"{what}: its size wasn't asked for")
            prepared = (block.handle, tensor.data) in self._prepared
            self.notes.check("init/sent", prepared, f"{what}: no INIT_TENSOR before its data")
        for address, (room, name) in block.sent.items():
            if address < tensor.data < address + room:
                self.notes.check("tensor/alloc-size", False, f"{what} lies in the room of {name!r}")
        if tensor.info.quantized:
            block.sent[tensor.data] = (reserved, tensor.name)

    def end_upload(self) -> bytes | None:
        """End the upload, which is complete; return the payload of its answer, None without one."""
        upload, self._upload = self._upload, None
        assert upload is not None
        large = upload.size > HASH_THRESHOLD
        if upload.offer is not None or (large and self.properties.caches):
            digest = fnv1a_64(upload.target)
            if upload.offer is not None:
                self.notes.check(
                    "hash/fnv",
                    digest == upload.offer.digest,
                    f"{upload.tensor.name!r}: offered as {upload.offer.digest:016x}, "
                    f"the data have {digest:016x}",
                )
            if large and self.properties.caches:
                self.store.keep(digest, upload.target)
        spec = self.dialect.commands[Command.SET_TENSOR]
        return None if spec.answer is Answer.NEVER else codec(spec.response).build({})

    def _set_tensor_hash(self, request: Request) -> Mapping[str, Any]:
        fields = request.fields
        tensor, block = self._placed(request.command, fields.tensor)
        offset = int(fields.offset)
        self.notes.check(
            "hash/large",
            tensor.nbytes - offset > HASH_THRESHOLD,
            f"{tensor.name!r} is offered by its hash, though only {tensor.nbytes - offset} bytes",
        )
        self._check_room(f"SET_TENSOR_HASH of {tensor.name!r}", tensor, block)
        data = self.store.find(int(fields.hash))
        hit = data is not None and offset + len(data) <= tensor.nbytes
        if data is not None and hit:
            start = tensor.data + offset - block.base
            block.view(start, len(data))[:] = data
            self.notes.check("hash/hit", True, "")
        self._offers[(tensor.data, offset)] = _Offer(tensor, offset, int(fields.hash), hit)
        return {"result": int(hit)}

    def _init_tensor(self, request: Request) -> None:
        tensor, block = self._placed(request.command, request.fields.tensor)
        self._prepared.add((block.handle, tensor.data))

    def _range(self, request: Request, rule: str) -> memoryview:
        fields = request.fields
        tensor, block = self._placed(request.command, fields.tensor)
        offset, size = int(fields.offset), int(fields.size)
        self._require(
            rule,
            offset + size <= tensor.nbytes,
            f"{request.command.name} of {tensor.name!r}: {size} bytes from {offset} on, "
            f"the tensor has {tensor.nbytes}",
        )
        return block.view(tensor.data + offset - block.base, size)

    def _get_tensor(self, request: Request) -> memoryview:
        return self._range(request, "get/range")

    def _memset_tensor(self, request: Request) -> None:
        target = self._range(request, "memset/range")
        target[:] = bytes([request.fields.value]) * len(target)

    def _copy_tensor(self, request: Request) -> Mapping[str, Any]:
        src, src_block = self._placed(request.command, request.fields.src)
        dst, dst_block = self._placed(request.command, request.fields.dst)
        self._require(
            "copy/range",
            dst_block.contains(dst.data, src.nbytes),
            f"COPY_TENSOR of {src.name!r}: {src.nbytes} bytes don't fit at "
            f"{dst.data - dst_block.base} of a buffer of {dst_block.size}",
        )
        if not self.properties.copies or src_block.device != dst_block.device:
            return {"result": 0}
        data = bytes(src_block.view(src.data - src_block.base, src.nbytes))
        dst_block.view(dst.data - dst_block.base, len(data))[:] = data
        return {"result": 1}

    # -- graphs

    def _graph_compute(self, request: Request) -> Mapping[str, Any]:
        assert request.graph is not None
        try:
            graph = decode_graph(request.graph, self.dialect)
        except (ProtocolError, struct.error) as error:
            self.notes.check("graph/counts", False, str(error))
            raise RequestRefused(str(error)) from None
        self.notes.check("graph/counts", True, "")
        self._check_device(request.command, graph.device)
        state = check_graph(self, graph)
        state.clear_results()
        self._graphs[graph.device] = state
        return {"result": self.properties.graph_status}

    def _graph_recompute(self, request: Request) -> None:
        device = self._device(request)
        otherwise = f"GRAPH_RECOMPUTE, but device {device} has no graph that is still valid"
        self._found("graph/recompute", self._graphs.get(device), otherwise).clear_results()

    def asked(self, device: int, tensor: TensorView) -> int:
        """Return the bytes that the client was told to reserve for a tensor.

        It is its own size if it never asked.
        """
        return self._asked.get((device, *tensor.layout), tensor.nbytes)

    def tensor(self, fields: Any) -> TensorView:
        """Return a tensor off the wire. Raises Refused for one without a type."""
        return self._tensor(fields)

    def find_block(self, what: str, handle: int) -> Block:
        """Return the live buffer with this handle. Raises Refused."""
        return self._block(what, handle)

    def require(self, rule: str, kept: bool, otherwise: str) -> None:
        """Note a test of a rule without which a server can't go on. Raises Refused."""
        self._require(rule, kept, otherwise)


_Fields = Mapping[str, Any] | memoryview | None
_HANDLERS: dict[Command, Callable[[ServedSession, Request], _Fields]] = {
    Command.DEVICE_COUNT: ServedSession._device_count,
    Command.GET_ALIGNMENT: ServedSession._get_alignment,
    Command.GET_MAX_SIZE: ServedSession._get_max_size,
    Command.GET_DEVICE_MEMORY: ServedSession._get_device_memory,
    Command.GET_ALLOC_SIZE: ServedSession._get_alloc_size,
    Command.ALLOC_BUFFER: ServedSession._alloc_buffer,
    Command.BUFFER_GET_BASE: ServedSession._buffer_get_base,
    Command.FREE_BUFFER: ServedSession._free_buffer,
    Command.BUFFER_CLEAR: ServedSession._buffer_clear,
    Command.SET_TENSOR_HASH: ServedSession._set_tensor_hash,
    Command.INIT_TENSOR: ServedSession._init_tensor,
    Command.MEMSET_TENSOR: ServedSession._memset_tensor,
    Command.GET_TENSOR: ServedSession._get_tensor,
    Command.COPY_TENSOR: ServedSession._copy_tensor,
    Command.GRAPH_COMPUTE: ServedSession._graph_compute,
    Command.GRAPH_RECOMPUTE: ServedSession._graph_recompute,
}
