"""CuPy itself, as far as it works without a GPU, takes what the device gives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cuda.card import by_value
from rpc_server.devices.cuda.compile import options_for, source_text

cupy = pytest.importorskip("cupy", reason="no CuPy: pip install '.[cuda12]'")


@pytest.mark.parametrize("capability", [61, 75])
def test_options_are_passed_to_the_compiler(capability: int) -> None:
    """As a kernel is compiled that isn't on disk yet; CuPy first asks for an empty one."""
    from cupy.cuda import compiler

    options = options_for(capability, "fill")
    compiler._preprocess("", options, str(capability), "nvrtc")
    program = compiler._NVRTCProgram(source_text("fill"), "fill.cu", method="cubin")
    code, _ = program.compile((*options, f"-arch=sm_{capability}"))
    assert code.startswith(b"\x7fELF")


def launch(argument: Any) -> None:
    """A launch of no function: the driver refuses it, but not before CuPy has read the argument."""
    function = cupy.cuda.Function.__new__(cupy.cuda.Function)
    function((1,), (32,), (argument,), 0, stream=SimpleNamespace(ptr=0))


def test_a_record_is_passed_by_value() -> None:
    """CuPy passes host arrays by value if they have one element, and refuses others."""
    words = np.zeros(RECORD_WORDS, np.int64)
    with pytest.raises(TypeError, match="size one"):
        launch(words)
    # Without a driver it is the runtime that refuses.
    with pytest.raises((cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)):
        launch(by_value(words))


def test_the_names_are_there() -> None:
    """Of what card.py calls; signatures are in the stand-in."""
    cuda, runtime = cupy.cuda, cupy.cuda.runtime
    assert {
        n for n in ("Device", "Event", "Stream", "alloc_pinned_memory") if not hasattr(cuda, n)
    } == set()
    of_graphs = ("launch", "upload", "graph", "graphExec")
    assert {n for n in of_graphs if not hasattr(cuda.Graph, n)} == set()
    names = (
        "CUDARuntimeError",
        "deviceCanAccessPeer",
        "deviceEnablePeerAccess",
        "free",
        "getDeviceCount",
        "getDeviceProperties",
        "malloc",
        "memGetInfo",
        "memcpyAsync",
        "memcpyPeerAsync",
        "memsetAsync",
        "streamCaptureModeThreadLocal",
    )
    assert {n for n in names if not hasattr(runtime, n)} == set()
