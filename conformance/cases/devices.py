"""7: several devices behind one port, and device numbers that are none."""

from __future__ import annotations

import struct
from collections.abc import Callable

from conformance.cases.groups import DEVICES
from conformance.suite import Context, Peer, RemoteBuffer, tensor
from conformance.suite.refusals import Refusal, Send, declare
from conformance.suite.tensors import graph_bytes
from protocol.commands import Command
from protocol.ggml.ops import Op

_SERVER = "ggml-rpc.cpp rpc_server::"
_COUNTED = (Command.DEVICE_COUNT,)


def _small_graph(peer: Peer, buffer: RemoteBuffer, device: int) -> bytes:
    nodes = [buffer.node(2, (8,), Op.ADD, 1, 1, at=64)]
    return graph_bytes(peer.dialect, nodes, [buffer.leaf(1, (8,))], device)


@DEVICES.case(
    1, source="ggml-rpc.cpp rpc_serve_client, case RPC_CMD_DEVICE_COUNT, since 3.0", needs=_COUNTED
)
def device_count(c: Context) -> None:
    """llama.cpp makes as many devices of a server, once, and ignores a server without.

    Sends: DEVICE_COUNT on two connections
    Expects: the same number, which is not 0
    """
    first = c.connect()
    count = first.call(Command.DEVICE_COUNT).device_count
    first.close()
    c.expect(count > 0, "the server has no devices")
    c.equal(c.connect().call(Command.DEVICE_COUNT).device_count, count, "the second answer")


@DEVICES.case(2, source=f"{_SERVER}get_alignment and others, since 3.0", needs=_COUNTED)
def every_device_answers(c: Context) -> None:
    """A device that is counted is there.

    Sends: GET_ALIGNMENT, GET_MAX_SIZE, GET_DEVICE_MEMORY and ALLOC_BUFFER for each device
    Expects: an answer for each
    """
    peer = c.connect()
    for device in range(c.facts.devices):
        for command in (Command.GET_ALIGNMENT, Command.GET_MAX_SIZE, Command.GET_DEVICE_MEMORY):
            peer.call(command, device=device)
        peer.alloc(64, device)


@DEVICES.case(
    3, source=f"{_SERVER}alloc_buffer (request.device), since 3.0", needs=_COUNTED, devices=2
)
def buffers_of_two_devices(c: Context) -> None:
    """Buffers of all devices share one space of addresses.

    Sends: a buffer on each of two devices, filled differently
    Expects: each keeps its own content; their addresses don't overlap
    """
    peer = c.connect()
    one, two = peer.alloc(4096, 0), peer.alloc(4096, 1)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=one.handle, value=1)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=two.handle, value=2)
    for buffer, value in ((one, 1), (two, 2)):
        found = peer.get(buffer.whole(), buffer.size)
        c.equal(found, bytes([value]) * buffer.size, f"the buffer of device {value - 1}")
    apart = one.base + one.size <= two.base or two.base + two.size <= one.base
    c.expect(apart, f"addresses overlap: {one.base:#x} and {two.base:#x}")


@DEVICES.case(4, source=f"{_SERVER}copy_tensor, since 3.0", needs=_COUNTED, devices=2)
def copy_between_devices(c: Context) -> None:
    """With the result 0 llama.cpp copies by way of itself.

    Sends: COPY_TENSOR from a buffer of one device to one of another
    Expects: result 1 and the bytes are there, or result 0 and nothing changed
    """
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
    source=f"{_SERVER}graph_recompute (stored_graphs[device]), since 3.5",
    needs=(*_COUNTED, Command.GRAPH_RECOMPUTE),
    devices=2,
)
def each_device_has_its_graph(c: Context) -> None:
    """Each device keeps the graph that it ran last.

    Sends: a graph on each of two devices, new sources, then GRAPH_RECOMPUTE of the first
    Expects: the first device's graph runs again, the second's result is as before
    """
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
    source=f"{_SERVER}graph_recompute (stored_graphs[device]), since 3.5",
    needs=(*_COUNTED, Command.GRAPH_RECOMPUTE),
    devices=2,
    hostile=True,
)
def recompute_of_a_device_without_a_graph(c: Context) -> None:
    """The graph of another device lies in that one's memory.

    Sends: a graph on one device, GRAPH_RECOMPUTE of another one, which has computed nothing
    Expects: the connection is closed
    """
    peer = c.connect()
    peer.call(Command.GRAPH_COMPUTE, _small_graph(peer, peer.alloc(256, 0), 0))
    peer.send(Command.GRAPH_RECOMPUTE, device=1)
    c.refused(peer)


def _floats(value: float) -> bytes:
    return struct.pack("<8f", *[value] * 8)


def _for_device(command: Command, device: Callable[[Context], int]) -> Send:
    """Send a request that names a device which isn't there."""

    def send(c: Context, peer: Peer) -> None:
        wrong = device(c)
        if command is Command.GRAPH_COMPUTE:
            peer.send(command, _small_graph(peer, peer.alloc(256), wrong))
        else:
            peer.send(command, device=wrong, size=64, tensor=tensor(1, (8,)))

    return send


declare(
    DEVICES,
    [
        Refusal(
            number + offset,
            f"{command.name.lower().replace('_', '-')}-of-{name}",
            f"{command.name} for device {shown}",
            _for_device(command, device),
            command,
            needs=(*_COUNTED, command),
        )
        for number, command in enumerate(
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
        )
        for offset, name, shown, device in (
            (0, "the-device-behind-the-last", "N, of N devices", lambda c: c.facts.devices),
            (10, "device-2-32", "2^32 - 1", lambda c: 0xFFFFFFFF),
        )
    ],
    why="A device number is an index into a list.",
    source=f"{_SERVER}get_alignment and others (dev_id >= backends.size()), since 3.0",
)
