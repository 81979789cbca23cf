"""The stand-in for CuPy refuses what CuPy and CUDA refuse, between cards and within captures."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.cuda import emulation, standin
from tests.cuda.standin import CUDARuntimeError

# One number from one place to another.
SOURCE = """
struct Record { float *to; const float *from; };
extern "C" __global__ void move(Record r) { *r.to = *r.from; }
"""


@pytest.fixture
def cupy() -> Iterator[Any]:
    """Two cards."""
    with standin.installed(2):
        yield sys.modules["cupy"]


def on(cupy: Any, card: int, what: Callable[[], Any]) -> Any:
    with cupy.cuda.Device(card):
        return what()


def stream(cupy: Any, card: int) -> Any:
    return on(cupy, card, lambda: cupy.cuda.Stream(non_blocking=True))


def memory(cupy: Any, card: int) -> int:
    return int(on(cupy, card, lambda: cupy.cuda.runtime.malloc(4)))


def event(cupy: Any, card: int) -> Any:
    return on(cupy, card, lambda: cupy.cuda.Event(block=True, disable_timing=True))


def in_a_thread(what: Callable[[], Any]) -> BaseException | None:
    """What it raises, if anything."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            what()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_the_current_card_is_the_threads(cupy: Any) -> None:
    """Devices nest, and other threads begin at the first card."""
    seen: list[int] = []
    with cupy.cuda.Device(1):
        with cupy.cuda.Device(0):
            pass
        assert cupy.cuda.Stream(non_blocking=True).device_id == 1
        in_a_thread(lambda: seen.append(cupy.cuda.Stream(non_blocking=True).device_id))
    assert seen == [0]
    with pytest.raises(CUDARuntimeError, match="InvalidDevice"), cupy.cuda.Device(2):
        pass


def test_memory_is_of_one_card(cupy: Any) -> None:
    here, there = memory(cupy, 0), memory(cupy, 1)
    with pytest.raises(CUDARuntimeError):
        cupy.cuda.runtime.memcpyAsync(here, there, 4, 3, stream(cupy, 0).ptr)
    with pytest.raises(CUDARuntimeError):
        cupy.cuda.runtime.memsetAsync(there, 0, 4, stream(cupy, 0).ptr)
    with pytest.raises(CUDARuntimeError):
        cupy.cuda.runtime.memcpyPeerAsync(here, 1, there, 0, 4, stream(cupy, 0).ptr)
    with pytest.raises(CUDARuntimeError):
        cupy.cuda.runtime.free(there)
    assert (standin.used(0), standin.used(1)) == (4, 4)


def test_events_and_streams_are_of_one_card(cupy: Any) -> None:
    with pytest.raises(CUDARuntimeError, match="another card"):
        event(cupy, 1).record(stream(cupy, 0))
    with pytest.raises(RuntimeError, match="does not match"), stream(cupy, 1):
        pass
    other = event(cupy, 1)
    other.record(stream(cupy, 1))
    # Waiting for one of another card is fine.
    stream(cupy, 0).wait_event(other)


@pytest.mark.parametrize("peering", [True, False])
def test_copies_between_cards(peering: bool) -> None:
    """They need no access; asking for it twice, or where there is none, is an error."""
    with standin.installed(2, peering=peering):
        cupy: Any = sys.modules["cupy"]
        runtime = cupy.cuda.runtime
        assert runtime.deviceCanAccessPeer(0, 1) == int(peering)
        assert runtime.deviceCanAccessPeer(1, 1) == 0
        if peering:
            runtime.deviceEnablePeerAccess(1)
        with pytest.raises(CUDARuntimeError, match="PeerAccess"):
            runtime.deviceEnablePeerAccess(1)
        here, there, way = memory(cupy, 0), memory(cupy, 1), stream(cupy, 1)
        on(cupy, 1, lambda: runtime.memsetAsync(there, 7, 4, way.ptr))
        on(cupy, 1, lambda: runtime.memcpyPeerAsync(here, 0, there, 1, 4, way.ptr))
        pinned = cupy.cuda.alloc_pinned_memory(4)
        back = stream(cupy, 0)
        done = event(cupy, 1)
        done.record(way)
        back.wait_event(done)
        runtime.memcpyAsync(pinned.ptr, here, 4, 2, back.ptr)
        back.synchronize()
        assert bytes(pinned._bytes) == bytes([7] * 4)


@pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)
def test_kernels_see_their_cards_memory_only(cupy: Any) -> None:
    module = cupy.RawModule(code=SOURCE, options=(), backend="nvrtc")
    kernel = module.get_function("move")
    here, there = memory(cupy, 0), memory(cupy, 1)
    way = stream(cupy, 0)
    words = np.array([here, there], np.int64)
    with way, pytest.raises(TypeError, match="size one"):
        kernel((1,), (1,), (words,))
    with way:
        kernel((1,), (1,), (words.view("V16"),))
    with pytest.raises(emulation.EmulationError, match="no memory of the device"):
        way.synchronize()


def test_a_capture_is_spoilt_by_what_its_own_thread_does(cupy: Any) -> None:
    way = stream(cupy, 0)
    way.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
    assert in_a_thread(lambda: memory(cupy, 0)) is None
    with pytest.raises(CUDARuntimeError, match="StreamCaptureUnsupported"):
        memory(cupy, 0)
    with pytest.raises(CUDARuntimeError, match="Invalidated"):
        way.end_capture()


def test_other_threads_spoil_a_global_capture_and_by_waiting_any(cupy: Any) -> None:
    way, place = stream(cupy, 0), memory(cupy, 0)
    way.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
    assert isinstance(in_a_thread(lambda: memory(cupy, 0)), CUDARuntimeError)
    with pytest.raises(CUDARuntimeError, match="Invalidated"):
        way.end_capture()
    way.begin_capture()
    memory(cupy, 0)
    assert isinstance(in_a_thread(lambda: cupy.cuda.runtime.free(place)), CUDARuntimeError)
    with pytest.raises(CUDARuntimeError, match="Invalidated"):
        way.end_capture()


def test_captures_have_no_cublas(cupy: Any) -> None:
    from cupy_backends.cuda.libs import cublas

    handle, way = cublas.create(), stream(cupy, 0)
    way.begin_capture()
    with way, pytest.raises(NotImplementedError):
        cublas.gemmStridedBatchedEx(
            handle, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 68, -1
        )
    way.end_capture()


def test_who_waits_for_what_another_thread_runs_waits_for_its_end(cupy: Any) -> None:
    way, mark = stream(cupy, 0), event(cupy, 0)
    begun, go, waited = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        go.wait(60)

    way.queue.give("job", job)
    mark.record(way)

    def wait() -> None:
        mark.synchronize()
        waited.set()

    threads = [threading.Thread(target=what) for what in (way.synchronize, wait)]
    threads[0].start()
    try:
        assert begun.wait(60)
        assert not mark.done
        threads[1].start()
        assert not waited.wait(0.05)
    finally:
        go.set()
    for thread in threads:
        thread.join()
    assert waited.is_set()
    assert mark.done


def test_what_is_left_of_a_stand_in_before_changes_nothing() -> None:
    """It is freed when garbage is collected, whoever may have the card by then."""
    with standin.installed():
        before: Any = sys.modules["cupy"]
        place, device = memory(before, 0), before.cuda.Device(0)
        from cupy_backends.cuda.libs import cublas

        handle = cublas.create()
    with standin.installed():
        cupy: Any = sys.modules["cupy"]
        now, way, mark = cupy.cuda.runtime.malloc(4), stream(cupy, 0), event(cupy, 0)
        standin.contexts.clear()
        cupy.cuda.runtime.memsetAsync(now, 1, 4, way.ptr)
        mark.record(way)
        way.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        device.use()
        # The same address, as malloc gives them again.
        for address in (place, now):
            before.cuda.runtime.free(address)
        cublas.destroy(handle)
        way.end_capture()
        assert not mark.done
        assert standin.used() == 4
        assert not standin.contexts
        mark.synchronize()


def test_what_is_waited_for_is_what_was_recorded_then(cupy: Any) -> None:
    """An event that is recorded again later means the old place to who waits for it already."""
    first, second, mark = stream(cupy, 0), stream(cupy, 0), event(cupy, 0)
    place = memory(cupy, 0)
    mark.record(first)
    second.wait_event(mark)
    cupy.cuda.runtime.memsetAsync(place, 1, 4, first.ptr)
    mark.record(first)
    second.synchronize()
    assert not mark.done
    mark.synchronize()
    assert mark.done
