"""One GPU, through CuPy: memory, copies, streams, kernels, captured graphs.

This is all that the device uses of CuPy, and the only file that knows how to call it. CuPy is asked
for when a card is opened, not when this is imported: a machine may have none.

What belongs to a card (memory, streams, events, handles) is made and used while that card is the
current one of the calling thread; any thread may do so.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from protocol.ggml.types import GgmlType
from rpc_server.devices.cuda.compile import OPTIONS
from rpc_server.devices.cuda.kernels import CudaKernel, Unit
from rpc_server.devices.cuda.planner import Product

log = logging.getLogger(__name__)

# cuBLAS: cudaDataType, cublasOperation_t, cublasComputeType_t, cublasGemmAlgo_t.
_CUBLAS_TYPES = {GgmlType.F32: 0, GgmlType.F16: 2, GgmlType.BF16: 14}
_AS_IT_IS, _TRANSPOSED = 0, 1
_SUMS_IN_F32 = 68
_ANY_ALGORITHM = -1
# What products and what was there before are multiplied with; cuBLAS reads them when it is called.
_FACTORS = (np.ones(1, np.float32), np.zeros(1, np.float32))

# Directions of cudaMemcpy.
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3


class CardError(Exception):
    """There is no such card, or CuPy can't be had or used; the message says what to do."""


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise CardError(
            f"CuPy is not installed ({error}): pip install 'ggml-rpc-server[cuda12]', or [cuda13]"
        ) from None
    return cupy


def _libraries() -> Any:
    """CuPy's cuBLAS, once both libraries that CuPy loads itself are known to be there."""
    try:
        from cupy_backends.cuda.libs import cublas, nvrtc

        nvrtc.getVersion()
    except Exception as error:
        raise CardError(
            f"CuPy finds no cuBLAS or NVRTC ({error}): "
            "pip install 'ggml-rpc-server[cuda12]', or [cuda13], brings both"
        ) from None
    return cublas


def card_count() -> int:
    """How many GPUs CuPy can use. Raises CardError, which says why there are none."""
    cupy = _cupy()
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:
        raise CardError(f"no CUDA GPU can be used here: {error}") from None


def by_value(record: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The record as one element: CuPy passes host arrays with more to no kernel."""
    return record.view(f"V{record.nbytes}")


class Pinned:
    """Host memory that the card copies from and to by itself; ``view`` is all of it."""

    def __init__(self, cupy: Any, size: int) -> None:
        self._memory = cupy.cuda.alloc_pinned_memory(size)
        self.address = int(self._memory.ptr)
        self.view = memoryview((ctypes.c_uint8 * size).from_address(self.address)).cast("B")
        self.size = size


class Card:
    """GPU number ``index``. Raises CardError if it can't be used."""

    def __init__(self, index: int) -> None:
        self.cupy = _cupy()
        self.index = index
        runtime = self.cupy.cuda.runtime
        count = card_count()
        if index >= count:
            raise CardError(f"no GPU {index}: there are {count}")
        properties = runtime.getDeviceProperties(index)
        self.name = properties["name"].decode()
        self.multiprocessors = int(properties["multiProcessorCount"])
        # As 61 for 6.1.
        self.capability = 10 * int(properties["major"]) + int(properties["minor"])
        self._cublas = _libraries()
        # What calls raise; once a kernel has failed, all of them do.
        self.failure: tuple[type[Exception], ...] = (
            runtime.CUDARuntimeError,
            self.cupy.cuda.driver.CUDADriverError,
        )
        self._device = self.cupy.cuda.Device(index)
        self._modules: dict[Unit, Any] = {}
        self._functions: dict[CudaKernel, Any] = {}
        self._lock = threading.Lock()
        # Cards whose memory this one has been asked to reach.
        self._peers: set[int] = set()
        # Held while a stream is captured, and by what waits for the whole card: that would make the
        # capture fail. Only what the host does is captured, so nobody waits for long.
        self._whole = threading.RLock()
        self._capturing = False
        # Memory that was to be freed in the middle of a capture.
        self._unwanted: list[int] = []

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """What CuPy does within is for this card; any thread."""
        with self._device:
            yield

    # -- memory --------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        with self._device:
            free, total = self.cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """Address of exactly ``size`` bytes, not from CuPy's pool. Raises MemoryError."""
        with self._whole, self._device:
            try:
                return int(self.cupy.cuda.runtime.malloc(size))
            except self.cupy.cuda.runtime.CUDARuntimeError as error:
                raise MemoryError(f"{size} bytes on {self.name}: {error}") from None

    def free(self, address: int) -> None:
        """Give memory back; waits for all that the card has been given."""
        with self._whole, self._device:
            if self._capturing:
                # A finalizer that ran in the capturing thread.
                self._unwanted.append(address)
                return
            self._give_back(self.cupy.cuda.runtime.free, address)

    def _give_back(self, how: Callable[[int], None], what: int) -> None:
        """A card that has failed has lost it anyway."""
        try:
            how(what)
        except self.failure as error:
            log.debug("%s takes nothing back: %s", self.name, error)

    def pinned(self, size: int) -> Pinned:
        """Raises MemoryError."""
        with self._whole, self._device:
            try:
                return Pinned(self.cupy, size)
            except self.cupy.cuda.runtime.CUDARuntimeError as error:
                raise MemoryError(f"{size} bytes of pinned memory: {error}") from None

    # -- streams and copies --------------------------------------------------------------------

    def stream(self) -> Any:
        """A stream that runs beside the others."""
        with self._device:
            return self.cupy.cuda.Stream(non_blocking=True)

    def mark(self, stream: Any) -> Any:
        """An event behind what has been given to ``stream`` so far."""
        with self._device:
            event = self.cupy.cuda.Event(block=True, disable_timing=True)
            event.record(stream)
            return event

    def to_device(self, address: int, host: int, size: int, stream: Any) -> None:
        """Enqueue a copy from pinned memory."""
        with self._device:
            self.cupy.cuda.runtime.memcpyAsync(address, host, size, _TO_DEVICE, stream.ptr)

    def to_host(self, host: int, address: int, size: int, stream: Any) -> None:
        """Enqueue a copy to pinned memory."""
        with self._device:
            self.cupy.cuda.runtime.memcpyAsync(host, address, size, _TO_HOST, stream.ptr)

    def copy(self, to: int, address: int, size: int, stream: Any) -> None:
        with self._device:
            self.cupy.cuda.runtime.memcpyAsync(to, address, size, _ON_DEVICE, stream.ptr)

    def copy_from_peer(self, to: int, peer: Card, address: int, size: int, stream: Any) -> None:
        """Enqueue a copy from another card's memory, past the host if the two can.

        ``stream`` is this card's.
        """
        runtime = self.cupy.cuda.runtime
        with self._device:
            if peer.index not in self._peers:
                self._peers.add(peer.index)
                if runtime.deviceCanAccessPeer(self.index, peer.index):
                    # It may be on already, or one peer too many: the copy then takes its own way.
                    with contextlib.suppress(runtime.CUDARuntimeError), self._whole:
                        runtime.deviceEnablePeerAccess(peer.index)
            runtime.memcpyPeerAsync(to, self.index, address, peer.index, size, stream.ptr)

    def fill(self, address: int, size: int, value: int, stream: Any) -> None:
        with self._device:
            self.cupy.cuda.runtime.memsetAsync(address, value, size, stream.ptr)

    # -- kernels -------------------------------------------------------------------------------

    def function(self, kernel: CudaKernel) -> Any:
        """The kernel, ready to be launched; compiles its unit if that is not on disk already."""
        known = self._functions.get(kernel)
        if known is not None:
            return known
        with self._lock:
            # Somebody else may have asked for it meanwhile.
            known = self._functions.get(kernel)
            if known is not None:
                return known
            with self._device:
                module = self._modules.get(kernel.unit)
                if module is None:
                    module = self.cupy.RawModule(
                        code=kernel.unit.text, options=OPTIONS, backend="nvrtc"
                    )
                    self._modules[kernel.unit] = module
                found = self._functions[kernel] = module.get_function(kernel.name)
            return found

    def launch(
        self,
        function: Any,
        words: np.ndarray[Any, np.dtype[np.int64]],
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: Any,
    ) -> None:
        """Enqueue a kernel with its record."""
        with self._device, stream:
            function(grid, (threads, 1, 1), (by_value(words),), shared_mem=shared)

    def library(self) -> int:
        """A handle of cuBLAS, for one stream at a time; see :meth:`close_library`."""
        with self._whole, self._device:
            return int(self._cublas.create())

    def close_library(self, handle: int) -> None:
        with self._whole, self._device:
            self._give_back(self._cublas.destroy, handle)

    def product(self, p: Product, handle: int, stream: Any) -> None:
        """Enqueue products by cuBLAS, with sums in F32; not while the stream is captured.

        CuPy gives cuBLAS the thread's current stream, and has no cuBLAS in captures.
        """
        kind = _CUBLAS_TYPES[p.type]
        one, zero = (int(x.ctypes.data) for x in _FACTORS)
        with self._device, stream:
            self._cublas.gemmStridedBatchedEx(
                handle,
                _TRANSPOSED,
                _AS_IT_IS,
                p.m,
                p.n,
                p.k,
                one,
                p.a,
                kind,
                p.lda,
                0,
                p.b,
                kind,
                p.ldb,
                p.stride_b,
                zero,
                p.c,
                _CUBLAS_TYPES[GgmlType.F32],
                p.ldc,
                p.stride_c,
                p.batch,
                _SUMS_IN_F32,
                _ANY_ALGORITHM,
            )

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """What ``enqueue`` gives to ``stream``, as a graph that can be launched again and again."""
        with self._whole, self._device:
            # What other threads do with the card is none of this capture's business.
            stream.begin_capture(self.cupy.cuda.runtime.streamCaptureModeThreadLocal)
            self._capturing = True
            try:
                enqueue()
            except BaseException:
                # The stream has to come out of capture, whatever became of it.
                with contextlib.suppress(Exception):
                    stream.end_capture()
                raise
            else:
                return stream.end_capture()
            finally:
                self._capturing = False
                unwanted, self._unwanted = self._unwanted, []
                for address in unwanted:
                    self._give_back(self.cupy.cuda.runtime.free, address)
