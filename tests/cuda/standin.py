"""What the CUDA device uses of CuPy, over the memory of the host: for machines without a GPU.

``install()`` puts it in the place of ``cupy``, with one card or several. Kernels run in the
emulation, with every access checked against the exact bounds of what was allocated on their card.
Streams are queues: what is given to one runs when somebody waits for it, and no earlier: what needs
an order and hasn't got it reads old bytes. What must not be done while a stream is captured, with a
card that isn't the current one, or with what belongs to another card, fails as it does with CuPy.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import threading
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from unittest import mock

import numpy as np

from rpc_server.devices.cuda import graphs, toolkit
from tests.cuda import emulation

# As a small card.
TOTAL_BYTES = 4 << 30
_PROPERTIES: dict[str, Any] = {
    "name": b"emulated GPU",
    "multiProcessorCount": 4,
    "major": 6,
    "minor": 1,
}
# A kernel gets no more without being asked whether it may.
_MOST_SHARED = 48 << 10

# Whether global memory is watched for races too; CHECKED: whether anything is. COMPUTES: whether
# kernels run at all; without, a card copies, and does nothing else.
RACES = False
CHECKED = True
COMPUTES = True

# What cards have been given, by what it is: kernel, graph, product, fill, copies by their way. In
# what graphs did is counted apart, at each launch.
given: Counter[str] = Counter()
given_in_graphs: Counter[str] = Counter()


# Numbers of cudaError_t and CUresult that the stand-in raises; of others the number is no matter.
_STATUS = {"MemoryAllocation": 2, "IllegalAddress": 700}


class CUDARuntimeError(RuntimeError):
    """As cupy's."""

    @property
    def status(self) -> int:
        return next((n for name, n in _STATUS.items() if f"cudaError{name}" in str(self)), 1)


class CUDADriverError(RuntimeError):
    """As cupy's, for launches."""

    status = 1


class CompileError(Exception):
    """As cupy.cuda.compiler's CompileException."""


class NVRTCError(RuntimeError):
    """As cupy_backends'."""


class CUBLASError(RuntimeError):
    """As cupy_backends'."""


# What NVRTC of CUDA 12.9 compiles for; that of CUDA 13 begins at 75.
ARCHITECTURES = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121)


class _Card:
    """One card: what has been allocated on it, and which others its copies may reach."""

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray[Any, Any]] = {}
        self.known = emulation.Memory()
        self.used = 0
        self.peers: set[int] = set()
        self.failed = False
        # What it raises when it is first used, as a card that somebody has for himself alone.
        self.unusable = ""

    def allocate(self, size: int) -> int:
        if self.used + size > TOTAL_BYTES:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        whole = np.full(size + 512, 0xC3, np.uint8)
        address = -(-int(whole.ctypes.data) // 512) * 512
        self.arrays[address] = whole
        self.known.add(address, size)
        self.used += size
        return address

    def alive(self) -> None:
        """Raises CUDARuntimeError once a kernel has failed."""
        if self.failed:
            raise CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access")

    def free(self, address: int) -> None:
        if address not in self.arrays:
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {address:#x} was not allocated here")
        self.known.remove(address)
        self.used -= len(self.arrays.pop(address)) - 512

    def check(self, address: int, size: int) -> None:
        """Raises CUDARuntimeError unless all bytes are in one allocation."""
        if not self.known.contains(address, size):
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {size} bytes at {address:#x}")


_cards: list[_Card] = []
# Which stand-in this is of those that were plugged in one after the other.
_installation = 0
# Whether cards can reach each other's memory.
_peering = True
# One thread at a time gives to streams, or runs what they were given.
_lock = threading.RLock()
# Compiling takes seconds, in which others go on.
_compiling = threading.Lock()


class _OfThread(threading.local):
    """What each thread has for itself: its current card, and a current stream for each card."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget which cards and streams were used."""
        self.card = 0
        self.outer: list[int] = []
        self.streams: dict[int, list[Stream]] = {}


_mine = _OfThread()


# -- captures ----------------------------------------------------------------------------------

GLOBAL, OF_THREAD, RELAXED = range(3)


class _Capture:
    """What a stream is given while it is captured; ``broken`` once something spoilt it."""

    def __init__(self, card: int, mode: int) -> None:
        self.card = card
        self.mode = mode
        self.thread = threading.get_ident()
        self.jobs: list[Callable[[], Any]] = []
        self.contents: Counter[str] = Counter()
        self.broken = False


_captures: set[_Capture] = set()


def _spoil(captures: Sequence[_Capture], what: str) -> None:
    for capture in captures:
        capture.broken = True
    if captures:
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what}")


def _unsafe(what: str) -> None:
    """What a thread must not do in its own capture, and no thread in a global one."""
    own = threading.get_ident()
    # Of a copy: others begin and end captures meanwhile.
    captures = _captures.copy()
    _spoil(
        [c for c in captures if c.mode == GLOBAL or (c.mode, c.thread) == (OF_THREAD, own)], what
    )


def _waits_for(card: int, what: str) -> None:
    """What waits for all that a card has been given."""
    _unsafe(what)
    _spoil([c for c in _captures.copy() if c.card == card], what)
    _cards[card].alive()
    for queue in list(_queues.values()):
        if queue.card == card:
            queue.run_to(queue.given)


# -- streams -----------------------------------------------------------------------------------


class _Queue:
    """What a stream has been given, and has not run yet."""

    def __init__(self, card: int) -> None:
        self.card = card
        self.jobs: deque[Callable[[], Any]] = deque()
        # Of those that ran each has come to its end.
        self.given = self.ran = 0
        self._running = False
        self.capture: _Capture | None = None
        self._open = threading.Event()
        self._open.set()
        self.reached = threading.Event()

    def give(self, what: str, job: Callable[[], Any]) -> None:
        with _lock:
            if self.capture is not None:
                self.capture.jobs.append(job)
                self.capture.contents[what] += 1
                return
            given[what] += 1
            self.jobs.append(job)
            self.given += 1

    def run_to(self, mark: int) -> None:
        _cards[self.card].alive()
        while self.ran < mark:
            if not self._open.is_set():
                self.reached.set()
                self._open.wait()
            with _lock:
                if self._running:
                    # This thread is within a job, and a finalizer frees something.
                    return
                if self.ran < mark:
                    self._run_next()

    def _run_next(self) -> None:
        job = self.jobs.popleft()
        self._running = True
        try:
            job()
        finally:
            self._running = False
            self.ran += 1

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Nothing given to it runs meanwhile; the event is set when somebody waits for that."""
        self.reached.clear()
        self._open.clear()
        try:
            yield self.reached
        finally:
            self._open.set()


_queues: dict[int, _Queue] = {}
# By the numbers of their handles: of graphs, their instances and nodes.
_graphs: weakref.WeakValueDictionary[int, Graph] = weakref.WeakValueDictionary()
_numbers = itertools.count(0x1000)


def _queue(stream: int) -> _Queue:
    if stream not in _queues:
        raise CUDARuntimeError(f"cudaErrorInvalidResourceHandle: {stream:#x} is no stream")
    _cards[_queues[stream].card].alive()
    return _queues[stream]


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._card = _mine.card
        self.recorded: tuple[_Queue, int] | None = None

    def record(self, stream: Stream) -> None:
        queue = _queue(stream.ptr)
        if queue.card != self._card:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the stream of another card")
        if queue.capture is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: an event of a capture")
        self.recorded = queue, queue.given

    @property
    def done(self) -> bool:
        _unsafe("asking for an event")
        return self.recorded is None or self.recorded[0].ran >= self.recorded[1]

    def synchronize(self) -> None:
        _unsafe("waiting for an event")
        if self.recorded is not None:
            self.recorded[0].run_to(self.recorded[1])


class Graph:
    def __init__(self, capture: _Capture) -> None:
        self._card = capture.card
        # The nodes of the graph, and what they do in the instance of it.
        self.jobs = list(capture.jobs)
        self.instance = list(capture.jobs)
        self._contents = capture.contents
        self.uploaded = False
        self.graph, self.graphExec = next(_numbers), next(_numbers)
        self.nodes = [next(_numbers) for _ in self.jobs]
        _graphs[self.graph] = _graphs[self.graphExec] = self
        _graphs.update(dict.fromkeys(self.nodes, self))

    @property
    def card(self) -> int:
        return self._card

    def upload(self, stream: Stream) -> None:
        if _queue(stream.ptr).card != self._card:
            raise CUDARuntimeError("cudaErrorInvalidValue: a graph of another card")
        _unsafe("cudaGraphUpload")
        self.uploaded = True

    def launch(self, stream: Stream) -> None:
        queue = _queue(stream.ptr)
        if queue.card != self._card:
            raise CUDARuntimeError("cudaErrorInvalidValue: a graph of another card")
        given_in_graphs.update(self._contents)
        jobs = list(self.instance)
        queue.give("graph", lambda: [job() for job in jobs])


class Stream:
    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking, "streams that wait for the null stream"
        self.device_id = _mine.card
        self.ptr = next(_numbers)
        self.queue = _queues[self.ptr] = _Queue(self.device_id)

    def __del__(self) -> None:
        # The card still runs what it was given.
        if not self.queue.jobs:
            _queues.pop(self.ptr, None)

    def __enter__(self) -> Self:
        if self.device_id != _mine.card:
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) "
                f"does not match with the current device ({_mine.card})"
            )
        _mine.streams.setdefault(self.device_id, []).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _mine.streams[self.device_id].pop()

    def synchronize(self) -> None:
        if self.queue.capture is not None:
            _spoil([self.queue.capture], "waiting for a stream that is captured")
        self.queue.run_to(self.queue.given)

    def wait_event(self, event: Event) -> None:
        if self.queue.capture is not None:
            _spoil([self.queue.capture], "waiting for what is not captured")
        if event.recorded is not None:
            # That it is recorded again later does not matter.
            queue, mark = event.recorded
            self.queue.give("event", lambda: queue.run_to(mark))

    def begin_capture(self, mode: int | None = None) -> None:
        if self.queue.capture is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: it is captured already")
        capture = _Capture(self.device_id, RELAXED if mode is None else mode)
        self.queue.capture = capture
        _captures.add(capture)

    def end_capture(self) -> Graph:
        capture, self.queue.capture = self.queue.capture, None
        assert capture is not None
        _captures.discard(capture)
        if capture.mode != RELAXED and capture.thread != threading.get_ident():
            raise CUDARuntimeError("cudaErrorStreamCaptureWrongThread")
        if capture.broken:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        return Graph(capture)


def _current() -> Stream:
    """The current stream of the current card."""
    streams = _mine.streams.get(_mine.card)
    assert streams, "the null stream, which has an order with no other"
    return streams[-1]


# -- kernels -----------------------------------------------------------------------------------


# At which launch the first card fails, counted down; 0: at none.
_fails_at = 0


def _count_launch() -> None:
    global _fails_at
    if _fails_at:
        _fails_at -= 1
        if not _fails_at:
            fail()


@dataclass(frozen=True)
class _KernelJob:
    """A launch of a kernel; ``module`` is None where nothing is computed."""

    module: emulation.Module | None
    name: str
    known: emulation.Memory
    record: np.ndarray[Any, Any]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int

    def __call__(self) -> None:
        if self.module is not None:
            self.module.launch(
                self.name, self.record, self.grid, self.block, self.known,
                shared=self.shared, races=RACES,
            )  # fmt: skip


class RawKernel:
    """As cupy's: on each card it is loaded when it is first asked for there."""

    def __init__(self, code: str, name: str) -> None:
        self._code = code
        self._name = name
        self._loaded: dict[int, emulation.Module] = {}
        self._module()

    def _module(self) -> emulation.Module | None:
        if not COMPUTES:
            return None
        if _mine.card not in self._loaded:
            _unsafe("loading a module")
            with _compiling:
                capability = 10 * _PROPERTIES["major"] + _PROPERTIES["minor"]
                module = emulation.build(
                    "standin", self._code, checked=CHECKED, capability=capability
                )
            assert self._name in module
            self._loaded[_mine.card] = module
        return self._loaded[_mine.card]

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        _count_launch()
        module, stream, (argument,) = self._module(), _current(), args
        assert isinstance(argument, np.ndarray)
        if argument.size != 1:
            raise TypeError("Only numpy.ndarrays of size one can be passed by value.")
        if shared_mem > _MOST_SHARED:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory")
        known = _cards[stream.device_id].known
        # A card copies the arguments at the launch.
        job = _KernelJob(module, self._name, known, argument.copy(), grid, block, shared_mem)
        stream.queue.give("kernel", job)


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...], backend: str) -> None:
        assert isinstance(options, tuple)
        assert backend == "nvrtc"
        self._code = code

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self._code, name)


# -- cards -------------------------------------------------------------------------------------


class Device:
    def __init__(self, device: int) -> None:
        self.id = device
        self._use = _while_installed(_set_device)

    def use(self) -> None:
        self._use(self.id)

    def __enter__(self) -> Self:
        _mine.outer.append(_mine.card)
        _set_device(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _set_device(_mine.outer.pop())


# Cards that a context was made on: that takes memory, whether the card is used or not.
contexts: set[int] = set()


def _set_device(index: int) -> None:
    card = _card(index)
    contexts.add(index)
    if card.unusable:
        raise CUDARuntimeError(card.unusable)
    _mine.card = index


def _card(index: int) -> _Card:
    if not 0 <= index < len(_cards):
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    return _cards[index]


def _can_access_peer(device: int, peer: int) -> int:
    _card(device)
    _card(peer)
    return int(_peering and device != peer)


def _enable_peer_access(peer: int) -> None:
    if not _can_access_peer(_mine.card, peer):
        raise CUDARuntimeError("cudaErrorPeerAccessUnsupported")
    peers = _card(_mine.card).peers
    if peer in peers:
        raise CUDARuntimeError("cudaErrorPeerAccessAlreadyEnabled")
    peers.add(peer)


# -- memory ------------------------------------------------------------------------------------

# Pinned memory of the host, by address; and by size what has been given back, as in CuPy's pool.
_pinned: dict[int, int] = {}
_spare: dict[int, list[Any]] = {}


class _Pinned:
    def __init__(self, size: int) -> None:
        _unsafe("cudaHostAlloc")
        spare = _spare.get(size)
        self._bytes = spare.pop() if spare else (ctypes.c_uint8 * max(size, 1))()
        self.ptr = ctypes.addressof(self._bytes)
        _pinned[self.ptr] = size

    def __del__(self) -> None:
        # The next who asks has it, whatever the card still does with it.
        size = _pinned.pop(self.ptr)
        ctypes.memset(self.ptr, 0xA5, size)
        _spare.setdefault(size, []).append(self._bytes)


def _check_pinned(address: int, size: int) -> None:
    if not any(a <= address and address + size <= a + n for a, n in list(_pinned.items())):
        raise CUDARuntimeError(f"{size} bytes at {address:#x} of the host are not pinned")


def _move(to: int, source: int, size: int) -> None:
    ctypes.memmove(to, source, size)


# By the directions of cudaMemcpy.
_WAYS = {1: "to the card", 2: "to the host", 3: "on the card"}


def _copy_async(to: int, source: int, size: int, kind: int, stream: int) -> None:
    queue = _queue(stream)
    card = _cards[queue.card]
    assert kind in (1, 2, 3)
    (card.check if kind in (1, 3) else _check_pinned)(to, size)
    (card.check if kind in (2, 3) else _check_pinned)(source, size)
    queue.give(_WAYS[kind], lambda: _move(to, source, size))


def _copy_peer_async(
    to: int, to_card: int, source: int, source_card: int, size: int, stream: int
) -> None:
    queue = _queue(stream)
    _card(to_card).check(to, size)
    _card(source_card).check(source, size)
    if queue.card not in (to_card, source_card):
        raise CUDARuntimeError("cudaErrorInvalidValue: the stream of a third card")
    queue.give("from a card", lambda: _move(to, source, size))


def _fill_async(address: int, value: int, size: int, stream: int) -> None:
    queue = _queue(stream)
    if queue.card != _mine.card:
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the stream of another card")
    _cards[queue.card].check(address, size)
    queue.give("fill", lambda: ctypes.memset(address, value, size))


def _allocate(size: int) -> int:
    _unsafe("cudaMalloc")
    _cards[_mine.card].alive()
    with _lock:
        return _cards[_mine.card].allocate(size)


def _free(address: int) -> None:
    _waits_for(_mine.card, "cudaFree")
    with _lock:
        _cards[_mine.card].free(address)


def _memory_info() -> tuple[int, int]:
    return TOTAL_BYTES - _cards[_mine.card].used, TOTAL_BYTES


# -- the driver --------------------------------------------------------------------------------

# CUresult.
_DONE, _INVALID_VALUE, _INVALID_HANDLE, _STRAYED = 0, 1, 400, 700

# What the driver tells of kernels, by their nodes: copies of their arguments, and where these are.
_told: dict[int, tuple[Any, Any]] = {}


def _function(job: _KernelJob) -> int:
    """The handle of a job's kernel."""
    return (id(job.module) ^ hash(job.name)) & (1 << 63) - 1 | 1


def _give_nodes(found: list[int], nodes: Any, count: Any) -> int:
    """As calls do that list nodes: how many there are, and as many as there is room for."""
    for i, node in enumerate(found[: count[0]] if nodes else ()):
        nodes[i] = node
    count[0] = len(found)
    return _DONE


def _get_roots(graph: int, nodes: Any, count: Any) -> int:
    known = _graphs.get(graph)
    if known is None or known.graph != graph:
        return _INVALID_HANDLE
    return _give_nodes(known.nodes[:1], nodes, count)


def _get_dependents(node: int, nodes: Any, count: Any) -> int:
    known = _graphs.get(node)
    if known is None or node not in known.nodes:
        return _INVALID_HANDLE
    at = known.nodes.index(node)
    return _give_nodes(known.nodes[at + 1 : at + 2], nodes, count)


def _job(node: int) -> Any:
    known = _graphs.get(node)
    if known is None or node not in known.nodes:
        return None
    return known.jobs[known.nodes.index(node)]


def _get_type(node: int, kind: Any) -> int:
    job = _job(node)
    kind[0] = 0 if isinstance(job, _KernelJob) else 1
    return _DONE if job is not None else _INVALID_HANDLE


def _get_parameters(node: int, parameters: Any) -> int:
    job = _job(node)
    if not isinstance(job, _KernelJob):
        return _INVALID_HANDLE
    record = job.record.copy()
    values = (ctypes.c_void_p * 1)(record.ctypes.data)
    _told[node] = record, values
    there = parameters[0]
    there.func, there.kern, there.context, there.extra = _function(job), None, None, None
    there.grid[:] = (*job.grid, 1, 1)[:3]
    there.block[:] = (*job.block, 1, 1)[:3]
    there.shared = job.shared
    there.values = values
    return _DONE


def _set_parameters(instance: int, node: int, parameters: Any) -> int:
    known, job, there = _graphs.get(instance), _job(node), parameters[0]
    if known is None or known.graphExec != instance or node not in known.nodes:
        return _INVALID_HANDLE
    if _cards[known.card].failed:
        return _STRAYED
    if known.card != _mine.card or not isinstance(job, _KernelJob) or there.extra:
        return _INVALID_VALUE
    if there.func != _function(job) or there.shared > _MOST_SHARED or not all(there.grid):
        return _INVALID_VALUE
    record = np.frombuffer(ctypes.string_at(there.values[0], job.record.nbytes), job.record.dtype)
    known.instance[known.nodes.index(node)] = replace(
        job, record=record.copy(), grid=tuple(there.grid), block=tuple(there.block),
        shared=there.shared,
    )  # fmt: skip
    given["changed kernel"] += 1
    return _DONE


def driver() -> Any:
    """As of toolkit: what libcuda has of captured graphs, called as C functions are."""
    calls = {
        "cuGraphGetRootNodes": _get_roots,
        "cuGraphNodeGetDependentNodes": _get_dependents,
        "cuGraphNodeGetType": _get_type,
        "cuGraphKernelNodeGetParams_v2": _get_parameters,
        "cuGraphExecKernelNodeSetParams_v2": _set_parameters,
    }
    made = types.SimpleNamespace()
    for name, call in calls.items():
        as_in_c: Any = ctypes.CFUNCTYPE(ctypes.c_int, *graphs.CALLS[name])
        setattr(made, name, as_in_c(call))
    return made


# -- cuBLAS ------------------------------------------------------------------------------------

# The card of each handle; and those that read their factors from the card's memory.
_handles: dict[int, int] = {}
_factors_on_card: set[int] = set()


def _set_pointer_mode(handle: int, mode: int) -> None:
    assert mode in (0, 1)
    assert handle in _handles
    (_factors_on_card.add if mode else _factors_on_card.discard)(handle)


def _factor(card: _Card, address: int, on_card: bool) -> float:
    if on_card:
        card.check(address, 4)
    return ctypes.c_float.from_address(address).value


def _create() -> int:
    _unsafe("cublasCreate")
    handle = next(_numbers)
    _handles[handle] = _mine.card
    return handle


def _destroy(handle: int) -> None:
    _waits_for(_handles[handle], "cublasDestroy")
    del _handles[handle]


def _array(
    card: _Card, address: int, type_: int, rows: int, ld: int, k: int
) -> np.ndarray[Any, Any]:
    """float32 (rows, k) over rows that are ``ld`` elements apart."""
    size = 4 if type_ == 0 else 2
    if not rows or not k:
        return np.zeros((rows, k), np.float32)
    card.check(address, ((rows - 1) * ld + k) * size)
    dtype = {0: np.float32, 2: np.float16, 14: np.uint16}[type_]
    raw = (ctypes.c_uint8 * (((rows - 1) * ld + k) * size)).from_address(address)
    view = np.ndarray((rows, k), dtype, memoryview(raw), 0, (ld * size, size))
    return (view.astype(np.uint32) << 16).view(np.float32) if type_ == 14 else view


def _gemm(
    handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int,
    a: int, a_type: int, lda: int, stride_a: int, b: int, b_type: int, ldb: int, stride_b: int,
    beta: int, c: int, c_type: int, ldc: int, stride_c: int, batch: int, compute: int, algo: int,
) -> None:  # fmt: skip
    """gemmStridedBatchedEx as the device calls it: column-major, a transposed, sums in F32."""
    # CuPy sets the stream at each call, whatever has been set before.
    queue = _current().queue
    if queue.capture is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture")
    assert _handles[handle] == queue.card
    assert (ta, tb, c_type, compute) == (1, 0, 0, 68)
    assert lda >= k
    assert ldb >= k
    assert ldc >= m
    size = 4 if b_type == 0 else 2
    card = _cards[queue.card]
    on_card = handle in _factors_on_card
    # What lies on the host is read at the call.
    here = None if on_card else (_factor(card, alpha, False), _factor(card, beta, False))

    def job() -> None:
        factor, zero = here or (_factor(card, alpha, True), _factor(card, beta, True))
        assert zero == 0
        for i in range(batch):
            weights = _array(card, a + i * stride_a * size, a_type, m, lda, k).astype(np.float32)
            columns = _array(card, b + i * stride_b * size, b_type, n, ldb, k).astype(np.float32)
            _array(card, c + 4 * i * stride_c, 0, n, ldc, m)[...] = factor * (columns @ weights.T)

    queue.give("product", job)


# -- the modules -------------------------------------------------------------------------------


def used(card: int = 0) -> int:
    """Bytes allocated on a card."""
    return _cards[card].used


def pinned() -> int:
    """How many pieces of the host's memory are pinned."""
    return len(_pinned)


def fail(card: int = 0) -> None:
    """Let the card do nothing from here on, as one whose kernel went out of bounds."""
    _cards[card].failed = True


def make_unusable(card: int, error: str) -> None:
    """Let a card raise ``error`` when it is used."""
    _cards[card].unusable = error


def handles() -> set[int]:
    """Handles of cuBLAS that have not been destroyed."""
    return set(_handles)


def _modules() -> dict[str, types.ModuleType]:
    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        streamCaptureModeGlobal=GLOBAL,
        streamCaptureModeThreadLocal=OF_THREAD,
        streamCaptureModeRelaxed=RELAXED,
        getDeviceCount=lambda: len(_cards),
        getDeviceProperties=lambda device: _card(device) and _PROPERTIES,
        deviceCanAccessPeer=_can_access_peer,
        deviceEnablePeerAccess=_enable_peer_access,
        memGetInfo=_memory_info,
        malloc=_allocate,
        free=_while_installed(_free),
        memcpyAsync=_copy_async,
        memcpyPeerAsync=_copy_peer_async,
        memsetAsync=_fill_async,
    )
    cuda = types.SimpleNamespace(
        runtime=runtime,
        Device=Device,
        Stream=Stream,
        Event=Event,
        alloc_pinned_memory=_Pinned,
        driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
        compiler=types.SimpleNamespace(CompileException=CompileError),
    )
    nvrtc = types.SimpleNamespace(
        getVersion=lambda: (12, 9), getSupportedArchs=lambda: ARCHITECTURES, NVRTCError=NVRTCError
    )
    cublas = types.SimpleNamespace(
        create=_create,
        destroy=_while_installed(_destroy),
        gemmStridedBatchedEx=_gemm,
        setPointerMode=_set_pointer_mode,
        CUBLASError=CUBLASError,
    )
    contents: dict[str, dict[str, Any]] = {
        "cupy": {"cuda": cuda, "RawModule": RawModule, "__version__": "0 (emulated)"},
        "cupy_backends": {},
        "cupy_backends.cuda": {},
        "cupy_backends.cuda.libs": {"cublas": cublas, "nvrtc": nvrtc},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
    return modules


def _while_installed(call: Callable[[int], None]) -> Callable[[int], None]:
    """``call`` for those whose cards these are.

    What is left of a stand-in before goes whenever garbage is collected, also in the middle of a
    capture, and what it frees may be where others have their memory by now.
    """
    mine = _installation

    def checked(number: int) -> None:
        if mine == _installation:
            call(number)

    return checked


def _plug_in(cards: int, peering: bool) -> None:
    global _peering, _installation
    _installation += 1
    _cards[:] = [_Card() for _ in range(cards)]
    _queues.clear()
    _handles.clear()
    _captures.clear()
    _told.clear()
    _mine.begin()
    contexts.clear()
    _peering = peering


def install() -> None:
    """Be ``cupy`` for whoever imports it from here on.

    EMULATED_CARDS in the environment is the number of cards, one if it isn't given; with
    EMULATED_PEERS=0 they can't reach each other's memory; EMULATED_CAPABILITY is what they can do,
    as 8.0; EMULATED_FAILURE=3 lets the first card fail for good at the third launch of a kernel;
    EMULATED_UNUSABLE=1 is the number of a card that somebody else has for himself alone.
    """
    global _fails_at
    _fails_at = int(os.environ.get("EMULATED_FAILURE", "0"))
    major, minor = os.environ.get("EMULATED_CAPABILITY", "6.1").split(".")
    _PROPERTIES.update(major=int(major), minor=int(minor))
    _plug_in(
        int(os.environ.get("EMULATED_CARDS", "1")), os.environ.get("EMULATED_PEERS", "1") != "0"
    )
    for number in filter(None, os.environ.get("EMULATED_UNUSABLE", "").split(",")):
        make_unusable(int(number), "cudaErrorDevicesUnavailable: busy")
    sys.modules.update(_modules())
    mock.patch.object(toolkit, "driver", driver).start()


@contextlib.contextmanager
def installed(cards: int = 1, *, peering: bool = True) -> Iterator[None]:
    """Be ``cupy`` meanwhile."""
    _plug_in(cards, peering)
    with mock.patch.dict(sys.modules, _modules()), mock.patch.object(toolkit, "driver", driver):
        yield
