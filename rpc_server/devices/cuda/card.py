"""One GPU, through CuPy: memory, copies, streams, kernels, captured graphs.

This is all that the device uses of CuPy, and the only file that knows how to call it; graphs.py has
what CuPy hasn't got. CuPy is asked for when a card is opened, not when this is imported: a machine
may have none.

What belongs to a card (memory, streams, events, handles) is made and used while that card is the
current one of the calling thread; any thread may do so.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from protocol.ggml.types import GgmlType
from rpc_server.devices.base import DeviceError
from rpc_server.devices.cuda import toolkit
from rpc_server.devices.cuda.compile import options_for
from rpc_server.devices.cuda.graphs import GraphCalls, KernelLaunch, UpdateError
from rpc_server.devices.cuda.kernels import CudaKernel, Unit, kernel
from rpc_server.devices.cuda.planner import Product
from rpc_server.devices.cuda.toolkit import CardError

log = logging.getLogger(__name__)

# cuBLAS: cudaDataType, cublasOperation_t, cublasComputeType_t, cublasGemmAlgo_t.
_CUBLAS_TYPES = {GgmlType.F32: 0, GgmlType.F16: 2, GgmlType.BF16: 14}
_AS_IT_IS, _TRANSPOSED = 0, 1
_SUMS_IN_F32 = 68
_ANY_ALGORITHM = -1
# cublasPointerMode_t: where what products are multiplied with lies.
_ON_HOST, _ON_CARD = 0, 1
# What products and what was there before are multiplied with; cuBLAS reads them when it is called.
_FACTORS = (np.ones(1, np.float32), np.zeros(1, np.float32))

# Directions of cudaMemcpy.
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3

# Of cudaError_t and CUresult, which agree: after these a process can do nothing more with the card.
# Launch timeout, assertion, stack, illegal instruction, misaligned address, address space, program
# counter, launch failure, illegal address; memory and links that can't be corrected; context gone.
_STICKY = frozenset({702, 710, 714, 715, 716, 717, 718, 719, 700, 214, 220, 709})
_NO_MEMORY = 2

# Memory that clients don't get: kernels' code and cuBLAS (100 to 150 MiB, and 8 or 32 for each
# client's handle), scratch (46 MiB for 512 tokens of an 8B, 180 for 2048, and up to 128 of decoded
# weights), captured graphs. A card that weights fill to the last byte would fail at its first
# graph.
_RESERVED = 512 << 20
# Of a small card no more than this part.
_RESERVED_PART = 8


# Of capability 7.5, and without tensor cores: what asks for them runs there, many times slower.
_NO_TENSOR_CORES = re.compile(r"\b(GTX 16\d\d|MX[45]50|T(400|500|550|600|1000|1200|2000))\b")


def by_value(record: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the record as one element: CuPy passes host arrays with more to no kernel."""
    return record.view(f"V{record.nbytes}")


class Pinned:
    """Host memory that the card copies from and to by itself; ``view`` is all of it."""

    def __init__(self, cupy: Any, size: int) -> None:
        self._memory = cupy.cuda.alloc_pinned_memory(size)
        self.address = int(self._memory.ptr)
        self.view = memoryview((ctypes.c_uint8 * size).from_address(self.address)).cast("B")
        self.size = size


class _Current:
    """A context in which CuPy works for one card; its errors come out as DeviceError.

    The thread stays with the card: to go back to the first one, as CuPy's own Device does, would
    make a context there, which takes hundreds of megabytes of a card that nobody uses.
    """

    def __init__(self, card: Card) -> None:
        self._card = card

    def __enter__(self) -> None:
        try:
            self._card.use()
        except self._card.failure as error:
            raise self._card.failed(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, self._card.failure):
            raise self._card.failed(error) from error


class Card:
    """GPU number ``index``. Raises CardError if it can't be used.

    All methods raise DeviceError when the card fails.
    """

    def __init__(self, index: int) -> None:
        self.cupy = toolkit.cupy()
        self.index = index
        runtime = self.cupy.cuda.runtime
        count = toolkit.card_count()
        if index >= count:
            raise CardError(f"no GPU {index}: there are {count}")
        properties = runtime.getDeviceProperties(index)
        self.name = properties["name"].decode()
        self.multiprocessors = int(properties["multiProcessorCount"])
        # As 61 for 6.1.
        self.capability = 10 * int(properties["major"]) + int(properties["minor"])
        # What all units begin with.
        self._macros = ""
        if _NO_TENSOR_CORES.search(self.name):
            self._macros = "#define WITHOUT_TENSOR_CORES\n"
        libraries = toolkit.libraries()
        toolkit.check_capability(self.name, self.capability, libraries.nvrtc.getSupportedArchs())
        self._cublas = libraries.cublas
        # What calls raise; once a kernel has gone astray, all of them do.
        self.failure: tuple[type[Exception], ...] = (
            runtime.CUDARuntimeError,
            self.cupy.cuda.driver.CUDADriverError,
            self.cupy.cuda.compiler.CompileException,
            libraries.cublas.CUBLASError,
            libraries.nvrtc.NVRTCError,
        )
        # Why nothing more can be done with the card in this process; empty while it can.
        self.lost = ""
        # What changes captured graphs; None: they are captured anew.
        self._graph_calls: GraphCalls | None = None
        try:
            self._graph_calls = GraphCalls(toolkit.driver())
        except UpdateError as error:
            log.debug("captured graphs stay as they are: %s", error)
        self._device = self.cupy.cuda.Device(index)
        self._current = _Current(self)
        self._modules: dict[Unit, Any] = {}
        self._functions: dict[CudaKernel, Any] = {}
        # One of them is compiled while others are asked for.
        self._compiling: dict[Unit, threading.Lock] = {}
        self._lock = threading.Lock()
        # Cards whose memory this one has been asked to reach.
        self._peers: set[int] = set()
        # Held while a stream is captured, and by what waits for the whole card: that would make the
        # capture fail. Only what the host does is captured, so nobody waits for long.
        self._whole = threading.RLock()
        self._capturing = False
        # Memory that was to be freed in the middle of a capture.
        self._unwanted: list[int] = []

        self._try_out()

    def _try_out(self) -> None:
        """Compile and load a kernel: what fails here would fail after a model was uploaded."""
        try:
            self.function(kernel("fill", "fill"))
            self.memory()
        except DeviceError as error:
            raise CardError(f"{self.name} can't be used: {error}") from None

    def use(self) -> None:
        """Make this the current card of the calling thread."""
        self._device.use()

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make this card the one that CuPy uses within; any thread may call it."""
        return self._current

    def failed(self, error: BaseException) -> DeviceError:
        """Return what to tell of an error of CuPy's; note it if the card is lost with it."""
        status = getattr(error, "status", None)
        if status in _STICKY and not self.lost:
            self.lost = f"CUDA{self.index} is lost until the server is started anew: {error}"
            log.error("%s", self.lost, extra={"event": "device_lost"})
        # A compiler's message has a line for each error, and the source's name in the first.
        said = str(error).strip().partition("\n")[0]
        return DeviceError(f"CUDA{self.index} failed: {said}")

    # -- memory --------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """Return bytes that clients may still have, and all bytes of the card."""
        with self.current():
            free, total = self.cupy.cuda.runtime.memGetInfo()
        return max(int(free) - min(_RESERVED, int(total) // _RESERVED_PART), 0), int(total)

    def allocate(self, size: int) -> int:
        """Return the address of exactly ``size`` bytes, not from CuPy's pool. Raises MemoryError.

        What is kept back from clients can be had.
        """
        with self._whole, self.current(), self._memory_error(size, f"on {self.name}"):
            return int(self.cupy.cuda.runtime.malloc(size))

    def allocate_for_client(self, size: int) -> int:
        """Allocate as :meth:`allocate` does, but leave some memory. Raises MemoryError."""
        with self._whole:
            free, _ = self.memory()
            if size > free:
                raise MemoryError(f"{size} bytes on {self.name}: {free} are free for clients")
            return self.allocate(size)

    @contextlib.contextmanager
    def _memory_error(self, size: int, where: str) -> Iterator[None]:
        """Tell a lack of memory from other failures."""
        try:
            yield
        except self.cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            raise MemoryError(f"{size} bytes {where}: {error}") from None

    def free(self, address: int) -> None:
        """Give memory back; waits for all that the card has been given."""
        with self._whole:
            if self._capturing:
                # A finalizer that ran in the capturing thread.
                self._unwanted.append(address)
                return
            self._give_back(self.cupy.cuda.runtime.free, address)

    def _give_back(self, how: Callable[[int], None], what: int) -> None:
        """Give back what the card gave; one that has failed has lost it anyway."""
        try:
            with self.current():
                how(what)
        except DeviceError as error:
            log.debug("nothing is taken back: %s", error)

    def pinned(self, size: int) -> Pinned:
        """Allocate pinned memory of the host. Raises MemoryError."""
        with self._whole, self.current(), self._memory_error(size, "of pinned memory"):
            return Pinned(self.cupy, size)

    # -- streams and copies --------------------------------------------------------------------

    def stream(self) -> Any:
        """Return a stream that runs beside the others."""
        with self.current():
            return self.cupy.cuda.Stream(non_blocking=True)

    def mark(self, stream: Any) -> Any:
        """Return an event behind what has been given to ``stream`` so far."""
        with self.current():
            event = self.cupy.cuda.Event(block=True, disable_timing=True)
            event.record(stream)
            return event

    def to_device(self, address: int, host: int, size: int, stream: Any) -> None:
        """Enqueue a copy from pinned memory."""
        with self.current():
            self.cupy.cuda.runtime.memcpyAsync(address, host, size, _TO_DEVICE, stream.ptr)

    def to_host(self, host: int, address: int, size: int, stream: Any) -> None:
        """Enqueue a copy to pinned memory."""
        with self.current():
            self.cupy.cuda.runtime.memcpyAsync(host, address, size, _TO_HOST, stream.ptr)

    def copy(self, to: int, address: int, size: int, stream: Any) -> None:
        with self.current():
            self.cupy.cuda.runtime.memcpyAsync(to, address, size, _ON_DEVICE, stream.ptr)

    def copy_from_peer(self, to: int, peer: Card, address: int, size: int, stream: Any) -> None:
        """Enqueue a copy from another card's memory, past the host if the two can.

        ``stream`` is this card's.
        """
        runtime = self.cupy.cuda.runtime
        with self.current():
            if peer.index not in self._peers:
                self._peers.add(peer.index)
                if runtime.deviceCanAccessPeer(self.index, peer.index):
                    # It may be on already, or one peer too many: the copy then takes its own way.
                    with contextlib.suppress(runtime.CUDARuntimeError), self._whole:
                        runtime.deviceEnablePeerAccess(peer.index)
            runtime.memcpyPeerAsync(to, self.index, address, peer.index, size, stream.ptr)

    def fill(self, address: int, size: int, value: int, stream: Any) -> None:
        with self.current():
            self.cupy.cuda.runtime.memsetAsync(address, value, size, stream.ptr)

    # -- kernels -------------------------------------------------------------------------------

    def function(self, kernel: CudaKernel) -> Any:
        """Return the kernel, ready to be launched.

        This compiles its unit if that is not on disk already.
        """
        known = self._functions.get(kernel)
        if known is not None:
            return known
        with self._lock:
            compiling = self._compiling.setdefault(kernel.unit, threading.Lock())
        with compiling, self.current():
            module = self._modules.get(kernel.unit)
            if module is None:
                code = self._macros + kernel.unit.text
                options = options_for(self.capability, kernel.unit.source)
                module = self.cupy.RawModule(code=code, options=options, backend="nvrtc")
            # The compiler is called by the first of these; a unit that failed is tried again.
            found = module.get_function(kernel.name)
            log.debug("kernel %s is ready", kernel.label)
            self._modules[kernel.unit] = module
            self._functions[kernel] = found
        return found

    def launch(self, x: KernelLaunch, stream: Any) -> None:
        """Enqueue a kernel with its record."""
        with self.current(), stream:
            x.function(x.grid, (x.threads, 1, 1), (by_value(x.words),), shared_mem=x.shared)

    def library(self) -> int:
        """Return a handle of cuBLAS, for one stream at a time; see :meth:`close_library`."""
        with self._whole, self.current():
            return int(self._cublas.create())

    def close_library(self, handle: int) -> None:
        with self._whole:
            self._give_back(self._cublas.destroy, handle)

    def product(self, p: Product, handle: int, stream: Any) -> None:
        """Enqueue products by cuBLAS, with sums in F32; not while the stream is captured.

        CuPy gives cuBLAS the thread's current stream, and has no cuBLAS in captures.
        """
        kind = _CUBLAS_TYPES[p.type]
        one, zero = (int(x.ctypes.data) for x in _FACTORS)
        if p.factor:
            one, zero = p.factor, p.factor + 4
        with self.current(), stream:
            self._cublas.setPointerMode(handle, _ON_CARD if p.factor else _ON_HOST)
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

    def take_graph(self, graph: Any, stream: Any) -> None:
        """Have the card take a captured graph, which its first launch would do otherwise."""
        with self.current():
            graph.upload(stream)

    @property
    def changes_graphs(self) -> bool:
        """Return whether captured graphs can be changed, as far as is known."""
        return self._graph_calls is not None

    def change_graph(
        self, graph: Any, captured: Sequence[KernelLaunch], changed: Mapping[int, KernelLaunch]
    ) -> bool:
        """Let kernels of a captured graph be launched with something else from now on.

        As of GraphCalls.change. False where that can't be done: then the graph is of no use.
        """
        if self._graph_calls is None:
            return False
        try:
            with self.current():
                self._graph_calls.change(graph, captured, changed)
        except UpdateError as error:
            # Nor will it work the next time.
            self._graph_calls = None
            log.warning("captured graphs can't be changed, so new ones are made: %s", error)
            return False
        return True

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """Return what ``enqueue`` gives to ``stream``, as a graph that can be launched again and
        again.
        """
        with self._whole, self.current():
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
