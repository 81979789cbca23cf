"""What each protocol version sends: the table of commands and the numbering of ops.

A dialect is data. Each row below is the row before it with what that version changed; nothing
elsewhere asks for a version number. Facts were read off the history of ggml-rpc.cpp.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from protocol import messages as m
from protocol.commands import Command
from protocol.ggml_ops import OPS_96, OPS_97, OPS_98, OPS_101, Op

Version = tuple[int, int, int]


class Body(enum.Enum):
    """What a request carries behind its fixed head."""

    NONE = "nothing"
    DATA = "bytes of a tensor"
    GRAPH = "a graph"


class Answer(enum.Enum):
    """How a command answers; a command either always answers or never does."""

    NEVER = "no answer"
    FIXED = "a fixed struct"
    DATA = "bytes of a tensor"


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """One command of one dialect: construct declarations of request head and answer."""

    request: Any
    answer: Answer
    response: Any = m.Empty
    body: Body = Body.NONE


# What rpc_tensor's last four bytes are from this version on; they were padding before.
USE_COUNT_SINCE: Version = (5, 1, 0)


@dataclass(frozen=True, slots=True)
class Dialect:
    """One protocol version as this project speaks it.

    ``ops[n]`` is the op with number ``n``; ``hello_size`` is the size of a client's HELLO;
    ``graph_device`` tells whether a graph starts with the number of its device.
    """

    version: Version
    hello_size: int
    ops: tuple[Op, ...]
    commands: Mapping[Command, CommandSpec]
    graph_device: bool = True

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))

    def op_number(self, op: Op) -> int:
        """The number of ``op`` on the wire; ValueError if this version has no such op."""
        return _OP_NUMBERS[self.ops][op]

    def __repr__(self) -> str:
        return f"<dialect {self.name}>"


class _OpNumbers(dict[Op, int]):
    def __missing__(self, op: Op) -> int:
        raise ValueError(f"this protocol version has no op {op}")


_OP_NUMBERS: dict[tuple[Op, ...], _OpNumbers] = {
    ops: _OpNumbers({op: i for i, op in enumerate(ops)})
    for ops in (OPS_96, OPS_97, OPS_98, OPS_101)
}


def _answers(request: Any, response: Any = m.Empty, body: Body = Body.NONE) -> CommandSpec:
    return CommandSpec(request, Answer.FIXED, response, body)


def _silent(request: Any, body: Body = Body.NONE) -> CommandSpec:
    return CommandSpec(request, Answer.NEVER, m.Empty, body)


def _changed(
    base: Mapping[Command, CommandSpec], changes: Mapping[Command, CommandSpec]
) -> Mapping[Command, CommandSpec]:
    return MappingProxyType({**base, **changes})


_COMMANDS_1_0: Mapping[Command, CommandSpec] = MappingProxyType(
    {
        Command.HELLO: _answers(m.Empty, m.HelloResponse1),
        Command.ALLOC_BUFFER: _answers(m.AllocBufferRequest1, m.AllocBufferResponse),
        Command.GET_ALIGNMENT: _answers(m.Empty, m.GetAlignmentResponse),
        Command.GET_MAX_SIZE: _answers(m.Empty, m.GetMaxSizeResponse),
        Command.BUFFER_GET_BASE: _answers(m.BufferRequest, m.BufferGetBaseResponse),
        Command.FREE_BUFFER: _answers(m.BufferRequest),
        Command.BUFFER_CLEAR: _answers(m.BufferClearRequest),
        Command.SET_TENSOR: _answers(m.SetTensorHead1, body=Body.DATA),
        Command.SET_TENSOR_HASH: _answers(m.SetTensorHashRequest, m.SetTensorHashResponse),
        Command.GET_TENSOR: CommandSpec(m.GetTensorRequest, Answer.DATA),
        Command.COPY_TENSOR: _answers(m.CopyTensorRequest, m.CopyTensorResponse),
        Command.GRAPH_COMPUTE: _answers(m.Empty, m.GraphComputeResponse, Body.GRAPH),
        Command.GET_DEVICE_MEMORY: _answers(m.Empty, m.GetDeviceMemoryResponse),
        Command.INIT_TENSOR: _answers(m.InitTensorRequest),
        Command.GET_ALLOC_SIZE: _answers(m.GetAllocSizeRequest1, m.GetAllocSizeResponse),
    }
)
_COMMANDS_2_0 = _changed(_COMMANDS_1_0, {Command.SET_TENSOR: _silent(m.SetTensorHead1, Body.DATA)})
_COMMANDS_3_0 = _changed(
    _COMMANDS_2_0,
    {
        Command.DEVICE_COUNT: _answers(m.Empty, m.DeviceCountResponse),
        Command.ALLOC_BUFFER: _answers(m.AllocBufferRequest, m.AllocBufferResponse),
        Command.GET_ALIGNMENT: _answers(m.DeviceRequest, m.GetAlignmentResponse),
        Command.GET_MAX_SIZE: _answers(m.DeviceRequest, m.GetMaxSizeResponse),
        Command.GET_DEVICE_MEMORY: _answers(m.DeviceRequest, m.GetDeviceMemoryResponse),
        Command.GET_ALLOC_SIZE: _answers(m.GetAllocSizeRequest3, m.GetAllocSizeResponse),
    },
)
_COMMANDS_3_5 = _changed(
    _COMMANDS_3_0,
    {
        Command.GRAPH_COMPUTE: _silent(m.Empty, Body.GRAPH),
        Command.GRAPH_RECOMPUTE: _silent(m.DeviceRequest),
    },
)
_COMMANDS_3_6 = _changed(
    _COMMANDS_3_5,
    {Command.GET_ALLOC_SIZE: _answers(m.GetAllocSizeRequest36, m.GetAllocSizeResponse)},
)
_COMMANDS_4_0 = _changed(_COMMANDS_3_6, {Command.HELLO: _answers(m.HelloRequest, m.HelloResponse4)})
_COMMANDS_5_0 = _changed(_COMMANDS_4_0, {Command.MEMSET_TENSOR: _answers(m.MemsetTensorRequest)})
_COMMANDS_6_0 = _changed(
    _COMMANDS_5_0,
    {
        Command.FREE_BUFFER: _silent(m.BufferRequest),
        Command.BUFFER_CLEAR: _silent(m.BufferClearRequest),
        Command.INIT_TENSOR: _silent(m.InitTensorRequest),
        Command.MEMSET_TENSOR: _silent(m.MemsetTensorRequest),
    },
)
_COMMANDS_7_0 = _changed(_COMMANDS_6_0, {Command.SET_TENSOR: _silent(m.SetTensorHead7, Body.DATA)})

# Newest first. Up to 3.6.0 no version number says how ops are numbered; 3.6.1 was the first that
# ties its patch number to 96 ops, and older clients are read by that numbering too.
DIALECTS: tuple[Dialect, ...] = (
    Dialect((7, 0, 0), 24, OPS_101, _COMMANDS_7_0),
    Dialect((6, 0, 0), 24, OPS_101, _COMMANDS_6_0),
    Dialect((5, 1, 0), 24, OPS_101, _COMMANDS_5_0),
    Dialect((5, 0, 0), 24, OPS_101, _COMMANDS_5_0),
    Dialect((4, 0, 3), 24, OPS_101, _COMMANDS_4_0),
    Dialect((4, 0, 2), 24, OPS_98, _COMMANDS_4_0),
    Dialect((4, 0, 1), 24, OPS_97, _COMMANDS_4_0),
    Dialect((4, 0, 0), 24, OPS_96, _COMMANDS_4_0),
    Dialect((3, 6, 1), 0, OPS_96, _COMMANDS_3_6),
    Dialect((3, 5, 0), 0, OPS_96, _COMMANDS_3_5),
    Dialect((3, 0, 0), 0, OPS_96, _COMMANDS_3_0),
    Dialect((2, 0, 0), 0, OPS_96, _COMMANDS_2_0, graph_device=False),
    Dialect((1, 0, 0), 0, OPS_96, _COMMANDS_1_0, graph_device=False),
)


def find_dialects(text: str) -> list[Dialect]:
    """The dialects that ``X``, ``X.Y`` or ``X.Y.Z`` names, newest first; ValueError if none."""
    parts = text.split(".")
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"'{text}' is not a protocol version such as 5.1")
    wanted = tuple(map(int, parts))
    found = [d for d in DIALECTS if d.version[: len(wanted)] == wanted]
    if not found:
        known = sorted({d.version[:2] for d in DIALECTS}, reverse=True)
        names = ", ".join(f"{major}.{minor}" for major, minor in known)
        raise ValueError(f"protocol {text} is not known; known are {names}")
    return found


def dialect_of_version(version: Version, hello_size: int) -> Dialect | None:
    """What a client of a server that answered ``version`` speaks; None if that isn't known.

    The newest known dialect of that major version that is not above it: minor versions that aren't
    in the table changed no message. A patch number below all known ones of its minor version counts
    as the lowest of those.
    """
    group = [d for d in DIALECTS if d.version[0] == version[0] and d.hello_size == hello_size]
    minor = [d for d in group if d.version[1] == version[1]]
    candidates = minor or group
    older = [d for d in candidates if d.version <= version]
    return older[0] if older else (minor[-1] if minor else None)


def compatible_dialects(dialect: Dialect) -> list[Dialect]:
    """Dialects whose clients can't be told apart from ``dialect``'s on the wire, itself first.

    They have the same major number and the same commands and differ in op numbers at most.
    """
    others = [
        d
        for d in DIALECTS
        if d is not dialect
        and d.version[0] == dialect.version[0]
        and d.commands is dialect.commands
        and d.ops != dialect.ops
    ]
    return [dialect, *others]
