"""What the CPU does for a kind of nodes: records without addresses, and where addresses belong.

A lowering is run on a specimen of the kind whose tensors and scratch lie at made-up addresses, and
once more at others. Words that differ are addresses, and by how much they differ says whose. So a
lowering may put addresses wherever it likes, with any offset, and never learns what they will be.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import Kernel
from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cpu.kernels.interface.planning import MOST_SOURCES
from rpc_server.devices.cpu.planner import Emitted, PlanItem, Planner
from rpc_server.devices.planning.kinds import SLOTS, specimen
from rpc_server.devices.planning.scratch import Arena
from rpc_server.graph.table import Ints
from rpc_server.ops.table import OpSpec, check, require

_NOT_IMPLEMENTED = "this combination is not implemented"

# Whatever an address may be counted from: slots of the node, scratch of threads, pieces of scratch,
# and nothing, for addresses that are what they are.
THREADS = SLOTS
PIECES = SLOTS + 1
MOST_PIECES = 6
NOTHING = PIECES + MOST_PIECES
BASES = NOTHING + 1

# Made-up addresses, and how far away the others are. No sum or difference of two such distances is
# one of them.
_FIRST = (np.arange(1, BASES, dtype=np.int64)) << 44
_APART = 4096 * np.array([3**i for i in range(BASES - 1)], np.int64)
_SECOND = _FIRST + _APART


@dataclass(frozen=True, slots=True)
class ScratchPiece:
    """Scratch of a node: ``offset`` bytes into its own, or what the request of that number has."""

    size: int
    offset: int = 0
    request: int = -1


@dataclass(frozen=True, slots=True)
class ScratchRequest:
    """Scratch that nodes share which ask for the same, and which is made of the same memory.

    ``sources`` are rows of (base, offset, bytes).
    """

    key: Hashable
    size: int
    sources: Ints


def _none(*shape: int) -> Ints:
    return np.zeros(shape, np.int64)


@dataclass(slots=True)
class CpuKind:
    """A kind of nodes, or one item of a plan: its records, a row each, and their addresses.

    ``places`` (n, 4): record, word, base, offset. ``spans`` (n, 5): record, base, offset, bytes,
    whether it is written. ``filling`` is the request that a record fills, which is only run where
    that isn't there yet; -1 for all others. ``written`` (n, 3): base, offset, bytes.
    """

    user: Op | PlanItem
    # Runs as the array reference of its op.
    by_reference: bool = False
    kernels: list[Kernel] = field(default_factory=list)
    words: Ints = field(default_factory=lambda: _none(0, RECORD_WORDS))
    places: Ints = field(default_factory=lambda: _none(0, 4))
    spans: Ints = field(default_factory=lambda: _none(0, 5))
    work: Ints = field(default_factory=lambda: _none(0))
    private: Ints = field(default_factory=lambda: _none(0))
    parts: Ints = field(default_factory=lambda: _none(0))
    filling: Ints = field(default_factory=lambda: _none(0))
    written: Ints = field(default_factory=lambda: _none(0, 3))
    pieces: list[ScratchPiece] = field(default_factory=list)
    requests: list[ScratchRequest] = field(default_factory=list)
    # Bytes of scratch of its own, of all threads, and of the arrays of a reference.
    local: int = 0
    threads: int = 0
    copies: int = 0

    @property
    def op(self) -> Op | None:
        """The op of the nodes; None for an item."""
        return self.user if isinstance(self.user, Op) else None

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        arrays = (self.words, self.places, self.spans, self.written)
        return sum(a.nbytes for a in arrays) + 2048

    def without_kernel(self) -> CpuKind:
        """Return the same nodes, run by the reference of their op."""
        return CpuKind(self.user, by_reference=True, written=self.written, copies=self.copies)


@dataclass(frozen=True, slots=True)
class _NoArena:
    """Says how large arenas are, and has no memory."""

    size: int

    def address(self, offset: int, size: int) -> int:
        """Nobody looks at it."""
        return 0


class _Recorder(Planner):
    """Takes down what one node asks for; scratch lies at made-up addresses."""

    def __init__(self, n_threads: int, arena: Arena, bases: Ints, pause_address: int) -> None:
        super().__init__(n_threads, arena, pause_address=pause_address)
        self._bases = bases
        self.pieces: list[ScratchPiece] = []
        self.keys: list[Hashable] = []
        self.sources: list[list[tuple[int, int]]] = []
        self.filling: list[int] = []
        self.finished: list[Tensor] = []
        self._fills = -1
        self.local = 0

    def _piece(self, piece: ScratchPiece) -> int:
        if len(self.pieces) == MOST_PIECES:
            raise RuntimeError(f"a node with more than {MOST_PIECES} pieces of scratch")
        self.pieces.append(piece)
        return int(self._bases[PIECES + len(self.pieces) - 1])

    def scratch(self, size: int) -> int:
        """As of Planner."""
        aligned = -(-size // 64) * 64
        address = self._piece(ScratchPiece(aligned, offset=self.local))
        self.local += aligned
        self._local = [*self._local, (address, address + aligned)]
        return address

    def thread_scratch(self, size: int) -> tuple[int, int]:
        """As of Planner."""
        _, stride = super().thread_scratch(size)
        return int(self._bases[THREADS]), stride

    def shared_scratch(
        self, key: Hashable, sources: Sequence[Tensor], size: int
    ) -> tuple[int, bool]:
        """As of Planner; always fresh."""
        if self.local or self._fills >= 0 or len(sources) > MOST_SOURCES:
            raise RuntimeError("shared scratch asked for out of turn, or made of too much")
        aligned = -(-size // 64) * 64
        self._fills = len(self.keys)
        address = self._piece(ScratchPiece(aligned, request=self._fills))
        self.keys.append(key)
        self.sources.append([(s.address, s.address + s.nbytes) for s in sources])
        self._filling = [(address, address + aligned)]
        return address, True

    def _add(self, record: Emitted) -> None:
        super()._add(record)
        self.filling.append(self._fills)
        self._fills = -1

    def finish(self, node: Tensor) -> None:
        """As of Planner."""
        self.finished.append(node)


class KindMaker:
    """Decides about kinds for plans whose records run on ``n_threads`` threads.

    ``scratch`` is the size of an arena in bytes. ``lower`` emits a node's records, False where
    there is no kernel for it. ``pause_address`` is as of Planner.
    """

    def __init__(
        self,
        n_threads: int,
        scratch: int,
        lower: Callable[[Tensor, Planner], bool],
        pause_address: int = 0,
    ) -> None:
        self._n_threads = n_threads
        self._arena = _NoArena(scratch)
        self._lower = lower
        self._pause_address = pause_address

    def __call__(self, signature: bytes) -> CpuKind:
        """Raises ContractError, MemoryError; RuntimeError for a lowering that breaks the rules."""
        nodes = [specimen(signature, bases.tolist()) for bases in (_FIRST, _SECOND)]
        return self._decided(*nodes)

    def decide(self, node: Tensor) -> None:
        """Raise what there is to say against a node itself, as of calling the maker."""
        self._decided(node, node)

    def _decided(self, node: Tensor, other: Tensor) -> CpuKind:
        spec = check(node)
        if spec.is_view or node.empty:
            return CpuKind(node.op)
        written = _spans_of(_written(spec, node), _written(spec, other))
        recorders = [self._recorder(bases) for bases in (_FIRST, _SECOND)]
        recorders[0].begin(node)
        if not self._lower(node, recorders[0]):
            require(spec.reference is not None, f"{node.label}: {_NOT_IMPLEMENTED}")
            return CpuKind(node.op, by_reference=True, written=written, copies=_copies(node))
        recorders[1].begin(other)
        if not self._lower(other, recorders[1]):
            raise RuntimeError(f"lowering of {node.op} looks at addresses")
        kind = _kind(node.op, recorders)
        kind.written = written
        kind.copies = _copies(node)
        return kind

    def item(self, item: PlanItem) -> CpuKind:
        """Return what is done for one item, whose addresses are what they are."""
        recorder = self._recorder(_FIRST)
        recorder.begin(item)
        item.emit(recorder)
        if recorder.pieces:
            raise RuntimeError(f"{item.label} asks for scratch")
        kind = _kind(item, [recorder, recorder])
        finished = [(t.address, t.address + t.nbytes) for t in recorder.finished if not t.empty]
        kind.written = _spans_of(finished, finished)
        return kind

    def _recorder(self, bases: Ints) -> _Recorder:
        return _Recorder(self._n_threads, self._arena, bases, self._pause_address)


def _copies(node: Tensor) -> int:
    """Bytes that a reference takes for its arrays of F32."""
    return 4 * sum(t.nelements for t in (node, *node.src) if t is not None)


def _written(spec: OpSpec, node: Tensor) -> list[tuple[int, int]]:
    return [(t.address, t.address + t.nbytes) for t in spec.written(node) if not t.empty]


def _counted_from(first: Ints, second: Ints) -> tuple[Ints, Ints]:
    """Bases and offsets of addresses in both runs. Raises RuntimeError for what is none."""
    apart = second - first
    base = np.minimum(np.searchsorted(_APART, apart), NOTHING - 1)
    none = apart == 0
    if not (none | (_APART[base] == apart)).all():
        raise RuntimeError("a lowering computes with addresses")
    return np.where(none, NOTHING, base), np.where(none, first, first - _FIRST[base])


def _spans_of(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> Ints:
    """(n, 3): base, offset and bytes of spans, given in both runs."""
    a, b = (np.array(spans, np.int64).reshape(-1, 2) for spans in (first, second))
    base, offset = _counted_from(a[:, 0], b[:, 0])
    if not np.array_equal(a[:, 1] - a[:, 0], b[:, 1] - b[:, 0]):
        raise RuntimeError("a lowering computes with addresses")
    return np.column_stack((base, offset, a[:, 1] - a[:, 0]))


def _kind(user: Op | PlanItem, recorders: Sequence[_Recorder]) -> CpuKind:
    """Compare what two runs took down."""
    one, other = recorders
    first, second = one.records, other.records
    if (
        [r.kernel for r in first] != [r.kernel for r in second]
        or one.keys != other.keys
        or one.pieces != other.pieces
        or one.filling != other.filling
    ):
        raise RuntimeError(f"lowering of {user} looks at addresses")
    words, others = (
        np.array([r.words for r in records], np.int64).reshape(-1, RECORD_WORDS)
        for records in (first, second)
    )
    record, word = np.nonzero(words != others)
    base, offset = _counted_from(words[record, word], others[record, word])
    words[record, word] = 0
    spans, numbers, writes = [], list[int](), list[int]()
    for records in (first, second):
        listed = [(span, i, w) for i, r in enumerate(records) for span, w in _touched(r)]
        spans.append([span for span, _, _ in listed])
        numbers, writes = [i for _, i, _ in listed], [w for _, _, w in listed]
    requests = [
        ScratchRequest(key, piece.size, _spans_of(a, b))
        for key, piece, a, b in zip(
            one.keys,
            (p for p in one.pieces if p.request >= 0),
            one.sources,
            other.sources,
            strict=True,
        )
    ]
    touched = _spans_of(*spans)
    return CpuKind(
        user,
        kernels=[r.kernel for r in first],
        words=words,
        places=np.column_stack((record, word, base, offset)),
        spans=np.column_stack((np.array(numbers, np.int64), touched, np.array(writes, np.int64))),
        work=np.array([r.work for r in first], np.int64),
        private=np.array([r.private for r in first], np.int64),
        parts=np.array([r.parts for r in first], np.int64),
        filling=np.array(one.filling, np.int64),
        pieces=one.pieces,
        requests=requests,
        local=one.local,
        threads=one.thread_bytes,
    )


def _touched(record: Emitted) -> list[tuple[tuple[int, int], int]]:
    return [*((span, 0) for span in record.reads), *((span, 1) for span in record.writes)]
