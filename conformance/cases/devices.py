"""7: several devices behind one port, and device numbers that are none."""

from __future__ import annotations

import struct
from collections.abc import Callable

from conformance.cases.groups import DEVICES
from conformance.suite import Context, Peer, RemoteBuffer, tensor
from conformance.suite.tensors import graph_bytes
from protocol.commands import Command
from protocol.ggml.ops import Op

_SERVER = "ggml-rpc.cpp rpc_server::"
_COUNTED = (Command.DEVICE_COUNT,)


def _small_graph(peer: Peer, buffer: RemoteBuffer, device: int) -> bytes:
    nodes = [buffer.node(2, (8,), Op.ADD, 1, 1, at=64)]
    return graph_bytes(peer.dialect, nodes, [buffer.leaf(1, (8,))], device)


@DEVICES.case(
    1,
    sends="DEVICE_COUNT on two connections",
    expects="the same number, which is not 0",
    source="ggml-rpc.cpp rpc_serve_client, case RPC_CMD_DEVICE_COUNT, since 3.0",
    needs=_COUNTED,
)
def device_count(c: Context) -> None:
    """llama.cpp makes as many devices of a server, once, and ignores a server without."""
    first = c.connect()
    count = first.call(Command.DEVICE_COUNT).device_count
    first.close()
    c.expect(count > 0, "the server has no devices")
    c.equal(c.connect().call(Command.DEVICE_COUNT).device_count, count, "the second answer")


@DEVICES.case(
    2,
    sends="GET_ALIGNMENT, GET_MAX_SIZE, GET_DEVICE_MEMORY and ALLOC_BUFFER for each device",
    expects="an answer for each",
    source=f"{_SERVER}get_alignment and others, since 3.0",
    needs=_COUNTED,
)
def every_device_answers(c: Context) -> None:
    """A device that is counted is there."""
    peer = c.connect()
    for device in range(c.facts.devices):
        for command in (Command.GET_ALIGNMENT, Command.GET_MAX_SIZE, Command.GET_DEVICE_MEMORY):
            peer.call(command, device=device)
        peer.alloc(64, device)


def _declare_no_device(number: int, command: Command) -> None:
    verb = command.name.lower().replace("_", "-")

    def declare(number: int, suffix: str, shown: str, device: Callable[[Context], int]) -> None:
        @DEVICES.case(
            number,
            name=f"{verb}-of-{suffix}",
            sends=f"{command.name} for device {shown}",
            expects="the connection is closed",
            source=f"{_SERVER}{command.name.lower()} (dev_id >= backends.size()), since 3.0",
            why="A device number is an index into a list.",
            needs=(*_COUNTED, command),
            hostile=True,
        )
        def check(c: Context) -> None:
            peer = c.connect()
            wrong = device(c)
            if command is Command.GRAPH_COMPUTE:
                peer.send(command, _small_graph(peer, peer.alloc(256), wrong))
            else:
                peer.send(command, device=wrong, size=64, tensor=tensor(1, (8,)))
            c.refused(peer, command)

    declare(number, "the-device-behind-the-last", "N, of N devices", lambda c: c.facts.devices)
    declare(number + 10, "device-2-32", "2^32 - 1", lambda c: 0xFFFFFFFF)


for _number, _command in enumerate(
    (
        Command.ALLOC_BUFFER,
        Command.GET_ALIGNMENT,
        Command.GET_MAX_SIZE,
        Command.GET_DEVICE_MEMORY,
        Command.GET_ALLOC_SIZE,
        Command.GRAPH_COMPUTE,
        Command.GRAPH_RECOMPUTE,
    ),
    11,
):
    _declare_no_device(_number, _command)


@DEVICES.case(
    3,
    sends="a buffer on each of two devices, filled differently",
    expects="each keeps its own content; their addresses don't overlap",
    source=f"{_SERVER}alloc_buffer (request.device), since 3.0",
    needs=_COUNTED,
    devices=2,
)
def buffers_of_two_devices(c: Context) -> None:
    """Buffers of all devices share one space of addresses."""
    peer = c.connect()
    one, two = peer.alloc(4096, 0), peer.alloc(4096, 1)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=one.handle, value=1)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=two.handle, value=2)
    for buffer, value in ((one, 1), (two, 2)):
        found = peer.get(buffer.whole(), buffer.size)
        c.equal(found, bytes([value]) * buffer.size, f"the buffer of device {value - 1}")
    apart = one.base + one.size <= two.base or two.base + two.size <= one.base
    c.expect(apart, f"addresses overlap: {one.base:#x} and {two.base:#x}")


@DEVICES.case(
    4,
    sends="COPY_TENSOR from a buffer of one device to one of another",
    expects="result 1 and the bytes are there, or result 0 and nothing changed",
    source=f"{_SERVER}copy_tensor, since 3.0",
    needs=_COUNTED,
    devices=2,
)
def copy_between_devices(c: Context) -> None:
    """With the result 0 llama.cpp copies by way of itself."""
    peer = c.connect()
    one, two = peer.alloc(4096, 0), peer.alloc(4096, 1)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=one.handle, value=1)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=two.handle, value=2)
    src, dst = one.leaf(1, (64,)), two.leaf(2, (64,), at=256)
    result = peer.call(Command.COPY_TENSOR, src=src, dst=dst).result
    copied = bytes([1 if result else 2]) * 256
    found = peer.get(two.whole(), two.size)
    c.equal(found, b"\x02" * 256 + copied + b"\x02" * (two.size - 512), "the destination")


@DEVICES.case(
    5,
    sends="a graph on each of two devices, new sources, then GRAPH_RECOMPUTE of the first",
    expects="the first device's graph runs again, the second's result is as before",
    source=f"{_SERVER}graph_recompute (stored_graphs[device]), since 3.5",
    needs=(*_COUNTED, Command.GRAPH_RECOMPUTE),
    devices=2,
)
def each_device_has_its_graph(c: Context) -> None:
    """Each device keeps the graph that it ran last."""
    peer = c.connect()
    buffers = [peer.alloc(256, device) for device in (0, 1)]
    for device, buffer in enumerate(buffers):
        peer.set(buffer.leaf(1, (8,)), _floats(1.0))
        answer = peer.call(Command.GRAPH_COMPUTE, _small_graph(peer, buffer, device))
        c.expect(answer is None or answer.result == 0, "the graph failed")
    for buffer in buffers:
        peer.set(buffer.leaf(1, (8,)), _floats(2.0))
    peer.call(Command.GRAPH_RECOMPUTE, device=0)
    for buffer, expected in zip(buffers, (4.0, 2.0), strict=True):
        c.equal(peer.get(buffer.leaf(2, (8,), at=64), 32), _floats(expected), "the result")


@DEVICES.case(
    6,
    sends="a graph on one device, GRAPH_RECOMPUTE of another one, which has computed nothing",
    expects="the connection is closed",
    source=f"{_SERVER}graph_recompute (stored_graphs[device]), since 3.5",
    needs=(*_COUNTED, Command.GRAPH_RECOMPUTE),
    devices=2,
    hostile=True,
)
def recompute_of_a_device_without_a_graph(c: Context) -> None:
    """The graph of another device lies in that one's memory."""
    peer = c.connect()
    peer.call(Command.GRAPH_COMPUTE, _small_graph(peer, peer.alloc(256, 0), 0))
    peer.send(Command.GRAPH_RECOMPUTE, device=1)
    c.refused(peer)


def _floats(value: float) -> bytes:
    return struct.pack("<8f", *[value] * 8)
