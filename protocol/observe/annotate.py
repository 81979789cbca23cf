"""Messages for people: what each byte is, what a message is about in one line, a graph as text.

Everything is derived from the construct declarations that messages are read and written by: a field
has the name, the place and the size that it is declared with. Ops are shown by name, as the dialect
numbers them, types by name, addresses and ids in hexadecimal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from construct import Array, Bytes, FormatField, Int8ul, Int32ul, Int64ul, Padded, Struct

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, Body, Dialect
from protocol.endpoint import format_endpoint
from protocol.errors import ProtocolError
from protocol.ggml.ops import GluOp, Op, TensorFlag, UnaryOp
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.ggml.types import nbytes as tensor_nbytes
from protocol.graph_payload import GraphPayload, decode_graph
from protocol.messages import RPC_TENSORS, RpcTensor
from protocol.numbering import canonical_params
from protocol.observe.events import MessageKind, ObservedMessage, Side
from protocol.requests import FRAME
from protocol.split import ProgramPayload, SplitStep, caps_version, decode_program

_FRAME = Struct("command" / Int8ul, "size" / Int64ul)
_SIZE = Struct("size" / Int64ul)
_HEXADECIMAL = frozenset(
    {"id", "buffer", "data", "src", "view_src", "remote_ptr", "base_ptr", "hash", "nodes", "ids"}
)
_TYPES = {int(t): t for t in GgmlType}
_SUB_OPS = {Op.UNARY: UnaryOp, Op.GLU: GluOp}
# Bytes that are text, up to the first zero.
_TEXT = frozenset(
    {"name", "host", "reason", "holder", "software", "protocols", "device_name",
     "device_description"}
)  # fmt: skip
# What a line leaves out when it is 0: most messages are of the only device, from the start.
_ZERO_IS_PLAIN = frozenset({"device", "offset", "cache_flag"})


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``[start, end)`` of a message, what field they are, and its value for people."""

    start: int
    end: int
    path: str
    value: str


@dataclass(slots=True)
class Field:
    """A field and what it consists of. An array of plain values has a value, too."""

    name: str
    start: int
    end: int
    value: str = ""
    children: list[Field] = field(default_factory=list)

    def spans(self, prefix: str = "") -> Iterator[Span]:
        """Yield the fields without children, in the order of their bytes."""
        path = f"{prefix}{self.name}"
        if not self.children:
            if self.end > self.start:
                yield Span(self.start, self.end, path, self.value)
            return
        for child in self.children:
            yield from child.spans(path if child.name.startswith("[") else f"{path}.")

    def lines(self, depth: int = 0) -> Iterator[str]:
        """Yield the tree as text, two spaces a level."""
        indent = "  " * depth
        if not self.children or self.value:
            yield f"{indent}{self.name}: {self.value}"
            return
        yield f"{indent}{self.name}"
        for child in self.children:
            yield from child.lines(depth + 1)


# -- fields from declarations -------------------------------------------------------------------


class _Walker:
    """Makes Fields of a declaration and bytes; where bytes are missing, it says so."""

    def __init__(self, data: bytes, dialect: Dialect) -> None:
        self._data = data
        self._dialect = dialect

    def walk(self, name: str, declaration: Any, at: int) -> Field:
        if isinstance(declaration, Struct):
            return self._struct(name, declaration, at)
        if isinstance(declaration, Array):
            return self._array(name, declaration, at)
        if isinstance(declaration, Padded):
            end = at + int(declaration.length)
            return Field("(padding)", at, end, self._bytes(at, end))
        end = at + int(declaration.sizeof())
        if end > len(self._data):
            return Field(name, at, end, "(not seen)")
        if isinstance(declaration, Bytes):
            value = self._text(at, end) if name in _TEXT else self._bytes(at, end)
            return Field(name, at, end, value)
        assert isinstance(declaration, FormatField)
        (number,) = struct.unpack_from(declaration.fmtstr, self._data, at)
        return Field(name, at, end, value_text(name, number, self._dialect))

    def _struct(self, name: str, declaration: Any, at: int) -> Field:
        made = Field(name, at, at)
        for subcon in declaration.subcons:
            child = self.walk(subcon.name or "", subcon.subcon if subcon.name else subcon, made.end)
            made.children.append(child)
            made.end = child.end
        if declaration in RPC_TENSORS.values() and made.end <= len(self._data):
            self._name_parameters(made, declaration, at)
        return made

    def _array(self, name: str, declaration: Any, at: int) -> Field:
        made = Field(name, at, at)
        plain = True
        for i in range(int(declaration.count)):
            child = self.walk(name, declaration.subcon, made.end)
            child.name = f"[{i}]"
            plain = plain and not child.children
            made.children.append(child)
            made.end = child.end
        if plain:
            values = [child.value for child in made.children]
            made.value = f"[{', '.join(_without_end_of_zeros(values))}]"
        return made

    def _name_parameters(self, tensor: Field, declaration: Any, at: int) -> None:
        """Say which function a UNARY or GLU is."""
        record = codec(declaration).parse(self._data, at)
        text = sub_op(op_of(record.op, self._dialect), record.op_params[0], self._dialect)
        if text:
            params = next(child for child in tensor.children if child.name == "op_params")
            params.children[0].value += f" ({text})"
            params.value += f" ({text})"

    def _bytes(self, start: int, end: int) -> str:
        content = self._data[start:end]
        if caps_version(content):
            return f"split extension {caps_version(content)}"
        if not any(content):
            return "zeros" if content else ""
        return content.hex(" ")

    def _text(self, start: int, end: int) -> str:
        return repr(text_of(self._data[start:end]))


def _without_end_of_zeros(values: Sequence[str]) -> list[str]:
    kept = list(values)
    while len(kept) > 4 and kept[-1] in ("0", "0x0"):
        kept.pop()
    if len(kept) < len(values):
        kept.append("...")
    return kept


def value_text(name: str, number: float, dialect: Dialect) -> str:
    """Return the value of the field ``name`` as it is shown."""
    if name == "op":
        return f"{op_text(int(number), dialect)} ({number})"
    if name == "type":
        return f"{type_text(int(number))} ({number})"
    if name == "command":
        return f"{command_text(int(number))} ({number})"
    if name == "flags" and number:
        return f"{number} ({TensorFlag(int(number) & 31)!s})" if number > 0 else str(number)
    if name in _HEXADECIMAL:
        return hex(int(number))
    return f"{number:g}" if isinstance(number, float) else str(number)


def _graph_declaration(graph: GraphPayload, dialect: Dialect) -> Any:
    return Struct(
        *(["device" / Int32ul] if dialect.graph_device else []),
        "n_nodes" / Int32ul,
        "nodes" / Array(len(graph.nodes), Int64ul),
        "n_tensors" / Int32ul,
        "tensors" / Array(len(graph.tensors), dialect.tensor),
    )


def _program_declaration(program: ProgramPayload) -> Any:
    n_ids = sum(len(s.inputs) + len(s.nodes) + len(s.outputs) for s in program.steps)
    fields = [
        "n_steps" / Int32ul,
        "steps" / Array(len(program.steps), SplitStep),
        "ids" / Array(n_ids, Int64ul),
        "n_tensors" / Int32ul,
        "tensors" / Array(len(program.tensors), RpcTensor),
    ]
    if program.swaps:
        swap = Struct("step" / Int32ul, "ids" / Array(len(program.swaps[0].ids), Int64ul))
        swaps = "swaps" / Array(len(program.swaps), swap)
        fields += ["n_swaps" / Int32ul, "n_parts" / Int32ul, swaps]
    return Struct(*fields)


def fields_of(message: ObservedMessage) -> list[Field]:
    """Return the fields of a message, with offsets into ``message.data``."""
    spec, data = message.spec, message.data
    walker = _Walker(data, message.dialect)
    found: list[Field] = []
    if message.kind is MessageKind.REQUEST:
        found += walker.walk("frame", _FRAME, 0).children
        found += walker.walk("", spec.request, FRAME.size).children
    elif message.kind is MessageKind.ANSWER:
        found += walker.walk("", _SIZE, 0).children
        if spec.answer is Answer.FIXED:
            found += walker.walk("", spec.response, found[-1].end).children
    at = found[-1].end if found else 0
    body = message.body_size
    if message.kind is MessageKind.REQUEST and spec.body is Body.GRAPH:
        content = message.graph
        if content is None:
            return [*found, Field("graph", at, at + body, message.problem or "(not seen)")]
        declaration = (
            _graph_declaration(content, message.dialect)
            if isinstance(content, GraphPayload)
            else _program_declaration(content)
        )
        return found + walker.walk("", declaration, at).children
    if body and not (message.kind is MessageKind.ANSWER and spec.answer is Answer.FIXED):
        found.append(Field("data", at, at + body, f"{body} bytes"))
    return found


def annotate(message: ObservedMessage) -> list[Span]:
    """Return what the bytes of a message are; offsets are into ``message.data``.

    They cover it without holes. A body that wasn't kept is one span that goes beyond its end.
    """
    return [span for item in fields_of(message) for span in item.spans()]


def tree(message: ObservedMessage) -> list[str]:
    """Return the whole message as lines of text: its line, and its fields indented."""
    lines = [describe(message)]
    for item in fields_of(message):
        lines += item.lines(1)
    if message.missing:
        lines.append(f"  ({message.missing} bytes were not seen)")
    return lines


# -- messages from bytes ------------------------------------------------------------------------


def message_of_request(data: bytes, dialect: Dialect) -> ObservedMessage:
    """Return the one request that ``data`` is, for who has its bytes alone.

    Raises ProtocolError.
    """
    if len(data) < FRAME.size:
        raise ProtocolError(f"a request of {len(data)} bytes")
    number, size = FRAME.unpack_from(data)
    spec = dialect.commands.get(number)
    if spec is None:
        raise ProtocolError(f"command {number} is none of protocol {dialect.name}")
    head = codec(spec.request)
    whole = FRAME.size + size
    if len(data) != whole or size < head.size or (spec.body is Body.NONE and size != head.size):
        raise ProtocolError(f"{Command(number).name} of {len(data)} bytes that says {whole}")
    at = FRAME.size + head.size
    body = data[at:]
    message = ObservedMessage(
        MessageKind.REQUEST, Side.CLIENT, Command(number), dialect, spec, end=whole, head=data[:at],
        fields=head.parse(data, FRAME.size), body_size=len(body), body=body,
    )  # fmt: skip
    if spec.body is Body.GRAPH:
        try:
            split = message.command is Command.SPLIT_PROGRAM
            message.graph = decode_program(body) if split else decode_graph(body, dialect)
        except ProtocolError as error:
            message.problem = str(error)
    return message


def message_of_answer(
    data: bytes, command: Command, dialect: Dialect, request: ObservedMessage | None = None
) -> ObservedMessage:
    """Return the one answer to ``command`` that ``data`` is. Raises ProtocolError."""
    spec = dialect.commands[command]
    size = int.from_bytes(data[: _SIZE.sizeof()], "little")
    fixed = spec.answer is Answer.FIXED
    if len(data) != _SIZE.sizeof() + size or (fixed and size != codec(spec.response).size):
        raise ProtocolError(f"{len(data)} bytes are no answer to {command.name}")
    message = ObservedMessage(
        MessageKind.ANSWER, Side.SERVER, command, dialect, spec, end=len(data), request=request
    )
    if fixed:
        message.head = data
        message.fields = codec(spec.response).parse(data, _SIZE.sizeof())
    else:
        message.head, message.body = data[: _SIZE.sizeof()], data[_SIZE.sizeof() :]
        message.body_size = size
    return message


# -- one line -----------------------------------------------------------------------------------


def op_of(number: int, dialect: Dialect) -> Op | None:
    return dialect.ops[number] if 0 <= number < len(dialect.ops) else None


def op_text(number: int, dialect: Dialect) -> str:
    """Return the op with this number on the wire, '?' for one that the dialect doesn't have."""
    return op_of(number, dialect) or "?"


def sub_op(op: Op | None, number: int, dialect: Dialect) -> str:
    """Return which function a UNARY or GLU is, '' for other ops."""
    functions = _SUB_OPS.get(op) if op is not None else None
    if op is None or functions is None:
        return ""
    (known, *_) = canonical_params(dialect.numbering, op, (number,))
    return functions(known).name if known in functions._value2member_map_ else "?"


def type_text(number: int) -> str:
    return _TYPES[number].name if number in _TYPES else "?"


def command_text(number: int) -> str:
    return Command(number).name if number in Command._value2member_map_ else "?"


def text_of(name: bytes) -> str:
    """Return a name of the wire, up to its NUL."""
    return name.split(b"\0", 1)[0].decode("utf-8", "replace")


def size_text(size: int) -> str:
    """Return bytes for people: exact below 10 KiB."""
    if size < 10 << 10:
        return f"{size} B"
    value, units = size / 1024, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.1f} {units[0]}"


def shape_text(ne: Sequence[int]) -> str:
    """Return elements innermost first, without ones at the end."""
    dims = list(map(int, ne))
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return "x".join(map(str, dims))


def tensor_text(tensor: Any, dialect: Dialect) -> str:
    """Return a tensor of a message: op (if it has one), name, type and shape."""
    parts = [op_text(tensor.op, dialect)] if tensor.op else []
    name = text_of(tensor.name)
    parts.append(repr(name) if name else "(no name)")
    parts += [type_text(tensor.type), shape_text(tensor.ne)]
    return " ".join(parts)


def tensor_bytes(tensor: Any) -> int | None:
    """Return ggml_nbytes of a tensor of a message; None for a type that isn't known."""
    if tensor.type not in _TYPES or tensor.ne[0] % TYPE_INFO[_TYPES[tensor.type]].block_size:
        return None
    return tensor_nbytes(_TYPES[tensor.type], tensor.ne, tensor.nb)


def describe(message: ObservedMessage) -> str:
    """Return what a message is about, in one line that begins with its command."""
    parts = [message.command.name]
    if message.kind is MessageKind.ANSWER:
        parts += ["=", *_answer_parts(message)]
    elif message.kind is MessageKind.REQUEST:
        parts += _request_parts(message)
    elif message.kind is MessageKind.SWAPS:
        parts.append(f"swaps, {size_text(message.body_size)}")
    else:
        parts.append(f"{message.kind.value} of step {message.step}, {size_text(message.body_size)}")
    if message.problem:
        parts.append(f"[{message.problem}]")
    if message.missing:
        parts.append(f"[{size_text(message.missing)} not seen]")
    return " ".join(parts)


def _request_parts(message: ObservedMessage) -> list[str]:
    fields = message.fields
    parts: list[str] = []
    if fields is None:
        return [f"of {size_text(message.size)}"]
    if message.graph is not None:
        parts.append(graph_summary(message.graph))
    elif message.spec.body is Body.GRAPH:
        parts.append(size_text(message.body_size))
    if message.spec.body is Body.DATA:
        parts.append(tensor_text(fields.tensor, message.dialect))
        parts.append(_extent(fields.tensor, fields.offset, message.body_size))
        return parts + _plain_parts(fields, message.dialect, skip={"tensor", "offset"})
    if message.command is Command.GET_TENSOR:
        parts.append(tensor_text(fields.tensor, message.dialect))
        parts.append(_extent(fields.tensor, fields.offset, fields.size))
        return parts
    return parts + _plain_parts(fields, message.dialect)


def _answer_parts(message: ObservedMessage) -> list[str]:
    if message.spec.answer is Answer.DATA:
        return [size_text(message.body_size)]
    if message.fields is None:
        return ["?"]
    if message.command is Command.HELLO:
        version = message.fields
        text = f"protocol {version.major}.{version.minor}.{version.patch}"
        extension = caps_version(getattr(version, "conn_caps", b""))
        return [text, f"split extension {extension}"] if extension else [text]
    return _plain_parts(message.fields, message.dialect, zeros=True) or ["done"]


def _extent(tensor: Any, offset: int, size: int) -> str:
    """Return which bytes of a tensor a transfer is of."""
    whole = tensor_bytes(tensor)
    if offset == 0 and size == whole:
        return size_text(size)
    return f"{size_text(size)} at {offset} of {'?' if whole is None else whole}"


def _plain_parts(
    fields: Any, dialect: Dialect, skip: set[str] | None = None, zeros: bool = False
) -> list[str]:
    parts = []
    for name, value in vars(fields).items():
        if skip and name in skip:
            continue
        if hasattr(value, "op_params"):
            prefix = "" if name == "tensor" else f"{name} "
            parts.append(prefix + tensor_text(value, dialect))
        elif isinstance(value, bytes):
            if any(value):
                version = caps_version(value)
                extension = f"split extension {version}" if version else value.hex()
                parts.append(f"{name} {text_of(value) if name in _TEXT else extension}")
        elif isinstance(value, tuple):
            parts.append(_sequence_text(name, value, dialect))
        elif value or zeros or name not in _ZERO_IS_PLAIN:
            shown = size_text(value) if _is_size(name) else value_text(name, value, dialect)
            parts.append(f"{name} {shown}")
    return [part for part in parts if part]


def _is_size(name: str) -> bool:
    return name.endswith(("size", "_mem"))


def _sequence_text(name: str, values: tuple[Any, ...], dialect: Dialect) -> str:
    if values and hasattr(values[0], "op_params"):
        given = [v for v in values if v.id]
        return "of " + ", ".join(tensor_text(v, dialect) for v in given) if given else ""
    if values and hasattr(values[0], "reach"):
        return "of " + ", ".join(peer_text(v) for v in values if any(v.host))
    if values and not isinstance(values[0], int | float):
        return ""
    return f"{name} {list(values)}"


def peer_text(peer: Any) -> str:
    """Return where a member of a group is, and whether the server is to connect to it."""
    where = format_endpoint(text_of(peer.host), peer.port)
    return f"{where} (to be reached)" if peer.reach else where


# -- graphs -------------------------------------------------------------------------------------


def graph_summary(graph: GraphPayload | ProgramPayload) -> str:
    if isinstance(graph, GraphPayload):
        device = f", device {graph.device}" if graph.device else ""
        return f"{len(graph.nodes)} nodes, {len(graph.tensors)} tensors{device}"
    nodes = sum(len(step.nodes) for step in graph.steps)
    swaps = f", {len(graph.swaps)} swaps" if graph.swaps else ""
    return f"{len(graph.steps)} steps, {nodes} nodes, {len(graph.tensors)} tensors{swaps}"


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A tensor of a decoded graph as it is shown; ``sources`` and ``view_of`` are labels.

    ``node`` is its place in the order of execution, None for what is only read.
    """

    id: int
    node: int | None
    label: str
    op: str
    type: str
    ne: tuple[int, ...]
    sources: tuple[int, ...]
    view_of: int
    flags: int


def graph_tensors(tensors: Any, nodes: Sequence[int], dialect: Dialect) -> dict[int, GraphTensor]:
    """Return the tensors of a graph (RPC_TENSOR_DTYPE) by id.

    Of an id that occurs twice the last.
    """
    order = {id_: i for i, id_ in enumerate(nodes)}
    names = ("id", "type", "ne", "op", "op_params", "flags", "src", "view_src", "name")
    found = {}
    for id_, type_, ne, op, params, flags, src, view, name in zip(
        *(tensors[column].tolist() for column in names), strict=True
    ):
        function = sub_op(op_of(op, dialect), params[0], dialect)
        op_name = op_text(op, dialect)
        found[id_] = GraphTensor(
            id_, order.get(id_), text_of(name).strip() or hex(id_),
            f"{op_name} {function}" if function else op_name, type_text(type_), tuple(ne),
            tuple(s for s in src if s), view, flags,
        )  # fmt: skip
    return found


def _source_text(tensors: Mapping[int, GraphTensor], id_: int) -> str:
    tensor = tensors.get(id_)
    if tensor is None:
        return f"{id_:#x}?"
    if tensor.node is not None:
        return tensor.label
    return f"{tensor.label} ({tensor.type} {shape_text(tensor.ne)})"


def graph_lines(graph: GraphPayload | ProgramPayload, dialect: Dialect) -> list[str]:
    """Return a graph as text: a line a node, with its op, name, type, shape and sources.

    Sources that no node computes (weights, inputs, caches) have their type and shape, too.
    """
    nodes = (
        graph.nodes.tolist()
        if isinstance(graph, GraphPayload)
        else [i for step in graph.steps for i in step.nodes]
    )
    tensors = graph_tensors(graph.tensors, nodes, dialect)
    lines = [graph_summary(graph)]
    width = max((len(t.op) for t in tensors.values() if t.node is not None), default=0)
    for i, id_ in enumerate(nodes):
        node = tensors.get(id_)
        if node is None:
            lines.append(f"{i:>5}  node {id_:#x} is not among the tensors")
            continue
        skipped = "" if node.flags & TensorFlag.COMPUTE else "  (not computed)"
        lines.append(f"{i:>5}  {node.op:{width}}  {_graph_line(node, tensors)}{skipped}")
    return lines


def _graph_line(tensor: GraphTensor, tensors: Mapping[int, GraphTensor]) -> str:
    line = f"{tensor.label}  {tensor.type} {shape_text(tensor.ne)}"
    if tensor.sources:
        line += " <- " + ", ".join(_source_text(tensors, s) for s in tensor.sources)
    if tensor.view_of and tensor.view_of not in tensor.sources:
        line += f" (view of {_source_text(tensors, tensor.view_of)})"
    return line
