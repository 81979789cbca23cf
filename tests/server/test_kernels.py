"""Kernels as clients of a server meet them: compiled elsewhere, and never in the way of others."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.ggml.types import GgmlType, row_size
from rpc_server.devices.cpu.catalog import binary_kernel
from rpc_server.devices.cpu.kernels.interface.codes import Binary
from rpc_server.options import NO_PREPARE_VARIABLE
from tests.server.process import Wire, running, sources, tensor

MIB = 1 << 20


class Doubling:
    """A graph that adds 64 numbers to themselves, on one connection."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        handle, base = wire.alloc(512)
        self._x = tensor(1, (64,), handle, base)
        self._y = tensor(2, (64,), handle, base + 256, op=wire.op("ADD"), src=sources(1, 1))

    def run(self, value: float) -> bool:
        """Whether the result is right."""
        x = np.full(64, value, np.float32)
        self._wire.set_tensor(self._x, x.tobytes())
        self._wire.compute([self._y], [self._x])
        y = np.frombuffer(self._wire.get_tensor(self._y, 256), np.float32)
        return bool((y == 2 * x).all())


@pytest.fixture
def cold(tmp_path: Path) -> dict[str, str]:
    """The environment of a server that finds no kernels on disk."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.slow
def test_the_server_never_loads_a_compiler(cold: dict[str, str]) -> None:
    # Once with kernels to be compiled, once with all on disk.
    for _ in range(2):
        with running("--threads", "2", env=cold) as server, Wire(server.port) as wire:
            assert Doubling(wire).run(1.5)
            maps = Path(f"/proc/{server.child.pid}/maps").read_text()
            assert "llvmlite" not in maps
            assert "numba" not in maps
            assert server.rss() < 80 * MIB


@pytest.mark.slow
def test_others_are_served_while_kernels_are_compiled(cold: dict[str, str]) -> None:
    with (
        running("--threads", "2", env=cold) as server,
        Wire(server.port) as quick,
        Wire(server.port) as slow,
    ):
        doubling = Doubling(quick)
        assert doubling.run(1)
        # A product of a type that nobody has used: seconds of compiling.
        handle, base = slow.alloc(1 << 16)
        size = 16 * row_size(GgmlType.Q6_K, 256)
        a = tensor(1, (256, 16), handle, base, GgmlType.Q6_K)
        b = tensor(2, (256, 1), handle, base + (1 << 15))
        c = tensor(3, (16, 1), handle, base + 49152, op=slow.op("MUL_MAT"), src=sources(1, 2))
        slow.set_tensor(a, bytes(size))
        slow.set_tensor(b, np.ones(256, np.float32).tobytes())
        slow.set_tensor(c, np.ones(16, np.float32).tobytes())
        slow.send(Command.GRAPH_COMPUTE, slow.graph([c], [a, b]))
        fields: dict[str, Any] = {"tensor": c, "offset": 0, "size": 64}
        head = codec(slow.dialect.commands[Command.GET_TENSOR].request).build(fields)
        slow.send(Command.GET_TENSOR, head)
        for value in range(2, 6):
            assert doubling.run(value)
        with Wire(server.port) as third:
            assert third.version is not None
        answered, _, _ = select.select([slow.socket], [], [], 0)
        assert not answered, "compiled before others had their turn: this test shows nothing"
        slow.answer(Command.GRAPH_COMPUTE)
        assert slow.answer(Command.GET_TENSOR) == bytes(64)


@pytest.mark.slow
def test_the_first_graph_does_not_wait_for_all_of_its_kernels(cold: dict[str, str]) -> None:
    with (
        running("--log-level", "debug", env={**cold, NO_PREPARE_VARIABLE: ""}) as server,
        Wire(server.port) as wire,
    ):
        doubling = Doubling(wire)
        assert doubling.run(1.5)
        # One node of it ran by its reference.
        server.wait_for(r"planned 1 nodes .* without kernels: \{")
        added = f"kernels-*/{binary_kernel(Binary.ADD, True).label}.bin"
        folder, deadline = Path(cold["XDG_CACHE_HOME"]), time.monotonic() + 120
        while not list(folder.glob(f"ggml-rpc-server/{added}")):
            assert doubling.run(2.5)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert doubling.run(3.5)


@pytest.mark.slow
def test_without_a_compiler_graphs_run_by_references(cold: dict[str, str]) -> None:
    with running(env={**cold, "NUMBA_DISABLE_JIT": "1"}) as server, Wire(server.port) as wire:
        assert Doubling(wire).run(2.5)
        server.wait_for("running without kernels, which is very slow")
