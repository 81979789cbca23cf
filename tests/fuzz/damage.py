"""Changes inputs with their structure in mind: whole messages, fields of tensors, links.

Bytes changed at random seldom get past the first check; one wrong field in a valid graph does.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import ProtocolError
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.graph_payload import GraphPayload, decode_graph, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE
from protocol.split import ProgramPayload, ProgramStep, decode_program, encode_program
from tests.fuzz.graphs import GraphInput, handle, wire_base

# (data, largest size) to changed bytes: the fuzzer's own, which knows what code compared with.
Mutate = Callable[[bytes, int], bytes]
# The same of a target; the last one are inputs that are valid.
Damage = Callable[[bytes, int, random.Random, Mutate, Sequence[bytes]], bytes]

_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 100, 255, 256, 257, 1024, 4096, 65535, 65536)
_HUGE = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0, 1 << 20, 1 << 24, 1 << 30, 1 << 31)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-6, 1e4, 3e38, 1e-40, float("inf"), float("nan"))
_FRAME = struct.Struct("<BQ")
# How many changes one input gets at most.
_MOST = 4


def _word(old: int, chosen: random.Random) -> int:
    """Another unsigned 32-bit number."""
    kind = chosen.randrange(6)
    if kind == 0:
        return chosen.choice(_HUGE)
    if kind == 1:
        return chosen.choice(_SIZES)
    if kind == 2:
        return (old + chosen.choice((-4, -2, -1, 1, 2, 4, 32, 256))) & 0xFFFFFFFF
    if kind == 3:
        return (old * chosen.choice((0, 2, 3, 32, 256))) & 0xFFFFFFFF
    if kind == 4:
        return old // chosen.choice((2, 3, 4, 32))
    return old ^ (1 << chosen.randrange(32))


def _parameter(old: int, chosen: random.Random) -> int:
    if chosen.random() < 0.5:
        value: int = struct.unpack("<i", struct.pack("<f", chosen.choice(_FLOATS)))[0]
        return value
    return int(np.uint32(_word(old & 0xFFFFFFFF, chosen)).view(np.int32))


Tensors = npt.NDArray[Any]


def _change_one(numbers: Tensors, i: int, swaps: float, chosen: random.Random) -> None:
    """Swap two of a tensor's four numbers, that often, or change one."""
    k = chosen.randrange(4)
    if chosen.random() < swaps:
        other = chosen.randrange(4)
        numbers[i, [k, other]] = numbers[i, [other, k]]
    else:
        numbers[i, k] = _word(int(numbers[i, k]), chosen)


def _change_ne(ts: Tensors, i: int, chosen: random.Random) -> None:
    _change_one(ts["ne"], i, 0.2, chosen)
    if chosen.random() < 0.5:
        _dense(ts, i)


def _dense(ts: Tensors, i: int) -> None:
    """Strides that fit the shape."""
    info = TYPE_INFO.get(int(ts["type"][i]))  # type: ignore[call-overload]
    if info is None:
        return
    stride = info.type_size
    ts["nb"][i, 0] = stride
    stride = stride * (int(ts["ne"][i, 0]) // info.block_size)
    for k in (1, 2, 3):
        ts["nb"][i, k] = stride & 0xFFFFFFFF
        stride *= int(ts["ne"][i, k])


def _change_nb(ts: Tensors, i: int, chosen: random.Random) -> None:
    _change_one(ts["nb"], i, 0.3, chosen)


def _change_both(ts: Tensors, i: int, chosen: random.Random) -> None:
    # The same size for all that had it: contracts compare shapes.
    k = chosen.randrange(4)
    old, new = int(ts["ne"][i, k]), _word(int(ts["ne"][i, k]), chosen)
    for j in range(len(ts)):
        for m in range(4):
            if int(ts["ne"][j, m]) == old:
                ts["ne"][j, m] = new
        _dense(ts, j)


def _stretch(ts: Tensors, i: int, chosen: random.Random) -> None:
    """Any number of elements in the same few bytes."""
    k, size = chosen.randrange(4), chosen.choice(_HUGE)
    old, alike = int(ts["ne"][i, k]), chosen.random() < 0.5
    for j in range(len(ts)):
        if j == i or (alike and int(ts["ne"][j, k]) == old):
            ts["ne"][j, k], ts["nb"][j, k] = size, 0


def _change_type(ts: Tensors, i: int, chosen: random.Random) -> None:
    ts["type"][i] = chosen.choice([*GgmlType, 4, 31, 43, 0xFFFFFFFF])
    if chosen.random() < 0.7:
        _dense(ts, i)


def _change_op(ts: Tensors, i: int, chosen: random.Random) -> None:
    ts["op"][i] = chosen.randrange(104)


def _change_parameter(ts: Tensors, i: int, chosen: random.Random) -> None:
    k = chosen.randrange(16) if chosen.random() < 0.3 else chosen.randrange(6)
    ts["op_params"][i, k] = _parameter(int(ts["op_params"][i, k]), chosen)


def _change_source(ts: Tensors, i: int, chosen: random.Random) -> None:
    k = chosen.randrange(10) if chosen.random() < 0.3 else chosen.randrange(3)
    ts["src"][i, k] = chosen.choice([0, *ts["id"].tolist(), 0xDEAD])


def _change_view(ts: Tensors, i: int, chosen: random.Random) -> None:
    ts["view_src"][i] = chosen.choice([0, *ts["id"].tolist()])
    ts["view_offs"][i] = chosen.choice((0, 1, 4, 1 << 40, (1 << 64) - 4))


def _change_place(ts: Tensors, i: int, chosen: random.Random) -> None:
    kind = chosen.randrange(4)
    other = chosen.randrange(len(ts))
    if kind == 0:
        # In the memory of another, in place or not quite.
        ts["buffer"][i], ts["data"][i] = ts["buffer"][other], ts["data"][other]
    elif kind == 1:
        ts["buffer"][i] = chosen.choice((0, handle(0), handle(1), 0xBAD))
    elif kind == 2:
        index = chosen.randrange(3)
        ts["buffer"][i], ts["data"][i] = handle(index), wire_base(index)
    if chosen.random() < 0.6:
        step = chosen.choice((-64, -8, -4, -2, -1, 1, 2, 4, 8, 32, 64, 1 << 40))
        ts["data"][i] = (int(ts["data"][i]) + step) & ((1 << 64) - 1)


def _change_flags(ts: Tensors, i: int, chosen: random.Random) -> None:
    ts["flags"][i] = chosen.choice((0, 1, 2, 4, 16, 17, -1))


def _change_id(ts: Tensors, i: int, chosen: random.Random) -> None:
    ts["id"][i] = chosen.choice([0, *ts["id"].tolist(), (1 << 64) - 1])


_CHANGES = (
    [_change_ne] * 4
    + [_change_nb] * 4
    + [_change_both] * 3
    + [_stretch]
    + [_change_type] * 2
    + [_change_op] * 2
    + [_change_parameter] * 4
    + [_change_source] * 2
    + [_change_place] * 3
    + [_change_view, _change_flags, _change_id]
)


def _damage_tensors(tensors: Tensors, chosen: random.Random) -> Tensors:
    changed = np.array(tensors, RPC_TENSOR_DTYPE)
    for _ in range(chosen.randint(1, _MOST)):
        if not len(changed):
            break
        i = chosen.randrange(len(changed))
        kind = chosen.randrange(20)
        if kind == 0:
            changed = np.delete(changed, i)
        elif kind == 1:
            changed = np.insert(changed, i, changed[chosen.randrange(len(changed))])
        elif kind == 2:
            changed = np.roll(changed, 1)
        else:
            chosen.choice(_CHANGES)(changed, i, chosen)
    return changed


def _damage_ids(ids: list[int], tensors: Tensors, chosen: random.Random) -> list[int]:
    kind = chosen.randrange(4)
    known: list[int] = tensors["id"].tolist()
    if kind == 0 and ids:
        ids.pop(chosen.randrange(len(ids)))
    elif kind == 1:
        chosen.shuffle(ids)
    elif kind == 2:
        ids.insert(chosen.randint(0, len(ids)), chosen.choice([0, *known]))
    else:
        return known
    return ids


def _damage_buffers(given: GraphInput, chosen: random.Random) -> GraphInput:
    buffers = list(given.buffers)
    if not buffers:
        return given
    i = chosen.randrange(len(buffers))
    what, size = buffers[i]
    if chosen.random() < 0.6:
        what = chosen.randrange(256)
    else:
        size = _word(size, chosen) & 0xFFFFFF
    buffers[i] = (what, size)
    return replace(given, buffers=tuple(buffers))


def _payload_damage(
    change: Callable[[GraphInput, random.Random], bytes],
) -> Damage:
    def damage(
        data: bytes, largest: int, chosen: random.Random, mutate: Mutate, valid: Sequence[bytes]
    ) -> bytes:
        kind = chosen.randrange(16)
        if kind == 0 and valid:
            data = chosen.choice(valid)
        given = GraphInput.decode(data)
        if given is None or kind == 1:
            return mutate(data, largest)
        if kind == 2:
            # New sizes and strides of one tensor as the fuzzer's comparisons suggest.
            payload = bytearray(given.payload)
            if len(payload) > 60:
                at = chosen.randrange(len(payload) - 48)
                payload[at : at + 48] = mutate(bytes(payload[at : at + 48]), 48)
            return replace(given, payload=bytes(payload)).encode()
        if kind == 3:
            return _damage_buffers(given, chosen).encode()
        if kind == 4:
            return replace(given, spoken=chosen.randrange(256)).encode()
        try:
            changed = replace(given, payload=change(given, chosen)).encode()
        except ProtocolError:
            return mutate(data, largest)
        return changed if len(changed) <= largest else data

    return damage


def _change_graph(given: GraphInput, chosen: random.Random) -> bytes:
    graph = decode_graph(given.payload, given.dialect)
    tensors, nodes = graph.tensors, graph.nodes
    if chosen.random() < 0.15:
        nodes = np.array(_damage_ids(nodes.tolist(), tensors, chosen), np.uint64)
    else:
        tensors = _damage_tensors(tensors, chosen)
    return encode_graph(GraphPayload(graph.device, nodes, tensors), given.dialect)


def _change_program(given: GraphInput, chosen: random.Random) -> bytes:
    program: ProgramPayload = decode_program(given.payload)
    steps, tensors = list(program.steps), program.tensors
    if chosen.random() < 0.4 and steps:
        i = chosen.randrange(len(steps))
        part = chosen.choice(("inputs", "nodes", "outputs"))
        ids = tuple(_damage_ids(list(getattr(steps[i], part)), tensors, chosen))
        steps[i] = replace(steps[i], **{part: ids})
    elif chosen.random() < 0.2:
        steps.insert(
            chosen.randint(0, len(steps)), chosen.choice([*steps, ProgramStep((), (), ())])
        )
    else:
        tensors = _damage_tensors(tensors, chosen)
    return encode_program(steps, tensors)


graph_damage = _payload_damage(_change_graph)
program_damage = _payload_damage(_change_program)


def request_damage(
    data: bytes, largest: int, chosen: random.Random, mutate: Mutate, valid: Sequence[bytes]
) -> bytes:
    """Whole messages repeated, left out, exchanged, and their frames changed."""
    kind = chosen.randrange(8)
    if kind == 0 or len(data) < 2:
        return mutate(data, largest)
    if kind == 1:
        return bytes((chosen.randrange(256), chosen.randrange(256))) + data[2:]
    frames = _frames(data[2:])
    i = chosen.randrange(len(frames))
    if kind == 2:
        frames.insert(i, chosen.choice(frames))
    elif kind == 3:
        frames.pop(i)
    elif kind == 4 and valid:
        frames.insert(i, chosen.choice(_frames(chosen.choice(valid)[2:])))
    elif kind == 5 and len(frames[i]) >= _FRAME.size:
        number, size = _FRAME.unpack_from(frames[i])
        wrong = chosen.choice((size + 1, size - 1, 0, 1 << 63, (1 << 64) - 1, size ^ 1 << 32))
        frames[i] = _FRAME.pack(number, wrong % (1 << 64)) + frames[i][_FRAME.size :]
    elif kind == 6 and frames[i]:
        frames[i] = bytes((chosen.randrange(256),)) + frames[i][1:]
    else:
        frames[i] = mutate(frames[i], max(len(frames[i]) + 64, 64))
    changed = data[:2] + b"".join(frames)
    return changed[:largest]


def _frames(stream: bytes) -> list[bytes]:
    """A stream cut into messages; the last may be broken, and there is at least one."""
    found, at = [], 0
    while at + _FRAME.size <= len(stream):
        _, size = _FRAME.unpack_from(stream, at)
        end = min(at + _FRAME.size + size, len(stream))
        found.append(stream[at:end])
        at = end
    if at < len(stream) or not found:
        found.append(stream[at:])
    return found


def answer_damage(
    data: bytes, largest: int, chosen: random.Random, mutate: Mutate, valid: Sequence[bytes]
) -> bytes:
    """What is expected changed without the answers, and the other way round."""
    if chosen.random() < 0.5 or len(data) < 4:
        return mutate(data, largest)
    other = chosen.choice(valid) if valid else data
    kind = chosen.randrange(4)
    if kind == 0:
        return data[: 3 + data[2]] + other[3 + other[2] :]
    if kind == 1:
        return data[:1] + bytes((chosen.randrange(256),)) + data[2:]
    head, tail = bytearray(data[: 3 + data[2]]), data[3 + data[2] :]
    if kind == 2:
        head.append(chosen.randrange(256))
        head[2] = len(head) - 3 & 0xFF
        return (bytes(head) + tail)[:largest]
    return (bytes(head) + tail + other[3 + other[2] :])[:largest]
