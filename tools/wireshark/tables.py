"""The declarations of protocol/ as Lua tables: layouts, fields, commands, versions, ops, types."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from construct import Array, Bytes, FormatField, Int8ul, Int64ul, Padded, Struct

from protocol import messages, split
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Body, CommandSpec, Dialect, compatible_dialects
from protocol.ggml.ops import GluOp, Numbering, Op, UnaryOp
from protocol.ggml.types import TYPE_INFO
from protocol.messages import MAX_SOURCES, RPC_TENSOR_DTYPE, RpcTensor
from protocol.numbering import fits
from protocol.observe.annotate import value_text
from protocol.split import (
    MOST_REPORT,
    REPORT_MARK,
    SPLIT_COMMANDS,
    SplitCaps,
    SplitStep,
    split_caps,
)

PREFIX = "ggml_rpc"

# What the frames of requests and answers begin with.
RequestFrame = Struct("command" / Int8ul, "payload_size" / Int64ul)
AnswerFrame = Struct("payload_size" / Int64ul)

# Names by format letter; all are little-endian.
_KINDS = {"B": "uint8", "b": "int8", "H": "uint16", "L": "uint32", "l": "int32", "Q": "uint64",
          "q": "int64", "f": "float", "d": "double"}  # fmt: skip
_ANSWERS = {Answer.NEVER: "never", Answer.FIXED: "fixed", Answer.DATA: "data"}
_BODIES = {Body.NONE: "none", Body.DATA: "data", Body.GRAPH: "graph"}


@functools.cache
def _struct_names() -> dict[int, str]:
    """The names by which the declarations are known, by their identity."""
    modules = (vars(split), vars(messages), globals())
    return {
        id(value): name
        for namespace in modules
        for name, value in namespace.items()
        if isinstance(value, Struct)
    }


def _part_name(declaration: Any) -> str:
    """Return what fields of a struct within another are called: tensor of RpcTensor."""
    name = _struct_names()[id(declaration)]
    return name.removeprefix("Rpc").removeprefix("Split").lower()


@dataclass(slots=True)
class Tables:
    """Collects what the dissector needs; ``text`` is all of it in Lua."""

    layouts: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def layout(self, declaration: Any, prefix: str = PREFIX) -> str:
        """Return the name of a struct's layout, which is made unless it is there."""
        name = _struct_names()[id(declaration)]
        if name not in self.layouts:
            entry: dict[str, Any] = {"size": declaration.sizeof(), "fields": []}
            self.layouts[name] = entry
            at = 0
            for subcon in declaration.subcons:
                entry["fields"] += self._field(subcon, at, prefix)
                at += subcon.sizeof()
        return name

    def _field(self, subcon: Any, at: int, prefix: str) -> list[dict[str, Any]]:
        inner = subcon.subcon if subcon.name else subcon
        if isinstance(inner, Padded):
            return []
        made: dict[str, Any] = {"name": subcon.name, "at": at}
        if isinstance(inner, Array):
            made["count"] = int(inner.count)
            inner = inner.subcon
        made["size"] = inner.sizeof()
        if isinstance(inner, Struct):
            made["layout"] = self.layout(inner, f"{PREFIX}.{_part_name(inner)}")
            return [made]
        if isinstance(inner, Bytes):
            made["kind"] = "string" if subcon.name == "name" else "bytes"
        else:
            assert isinstance(inner, FormatField)
            made["kind"] = _KINDS[inner.fmtstr[-1]]
        made["filter"] = self.field(f"{prefix}.{subcon.name}", made["kind"])
        return [made]

    def field(self, filter_name: str, kind: str) -> str:
        """Return the name that a field is filtered by.

        It has its kind where another has the plain one.
        """
        if self.fields.setdefault(filter_name, kind) != kind:
            filter_name = f"{filter_name}_{kind}"
            self.fields[filter_name] = kind
        return filter_name

    def command(self, spec: CommandSpec) -> dict[str, Any]:
        """Return one command of a version."""
        return {
            "request": self.layout(spec.request),
            "answer": _ANSWERS[spec.answer],
            "response": self.layout(spec.response),
            "body": _BODIES[spec.body],
        }

    def commands(self, specs: Mapping[Command, CommandSpec]) -> dict[int, Any]:
        """Return all commands of a version by their numbers."""
        return {int(c): self.command(spec) for c, spec in sorted(specs.items())}

    def text(self) -> str:
        """Return all tables, as local variables."""
        command_sets = _distinct([d.commands for d in DIALECTS])
        numberings = _distinct([d.numbering for d in DIALECTS])
        dialects = [
            {
                "version": list(d.version),
                "name": d.name,
                "hello_size": d.hello_size,
                "graph_device": d.graph_device,
                "commands": _index(command_sets, d.commands),
                "ops": _index(numberings, d.numbering),
                "compatible": [DIALECTS.index(c) + 1 for c in compatible_dialects(d)],
            }
            for d in DIALECTS
        ]
        for frame in (RequestFrame, AnswerFrame):
            self.layout(frame)
        self.layout(SplitStep, f"{PREFIX}.step")
        self.layout(RpcTensor, f"{PREFIX}.tensor")
        for name in ("n_nodes", "n_tensors", "n_steps", "n_swaps", "n_parts", "swap.step"):
            self.field(f"{PREFIX}.{name}", "uint32")
        for name in ("nodes", "ids"):
            self.field(f"{PREFIX}.{name}", "uint64")
        caps = split_caps()
        at = sum(s.sizeof() for s in SplitCaps.subcons[:1])
        tables: dict[str, Any] = {
            "COMMAND_NAMES": {int(c): c.name for c in Command},
            "COMMANDS": [self.commands(specs) for specs in command_sets],
            "SPLIT_COMMANDS": self.commands(SPLIT_COMMANDS),
            # Capability bytes that announce the split extension, up to its version.
            "SPLIT_MAGIC": caps[:at].hex(),
            # The upper half of the size of a report, and the most that the lower half is.
            "REPORT_MARK": REPORT_MARK >> 32,
            "MOST_REPORT": MOST_REPORT,
            "OPS": [dict(enumerate(map(str, n.ops))) for n in numberings],
            "SOURCES": [_sources(n) for n in numberings],
            "FUNCTIONS": [_functions(n) for n in numberings],
            "TYPES": {
                int(t): {"name": t.name, "block": info.block_size, "size": info.type_size}
                for t, info in TYPE_INFO.items()
            },
            "DIALECTS": dialects,
            "LAYOUTS": self.layouts,
            "FIELDS": [
                {"filter": name, "kind": kind, "hex": _is_hexadecimal(name)}
                for name, kind in sorted(self.fields.items())
            ],
        }
        return "\n\n".join(f"local {name} = {lua(table)}" for name, table in tables.items())


def _distinct(items: Sequence[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if not any(item is other for other in kept):
            kept.append(item)
    return kept


def _index(items: Sequence[Any], wanted: Any) -> int:
    """Position in a Lua list."""
    return next(i for i, item in enumerate(items, 1) if item is wanted)


def _is_hexadecimal(filter_name: str) -> bool:
    name = filter_name.rpartition(".")[2]
    return value_text(name, 1, DIALECTS[0]).startswith("0x")


def _functions(numbering: Numbering) -> dict[str, dict[int, str]]:
    """The functions of UNARY and GLU by their numbers."""
    return {
        str(op): {i: functions(n).name for i, n in enumerate(numbering.functions[op])}
        for op, functions in ((Op.UNARY, UnaryOp), (Op.GLU, GluOp))
    }


def _sources(numbering: Numbering) -> dict[int, list[int]]:
    """Least and most sources of each op that a graph of this numbering can have; absent: any."""
    dialect = next(d for d in DIALECTS if d.numbering is numbering)
    ops = numbering.ops
    limits: dict[int, list[int]] = {}
    for number in range(len(ops)):
        counts = [n for n in range(MAX_SOURCES + 1) if _has_sources(number, n, dialect)]
        if len(counts) <= MAX_SOURCES:
            # An op that never travels has no count that fits.
            limits[number] = [counts[0], counts[-1]] if counts else [1, 0]
    return limits


def _has_sources(number: int, count: int, dialect: Dialect) -> bool:
    tensor = np.zeros(1, RPC_TENSOR_DTYPE)
    tensor["op"] = number
    tensor["src"][0, :count] = 1
    return fits(tensor, dialect)


def lua(value: Any, depth: int = 0) -> str:
    """Return a Python value as a Lua expression."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        entries = [f"{_key(k)} = {lua(v, depth + 1)}" for k, v in value.items()]
    else:
        entries = [lua(v, depth + 1) for v in value]
    line = "{" + ", ".join(entries) + "}"
    if len(line) + 2 * depth < 100 and "\n" not in line:
        return line
    indent = "  " * (depth + 1)
    return "{\n" + "".join(f"{indent}{e},\n" for e in entries) + "  " * depth + "}"


def _key(key: Any) -> str:
    return key if isinstance(key, str) else f"[{key}]"
