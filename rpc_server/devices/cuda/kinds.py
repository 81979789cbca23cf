"""Launches by kinds of nodes: what is decided of some nodes is decided for all that are alike.

Lowerings of this device look at nodes ahead, and do several at once. So what is remembered is a
*pattern*: the kinds of the nodes that a lowering has looked at, how their memory is related, and
what came of it, with addresses left out. Contracts are none of it: each kind of a graph's nodes is
held against its contract, which its signature alone decides (``planning/kinds.py``), before
anything is looked for here.

A pattern is made by running the lowering on nodes whose addresses are :class:`Placed`: numbers
that know what they count from. It may be used for other nodes of these kinds if each row of the
table stands where it stood, if what is written overlaps the same as it did, and nothing else, and
if addresses are multiples of the same: these are all that a lowering can learn of addresses.

Of a whole graph it is remembered which patterns are where, and where their scratch lies. That is
good for other graphs of the same kinds in the same order, linked in the same way, whose memory lies
in the same order with the same overlaps: the order of all beginnings and ends decides of any two
pieces of memory how they are related.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from protocol.ggml.types import GgmlType, nbytes
from protocol.tensor import Tensor, padded_sources
from rpc_server.devices.base import StopWord
from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cuda.kernels import CudaKernel
from rpc_server.devices.cuda.planner import (
    SCRATCH_LIMIT,
    CudaPlanner,
    Grid,
    Launch,
    Product,
    lower_to_launches,
)
from rpc_server.devices.planning.kinds import (
    SLOTS,
    KindMemory,
    NodeLabels,
    TooManyKindsError,
    signatures,
    slot_rows,
    specimen,
)
from rpc_server.devices.planning.scratch import ScratchPlanner
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph
from rpc_server.graph.table import OPS as OPS_BY_NUMBER
from rpc_server.graph.table import Ints, shape_of
from rpc_server.ops.table import OPS, ContractError, check

# A graph has a few dozen kinds of nodes.
_MOST_KINDS = 1 << 11
# Nodes that a lowering looks at, rows of the table that these have, and pieces of scratch, at most.
_MOST_NODES, _MOST_ROWS, _MOST_PIECES = 20, 56, 8
# Words of a record that are addresses, at most.
_MOST_PLACES = 24
# Records and patterns that are remembered at most, of all graphs of a card; patterns of the same
# kinds that differ in how memory is related.
_MOST_REMEMBERED, _MOST_ALIKE = 1 << 12, 8

# Whole graphs that are remembered at most, and groups of nodes in all of them, some 600 bytes each.
_MOST_GRAPHS, _MOST_GROUPS = 24, 1 << 14

# Positions of nodes that are not there; of those that are one more may wait.
_NO_NODES = (0,) * (_MOST_NODES + 1)

# Lowerings ask whether addresses are multiples of up to 16.
_LOW_BITS = 15
# Added to addresses while a pattern is made: no other number is as large.
_SHIFT = 1 << 56

_END = -1

# With which a node waits, before it is known with which.
_SOMEBODY = Tensor(0, GgmlType.F32, (1, 1, 1, 1), (4, 4, 4, 4))


class NoPatternError(Exception):
    """A graph that has to be planned node by node."""


class Placed(int):
    """An address, or bytes from there on, that knows what it counts from.

    ``origin`` is a number of what has the address, ``offset`` the bytes from there on. Compared and
    divided it is a number like others.
    """

    origin: int
    offset: int

    @classmethod
    def at(cls, address: int, origin: int, offset: int = 0) -> Placed:
        """Return an address, ``offset`` included."""
        made = cls(address)
        made.origin, made.offset = origin, offset
        return made

    def __add__(self, other: int) -> int:
        total = int.__add__(self, other)
        if isinstance(other, Placed):
            return total
        return Placed.at(total, self.origin, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: int) -> int:
        total = int.__sub__(self, other)
        if isinstance(other, Placed):
            return total
        return Placed.at(total, self.origin, self.offset - other)


@dataclass(slots=True)
class CudaKind:
    """A kind of nodes that keep their contract; views and what is empty do nothing."""

    number: int
    runs: bool
    nbytes: int = 256


@dataclass(frozen=True, slots=True)
class LaunchTemplate:
    """A launch without its record, which is known by a number.

    ``request`` is the number of the piece of shared scratch that it does nothing but fill; -1: it
    does more.
    """

    record: int
    kernel: CudaKernel
    grid: Grid
    threads: int
    shared: int
    request: int


@dataclass(frozen=True, slots=True)
class ProductTemplate:
    """A product by cuBLAS, and its fields that are addresses.

    Of these, what they count from, and bytes from there on.
    """

    product: Product
    fields: tuple[tuple[str, int, int], ...]
    request: int = -1

    def placed(self, bases: Ints) -> Product:
        """Return the product with its addresses; ``bases`` are what they count from."""
        values = {name: int(bases[origin]) + offset for name, origin, offset in self.fields}
        return replace(self.product, **values)  # type: ignore[arg-type]


# Of scratch, in the order in which a lowering did it: a piece that later nodes may find (its key,
# what it is made of as coordinates, offsets and bytes, and its bytes), one of the node's own, and
# memory written.
@dataclass(frozen=True, slots=True)
class _Shared:
    key: Hashable
    sources: tuple[tuple[int, int, int, int], ...]
    size: int


@dataclass(frozen=True, slots=True)
class _Local:
    size: int


@dataclass(frozen=True, slots=True)
class _Written:
    node: int
    slot: int
    offset: int
    size: int


_Event = _Shared | _Local | _Written


@dataclass(slots=True)
class Pattern:
    """The things that a lowering did for a node, and what it saw of it and others.

    ``nodes`` is how many it looked at: one that waits, if there is one, that at hand, and those
    ahead. Rows have numbers in the order in which they came up; their coordinates are a node of
    these and a slot of it.
    """

    nodes: int
    # By row: its coordinates, and the low bits of its address.
    row_node: Ints
    row_slot: Ints
    low: Ints
    # Coordinates where a row stands that came up before.
    same_node: Ints
    same_slot: Ints
    same_row: Ints
    # Pairs of rows of which one is written, and how they are related.
    one: Ints
    other: Ints
    relation: Ints
    coordinates: list[tuple[int, int]]
    launches: list[LaunchTemplate | ProductTemplate]
    events: list[_Event]
    # Of the nodes: which are done, and with which of them that at hand is to be done (-1: none).
    absorbed: tuple[int, ...]
    waits: int


@dataclass(frozen=True, slots=True)
class PlannedGraph:
    """The launches of a graph without their addresses, which graphs that are alike have, too.

    By group, ``rows`` (groups, _MOST_ROWS) are the table's rows that its records' addresses count
    from, ``pieces`` (groups, _MOST_PIECES) offsets of its scratch, ``hands`` its node. ``launches``
    are in order; ``owners`` the groups of those that aren't products, ``records`` their numbers.
    ``extents`` (n, 3) is the memory that scratch depends on, as rows, offsets and bytes. ``low``
    and ``order`` are as of :meth:`_Walk.memory_order`.
    """

    rows: Ints
    pieces: Ints
    peak: int
    hands: Ints
    launches: list[LaunchTemplate | ProductTemplate]
    owners: Ints
    product_owners: list[int]
    records: Ints
    extents: Ints
    low: Ints
    order: Ints


@dataclass(slots=True)
class PlannedLaunches:
    """Launches and products in order; records are rows of ``words``.

    ``labels`` are, by record, the names of their nodes.
    """

    launches: list[Launch | Product]
    words: Ints
    labels: NodeLabels


@dataclass(frozen=True, slots=True)
class _NodeOf:
    """The node of a record, which has its name when it is asked for."""

    labels: NodeLabels
    number: int

    @property
    def label(self) -> str:
        return self.labels[self.number]


@dataclass(frozen=True, slots=True)
class _Extent:
    """Memory that kept scratch was made of."""

    address: int
    nbytes: int
    empty: bool = False


class _Arena:
    """Scratch by offsets."""

    size = SCRATCH_LIMIT

    def address(self, offset: int, size: int) -> int:
        return offset


class _Scratch(ScratchPlanner):
    """Places scratch for nodes whose requests are known."""

    def __init__(self, last_use: dict[int, int]) -> None:
        super().__init__(_Arena())
        self._last_use = last_use

    def at(self, number: int) -> None:
        """Go on with node ``number`` of the graph."""
        self._begun = number
        if self._shared:
            self._drop([key for key, kept in self._shared.items() if kept.until < number])
        self._local_used = 0
        self._filling, self._reading = [], []

    def write(self, start: int, size: int) -> None:
        """Let go of what was made of memory that is written."""
        if size and self._shared:
            self.overwritten(start, start + size)


class _SeenNodes:
    """Some nodes as a lowering sees them; rows of the table get numbers as they come up."""

    def __init__(self, walk: _Walk, nodes: Sequence[int], ends: bool) -> None:
        self._walk = walk
        self.nodes = nodes
        # Whether nothing comes behind them.
        self.ends = ends
        self._made: dict[int, Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._known: dict[int, Tensor] = {}
        self.rows: list[int] = []
        self.coordinates: list[tuple[int, int]] = []
        self.same: list[tuple[int, int, int]] = []

    def node(self, j: int) -> Tensor:
        """Return node ``j`` of those given."""
        known = self._known.get(j)
        if known is not None:
            return known
        node, *sources = (
            self._tensor(row, j, slot)
            for slot, row in enumerate(self._walk.rows[self.nodes[j]].tolist())
        )
        assert node is not None
        table = self._walk.table
        description = int(table.described[node.id])
        node.op = OPS_BY_NUMBER[int(table.ops[description])]
        node.op_params = tuple(table.params[description].tolist())
        node.src = padded_sources(sources)
        self._known[j] = node
        return node

    def is_known(self, j: int, node: Tensor) -> bool:
        """Return whether ``node`` is number ``j``."""
        return self._known.get(j) is node

    def _tensor(self, row: int, j: int, slot: int) -> Tensor | None:
        table = self._walk.table
        if row == table.none:
            return None
        number = self._numbers.get(row)
        if number is not None:
            self.same.append((j, slot, number))
            return self._made[row]
        number = self._numbers[row] = len(self.rows)
        if number == _MOST_ROWS:
            raise NoPatternError("nodes with too many tensors")
        self.rows.append(row)
        self.coordinates.append((j, slot))
        # What a source itself is computed by is none of a kind.
        type_, ne, nb = shape_of(table.shapes[table.described[row]].tolist())
        t = Tensor(row, type_, ne, nb)  # type: ignore[arg-type]
        address = int(table.address[row])
        t.address = Placed.at(address + _SHIFT, number) if address else 0
        self._made[row] = t
        return t

    def pairs(self, count: int) -> Ints:
        """Return pairs (n, 2) of rows of which the first ``count`` nodes write at least one."""
        nodes = [self.node(j) for j in range(count)]
        written = {self._numbers[t.id] for n in nodes for t in OPS[n.op].written(n)}
        numbers = range(len(self.rows))
        found = [(a, b) for a in written for b in numbers if b > a or (b < a and b not in written)]
        return np.array(found, np.int64).reshape(-1, 2)


class _Tracer(CudaPlanner):
    """Takes down what the lowering of one node does.

    ``waiting``: the first node of the window is one that waits for that at hand or a later one,
    number ``partner`` of the window (-1: further on).
    """

    def __init__(
        self, memory: LaunchMemory, window: _SeenNodes, waiting: bool, partner: int
    ) -> None:
        super().__init__((), memory.multiprocessors, memory.capability)
        self._memory = memory
        self._window = window
        # The node at hand, and how many of those ahead have been looked at.
        self.hand = int(waiting)
        self.looked = 0
        self.pieces = 0
        self.events: list[_Event] = []
        self.templates: list[LaunchTemplate | ProductTemplate] = []
        self._request = -1
        self._filling_only = False
        self._partner = partner
        if waiting:
            # Its partner is looked at when somebody does.
            self._waiting = {_SOMEBODY: window.node(0)}

    def waiting_for(self, node: Tensor) -> Tensor | None:
        """As of CudaPlanner."""
        if self._window.is_known(self._partner, node):
            return self._window.node(0)
        return super().waiting_for(node)

    def ahead(self) -> Iterator[Tensor]:
        """As of CudaPlanner; notes how far it went."""
        for j in itertools.count(1):
            self.looked = max(self.looked, j)
            at = self.hand + j
            if at >= len(self._window.nodes):
                if not self._window.ends:
                    raise NoPatternError("a lowering looks far ahead")
                return
            node = self._window.node(at)
            if node not in self._absorbed:
                yield node

    def _piece(self) -> Placed:
        number = self.pieces
        if number == _MOST_PIECES:
            raise NoPatternError("a node with many pieces of scratch")
        self.pieces += 1
        return Placed.at((number + 1 << 46) + (_SHIFT << 1), _MOST_ROWS + number)

    def scratch(self, size: int) -> int:
        """As of ScratchPlanner."""
        self.events.append(_Local(size))
        return self._piece()

    def shared_scratch(
        self, key: Hashable, sources: Sequence[Tensor], size: int
    ) -> tuple[int, bool]:
        """As of ScratchPlanner; always fresh."""
        self._request = self.pieces
        self.events.append(_Shared(key, tuple(self._extent(s) for s in sources), size))
        return self._piece(), True

    def _extent(self, t: Tensor) -> tuple[int, int, int, int]:
        """The coordinates of a tensor's memory, bytes from there on, and its size."""
        if not isinstance(t.address, Placed) or t.address.origin >= _MOST_ROWS:
            raise NoPatternError("scratch made of what is not here, or of scratch")
        node, slot = self._window.coordinates[t.address.origin]
        return node, slot, t.address.offset, t.nbytes

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """As of CudaPlanner."""
        self._filling_only = True
        try:
            yield
        finally:
            self._filling_only = False

    def finish(self, node: Tensor) -> None:
        """As of CudaPlanner."""
        if not self.is_pending(node) and not node.empty:
            self.events.append(_Written(*self._extent(node)))

    def _add(
        self, kernel: CudaKernel, words: list[int], grid: Grid, threads: int, shared: int
    ) -> None:
        number = self._memory.remember(words)
        request = self._request if self._filling_only else -1
        self.templates.append(LaunchTemplate(number, kernel, grid, threads, shared, request))

    def product(self, product: Product) -> None:
        """As of CudaPlanner."""
        values = {name: getattr(product, name) for name in ("a", "b", "c", "factor")}
        fields = tuple(
            (name, value.origin, value.offset)
            for name, value in values.items()
            if isinstance(value, Placed)
        )
        if any(value >= _SHIFT >> 1 and type(value) is not Placed for value in values.values()):
            raise NoPatternError("an address that lost what it counts from")
        self.templates.append(ProductTemplate(product, fields))

    def waits_for(self) -> int:
        """Return the node of the window with which that at hand is to be done; -1: none."""
        node = self._window.node(self.hand)
        for partner, waiting in self._waiting.items():
            if waiting is node:
                return next(
                    j
                    for j in range(self.hand, self.hand + 1 + self.looked)
                    if self._window.node(j) is partner
                )
        return -1

    def done(self) -> tuple[int, ...]:
        """Return the nodes of the window that are absorbed."""
        count = min(self.hand + 1 + self.looked, len(self._window.nodes))
        return tuple(j for j in range(count) if self._window.node(j) in self._absorbed)


class LaunchMemory:
    """The patterns of one card's graphs that came up so far; one graph is planned at a time."""

    def __init__(self, multiprocessors: int, capability: int) -> None:
        self.multiprocessors = multiprocessors
        self.capability = capability
        self._lock = threading.Lock()
        self._kinds: KindMemory[CudaKind] = KindMemory()
        self._numbers = itertools.count()
        self._clear()

    def _clear(self) -> None:
        # By state and kinds: those that differ in how memory is related, the newest last.
        self.patterns: dict[Hashable, list[Pattern]] = {}
        # By state and the first kind: how many kinds the keys above have, most first.
        self.lengths: dict[Hashable, list[int]] = {}
        # Whole graphs by all of them but addresses, those used last at the end.
        self._graphs: dict[bytes, PlannedGraph] = {}
        self._count = self._made = 0
        # A word more than a record has: places that there are none of.
        self._words = np.zeros((64, RECORD_WORDS + 1), np.int64)
        self._places = np.zeros((3, 64, _MOST_PLACES), np.int64)

    def _make(self, signature: bytes) -> CudaKind:
        """Raise ContractError for nodes that don't keep their contract."""
        node = specimen(signature, _SPECIMENS)
        spec = check(node)
        return CudaKind(next(self._numbers), not (spec.is_view or node.empty))

    def kinds_of(self, keys: Iterable[bytes]) -> list[CudaKind]:
        """Return the kinds with these signatures. Raises NoPatternError if one is refused."""
        try:
            return [self._kinds.find(key, self._make) for key in keys]
        except ContractError as error:
            # Who plans node by node says what is wrong with which.
            raise NoPatternError(str(error)) from None

    def add(self, state: Hashable, kinds: tuple[int, ...], pattern: Pattern) -> None:
        """Keep a pattern of these kinds."""
        self._made += 1
        alike = self.patterns.setdefault((state, kinds), [])
        alike.append(pattern)
        del alike[:-_MOST_ALIKE]
        first = (state, kinds[0])
        known = self.lengths.get(first, ())
        self.lengths[first] = sorted({*known, len(kinds)}, reverse=True)

    def remember(self, words: Sequence[int]) -> int:
        """Keep a record whose addresses are Placed; its number."""
        number = self._count
        self._count += 1
        if number == len(self._words):
            self._words = np.concatenate([self._words, np.zeros_like(self._words)])
            self._places = np.concatenate([self._places, np.zeros_like(self._places)], axis=1)
        places = [
            (at, word.origin, word.offset)
            for at, word in enumerate(words)
            if isinstance(word, Placed)
        ]
        plain = [0 if isinstance(word, Placed) else word for word in words]
        if len(places) > _MOST_PLACES or max(plain) >= _SHIFT >> 1:
            raise NoPatternError("a record with too many addresses, or one that is no longer one")
        self._words[number, :RECORD_WORDS] = plain
        self._words[number, RECORD_WORDS:] = 0
        self._places[:, number] = 0
        self._places[0, number] = RECORD_WORDS
        if places:
            self._places[:, number, : len(places)] = np.array(places, np.int64).T
        return number

    def filled(self, numbers: Ints, groups: Ints, bases: Ints) -> Ints:
        """Return the words (n, RECORD_WORDS + 1) of records by number, with addresses.

        ``bases`` has by group what its records' addresses count from.
        """
        words = self._words[numbers]
        at, origin, offset = self._places[:, numbers]
        words[np.arange(len(numbers))[:, None], at] = bases[groups[:, None], origin] + offset
        return words

    def plan(
        self,
        graph: LinkedGraph,
        scratch: Callable[[int], int],
        stop: StopWord | None = None,
    ) -> PlannedLaunches:
        """Return a graph's launches.

        ``scratch`` gives the address of so many bytes. Raises NoPatternError for a graph that is to
        be planned node by node, GraphError.
        """
        with self._lock:
            if max(self._count, self._made) > _MOST_REMEMBERED:
                self._clear()
            walk = _Walk(self, graph, stop)
            known = self._graphs.pop(walk.key, None)
            if known is None or not walk.is_like(known):
                known = walk.plan()
            self._graphs[walk.key] = known
            self._forget_graphs()
            return walk.launches(known, scratch)

    def _forget_graphs(self) -> None:
        """Let go of those used longest ago, if there are too many."""
        groups = sum(len(known.rows) for known in self._graphs.values())
        while len(self._graphs) > _MOST_GRAPHS or groups > _MOST_GROUPS:
            groups -= len(self._graphs.pop(next(iter(self._graphs))).rows)


# Where the slots of a kind's specimen lie.
_SPECIMENS = [slot + 1 << 40 for slot in range(SLOTS)]


def _relation(a: Any, a_end: Any, b: Any, b_end: Any) -> Any:
    """Return how memory is related: 0 apart, 1 overlapping, 2 or 3 at one address."""
    return ((a < b_end) & (b < a_end)) + 2 * (a == b)


def _padded(values: Ints, by: int = 0) -> Ints:
    """Values of rows, for as many as there may be."""
    return np.concatenate([values, np.full(_MOST_ROWS - len(values), by, np.int64)])


@dataclass(slots=True)
class _Group:
    """A pattern at its place: the nodes' positions, its scratch by offset, and what is launched."""

    pattern: Pattern
    hand: int
    nodes: list[int]
    pieces: list[int] = field(default_factory=list)
    launches: list[LaunchTemplate | ProductTemplate] = field(default_factory=list)


class _Walk:
    """One graph on its way through the memory.

    ``rows`` (n, k) are the table's rows of the nodes that compute, and of their sources.
    """

    def __init__(self, memory: LaunchMemory, graph: LinkedGraph, stop: StopWord | None) -> None:
        self._memory = memory
        self._stop = stop
        table = self.table = graph.table
        slots = slot_rows(table, graph.order)
        try:
            keys, _, which = signatures(table, slots, _MOST_KINDS)
        except TooManyKindsError as error:
            raise GraphError(
                f"a graph of {error.count} kinds of nodes, no two of them alike; more than "
                f"{_MOST_KINDS} are not planned for"
            ) from None
        kinds = memory.kinds_of(keys)
        runs = np.array([kind.runs for kind in kinds], bool)[which]
        (active,) = np.nonzero(runs)
        self._slots = slots
        self._active = active.tolist()
        self._order = graph.order[active]
        numbers = np.array([kind.number for kind in kinds], np.int64)[which]
        self._kinds = numbers[active].tolist()
        self.rows = slots[active]
        made_of = (numbers.tobytes(), slots.tobytes(), table.none.to_bytes(8, "little"))
        # All of the graph but where its memory is.
        self.key = hashlib.blake2b(b"".join(made_of), digest_size=32).digest()
        sizes = [nbytes(*shape_of(words)) for words in table.shapes[:-1].tolist()]  # type: ignore[arg-type]
        self._ends = table.address + np.array([*sizes, 0], np.int64)[table.described]
        self._groups: list[_Group] = []
        # What all of them look at, as of _rows_of.
        none = np.zeros((0, _MOST_ROWS), np.int64)
        self._seen = none, none, none
        self._peak = 0

    def is_like(self, known: PlannedGraph) -> bool:
        """Return whether a graph with the same key also has its memory in the same order."""
        low, order = self.memory_order(known.extents)
        return np.array_equal(low, known.low) and np.array_equal(order, known.order)

    def memory_order(self, extents: Ints) -> tuple[Ints, Ints]:
        """Return the low bits of the rows' addresses, and ranks of where memory begins and ends.

        Of all rows, and of ``extents`` (n, 3): rows, offsets and bytes. 0 has a rank as well.
        """
        address = self.table.address
        begins = address[extents[:, 0]] + extents[:, 1]
        places = (np.zeros(1, np.int64), address, self._ends, begins, begins + extents[:, 2])
        return address & _LOW_BITS, np.unique(np.concatenate(places), return_inverse=True)[1]

    def plan(self) -> PlannedGraph:
        """Find out what is launched. Raises NoPatternError, GraphError."""
        self._addresses = self.table.address[self.rows].tolist()
        # Where each source is read last, by its address.
        read = self.table.address[self._slots[:, 1:]]
        at = np.broadcast_to(np.arange(len(read))[:, None], read.shape)
        self._last_use = dict(zip(read.ravel().tolist(), at.ravel().tolist(), strict=True))
        self._go(verify=False)
        if not self._fits():
            self._go(verify=True)
            self._fits()
        return self._planned()

    # -- which pattern is where ----------------------------------------------------------------

    def _go(self, *, verify: bool) -> None:
        """Find or make the pattern of each node; ``verify``: look at each whether it fits."""
        self._groups = []
        count = len(self._kinds)
        self._done = bytearray(count)
        scratch = _Scratch(self._last_use)
        # The node that waits, and that with which it is to be done.
        waits: tuple[int, int] | None = None
        for hand in range(count):
            if self._done[hand]:
                continue
            if self._stop is not None and self._stop[0]:
                raise GraphError("was stopped")
            group = self._group(hand, waits, verify)
            pattern = group.pattern
            try:
                self._place(group, scratch, self._active[hand])
            except MemoryError as error:
                raise NoPatternError(str(error)) from None
            for j in pattern.absorbed:
                self._done[group.nodes[j]] = 1
            if waits is not None and self._done[waits[0]]:
                waits = None
            if pattern.waits >= 0:
                if waits is not None:
                    raise NoPatternError("two nodes wait at a time")
                waits = hand, group.nodes[pattern.waits]
            self._groups.append(group)
        self._peak = scratch.scratch_peak

    def _ahead(self, hand: int, most: int) -> list[int]:
        """The node at hand, and those behind it that are not done: ``most`` at most."""
        done, count = self._done, len(self._kinds)
        end = min(hand + most, count)
        if done.find(1, hand + 1, end) < 0:
            return list(range(hand, end))
        nodes = [hand]
        at = hand + 1
        while len(nodes) < most and at < count:
            if not done[at]:
                nodes.append(at)
            at += 1
        return nodes

    def _group(self, hand: int, waits: tuple[int, int] | None, verify: bool) -> _Group:
        memory, kinds = self._memory, self._kinds
        state: tuple[int, int] | None = None
        before: list[int] = []
        if waits is not None:
            waiting, partner = waits
            # How far away its partner is, so that what is looked at tells which it is.
            away = self._done.count(0, hand, partner)
            state = kinds[waiting], away if away < _MOST_NODES else _END
            before = [waiting]
        lengths = memory.lengths.get((state, kinds[hand]))
        if lengths is not None:
            most = lengths[0]
            ahead = self._ahead(hand, most)
            seen = [kinds[at] for at in ahead]
            if len(ahead) < most:
                seen.append(_END)
            for length in lengths:
                known = memory.patterns.get((state, tuple(seen[:length])), ())
                for pattern in reversed(known):
                    nodes = before + ahead
                    group = _Group(pattern, hand, nodes[: pattern.nodes])
                    if not verify or self._fit([group], *self._rows_of([group])):
                        return group
        ahead = self._ahead(hand, _MOST_NODES)
        nodes = before + ahead
        pattern, length = self._make(nodes, state, len(ahead) < _MOST_NODES)
        seen = [kinds[at] for at in ahead]
        if length > len(seen):
            seen.append(_END)
        memory.add(state, tuple(seen[:length]), pattern)
        return _Group(pattern, hand, nodes[: pattern.nodes])

    def _make(
        self, nodes: list[int], state: tuple[int, int] | None, ends: bool
    ) -> tuple[Pattern, int]:
        """Run the lowering of the node at hand; the pattern, and how many kinds it has seen."""
        window = _SeenNodes(self, nodes, ends)
        partner = _END if state is None or state[1] == _END else 1 + state[1]
        tracer = _Tracer(self._memory, window, state is not None, partner)
        node = window.node(tracer.hand)
        tracer.begin(node)
        try:
            if not lower_to_launches(node, tracer):
                raise NoPatternError(f"no kernel for {node.label}")
        except MemoryError as error:
            raise NoPatternError(str(error)) from None
        for written in OPS[node.op].written(node):
            tracer.finish(written)
        waits, absorbed = tracer.waits_for(), tracer.done()
        seen = min(tracer.hand + 1 + tracer.looked, len(nodes))
        pairs = window.pairs(seen)
        address, ends_at = self.table.address[window.rows], self._ends[window.rows]
        one, other = pairs.T
        same = np.array(window.same, np.int64).reshape(-1, 3)
        coordinates = np.array(window.coordinates, np.int64)
        pattern = Pattern(
            nodes=seen,
            row_node=_padded(coordinates[:, 0]),
            row_slot=_padded(coordinates[:, 1]),
            low=_padded(address & _LOW_BITS, -1),
            same_node=same[:, 0],
            same_slot=same[:, 1],
            same_row=same[:, 2],
            one=one,
            other=other,
            relation=_relation(address[one], ends_at[one], address[other], ends_at[other]),
            coordinates=window.coordinates,
            launches=tracer.templates,
            events=tracer.events,
            absorbed=absorbed,
            waits=waits,
        )
        return pattern, 1 + tracer.looked

    def _place(self, group: _Group, scratch: _Scratch, number: int) -> None:
        """Place a group's scratch; what it launches depends on what is there already."""
        pattern, nodes, addresses = group.pattern, group.nodes, self._addresses
        if not pattern.events:
            group.launches = pattern.launches
            return
        scratch.at(number)
        pieces, fresh = group.pieces, list[bool]()
        for event in pattern.events:
            if isinstance(event, _Written):
                scratch.write(addresses[nodes[event.node]][event.slot] + event.offset, event.size)
            elif isinstance(event, _Local):
                pieces.append(scratch.scratch(event.size))
                fresh.append(True)
            else:
                sources = [
                    _Extent(addresses[nodes[j]][slot] + offset, size)
                    for j, slot, offset, size in event.sources
                ]
                place, new = scratch.shared_scratch(event.key, sources, event.size)  # type: ignore[arg-type]
                pieces.append(place)
                fresh.append(new)
        group.launches = pattern.launches
        if not all(fresh):
            group.launches = [t for t in group.launches if t.request < 0 or fresh[t.request]]

    # -- whether patterns fit ------------------------------------------------------------------

    def _rows_of(self, groups: Sequence[_Group]) -> tuple[Ints, Ints, Ints]:
        """Return by group the table's rows by their numbers, nodes' positions, and low bits."""
        nodes = np.array([(*g.nodes, *_NO_NODES[len(g.nodes) :]) for g in groups], np.int64)
        numbers: dict[int, int] = {}
        patterns: list[Pattern] = []
        which = list[int]()
        for group in groups:
            number = numbers.get(id(group.pattern))
            if number is None:
                number = numbers[id(group.pattern)] = len(patterns)
                patterns.append(group.pattern)
            which.append(number)
        row_node, row_slot, low = (
            np.array([getattr(p, name) for p in patterns])[which]
            for name in ("row_node", "row_slot", "low")
        )
        at = nodes[np.arange(len(groups))[:, None], row_node]
        return self.rows[at, row_slot], nodes, low

    def _fits(self) -> bool:
        """Return whether all patterns fit where they are."""
        if not self._groups:
            return True
        self._seen = self._rows_of(self._groups)
        return self._fit(self._groups, *self._seen)

    def _fit(self, groups: Sequence[_Group], rows: Ints, nodes: Ints, low: Ints) -> bool:
        """Return whether patterns fit; what is given is as of _rows_of."""
        patterns = [g.pattern for g in groups]
        address, ends = self.table.address[rows], self._ends[rows]
        if ((address & _LOW_BITS != low) & (low >= 0)).any():
            return False
        numbers = np.arange(len(groups))
        of = np.repeat(numbers, [len(p.same_node) for p in patterns])
        node = np.concatenate([p.same_node for p in patterns])
        slot = np.concatenate([p.same_slot for p in patterns])
        row = np.concatenate([p.same_row for p in patterns])
        if (self.rows[nodes[of, node], slot] != rows[of, row]).any():
            return False
        # Places in the flattened arrays.
        of = np.repeat(numbers * _MOST_ROWS, [len(p.one) for p in patterns])
        one = np.concatenate([p.one for p in patterns]) + of
        other = np.concatenate([p.other for p in patterns]) + of
        address, ends = address.ravel(), ends.ravel()
        found = _relation(address[one], ends[one], address[other], ends[other])
        return bool((found == np.concatenate([p.relation for p in patterns])).all())

    # -- what comes of it ----------------------------------------------------------------------

    def _planned(self) -> PlannedGraph:
        """Return what was found, for this graph and those like it."""
        groups = self._groups
        pieces = np.zeros((len(groups), _MOST_PIECES), np.int64)
        launches: list[LaunchTemplate | ProductTemplate] = []
        owners, product_owners, records = list[int](), list[int](), list[int]()
        extents: list[tuple[int, int, int]] = []
        for i, group in enumerate(groups):
            pieces[i, : len(group.pieces)] = group.pieces
            launches += group.launches
            for template in group.launches:
                if isinstance(template, ProductTemplate):
                    product_owners.append(i)
                else:
                    owners.append(i)
                    records.append(template.record)
            extents += self._extents(group)
        memory = np.array(extents, np.int64).reshape(-1, 3)
        return PlannedGraph(
            self._seen[0], pieces, self._peak, np.array([g.hand for g in groups], np.int64),
            launches, np.array(owners, np.int64), product_owners, np.array(records, np.int64),
            memory, *self.memory_order(memory),
        )  # fmt: skip

    def _extents(self, group: _Group) -> Iterator[tuple[int, int, int]]:
        """Memory that a group's scratch depends on: rows, offsets and bytes."""
        for event in group.pattern.events:
            if isinstance(event, _Written):
                written = self.rows[group.nodes[event.node], event.slot]
                yield int(written), event.offset, event.size
            elif isinstance(event, _Shared):
                for node, slot, offset, size in event.sources:
                    yield int(self.rows[group.nodes[node], slot]), offset, size

    def launches(self, planned: PlannedGraph, scratch: Callable[[int], int]) -> PlannedLaunches:
        """Return what is launched, all addresses filled in."""
        base = scratch(planned.peak)
        bases = np.empty((len(planned.rows), _MOST_ROWS + _MOST_PIECES), np.int64)
        bases[:, :_MOST_ROWS] = self.table.address[planned.rows]
        bases[:, _MOST_ROWS:] = planned.pieces + base
        words = self._memory.filled(planned.records, planned.owners, bases)
        labels = NodeLabels(self.table, self._order[planned.hands[planned.owners]])
        records = enumerate(words[:, :RECORD_WORDS])
        products = iter(planned.product_owners)
        launches: list[Launch | Product] = []
        for x in planned.launches:
            if isinstance(x, ProductTemplate):
                launches.append(x.placed(bases[next(products)]))
                continue
            number, record = next(records)
            node = _NodeOf(labels, number)
            launches.append(Launch(x.kernel, record, x.grid, x.threads, x.shared, node))
        return PlannedLaunches(launches, words, labels)
