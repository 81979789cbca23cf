"""Where a message begins, in a stream of requests that was joined or lost in its middle.

A request has no mark that it begins with, but most of its bytes are given: commands have fixed
sizes, and a tensor has a type, an op, a shape and a name that are hardly met by chance. A position
is taken for a beginning when the frame there is one that the dialect has, and either a plausible
tensor (or graph) is behind it or the next frame is.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Collection, Iterable
from typing import Any

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Body, CommandSpec, Dialect
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.ggml.types import nbytes as tensor_nbytes
from protocol.requests import FRAME

_WORD = struct.Struct("<I")
_TYPES = {int(t): t for t in GgmlType}
# Payloads of a terabyte don't occur; neither do graphs of a gigabyte.
_BODY_SIZE = rb".{5}\0\0\0"
_GRAPH_SIZE = rb".{4}\0\0\0\0"


def plausible_tensor(tensor: Any, dialect: Dialect) -> bool:
    """Return whether the fields of an rpc_tensor are such as ggml sends."""
    if tensor.type not in _TYPES or tensor.op >= len(dialect.ops) or not tensor.id:
        return False
    info = TYPE_INFO[_TYPES[tensor.type]]
    if 0 in tensor.ne or tensor.ne[0] % info.block_size or 0 in tensor.nb:
        return False
    name = tensor.name.split(b"\0", 1)[0]
    # Names are text: what isn't ASCII is at least no control character.
    return len(name) < len(tensor.name) and all(byte >= 0x20 and byte != 0x7F for byte in name)


class FrameFinder:
    """Finds beginnings of requests of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._specs: dict[int, CommandSpec] = {}
        patterns = []
        for command, spec in dialect.commands.items():
            head = codec(spec.request).size
            # HELLO begins a connection only, and a command without payload is too little to find.
            if command is Command.HELLO or (head == 0 and spec.body is Body.NONE):
                continue
            self._specs[command] = spec
            size = {
                Body.NONE: re.escape(head.to_bytes(8, "little")),
                Body.DATA: _BODY_SIZE,
                Body.GRAPH: _GRAPH_SIZE,
            }[spec.body]
            patterns.append(re.escape(bytes([command])) + size)
        self._pattern = re.compile(b"|".join(patterns), re.DOTALL)
        short = [
            bytes([command]) + bytes(8)
            for command, spec in dialect.commands.items()
            if command is not Command.HELLO and codec(spec.request).size == 0
        ]
        self._following = re.compile(b"|".join([*patterns, *map(re.escape, short)]), re.DOTALL)

    def find(self, data: bytes | bytearray, begins: Collection[int] = ()) -> tuple[int, bool]:
        """Return the first beginning in ``data``, and whether it is one for sure.

        Otherwise no request begins before that position, and more bytes are needed to judge it.
        ``begins`` are positions where a segment of the stream begins, as requests mostly do.
        """
        at = 0
        while (match := self._pattern.search(data, at)) is not None:
            verdict = self._judge(data, match.start(), begins)
            if verdict is not False:
                return match.start(), verdict is True
            at = match.start() + 1
        # A frame may have begun in the last bytes.
        return max(at, len(data) - FRAME.size + 1, 0), False

    def _judge(self, data: bytes | bytearray, at: int, begins: Collection[int]) -> bool | None:
        """Return whether a request begins at ``at``; None if more bytes are needed."""
        number, size = FRAME.unpack_from(data, at)
        spec = self._specs[number]
        head = codec(spec.request)
        payload = at + FRAME.size
        if size < head.size:
            return False
        if spec.body is Body.GRAPH:
            return self._judge_graph(data, payload + head.size, size - head.size)
        if len(data) < payload + head.size:
            return None
        tensors = list(_tensors(head.parse(data, payload)))
        if tensors:
            sound = all(plausible_tensor(tensor, self.dialect) for tensor in tensors[:2])
            if sound and spec.body is Body.DATA:
                fields = head.parse(data, payload)
                return _fits(fields.tensor, fields.offset, size - head.size)
            return sound
        end = payload + size
        if end == len(data) and at in begins:
            return True
        if len(data) < end + FRAME.size:
            return None
        return self._following.match(data, end) is not None

    def _judge_graph(self, data: bytes | bytearray, at: int, size: int) -> bool | None:
        words = 2 if self.dialect.graph_device else 1
        if len(data) < at + words * _WORD.size:
            return None
        (n_nodes,) = _WORD.unpack_from(data, at + (words - 1) * _WORD.size)
        tensor_size = self.dialect.tensor_size
        tensors = size - (words + 1) * _WORD.size - 8 * n_nodes
        if not n_nodes or tensors < tensor_size * n_nodes or tensors % tensor_size:
            return False
        first = at + (words + 1) * _WORD.size + 8 * n_nodes
        if len(data) < first + tensor_size:
            return None
        (n_tensors,) = _WORD.unpack_from(data, first - _WORD.size)
        if n_tensors * tensor_size != tensors:
            return False
        return plausible_tensor(codec(self.dialect.tensor).parse(data, first), self.dialect)


@functools.lru_cache(maxsize=32)
def _finder(commands: int, dialect_index: int) -> FrameFinder:
    return FrameFinder(DIALECTS[dialect_index])


def guess_dialect(data: bytes | bytearray, hello_size: int | None = None) -> Dialect | None:
    """Return the newest dialect in which a request begins in ``data``, the earlier the better.

    ``hello_size`` leaves only those of the versions that have such a HELLO. Versions that differ in
    their answers alone can't be told apart so.
    """
    best: tuple[int, Dialect] | None = None
    for dialect in DIALECTS:
        if hello_size is not None and dialect.hello_size != hello_size:
            continue
        at, found = finder(dialect).find(data)
        if found and (best is None or at < best[0]):
            best = at, dialect
    return best[1] if best else None


def finder(dialect: Dialect) -> FrameFinder:
    """Return the finder of a dialect; those of the plain dialects are made once."""
    for i, known in enumerate(DIALECTS):
        if known is dialect:
            return _finder(id(known.commands), i)
    return FrameFinder(dialect)


def _tensors(fields: Any) -> Iterable[Any]:
    for value in vars(fields).values():
        if hasattr(value, "op_params"):
            yield value


def _fits(tensor: Any, offset: int, size: int) -> bool:
    """Return whether ``size`` bytes at ``offset`` are whole blocks that lie in the tensor."""
    info = TYPE_INFO[_TYPES[tensor.type]]
    nbytes = tensor_nbytes(_TYPES[tensor.type], tensor.ne, tensor.nb)
    return size % info.type_size == 0 and offset + size <= nbytes
