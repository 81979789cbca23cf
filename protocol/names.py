"""How long a tensor's name is on a connection: 64 bytes, or 128 where ggml was compiled so.

Nothing on the wire says it. Requests of a fixed size that carry tensors tell by that size, graphs
by their counts; an upload tells by the bytes that it may have, since what is before the name says
how large the tensor is. Names are filled up with zeros.
"""

from __future__ import annotations

import functools
from typing import Any

from protocol.codec import Buffer, codec
from protocol.commands import Command
from protocol.dialects import Body, Dialect
from protocol.ggml.types import GgmlType
from protocol.ggml.types import nbytes as tensor_nbytes
from protocol.graph_payload import graph_name_sizes
from protocol.messages import NAME_SIZES, with_names

_TYPES = {int(t): t for t in GgmlType}


@functools.lru_cache(maxsize=1024)
def _head_sizes(request: Any) -> dict[int, int]:
    """Bytes of a request's head, by the size of names; empty if it carries no tensor."""
    sizes = {n: codec(with_names(request, n)).size for n in NAME_SIZES}
    return sizes if len(set(sizes.values())) > 1 else {}


def size_by_frame(dialect: Dialect, number: int, size: int) -> int | None:
    """Return the size of names that a frame of command ``number`` with ``size`` bytes has.

    None if it doesn't tell: the command has no tensor, or no fixed size, or is none.
    """
    if number not in Command._value2member_map_:
        return None
    spec = dialect.commands.get(Command(number))
    if spec is None or spec.body is not Body.NONE:
        return None
    return next((n for n, head in _head_sizes(spec.request).items() if head == size), None)


def upload_head_size(dialect: Dialect, size: int) -> int:
    """Return how many of the ``size`` bytes of a SET_TENSOR :func:`size_by_upload` looks at."""
    return min(size, max(_head_sizes(dialect.commands[Command.SET_TENSOR].request).values()))


def size_by_upload(dialect: Dialect, size: int, head: Buffer) -> int | None:
    """Return the size of names by a SET_TENSOR of ``size`` bytes that begins with ``head``.

    None if it may be either: a part of a tensor, or a whole one whose data begins with zeros.
    Clients write within tensors.
    """
    possible: list[int] = []
    request = dialect.commands[Command.SET_TENSOR].request
    for name_size, head_size in _head_sizes(request).items():
        if size < head_size:
            continue
        fields = codec(with_names(request, name_size)).parse(head)
        tensor, left = fields.tensor, size - head_size
        name, _, rest = tensor.name.partition(b"\0")
        if tensor.type not in _TYPES or len(name) == name_size or rest.strip(b"\0"):
            continue
        if fields.offset + left <= tensor_nbytes(_TYPES[tensor.type], tensor.ne, tensor.nb):
            possible.append(name_size)
    return possible[0] if len(possible) == 1 else None


def size_by_graph(dialect: Dialect, payload: Buffer) -> int | None:
    """Return the size of names with which a graph's counts fill it; None if it doesn't tell."""
    sizes = graph_name_sizes(payload, dialect)
    return sizes[0] if len(sizes) == 1 else None
