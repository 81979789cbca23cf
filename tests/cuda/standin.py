"""What the CUDA device uses of CuPy, over the memory of the host: for machines without a GPU.

``install()`` puts it in the place of ``cupy``. Kernels run in the emulation, with every access
checked against the exact bounds of what was allocated. Streams are queues: what is given to one
runs when somebody waits for it, and no earlier: what needs an order and hasn't got it reads old
bytes. What must not be done while a stream is being captured fails, as it does on a card.
"""

from __future__ import annotations

import ctypes
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from tests.cuda import emulation

# As a small card.
TOTAL_BYTES = 4 << 30
_PROPERTIES = {
    "name": b"emulated GPU",
    "multiProcessorCount": 4,
    "major": 6,
    "minor": 1,
}


class CUDARuntimeError(RuntimeError):
    """As cupy's."""


class _Memory:
    """What has been allocated on the card."""

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray[Any, Any]] = {}
        self.known = emulation.Memory()
        self.used = 0

    def allocate(self, size: int) -> int:
        if self.used + size > TOTAL_BYTES:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        whole = np.full(size + 512, 0xC3, np.uint8)
        address = -(-int(whole.ctypes.data) // 512) * 512
        self.arrays[address] = whole
        self.known.add(address, size)
        self.used += size
        return address

    def free(self, address: int) -> None:
        if address not in self.arrays:
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {address:#x} was not allocated")
        self.known.remove(address)
        self.used -= len(self.arrays.pop(address)) - 512

    def check(self, address: int, size: int) -> None:
        """Raises CUDARuntimeError unless all bytes are in one allocation."""
        if not self.known.contains(address, size):
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {size} bytes at {address:#x}")


_memory = _Memory()
_capturing: list[Stream] = []


def _not_while_capturing(what: str) -> None:
    if _capturing:
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what}")


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._stream: Stream | None = None
        self._mark = 0

    def record(self, stream: Stream) -> None:
        self._stream, self._mark = stream, stream.given

    @property
    def done(self) -> bool:
        return self._stream is None or self._stream.ran >= self._mark

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.run_to(self._mark)


class Graph:
    def __init__(self, jobs: Sequence[Callable[[], None]]) -> None:
        self._jobs = list(jobs)

    def launch(self, stream: Stream) -> None:
        stream.give(lambda: [job() for job in self._jobs])


class Stream:
    current: ClassVar[list[Stream]] = []

    def __init__(self, non_blocking: bool = False) -> None:
        self._jobs: deque[Callable[[], Any]] = deque()
        self.given = self.ran = 0
        self._captured: list[Callable[[], None]] | None = None
        self.ptr = id(self)
        _streams[self.ptr] = self

    def __enter__(self) -> Self:
        Stream.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current.pop()

    def give(self, job: Callable[[], Any]) -> None:
        if self._captured is not None:
            self._captured.append(job)
            return
        self._jobs.append(job)
        self.given += 1

    def run_to(self, mark: int) -> None:
        while self.ran < mark:
            job = self._jobs.popleft()
            self.ran += 1
            job()

    def synchronize(self) -> None:
        _not_while_capturing("waiting for a stream")
        self.run_to(self.given)

    def wait_event(self, event: Event) -> None:
        self.give(event.synchronize)

    def begin_capture(self) -> None:
        _not_while_capturing("a second capture")
        self._captured = []
        _capturing.append(self)

    def end_capture(self) -> Graph:
        _capturing.remove(self)
        jobs, self._captured = self._captured, None
        assert jobs is not None
        return Graph(jobs)


_streams: dict[int, Stream] = {}


class _Function:
    def __init__(self, module: emulation.Module, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: tuple[Any, ...],
        shared_mem: int = 0,
    ) -> None:
        # A card copies the arguments at the launch.
        words = np.array(arguments[0], copy=True)

        def job() -> None:
            self._module.launch(
                self._name, words, grid, block, _memory.known, shared=shared_mem, races=RACES
            )

        Stream.current[-1].give(job)


# Whether global memory is watched for races too; CHECKED: whether anything is.
RACES = False
CHECKED = True


class RawModule:
    def __init__(self, *, code: str, options: Sequence[str], backend: str) -> None:
        _not_while_capturing("loading a module")
        assert backend == "nvrtc"
        self._module = emulation.build("standin", code, checked=CHECKED)

    def get_function(self, name: str) -> _Function:
        assert name in self._module
        return _Function(self._module, name)


class Device:
    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Pinned:
    def __init__(self, size: int) -> None:
        self._bytes = (ctypes.c_uint8 * max(size, 1))()
        self.ptr = ctypes.addressof(self._bytes)


def _move(to: int, source: int, size: int) -> None:
    ctypes.memmove(to, source, size)


def _copy_async(to: int, source: int, size: int, kind: int, stream: int) -> None:
    if kind in (1, 3):
        _memory.check(to, size)
    if kind in (2, 3):
        _memory.check(source, size)
    _streams[stream].give(lambda: _move(to, source, size))


def _fill_async(address: int, value: int, size: int, stream: int) -> None:
    _memory.check(address, size)
    _streams[stream].give(lambda: ctypes.memset(address, value, size))


def _allocate(size: int) -> int:
    _not_while_capturing("cudaMalloc")
    return _memory.allocate(size)


def _free(address: int) -> None:
    _not_while_capturing("cudaFree")
    # cudaFree waits for all that the card has been given.
    for stream in list(_streams.values()):
        stream.run_to(stream.given)
    _memory.free(address)


def _array(address: int, type_: int, rows: int, ld: int, k: int) -> np.ndarray[Any, Any]:
    """float32 (rows, k) over rows that are ``ld`` elements apart."""
    size = 4 if type_ == 0 else 2
    if not rows or not k:
        return np.zeros((rows, k), np.float32)
    _memory.check(address, ((rows - 1) * ld + k) * size)
    dtype = {0: np.float32, 2: np.float16, 14: np.uint16}[type_]
    raw = (ctypes.c_uint8 * (((rows - 1) * ld + k) * size)).from_address(address)
    view = np.ndarray((rows, k), dtype, raw, 0, (ld * size, size))
    return (view.astype(np.uint32) << 16).view(np.float32) if type_ == 14 else view


def _gemm(
    handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int,
    a: int, a_type: int, lda: int, stride_a: int, b: int, b_type: int, ldb: int, stride_b: int,
    beta: int, c: int, c_type: int, ldc: int, stride_c: int, batch: int, compute: int, algo: int,
) -> None:  # fmt: skip
    """gemmStridedBatchedEx as the device calls it: column-major, a transposed, sums in F32."""
    assert (ta, tb, c_type, compute) == (1, 0, 0, 68)
    assert lda >= k
    assert ldb >= k
    assert ldc >= m
    size = 4 if b_type == 0 else 2

    def job() -> None:
        for i in range(batch):
            weights = _array(a + i * stride_a * size, a_type, m, lda, k).astype(np.float32)
            columns = _array(b + i * stride_b * size, b_type, n, ldb, k).astype(np.float32)
            _array(c + 4 * i * stride_c, 0, n, ldc, m)[...] = columns @ weights.T

    _streams[_blas_stream[0]].give(job)


_blas_stream = [0]


def _set_stream(handle: int, stream: int) -> None:
    _blas_stream[0] = stream


def used() -> int:
    """Bytes allocated on the card."""
    return _memory.used


def install() -> types.ModuleType:
    """Be ``cupy`` for whoever imports it from here on."""
    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda index: _PROPERTIES,
        memGetInfo=lambda: (TOTAL_BYTES - _memory.used, TOTAL_BYTES),
        malloc=_allocate,
        free=_free,
        memcpyAsync=_copy_async,
        memsetAsync=_fill_async,
    )
    cuda = types.SimpleNamespace(
        runtime=runtime,
        Device=Device,
        Stream=Stream,
        Event=Event,
        alloc_pinned_memory=_Pinned,
        device=types.SimpleNamespace(get_cublas_handle=lambda: 1),
    )
    cublas = types.SimpleNamespace(gemmStridedBatchedEx=_gemm, setStream=_set_stream)
    backends = types.ModuleType("cupy_backends.cuda.libs")
    backends.__dict__.update(cublas=cublas)
    sys.modules["cupy_backends.cuda.libs"] = backends
    for name in ("cupy_backends", "cupy_backends.cuda"):
        sys.modules[name] = types.ModuleType(name)
    module = types.ModuleType("cupy")
    module.__dict__.update(cuda=cuda, RawModule=RawModule, __version__="0 (emulated)")
    sys.modules["cupy"] = module
    return module
