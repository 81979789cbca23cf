"""SPLIT_BUFFER, an extension of the wire: products of row-split weights in one round trip.

Upstream doesn't know it. A client that would like to use it says so in the capability bytes of its
HELLO, which upstream's servers ignore (they read RDMA's there); a server that has it answers with
the same bytes and its version of the extension. Without them the session is an ordinary one.

A *program* is what a client lets a server compute again and again: steps that each take some input
tensors from the stream, compute nodes, and put some output tensors on it. It is sent once
(SPLIT_PROGRAM); SPLIT_RUN then starts it, and from there until the last step is over nothing but
the bytes of inputs and outputs are on the connection, in the order of the steps, without framing::

    client -> server   SPLIT_RUN | inputs of step 0 | inputs of step 1 ...
    server -> client             outputs of step 0  | outputs of step 1 ...

Whoever runs programs on several servers at once needs all of them at the same time, and so may
somebody else. From version 2 on a server has a *lease* of each device: SPLIT_ACQUIRE asks for it,
SPLIT_RELEASE gives it back, or keeps it where nobody waits. A SPLIT_RUN without it waits for its
turn and has the lease for that one run. SPLIT_MEMBERS tells which servers are behind a name, so
that none is used twice.

From version 5 on the servers of a split may exchange tensors among themselves, without the client
in between. SPLIT_PEERS makes a server member of a *group*: who the others are, and a secret. A
server reaches another at its ordinary port, as any client, and shows the secret by SPLIT_JOIN; from
there on that connection is their *link*. A program may then have *swaps*: at the end of a step each
member sends a tensor to all others, and receives one from each.

From version 3 on SPLIT_DESCRIBE tells what a server is: its software, the protocols that it speaks,
the name of a device and what it is. That is for people; nothing is decided by it.

Tensors lie in ordinary buffers: weights are allocated, uploaded (by hash too), read back and freed
by the ordinary commands. SPLIT_ALLOC_BUFFER asks a server that splits over others for proportions
of its own; for one that doesn't it is ALLOC_BUFFER.

Layout of a program (little-endian, packed)::

    n_steps u32 | step[n_steps] | ids u64[sum of all counts] | n_tensors u32 | rpc_tensor[n_tensors]
    [ n_swaps u32 | n_parts u32 | swap[n_swaps] ]

``step`` is ``n_inputs u32 | n_nodes u32 | n_outputs u32``; ``ids`` are those of the steps one after
the other, of each its inputs, nodes (in the order of execution) and outputs. What is in brackets is
left out where there are no swaps. ``swap`` is ``step u32 | ids u64[n_parts]``: behind the outputs
of this step, the tensor in the place of the server's own number goes to all others, and what comes
from each of them goes into the one in its place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from construct import Array, Bytes, Float32l, Float64l, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from protocol.commands import Command
from protocol.dialects import Answer, Body, CommandSpec, Dialect
from protocol.errors import ProtocolError
from protocol.ggml.types import GgmlType
from protocol.ggml.types import nbytes as tensor_nbytes
from protocol.messages import (
    CONN_CAPS_SIZE,
    RPC_TENSOR_DTYPE,
    RPC_TENSOR_SIZE,
    AllocBufferResponse,
    numpy_dtype,
)

VERSION = 5
MAX_PARTS = 16
# Most servers that a coordinator and those behind it may be in all.
MAX_MEMBERS = 64
MAX_PROGRAMS = 64
# The version that has leases and members.
LEASES_SINCE = 2
# The version whose servers describe themselves.
DESCRIBES_SINCE = 3
# The version in which a server can be asked for a slice of what it has on its own disk.
LOADS_SINCE = 4
# The version whose servers exchange tensors among themselves.
SWAPS_SINCE = 5

SECRET_SIZE = 32
# Outputs of a program with swaps come in frames, as answers do. One that fails sends a size with
# this mark and, below it, that of a text which says why.
REPORT_MARK = 0xFFFF_FFFF << 32
MOST_REPORT = 512

# In which activations may travel, by the names that users give.
WIRE_TYPES = {"f32": GgmlType.F32, "f16": GgmlType.F16, "q8_0": GgmlType.Q8_0}

_MAGIC = b"ggml rpc SPLIT_BUFFER\0"

# What both sides put into the capability bytes of HELLO.
SplitCaps = Struct("magic" / Bytes(len(_MAGIC)), "version" / Int8ul, "reserved" / Int8ul)
assert SplitCaps.sizeof() == CONN_CAPS_SIZE

SplitQueryResponse = Struct("version" / Int32ul, "max_programs" / Int32ul, "n_parts" / Int32ul)

SplitAllocBufferRequest = Struct(
    "device" / Int32ul,
    "size" / Int64ul,
    "n_proportions" / Int32ul,
    "proportions" / Array(MAX_PARTS, Float32l),
)

SplitProgramHead = Struct("device" / Int32ul, "program" / Int32ul)
SplitProgramResponse = Struct("result" / Int8ul)
SplitStep = Struct("n_inputs" / Int32ul, "n_nodes" / Int32ul, "n_outputs" / Int32ul)

SplitRunRequest = Struct("device" / Int32ul, "program" / Int32ul)

SplitPart = Struct(
    "name" / Bytes(64),
    "rows" / Int64ul,
    "bytes" / Int64ul,
    "exchanges" / Int64ul,
    "bytes_sent" / Int64ul,
    "bytes_received" / Int64ul,
    "round_trip_seconds" / Float64l,
    "wait_seconds" / Float64l,
)
SplitStatusResponse = Struct(
    "graphs" / Int64ul,
    "graph_seconds" / Float64l,
    "tokens" / Int64ul,
    "n_parts" / Int32ul,
    "parts" / Array(MAX_PARTS, SplitPart),
)

SplitMembersResponse = Struct(
    "n_members" / Int32ul,
    "members" / Array(MAX_MEMBERS, Int64ul),
)
SplitAcquireRequest = Struct("device" / Int32ul, "patience_ms" / Int32ul)
SplitAcquireResponse = Struct("granted" / Int8ul, "holder" / Bytes(64))
SplitReleaseRequest = Struct("device" / Int32ul, "keep" / Int8ul)
SplitReleaseResponse = Struct("kept" / Int8ul)
SplitDescribeResponse = Struct(
    "software" / Bytes(64),
    "protocols" / Bytes(128),
    "device_name" / Bytes(32),
    "device_description" / Bytes(128),
)
# Of a content of ``nbytes``: ``count`` runs of ``size`` bytes, the first at ``start`` and each
# ``distance`` behind the one before, go to ``address`` in a buffer, side by side. ``whole`` is 1 if
# no other bytes belong to the tensor there.
SplitLoadRequest = Struct(
    "remote_ptr" / Int64ul,
    "address" / Int64ul,
    "hash" / Int64ul,
    "nbytes" / Int64ul,
    "start" / Int64ul,
    "size" / Int64ul,
    "distance" / Int64ul,
    "count" / Int64ul,
    "whole" / Int8ul,
)
SplitLoadResponse = Struct("result" / Int8ul)
# A member of a group, by address (empty for the client itself). ``reach`` 1: it is to be connected
# to; 0: it comes by itself.
SplitPeer = Struct("host" / Bytes(64), "port" / Int16ul, "reach" / Int8ul)
# ``timeout_ms`` is how long a member may be waited for in one swap, ``number`` the server's own.
SplitPeersRequest = Struct(
    "device" / Int32ul,
    "secret" / Bytes(SECRET_SIZE),
    "timeout_ms" / Int32ul,
    "number" / Int32ul,
    "n_parts" / Int32ul,
    "parts" / Array(MAX_PARTS, SplitPeer),
)
# ``result`` 0: all that were to be reached are. Else ``reason`` says what is in the way.
SplitPeersResponse = Struct("result" / Int8ul, "reason" / Bytes(160))
SplitJoinRequest = Struct("secret" / Bytes(SECRET_SIZE), "number" / Int32ul)
SplitJoinResponse = Struct("result" / Int8ul)
_DEVICE = Struct("device" / Int32ul)

_COMMANDS_1: dict[Command, CommandSpec] = {
    Command.SPLIT_QUERY: CommandSpec(_DEVICE, Answer.FIXED, SplitQueryResponse),
    Command.SPLIT_ALLOC_BUFFER: CommandSpec(
        SplitAllocBufferRequest, Answer.FIXED, AllocBufferResponse
    ),
    Command.SPLIT_PROGRAM: CommandSpec(
        SplitProgramHead, Answer.FIXED, SplitProgramResponse, Body.GRAPH
    ),
    Command.SPLIT_RUN: CommandSpec(SplitRunRequest, Answer.NEVER),
    Command.SPLIT_STATUS: CommandSpec(_DEVICE, Answer.FIXED, SplitStatusResponse),
}
_COMMANDS_2: dict[Command, CommandSpec] = {
    **_COMMANDS_1,
    Command.SPLIT_MEMBERS: CommandSpec(_DEVICE, Answer.FIXED, SplitMembersResponse),
    Command.SPLIT_ACQUIRE: CommandSpec(SplitAcquireRequest, Answer.FIXED, SplitAcquireResponse),
    Command.SPLIT_RELEASE: CommandSpec(SplitReleaseRequest, Answer.FIXED, SplitReleaseResponse),
}
_COMMANDS_3: dict[Command, CommandSpec] = {
    **_COMMANDS_2,
    Command.SPLIT_DESCRIBE: CommandSpec(_DEVICE, Answer.FIXED, SplitDescribeResponse),
}
_COMMANDS_4: dict[Command, CommandSpec] = {
    **_COMMANDS_3,
    Command.SPLIT_LOAD: CommandSpec(SplitLoadRequest, Answer.FIXED, SplitLoadResponse),
}
SPLIT_COMMANDS: dict[Command, CommandSpec] = {
    **_COMMANDS_4,
    Command.SPLIT_PEERS: CommandSpec(SplitPeersRequest, Answer.FIXED, SplitPeersResponse),
    Command.SPLIT_JOIN: CommandSpec(SplitJoinRequest, Answer.FIXED, SplitJoinResponse),
}
# The commands of each version, the newest first.
_VERSIONS = (
    (SWAPS_SINCE, SPLIT_COMMANDS),
    (LOADS_SINCE, _COMMANDS_4),
    (DESCRIBES_SINCE, _COMMANDS_3),
    (LEASES_SINCE, _COMMANDS_2),
    (1, _COMMANDS_1),
)

_STEP_DTYPE = numpy_dtype(SplitStep)
_COUNT = struct.Struct("<I")
_SIZE = struct.Struct("<Q")
_TYPES = {int(t): t for t in GgmlType}


def members_fields(members: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a SplitMembersResponse; one of too many says only how many there are."""
    known = list(members[:MAX_MEMBERS])
    return {"n_members": len(members), "members": [*known, *[0] * (MAX_MEMBERS - len(known))]}


def description_fields(
    software: str, protocols: Sequence[str], device_name: str, device_description: str
) -> dict[str, Any]:
    """Return the fields of a SplitDescribeResponse; what is too long is cut, at a character."""
    return {
        "software": _fitted(software, 64),
        "protocols": _fitted(" ".join(protocols), 128),
        "device_name": _fitted(device_name, 32),
        "device_description": _fitted(device_description, 128),
    }


def _fitted(text: str, size: int) -> bytes:
    """Return ``text`` in UTF-8, in less than ``size`` bytes."""
    return text.encode()[: size - 1].decode(errors="ignore").encode()


def peers_fields(
    secret: bytes,
    timeout: float,
    number: int,
    parts: Sequence[tuple[str, int, bool]],
) -> dict[str, Any]:
    """Return the fields of a SplitPeersRequest but for ``device``.

    ``parts`` are host, port, and whether to connect there; ``timeout`` is in seconds.
    """
    rows = [{"host": h.encode(), "port": p, "reach": int(reach)} for h, p, reach in parts]
    nobody = {"host": b"", "port": 0, "reach": 0}
    return {
        "secret": secret,
        "timeout_ms": max(1, int(timeout * 1000)),
        "number": number,
        "n_parts": len(parts),
        "parts": [*rows, *[nobody] * (MAX_PARTS - len(rows))],
    }


def peers_answer(reason: str) -> dict[str, Any]:
    """Return the fields of a SplitPeersResponse; ``reason`` is '' where all are reached."""
    return {"result": int(bool(reason)), "reason": _fitted(reason, 160)}


def split_part_fields(name: str, **counts: float) -> dict[str, Any]:
    """Return the fields of a SplitPart; counts that aren't given are 0.

    Raises TypeError for a count that it hasn't.
    """
    fields: dict[str, Any] = {field.name: 0 for field in SplitPart.subcons}
    if unknown := counts.keys() - fields.keys():
        raise TypeError(f"a SplitPart has no {unknown.pop()}")
    return {**fields, **counts, "name": name.encode()[:63]}


def split_status_fields(
    parts: Sequence[dict[str, Any]] = (),
    *,
    graphs: int = 0,
    graph_seconds: float = 0.0,
    tokens: int = 0,
) -> dict[str, Any]:
    """Return the fields of a SplitStatusResponse; ``parts`` have those of SplitPart."""
    return {
        "graphs": graphs,
        "graph_seconds": graph_seconds,
        "tokens": tokens,
        "n_parts": len(parts),
        "parts": [*parts, *[split_part_fields("")] * (MAX_PARTS - len(parts))],
    }


def split_caps(version: int = VERSION) -> bytes:
    """Return the capability bytes of a peer that has the extension."""
    return bytes(SplitCaps.build({"magic": _MAGIC, "version": version, "reserved": 0}))


def caps_version(caps: bytes) -> int:
    """Return which version of the extension these capability bytes announce, 0 for none."""
    if len(caps) != CONN_CAPS_SIZE or not caps.startswith(_MAGIC):
        return 0
    return int(SplitCaps.parse(caps).version)


def with_split(dialect: Dialect, version: int = VERSION) -> Dialect:
    """Return ``dialect`` with the commands of this ``version`` of the extension."""
    added = split_commands(version)
    return replace(dialect, commands=MappingProxyType({**dialect.commands, **added}))


def split_commands(version: int) -> dict[Command, CommandSpec]:
    """Return the commands that a ``version`` of the extension adds; none for version 0."""
    return next((commands for since, commands in _VERSIONS if version >= since), {})


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """Ids of the tensors a step takes, computes (in order) and gives, in a program's tensors."""

    inputs: tuple[int, ...]
    nodes: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProgramSwap:
    """An exchange among members of a group behind step number ``step``: ids by member."""

    step: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProgramPayload:
    """A program as it is sent: ``tensors`` RPC_TENSOR_DTYPE[n].

    All ``swaps`` have as many ids.
    """

    steps: tuple[ProgramStep, ...]
    tensors: npt.NDArray[Any]
    swaps: tuple[ProgramSwap, ...] = ()

    @property
    def tail_size(self) -> int:
        """The bytes that follow its tensors when it is sent."""
        if not self.swaps:
            return 0
        return 2 * _COUNT.size + len(self.swaps) * _swap_dtype(len(self.swaps[0].ids)).itemsize


def encode_program(
    steps: Sequence[ProgramStep], tensors: npt.NDArray[Any], swaps: Sequence[ProgramSwap] = ()
) -> bytes:
    """Return the body of a SPLIT_PROGRAM."""
    counts = np.array([(len(s.inputs), len(s.nodes), len(s.outputs)) for s in steps], _STEP_DTYPE)
    ids = [i for s in steps for i in (*s.inputs, *s.nodes, *s.outputs)]
    return b"".join(
        (
            _COUNT.pack(len(steps)),
            counts.tobytes(),
            np.array(ids, "<u8").tobytes(),
            _COUNT.pack(len(tensors)),
            np.ascontiguousarray(tensors, RPC_TENSOR_DTYPE).tobytes(),
            _encode_swaps(swaps),
        )
    )


def _encode_swaps(swaps: Sequence[ProgramSwap]) -> bytes:
    if not swaps:
        return b""
    n_parts = len(swaps[0].ids)
    rows = np.array([(s.step, s.ids) for s in swaps], _swap_dtype(n_parts))
    return _COUNT.pack(len(swaps)) + _COUNT.pack(n_parts) + rows.tobytes()


def _swap_dtype(n_parts: int) -> np.dtype[Any]:
    return np.dtype([("step", "<u4"), ("ids", "<u8", (n_parts,))])


def _decode_swaps(tail: memoryview, n_steps: int) -> tuple[ProgramSwap, ...]:
    """Read what follows a program's tensors. Raises ProtocolError."""
    if not len(tail):
        return ()
    if len(tail) < 2 * _COUNT.size:
        raise ProtocolError(f"program whose swaps end within a count: {len(tail)} bytes")
    n, n_parts = (_COUNT.unpack_from(tail, at)[0] for at in (0, _COUNT.size))
    if not 2 <= n_parts <= MAX_PARTS:
        raise ProtocolError(f"program whose swaps are among {n_parts}, not 2 to {MAX_PARTS}")
    dtype, body = _swap_dtype(n_parts), tail[2 * _COUNT.size :]
    if not n or n * dtype.itemsize != len(body):
        raise ProtocolError(f"program with {len(body)} bytes for {n} swaps among {n_parts}")
    rows = np.frombuffer(body, dtype)
    steps = rows["step"].tolist()
    if steps != sorted(steps) or steps[-1] >= n_steps:
        raise ProtocolError(f"program of {n_steps} steps with swaps out of order or behind them")
    return tuple(ProgramSwap(s, tuple(i)) for s, i in zip(steps, rows["ids"].tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class ProgramSize:
    """The counts that a program's head gives; ``nodes`` and ``ids`` are those of all steps.

    What swaps name besides takes as many bytes as it says.
    """

    steps: int
    nodes: int
    ids: int


def program_size(payload: bytes | bytearray | memoryview) -> ProgramSize:
    """Count what decoding a program would take; ProtocolError if its steps don't fit into it."""
    counts = _step_counts(payload)
    n = {name: int(counts[name].sum(dtype=np.uint64)) for name in counts.dtype.names or ()}
    return ProgramSize(len(counts), n["n_nodes"], sum(n.values()))


def _step_counts(payload: bytes | bytearray | memoryview) -> npt.NDArray[Any]:
    """The heads of a program's steps. Raises ProtocolError."""
    if len(payload) < _COUNT.size:
        raise ProtocolError(f"program of {len(payload)} bytes ends within a count")
    (n,) = _COUNT.unpack_from(payload)
    if _COUNT.size + n * _STEP_DTYPE.itemsize > len(payload):
        raise ProtocolError(f"program of {len(payload)} bytes can't hold {n} steps")
    return np.frombuffer(payload, _STEP_DTYPE, n, _COUNT.size)


def decode_program(payload: bytes | bytearray | memoryview) -> ProgramPayload:
    """Read the body of a SPLIT_PROGRAM; ProtocolError if its counts don't fill it."""
    size = len(payload)
    counts = _step_counts(payload).tolist()
    at = _COUNT.size + len(counts) * _STEP_DTYPE.itemsize
    n_ids = sum(map(sum, counts))
    if at + 8 * n_ids > size:
        raise ProtocolError(f"program of {size} bytes can't hold {n_ids} ids")
    ids = np.frombuffer(payload, "<u8", n_ids, at).tolist()
    at += 8 * n_ids
    if at + _COUNT.size > size:
        raise ProtocolError(f"program of {size} bytes ends within a count")
    (n_tensors,) = _COUNT.unpack_from(payload, at)
    at += _COUNT.size
    if at + n_tensors * RPC_TENSOR_SIZE > size:
        raise ProtocolError(f"program of {size} bytes can't hold {n_tensors} tensors")
    end_of_tensors = at + RPC_TENSOR_SIZE * n_tensors
    swaps = _decode_swaps(memoryview(payload)[end_of_tensors:], len(counts))
    steps, first = [], 0
    for n_inputs, n_nodes, n_outputs in counts:
        middle, last = first + n_inputs, first + n_inputs + n_nodes
        end = last + n_outputs
        steps.append(
            ProgramStep(tuple(ids[first:middle]), tuple(ids[middle:last]), tuple(ids[last:end]))
        )
        first = end
    tensors = np.frombuffer(payload, RPC_TENSOR_DTYPE, n_tensors, at)
    return ProgramPayload(tuple(steps), tensors, swaps)


def encode_report(text: str) -> bytes:
    """Return what a server sends instead of an output that its program will not come to."""
    data = _fitted(text, MOST_REPORT)
    return _SIZE.pack(REPORT_MARK | len(data)) + data


def report_size(data: bytes | bytearray) -> int:
    """Return the bytes of the report that ``data`` begins with, 0 for anything else."""
    if len(data) < _SIZE.size:
        return 0
    (size,) = _SIZE.unpack_from(data)
    if size & REPORT_MARK != REPORT_MARK or size ^ REPORT_MARK > MOST_REPORT:
        return 0
    return int(_SIZE.size + (size ^ REPORT_MARK))


def decode_report(data: bytes) -> str:
    """Return the text of :func:`encode_report`, as far as it is there; '' for anything else."""
    return data[_SIZE.size : report_size(data)].decode(errors="replace")


def step_sizes(program: ProgramPayload) -> list[tuple[int, int]]:
    """Return the bytes that each step of a program takes off the stream and puts on it.

    Raises ProtocolError.
    """
    columns = (program.tensors[name].tolist() for name in ("id", "type", "ne", "nb"))
    sizes: dict[int, int] = {}
    for id_, type_, ne, nb in zip(*columns, strict=True):
        if type_ not in _TYPES:
            raise ProtocolError(f"program with a tensor of unknown type {type_}")
        sizes[id_] = tensor_nbytes(_TYPES[type_], ne, nb)
    frame = _SIZE.size if program.swaps else 0
    try:
        return [
            (sum(sizes[i] for i in step.inputs), sum(sizes[i] + frame for i in step.outputs))
            for step in program.steps
        ]
    except KeyError as error:
        raise ProtocolError(f"program without its tensor {error.args[0]:#x}") from None
