"""Single parts of a server's work, driven over one plain socket: no model, no llama.cpp.

Graphs and tensors are made by ``client/``; requests go over a blocking socket, as llama.cpp's do,
since an event loop on this side would be part of every figure and bring them closer to one another.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.builder.graph import GraphBuilder
from protocol.codec import codec
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from tools.bench.results import Sample
from tools.wire import Wire

# A layer of a llama with a billion parameters in Q8_0: its matrices and norms, (type, ne).
_WIDTH, _KV_WIDTH, _FFN_WIDTH = 2048, 512, 8192
_LAYER: tuple[tuple[GgmlType, tuple[int, int]], ...] = (
    (GgmlType.F32, (_WIDTH, 1)),
    (GgmlType.Q8_0, (_WIDTH, _WIDTH)),
    (GgmlType.Q8_0, (_WIDTH, _KV_WIDTH)),
    (GgmlType.Q8_0, (_WIDTH, _KV_WIDTH)),
    (GgmlType.Q8_0, (_WIDTH, _WIDTH)),
    (GgmlType.F32, (_WIDTH, 1)),
    (GgmlType.Q8_0, (_WIDTH, _FFN_WIDTH)),
    (GgmlType.Q8_0, (_WIDTH, _FFN_WIDTH)),
    (GgmlType.Q8_0, (_FFN_WIDTH, _WIDTH)),
)
_ALIGNMENT = 64
_NODE_WIDTH = 16
# What a client reads row by row: of a value cache without flash attention, or a token by a sampler.
_SMALL = 128


@dataclass(frozen=True)
class MicroOptions:
    """The amounts of each: round trips, bytes to upload and to read, nodes and runs of a graph."""

    round_trips: int = 3000
    upload_bytes: int = 1 << 30
    download_bytes: int = 256 << 20
    nodes: int = 1000
    reruns: int = 200
    new_graphs: int = 10


# As little of each as there is: has a server compile what all of them need.
LEAST = MicroOptions(
    round_trips=1, upload_bytes=1, download_bytes=1, nodes=1, reruns=1, new_graphs=1
)


def measure(port: int, pid: int, options: MicroOptions) -> list[Sample]:
    """Measure all of them, on a connection each; ``pid`` is the server's process."""
    with _apart(pid), Wire(port, timeout=300) as wire:
        samples = _round_trip(wire, options)
    for part in (_transfers, _graphs):
        with Wire(port, timeout=300) as wire:
            samples += part(wire, options)
    return samples


@contextmanager
def _apart(pid: int) -> Iterator[None]:
    """Keeps this process and the server's on different cores, where there are two.

    Two that share a core wake each other several times as fast as two that don't, and which of
    both it is the system decides anew for every connection.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(cores) < 2:
        yield
        return
    first = {min(cores)}
    threads = {0: first, **dict.fromkeys(_threads(pid), cores - first)}
    before = {}
    try:
        for thread, where in threads.items():
            with _unless_it_has_ended():
                before[thread] = os.sched_getaffinity(thread)
                os.sched_setaffinity(thread, where)
        yield
    finally:
        for thread, where in before.items():
            with _unless_it_has_ended():
                os.sched_setaffinity(thread, where)


def _unless_it_has_ended() -> AbstractContextManager[None]:
    """Return a context for what is done to one of the server's threads."""
    return suppress(ProcessLookupError)


def _threads(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


def _settle(wire: Wire) -> None:
    """Wait until the server has done all that was sent: it answers in order."""
    wire.call(Command.DEVICE_COUNT)


def _seconds(wire: Wire, command: Command, payload: bytes) -> float:
    """Return how long a command takes up to the answer of an empty one behind it."""
    started = time.perf_counter()
    wire.send(command, payload)
    wire.answer(command)
    _settle(wire)
    return time.perf_counter() - started


def _round_trip(wire: Wire, options: MicroOptions) -> list[Sample]:
    """An empty command and its answer of four bytes."""
    times = []
    for _ in range(options.round_trips):
        started = time.perf_counter()
        wire.send(Command.DEVICE_COUNT, b"")
        wire.read_answer()
        times.append(time.perf_counter() - started)
    return [Sample("round trip", "us", False, statistics.median(times) * 1e6)]


# -- uploads and downloads -------------------------------------------------------------------


def model_tensors(nbytes: int) -> Iterator[Tensor]:
    """Yield leaves as a model of at least ``nbytes`` has them, in the order of a file."""
    graph = GraphBuilder()
    made = 0
    while made < nbytes:
        for type_, ne in _LAYER:
            tensor = graph.new_tensor(type_, ne, f"weight {made}")
            made += tensor.nbytes
            yield tensor


def place(wire: Wire, tensors: list[Tensor]) -> None:
    """Give tensors memory in one new buffer."""
    sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
    handle, address = wire.alloc(sum(sizes))
    for tensor, size in zip(tensors, sizes, strict=True):
        tensor.place(handle, address)
        address += size


def _fields(wire: Wire, tensor: Tensor) -> dict[str, Any]:
    return {**tensor.fields(), "op": wire.dialect.op_number(tensor.op)}


def _transfers(wire: Wire, options: MicroOptions) -> list[Sample]:
    """Weights to the server, and some of them back. Nothing is copied on this side."""
    tensors = list(model_tensors(options.upload_bytes))
    place(wire, tensors)
    source = memoryview(bytes(max(t.nbytes for t in tensors)))
    request = codec(wire.dialect.commands[Command.SET_TENSOR].request)
    heads = [
        request.build({"tensor": _fields(wire, t), "offset": 0, "cache_flag": 0}) for t in tensors
    ]
    # The first time the server's system has to find the memory; the second time it has it.
    uploads = []
    for _ in range(2):
        started = time.perf_counter()
        for tensor, head in zip(tensors, heads, strict=True):
            wire.send(Command.SET_TENSOR, head, source[: tensor.nbytes])
            wire.answer(Command.SET_TENSOR)
        _settle(wire)
        uploads.append(sum(t.nbytes for t in tensors) / (time.perf_counter() - started))

    request = codec(wire.dialect.commands[Command.GET_TENSOR].request)
    # A page of the target that was never touched would cost time on this side.
    target = memoryview(np.ones(len(source), np.uint8).data)
    done, seconds = 0, 0.0
    for tensor in tensors:
        if done >= options.download_bytes:
            break
        fields = _fields(wire, tensor)
        head = request.build({"tensor": fields, "offset": 0, "size": tensor.nbytes})
        started = time.perf_counter()
        wire.send(Command.GET_TENSOR, head)
        wire.read_into(target[: wire.read_size()])
        seconds += time.perf_counter() - started
        done += tensor.nbytes
    return [
        Sample("upload, new memory", "GB/s", True, uploads[0] / 1e9),
        Sample("upload, same memory", "GB/s", True, uploads[1] / 1e9),
        Sample("download", "GB/s", True, done / seconds / 1e9),
        _small_reads(wire, tensors[0], options.round_trips),
    ]


def _small_reads(wire: Wire, tensor: Tensor, count: int) -> Sample:
    """Little of a tensor, one read after the other."""
    request = codec(wire.dialect.commands[Command.GET_TENSOR].request)
    fields = {"tensor": _fields(wire, tensor), "offset": _SMALL, "size": _SMALL}
    head = request.build(fields)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        wire.send(Command.GET_TENSOR, head)
        wire.read_answer()
        times.append(time.perf_counter() - started)
    return Sample(f"read of {_SMALL} bytes", "us", False, statistics.median(times) * 1e6)


# -- graphs ----------------------------------------------------------------------------------


def chain(wire: Wire, nodes: int, width: int) -> bytes:
    """Return the GRAPH_COMPUTE of a chain of small sums, all of it placed in a new buffer."""
    builder = GraphBuilder()
    total = builder.new_tensor(GgmlType.F32, (width,), "start")
    step = builder.new_tensor(GgmlType.F32, (width,), "step")
    for _ in range(nodes):
        total = builder.add(total, step)
    graph = builder.build(total)
    place(wire, list(graph.tensors))
    return graph.encode(wire.dialect)


def _graphs(wire: Wire, options: MicroOptions) -> list[Sample]:
    """A graph that the server has seen last, and graphs that it hasn't seen."""
    # The first graph also loads kernels.
    _seconds(wire, Command.GRAPH_COMPUTE, chain(wire, 1, _NODE_WIDTH))
    least = _again(wire, options.reruns)
    # Every graph has another shape, so that nothing of an earlier one can be used.
    payloads = [chain(wire, options.nodes, _NODE_WIDTH + i) for i in range(options.new_graphs)]
    new = [_seconds(wire, Command.GRAPH_COMPUTE, payload) for payload in payloads]
    per_node = _again(wire, options.reruns) / options.nodes
    return [
        Sample("graph again, 1 node", "us", False, least * 1e6),
        Sample(f"graph again, {options.nodes} nodes", "us/node", False, per_node * 1e6),
        Sample(f"new graph, {options.nodes} nodes", "ms", False, statistics.median(new) * 1e3),
    ]


def _again(wire: Wire, times: int) -> float:
    """Seconds for the graph that ran last, the median of some runs."""
    request = codec(wire.dialect.commands[Command.GRAPH_RECOMPUTE].request).build({"device": 0})
    return statistics.median(_seconds(wire, Command.GRAPH_RECOMPUTE, request) for _ in range(times))
