"""An rpc_tensor off the wire, as far as its place and its size go."""

from __future__ import annotations

from typing import Any, NamedTuple

from protocol.ggml.types import TYPE_INFO, GgmlType, TypeInfo, nbytes

_TYPES = {int(type): type for type in GgmlType}


class TensorView(NamedTuple):
    """The place and the size of a tensor; ``layout`` is what its room depends on."""

    id: int
    name: str
    type: GgmlType
    ne: tuple[int, ...]
    buffer: int
    data: int
    nb: tuple[int, ...]
    view_src: int
    nbytes: int
    layout: tuple[Any, ...]

    @property
    def info(self) -> TypeInfo:
        return TYPE_INFO[self.type]


def name_of(fields: Any) -> str:
    """Return a tensor's name as text."""
    return bytes(fields.name).split(b"\0", 1)[0].decode("utf-8", "replace")


def describe(fields: Any) -> str:
    """Return a tensor that may be of no known type, for messages."""
    shape = "x".join(map(str, fields.ne))
    return f"{name_of(fields)!r} (type {fields.type}, {shape})"


def view_of(fields: Any) -> TensorView | None:
    """Return the tensor, or None if it has no type or its rows aren't whole blocks.

    A row of part of a block is allowed where nothing is stored: of views, which ggml rounds down.
    """
    kind = _TYPES.get(int(fields.type))
    ne, nb = tuple(map(int, fields.ne)), tuple(map(int, fields.nb))
    if kind is None or (not fields.view_src and ne[0] % TYPE_INFO[kind].block_size):
        return None
    layout = (int(kind), int(fields.op), tuple(map(int, fields.op_params)), ne, nb)
    return TensorView(
        int(fields.id),
        name_of(fields),
        kind,
        ne,
        int(fields.buffer),
        int(fields.data),
        nb,
        int(fields.view_src),
        nbytes(kind, ne, nb),
        layout,
    )
