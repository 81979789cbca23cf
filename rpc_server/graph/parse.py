"""From the wire's tensor array to linked tensors: references resolved, extents inside buffers.

Everything later (contracts, plans, kernels) relies on what is established here:

* every id that a node or tensor names is present, ids are unique;
* references have no cycle, and a node reads only what earlier nodes or no node computes;
* types and op numbers exist in the dialect, rows are whole blocks;
* ops, and what their op_params say, are those of the newest ggml, whatever the client numbers;
* elements and blocks are aligned, as ggml's are by construction;
* a tensor with an address lies wholly inside a live buffer of this client, counted in Python
  integers; one whose data is not here has address 0;
* the bytes that a tensor's elements would take side by side are not many times those it lies in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protocol.dialects import Dialect
from protocol.ggml.ops import Op, TensorFlag
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.graph_payload import GraphPayload
from protocol.messages import MAX_DIMS, MAX_PARAM_WORDS
from protocol.numbering import canonical_params, padding_behind
from protocol.tensor import Tensor, padded_sources
from rpc_server.graph.errors import GraphError
from rpc_server.graph.table import (
    OP_NUMBERS,
    Ints,
    TensorTable,
    group_rows,
    name_of,
    shape_rows,
    sources_used,
    table_of,
    with_none,
)

_TYPES = {int(t): t for t in GgmlType}

# Strides below an element's size make any number of elements out of a few bytes, and a kernel busy
# for days. Windows that overlap, or rows that repeat, are well within this.
_MOST_REPEATED = 64
_REPEATED_FROM = 64 << 20

# What sizes are counted up to: no buffer is as large, and a sum of four still is an int64.
_MOST_BYTES = 1 << 60

_CPY = OP_NUMBERS[Op.CPY]

# What a tensor says of itself, as words of 32 bits: type, ne, nb, op, op_params.
_NE, _NB, _OP = 1, 1 + MAX_DIMS, 1 + 2 * MAX_DIMS
_PARAMS = _OP + 1
_SAID_WORDS = _PARAMS + MAX_PARAM_WORDS


class BufferLike(Protocol):
    """A buffer as parsing needs it: where it lies on the wire and in memory, in bytes."""

    @property
    def base(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...


Resolve = Callable[[int], BufferLike | None]


class LinkedGraph:
    """Nodes in execution order, views included; ``dialect`` is the numbering they were read by.

    ``table`` has their columns and those of all that they read, and ``order`` the nodes' rows in
    it; without them they are made of ``nodes``, and without ``nodes`` these of them.
    """

    def __init__(
        self,
        nodes: Sequence[Tensor] | None,
        dialect: Dialect,
        table: TensorTable | None = None,
        order: Ints | None = None,
    ) -> None:
        self.dialect = dialect
        if nodes is not None and table is None:
            table, rows = table_of(nodes)
            order = np.array([rows[id(t)] for t in nodes], np.int64)
        assert table is not None
        assert order is not None
        self.table = table
        self.order = order
        self._nodes = nodes

    @property
    def nodes(self) -> Sequence[Tensor]:
        """The nodes, linked: made when they are asked for."""
        if self._nodes is None:
            self._nodes = [self.table.make(row) for row in self.order.tolist()]
        return self._nodes


def parse_graph(payload: GraphPayload, dialect: Dialect, resolve: Resolve) -> LinkedGraph:
    """Link and check the graph of a GRAPH_COMPUTE.

    ``resolve`` maps a buffer handle off the wire to the client's buffer, None if it has no such.
    Raises GraphError.
    """
    ids = _Ids(payload.tensors["id"])
    table, in_order = _read_table(payload.tensors, ids, dialect, resolve)
    nodes = ids.rows(payload.nodes)
    if (missing := nodes == ids.none).any():
        raise GraphError(
            f"node {int(payload.nodes[missing.argmax()]):#x} is not among the graph's tensors"
        )
    if not (in_order and (nodes[1:] > nodes[:-1]).all()):
        _check_order(table, nodes)
    flags = payload.tensors["flags"][nodes] & TensorFlag.COMPUTE != 0
    # The flag came in 2026-01; clients of protocol 3.6 exist with and without it.
    if flags.any() or dialect.always_flags:
        nodes = nodes[flags]
    return LinkedGraph(None, dialect, table, nodes)


def parse_tensors(wire: Any, dialect: Dialect, resolve: Resolve) -> dict[int, Tensor]:
    """Link and check an array of the wire's tensors; they by id. Raises GraphError."""
    table, _ = _read_table(wire, _Ids(wire["id"]), dialect, resolve)
    return {id_: table.make(row) for row, id_ in enumerate(wire["id"].tolist())}


def tensor_with_id(tensors: dict[int, Tensor], id_: int) -> Tensor:
    """Return the tensor that the graph names as a node. Raises GraphError."""
    tensor = tensors.get(id_)
    if tensor is None:
        raise GraphError(f"node {id_:#x} is not among the graph's tensors")
    return tensor


class _Ids:
    """The rows of tensors by id. Raises GraphError for ids that are not unique, and for 0."""

    def __init__(self, ids: npt.NDArray[np.uint64]) -> None:
        self.none = len(ids)
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        if (ordered[1:] == ordered[:-1]).any():
            raise GraphError("a tensor id occurs twice in the graph")
        if self.none and not ordered[0]:
            raise GraphError("a tensor has id 0")
        # One more behind them: where ids are looked for that are larger than all, and that is none.
        self._order = with_none(order, self.none)
        self._sorted = np.append(ordered, np.iinfo(np.uint64).max)

    def rows(self, ids: npt.NDArray[np.uint64]) -> Ints:
        """Return where tensors with these ids are; ``none`` for one that is not there."""
        at = np.searchsorted(self._sorted, ids)
        return np.where(self._sorted[at] == ids, self._order[at], self.none)


class _TypeColumns:
    """The properties of types, by their number; the last one is that of all that are none."""

    def __init__(self) -> None:
        count = max(_TYPES) + 2
        self.known = np.zeros(count, bool)
        self.block, self.size, self.alignment = (np.ones(count, np.int64) for _ in range(3))
        for number, type_ in _TYPES.items():
            info = TYPE_INFO[type_]
            self.known[number] = True
            self.block[number] = info.block_size
            self.size[number] = info.type_size
            self.alignment[number] = info.alignment

    def numbers(self, types: npt.NDArray[np.uint32]) -> Ints:
        """Types off the wire as numbers that are in the columns."""
        return np.minimum(types, len(self.known) - 1).astype(np.int64)


@functools.cache
def _type_columns() -> _TypeColumns:
    return _TypeColumns()


@functools.cache
def _numbers_of_ops(dialect: Dialect) -> Ints:
    """By its number in a dialect, the number of an op."""
    return np.array([OP_NUMBERS[op] for op in dialect.numbering.ops], np.int64)


def _read_table(
    wire: Any, ids: _Ids, dialect: Dialect, resolve: Resolve
) -> tuple[TensorTable, bool]:
    """The tensors as columns, each of them checked and linked; whether all refer to earlier ones.

    Most of it is asked of descriptions, which are few. Raises GraphError.
    """
    columns, op_numbers = _type_columns(), _numbers_of_ops(dialect)
    words = _said(wire, ids, dialect)
    first, which = group_rows(words.view(np.int64))
    said = words[first]
    types = columns.numbers(said[:, 0])
    ne, nb = said[:, _NE:_NB].astype(np.uint64), said[:, _NB:_OP].astype(np.uint64)
    block, size = columns.block[types], columns.size[types]

    def refuse(bad: npt.NDArray[np.bool_], message: Callable[[int], str]) -> None:
        if bad.any():
            raise GraphError(message(int(first[bad.argmax()])))

    refuse(~columns.known[types], lambda i: _unknown_type(wire, i))
    refuse(
        said[:, _OP] >= len(op_numbers),
        lambda i: (
            f"tensor '{_label(wire, i)}': unknown op {wire['op'][i]}, {dialect.name} has "
            f"{len(op_numbers)}"
        ),
    )
    refuse(
        ne[:, 0] % block.astype(np.uint64) != 0,
        lambda i: (
            f"tensor '{_label(wire, i)}': rows of {wire['ne'][i][0]} "
            f"{GgmlType(int(wire['type'][i])).name} are not whole blocks"
        ),
    )
    ops = op_numbers[said[:, _OP]]
    # Sizes are exact below the bound, and at least that above it.
    steps = np.minimum((ne - np.uint64(1)) * nb, np.uint64(_MOST_BYTES)).astype(np.int64)
    along = np.minimum(ne[:, 0] * nb[:, 0], np.uint64(_MOST_BYTES)).astype(np.int64)
    begin = np.where(block == 1, size + steps[:, 0], along // block)
    empty = (ne == 0).any(axis=1)
    nbytes = np.where(empty, 0, begin + steps[:, 1:].sum(axis=1))

    # Where a GPU loads words of 4 bytes an odd address ends all work of the card, of all clients.
    alignment = columns.alignment[types].astype(np.uint64)
    odd = ((nb % alignment[:, None] != 0) & (ne > 1)).any(axis=1)[which]
    odd |= wire["data"] % alignment[which] != 0
    address = _addresses(wire, odd, nbytes[which], resolve)
    # Only told from what is allowed by a factor: floats do.
    dense = (ne[:, 0] / block) * size * ne[:, 1] * ne[:, 2] * ne[:, 3]
    repeated = (dense > _REPEATED_FROM) & (dense > _MOST_REPEATED * nbytes.astype(float))
    if repeated.any():
        _refuse_first((address != 0) & repeated[which], lambda i: _repeated(_bare(wire, i)))
    src, view_src, in_order = _link(wire, ids, (ops == _CPY)[which])
    described = with_none(which, len(first))
    params = _params(said[:, _PARAMS:].view(np.int32), ops, dialect)
    made = _Maker(wire, described, ops, params, address, src, view_src)
    table = TensorTable(
        described=described,
        shapes=shape_rows(types, ne, nb),
        ops=ops,
        params=params,
        address=with_none(address),
        src=src,
        view_src=view_src,
        names=wire["name"],
        make=made.linked,
        node=made.alone,
    )
    return table, in_order


def _said(wire: Any, ids: _Ids, dialect: Dialect) -> npt.NDArray[np.uint32]:
    """Return what tensors say of themselves (n, 26), with what older clients leave out.

    Functions are those of the dialect.
    """
    words = np.empty((len(wire), _SAID_WORDS), np.uint32)
    words[:, 0] = wire["type"]
    words[:, _NE:_NB], words[:, _NB:_OP] = wire["ne"], wire["nb"]
    words[:, _OP] = wire["op"]
    words[:, _PARAMS:].view(np.int32)[:] = wire["op_params"]
    numbering = dialect.numbering
    if numbering.pads_behind:
        (rows,) = np.nonzero(wire["op"] == numbering.numbers[Op.PAD])
        sources = ids.rows(wire["src"][rows, 0])
        for row, at in zip(rows.tolist(), sources.tolist(), strict=True):
            if at != ids.none:
                shape, source_shape = wire["ne"][row].tolist(), wire["ne"][at].tolist()
                words[row, _PARAMS:] = padding_behind(shape, source_shape, MAX_PARAM_WORDS)
    return words


def _addresses(wire: Any, odd: Any, nbytes: Ints, resolve: Resolve) -> Ints:
    """Return where each tensor lies: all of it in its buffer; 0 where its data is not here.

    ``odd`` are those that lie at no place for their type. Raises GraphError.

    Up to protocol 6 clients name buffers that they have on other servers, for sources that nothing
    here reads; a node that does read them is refused by its contract.
    """
    named = wire["buffer"]
    handles = np.unique(named)
    which = np.searchsorted(handles, named)
    buffers = [resolve(handle) if handle else None for handle in handles.tolist()]
    base, size, start = (
        np.array([0 if b is None else of(b) for b in buffers], np.uint64)[which]
        for of in (attrgetter("base"), attrgetter("size"), attrgetter("address"))
    )
    here = np.array([b is not None for b in buffers], bool)[which] & (wire["data"] != 0)
    offset = wire["data"] - base
    outside = (wire["data"] < base) | (offset > size) | (size - offset < nbytes.astype(np.uint64))

    def message(i: int) -> str:
        t, buffer = _bare(wire, i), buffers[which[i]]
        assert buffer is not None
        first = int(wire["data"][i]) - buffer.base
        return (
            f"tensor '{t.name}': bytes [{first}, {first + t.nbytes}) lie outside its buffer of "
            f"{buffer.size}"
        )

    _refuse_first(
        odd & here,
        lambda i: f"tensor '{_label(wire, i)}': {_bare(wire, i).type.name} that is not aligned",
    )
    _refuse_first(outside & here, message)
    return np.where(here, start + offset, np.uint64(0)).astype(np.int64)


def _refuse_first(bad: npt.NDArray[np.bool_], message: Callable[[int], str]) -> None:
    """Raises GraphError with the message for the first row that is ``bad``."""
    if bad.any():
        raise GraphError(message(int(bad.argmax())))


def _label(wire: Any, i: int) -> str:
    return name_of(bytes(wire["name"][i]))


def _unknown_type(wire: Any, i: int) -> str:
    return f"tensor '{_label(wire, i)}': unknown type {wire['type'][i]}"


def _bare(wire: Any, i: int) -> Tensor:
    """A tensor of known type that says no more than how it lies."""
    ne, nb = (tuple(map(int, wire[name][i])) for name in ("ne", "nb"))
    type_ = _TYPES[int(wire["type"][i])]
    return Tensor(int(wire["id"][i]), type_, ne, nb, name=_label(wire, i))  # type: ignore[arg-type]


def _repeated(t: Tensor) -> str:
    return f"tensor '{t.name}': {t.row_size * t.nrows} bytes of elements lie in {t.nbytes} bytes"


def _link(wire: Any, ids: _Ids, copies: npt.NDArray[np.bool_]) -> tuple[Ints, Ints, bool]:
    """Rows of sources (n, k) and of what is viewed (n); whether all of them are earlier ones.

    ``copies`` are the tensors whose op is CPY. Raises GraphError.
    """
    n = len(wire)
    sources = wire["src"]
    used = sources_used(sources != 0)
    named = np.empty((n, used + 1), np.uint64)
    named[:, :used] = sources[:, :used]
    named[:, used] = wire["view_src"]
    there = named != 0
    rows = np.full(named.shape, n, np.int64)
    rows[there] = ids.rows(named[there])
    lost = there & (rows == n)
    if lost.any():
        i, k = np.argwhere(lost)[0]
        raise GraphError(
            f"tensor '{_label(wire, i)}': source {int(named[i, k]):#x} is not in the graph"
        )
    own = np.arange(n)
    if used > 1 and copies.any():
        # ggml_cast: a copy whose destination is its own result.
        rows[(rows[:, 1] == own) & copies, 1] = n
    # Clients write tensors after what they refer to, which rules cycles out; only another order
    # needs the search.
    in_order = not ((rows >= own[:, None]) & (rows != n)).any()
    if not in_order:
        _refuse_cycles(wire, rows)
    return rows[:, :used], rows[:, used], in_order


def _params(said: npt.NDArray[np.int32], ops: Ints, dialect: Dialect) -> Ints:
    """op_params of descriptions (m, 16) as the newest ggml has them, whoever sent them."""
    numbering = dialect.numbering
    params: Ints = said.astype(np.int64)
    for op in numbering.functions:
        (rows,) = np.nonzero(ops == OP_NUMBERS[op])
        for row in rows.tolist():
            params[row, 0] = canonical_params(numbering, op, (int(params[row, 0]),))[0]
    return params


class _Maker:
    """Makes tensors of the wire."""

    def __init__(
        self, wire: Any, described: Ints, ops: Ints, params: Ints, address: Ints, *links: Ints
    ) -> None:
        self._wire = wire
        self._described, self._ops, self._params = described, ops, params
        self._address = address
        self._src, self._view_src = links
        self._made: dict[int, Tensor] = {}

    def alone(self, row: int) -> Tensor:
        """A tensor and its sources, with nothing behind these."""
        t = self._bare(row)
        none = len(self._wire)
        t.src = padded_sources(
            None if i == none else self._bare(i) for i in self._src[row].tolist()
        )
        return t

    def linked(self, row: int) -> Tensor:
        """A tensor with all that it leads to; each of them is made once."""
        made = self._made.get(row)
        if made is not None:
            return made
        wanted = [row]
        for at in wanted:
            if at in self._made:
                continue
            self._made[at] = self._bare(at)
            wanted += self._links(at)
        for at in wanted:
            t = self._made[at]
            *sources, view = (self._made.get(i) for i in self._ends(at))
            t.src, t.view_src = padded_sources(sources), view
        return self._made[row]

    def _ends(self, row: int) -> list[int]:
        return [*self._src[row].tolist(), int(self._view_src[row])]

    def _links(self, row: int) -> list[int]:
        return [i for i in self._ends(row) if i != len(self._wire)]

    def _bare(self, row: int) -> Tensor:
        t = _bare(self._wire, row)
        description = int(self._described[row])
        t.op = _OPS[int(self._ops[description])]
        t.op_params = tuple(self._params[description].tolist())
        t.flags = int(self._wire["flags"][row])
        t.use_count = int(self._wire["use_count"][row])
        t.address = int(self._address[row])
        return t


_OPS = tuple(Op)


def _refuse_cycles(wire: Any, rows: Ints) -> None:
    """Raise GraphError if a tensor leads to itself by the rows of what it refers to."""
    n = len(rows)
    links = [[i for i in row if i != n] for row in rows.tolist()]
    # 1: on the path that is being followed; 2: done.
    state = bytearray(n)
    for root in range(n):
        stack = [] if state[root] else [root]
        while stack:
            at = stack[-1]
            if state[at]:
                state[stack.pop()] = 2
                continue
            state[at] = 1
            for other in links[at]:
                if state[other] == 1:
                    raise GraphError(f"tensor '{_label(wire, other)}' depends on itself")
                if not state[other]:
                    stack.append(other)


def _check_order(table: TensorTable, nodes: Ints) -> None:
    """Raise GraphError if a node reads what a later one computes."""
    position = np.full(len(table) + 1, -1, np.int64)
    position[nodes] = own = np.arange(len(nodes))
    read = np.column_stack((table.src[nodes], table.view_src[nodes]))
    early = position[read] > own[:, None]
    if early.any():
        i, k = np.argwhere(early)[0]
        node, source = table.make(int(nodes[i])), table.make(int(read[i, k]))
        raise GraphError(f"{node.label}: source '{source.name}' is computed after it")


def check_order(nodes: list[Tensor]) -> None:
    """Raise GraphError if a node reads what a later one computes."""
    position = {id(node): i for i, node in enumerate(nodes)}
    for i, node in enumerate(nodes):
        for source in (*node.src, node.view_src):
            if source is not None and position.get(id(source), -1) > i:
                raise GraphError(f"{node.label}: source '{source.name}' is computed after it")


def label_of_message(message: Any) -> str:
    """Return the name that an rpc_tensor message gives, however it is written."""
    text: str = message.name.split(b"\0", 1)[0].decode("utf-8", "replace")
    return text


def check_message(message: Any) -> GgmlType:
    """Return the type of an rpc_tensor message.

    Raises GraphError if it is unknown or a row is broken blocks.
    """
    type_ = _TYPES.get(message.type)
    if type_ is None:
        raise GraphError(f"tensor '{label_of_message(message)}': unknown type {message.type}")
    if message.ne[0] % TYPE_INFO[type_].block_size:
        raise GraphError(
            f"tensor '{label_of_message(message)}': rows of {message.ne[0]} {type_.name} are not "
            "whole blocks"
        )
    return type_


def tensor_of_message(message: Any, dialect: Dialect) -> Tensor:
    """Return a tensor from a single rpc_tensor message (GET_ALLOC_SIZE), without data and sources.

    Raises GraphError for an unknown type, op or a row of broken blocks.
    """
    type_ = check_message(message)
    op = dialect.ops[message.op] if message.op < len(dialect.ops) else Op.NONE
    return Tensor(
        id=message.id,
        name=label_of_message(message),
        type=type_,
        op=op,
        ne=tuple(message.ne),
        nb=tuple(message.nb),
        op_params=tuple(message.op_params),
        flags=message.flags,
    )
