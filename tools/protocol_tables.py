"""Writes the tables of docs/protocol.md from the declarations in protocol/.

python -m tools.protocol_tables            # rewrite the tables
python -m tools.protocol_tables --check    # fail if they are out of date
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from construct import Array, Bytes, FormatField, Struct

from protocol import messages, split
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Body, CommandSpec, Dialect, distinct_numberings
from protocol.ggml.ops import GluOp, Numbering, Op, UnaryOp
from tools.documents import keep, with_tables

DOCUMENT = Path(__file__).parents[1] / "docs" / "protocol.md"
PROGRAM = "tools.protocol_tables"

_BODY = {Body.NONE: "", Body.DATA: "data", Body.GRAPH: "graph"}
# Structures that others hold, by the name they have in the document.
_FUNCTIONS: dict[Op, type[enum.IntEnum]] = {Op.UNARY: UnaryOp, Op.GLU: GluOp}
_NAMED = {
    messages.RpcTensor: "rpc_tensor",
    split.SplitPart: "part",
    split.SplitPeer: "peer",
}


def _type_name(declaration: Any) -> str:
    if declaration in _NAMED:
        return _NAMED[declaration]
    if isinstance(declaration, Array):
        return f"{_type_name(declaration.subcon)}[{declaration.count}]"
    if isinstance(declaration, Bytes):
        return f"u8[{declaration.length}]"
    if isinstance(declaration, FormatField):
        letter = declaration.fmtstr[-1]
        kind = "f" if letter in "efd" else "i" if letter.islower() else "u"
        return f"{kind}{declaration.length * 8}"
    raise TypeError(f"no name for {declaration!r}")


def fields(struct: Any) -> Iterator[tuple[int, str, str]]:
    """Yield (offset, type, name) of each field of a declaration."""
    at = 0
    for field in struct.subcons:
        inner = field.subcon if field.name else field
        name = field.name or "(zero)"
        kind = _type_name(inner) if field.name else f"u8[{inner.length}]"
        yield at, kind, name
        at += field.sizeof()


def _layout(struct: Struct, tail: str = "") -> str:
    parts = [f"{name} {kind}" for _, kind, name in fields(struct)]
    return " · ".join([*parts, *([tail] if tail else [])]) or "(empty)"


def _answer(spec: CommandSpec) -> str:
    if spec.answer is Answer.NEVER:
        return "none"
    return "data" if spec.answer is Answer.DATA else _layout(spec.response)


def _rows(command: Command) -> Iterator[str]:
    """One row for each form a command has had, newest first."""
    forms: list[tuple[CommandSpec, list[Dialect]]] = []
    for dialect in DIALECTS:
        spec = dialect.commands.get(command)
        if spec is None:
            continue
        if forms and forms[-1][0] == spec:
            forms[-1][1].append(dialect)
        else:
            forms.append((spec, [dialect]))
    for spec, dialects in forms:
        newest, oldest = dialects[0].version, dialects[-1].version
        since = f"{oldest[0]}.{oldest[1]}"
        until = "" if newest == DIALECTS[0].version else f"{newest[0]}.{newest[1]}"
        versions = f"{since} to {until}" if until and until != since else (until or f"from {since}")
        request = _layout(spec.request, _BODY[spec.body])
        yield f"| {int(command)} | {command.name} | {versions} | {request} | {_answer(spec)} |"


def _function_names(op: Op, newer: Numbering, older: Numbering) -> list[str]:
    """Return what functions of an op the older of two numberings lacks."""
    names = _FUNCTIONS[op]
    return [names(n).name for n in newer.functions[op] if n not in older.functions[op]]


def tables() -> str:
    """Return the generated part of the document."""
    lines = ["### rpc_tensor", "", "| offset | type | field |", "|---|---|---|"]
    lines += [f"| {at} | {kind} | {name} |" for at, kind, name in fields(messages.RpcTensor)]
    lines += ["", "### Commands", ""]
    lines += ["| number | command | protocol | request | answer |", "|---|---|---|---|---|"]
    for command in Command:
        lines += _rows(command)
    lines += ["", "### Versions", ""]
    lines += [
        "| `--protocol` | HELLO | ops | proved with the client of |",
        "|---|---|---|---|",
    ]
    for d in DIALECTS:
        proof = ", ".join(d.clients) or "none: no release was found"
        lines.append(f"| {d.name} | {d.hello_size} bytes | {len(d.ops)} | {proof} |")
    lines += ["", "### Numberings", "", "| ops | lacks of the next newer one |", "|---|---|"]
    numberings = [d.numbering for d in distinct_numberings(DIALECTS)]
    for newer, older in pairwise(numberings):
        lacking = ", ".join(op for op in newer.ops if op not in older.ops)
        functions = [
            f"{op}: {', '.join(_function_names(op, newer, older))}"
            for op in _FUNCTIONS
            if op in older.ops and newer.functions[op] != older.functions[op]
        ]
        padding = ["PAD's op_params"] if older.pads_behind and not newer.pads_behind else []
        lines.append(f"| {len(older.ops)} | {'; '.join([lacking, *functions, *padding])} |")
    lines += ["", "### Split extension", ""]
    lines += ["| number | command | request | answer |", "|---|---|---|---|"]
    for command, spec in split.SPLIT_COMMANDS.items():
        body = "program" if spec.body is Body.GRAPH else ""
        layout = f"{_layout(spec.request, body)} | {_answer(spec)}"
        lines.append(f"| {int(command):#x} | {command.name} | {layout} |")
    lines += ["", f"HELLO's capability bytes: {_layout(split.SplitCaps)}"]
    lines += ["", f"step: {_layout(split.SplitStep)}", "", f"part: {_layout(split.SplitPart)}"]
    lines += ["", f"peer: {_layout(split.SplitPeer)}"]
    return "\n".join(lines)


def document() -> str:
    """Return the whole text, its tables made anew."""
    return with_tables(DOCUMENT, PROGRAM, tables())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return keep(DOCUMENT, PROGRAM, document, arguments)


if __name__ == "__main__":
    sys.exit(main())
