"""What the CPU does for a kind of nodes: records without addresses, and where addresses belong.

A lowering is run on a specimen of the kind whose tensors and scratch lie at made-up addresses.
These are numbers of a type of their own (:class:`MadeUp`), to which bytes can be added and nothing
else be done. So a lowering may put addresses wherever it likes, with any offset, and never learns
what they will be.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import Kernel
from rpc_server.devices.cpu.kernels.interface.abi import (
    EXTRA_WORD,
    PARAM_WORD,
    RECORD_WORDS,
    SLOT_WORDS,
)
from rpc_server.devices.cpu.kernels.interface.planning import (
    MOST_PIECES,
    MOST_SOURCES,
    NOTHING,
    PIECE_WORDS,
    PIECES,
    PLACE_WORDS,
    REQUEST_WORDS,
    SPAN_WORDS,
    THREADS,
    WRITTEN_WORDS,
    KindWord,
    RecordField,
)
from rpc_server.devices.cpu.kernels.interface.schedule import Span
from rpc_server.devices.cpu.planner import Emitted, PlanItem, Planner
from rpc_server.devices.planning.kinds import specimen
from rpc_server.devices.planning.scratch import Arena
from rpc_server.devices.planning.shapes import touched_elements
from rpc_server.ops.table import check, require

_NOT_IMPLEMENTED = "this combination is not implemented"

# Bytes between made-up addresses: more than any offset.
_APART_BITS = 57


class MadeUp(int):
    """A made-up address: some bytes from a base on, which is no place yet.

    Bytes can be added to it. What else might be done with an address raises RuntimeError: other
    nodes of the kind have others.
    """

    __slots__ = ()

    @classmethod
    def of(cls, base: int) -> MadeUp:
        """Return the address that is a base."""
        return cls((base + 1) << _APART_BITS)

    def counted(self) -> tuple[int, int]:
        """Return its base, and the bytes from there on."""
        base = (int.__add__(self, 1 << (_APART_BITS - 1)) >> _APART_BITS) - 1
        return base, int.__sub__(self, (base + 1) << _APART_BITS)

    def __add__(self, offset: int) -> MadeUp:
        if isinstance(offset, MadeUp):
            _refuse()
        return MadeUp(int.__add__(self, offset))

    __radd__ = __add__

    def __sub__(self, offset: int) -> MadeUp:
        if isinstance(offset, MadeUp):
            _refuse()
        return MadeUp(int.__sub__(self, offset))


def _refuse(*_: object) -> Any:
    raise RuntimeError("a lowering computes with addresses")


# Whether two are the same is told by a signature, and whether one is 0.
for _operation in (
    *("rsub", "mul", "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv", "mod", "rmod"),
    *("divmod", "rdivmod", "pow", "rpow", "lshift", "rlshift", "rshift", "rrshift"),
    *("and", "rand", "or", "ror", "xor", "rxor", "neg", "abs", "invert", "lt", "le", "gt", "ge"),
    *("int", "index", "float", "trunc", "round"),
):
    setattr(MadeUp, f"__{_operation}__", _refuse)

_MADE_UP = [MadeUp.of(base) for base in range(NOTHING)]

# Words of a record that may be addresses: those of slots, and a kernel's own.
_ADDRESSES = (*range(0, PARAM_WORD, SLOT_WORDS), *range(EXTRA_WORD, RECORD_WORDS))


@dataclass(frozen=True, slots=True)
class ScratchPiece:
    """Scratch of a node: ``offset`` bytes into its own, or what the request of that number has."""

    size: int
    offset: int = 0
    request: int = -1


def _table(
    words: Iterable[int] = (),
    fields: Sequence[int] = (0,) * len(RecordField),
    places: Sequence[int] = (),
    spans: Sequence[int] = (),
    written: Sequence[int] = (),
    requests: Sequence[int] = (),
    pieces: Sequence[int] = (),
    local: int = 0,
) -> array[int]:
    """Return the table of a kind; rows are given one after the other."""
    made = [0] * len(KindWord)
    made[KindWord.LOCAL] = local
    made[KindWord.RECORDS] = len(fields) // len(RecordField) - 1
    made[KindWord.WRITTEN] = len(written) // WRITTEN_WORDS
    made[KindWord.REQUESTS] = len(requests) // REQUEST_WORDS
    made[KindWord.PIECES] = len(pieces) // PIECE_WORDS
    for word, rows in (
        (KindWord.WORDS_AT, words),
        (KindWord.FIELDS_AT, fields),
        (KindWord.PLACES_AT, places),
        (KindWord.SPANS_AT, spans),
        (KindWord.WRITTEN_AT, written),
        (KindWord.REQUESTS_AT, requests),
        (KindWord.PIECES_AT, pieces),
    ):
        made[word] = len(made)
        made += rows
    return array("q", made)


@dataclass(slots=True)
class CpuKind:
    """A kind of nodes, or one item of a plan: its records, without addresses, and where these go.

    ``table`` has them in words for the loops of planning, see ``KindWord``. ``keys`` are what its
    requests for shared scratch ask for.
    """

    user: Op | PlanItem
    # Runs as the array reference of its op.
    by_reference: bool = False
    kernels: list[Kernel] = field(default_factory=list)
    # Where their code is, once that has been asked for: it stays there.
    code: list[int] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)
    table: array[int] = field(default_factory=_table)
    # Bytes of scratch of all threads, and of the arrays of a reference.
    threads: int = 0
    copies: int = 0
    # Where its table lies, and how many spans its records have.
    address: int = field(init=False)
    n_spans: int = field(init=False)

    def __post_init__(self) -> None:
        self.address, _ = self.table.buffer_info()
        begin, end = self.table[KindWord.SPANS_AT], self.table[KindWord.WRITTEN_AT]
        self.n_spans = (end - begin) // SPAN_WORDS

    @property
    def op(self) -> Op | None:
        """The op of the nodes; None for an item."""
        return self.user if isinstance(self.user, Op) else None

    @property
    def has_scratch(self) -> bool:
        """True if nodes need any scratch but that of threads."""
        return bool(self.keys) or self.table[KindWord.PIECES] > 0

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return 8 * len(self.table) + 2048

    def scratch_alone(self) -> tuple[list[tuple[int, int]], int]:
        """Return where pieces of scratch lie if a node has all of it, and how many bytes it takes.

        Pieces are numbers, and bytes from the beginning on; requests lie behind the node's own.
        """
        table, end = self.table, self.table[KindWord.LOCAL]
        pieces: list[tuple[int, int]] = []
        for row in self._rows(KindWord.PIECES, KindWord.PIECES_AT, PIECE_WORDS):
            pieces.append((table[row], table[row + 1]))
        for row in self._rows(KindWord.REQUESTS, KindWord.REQUESTS_AT, REQUEST_WORDS):
            pieces.append((table[row + 1], end))
            end += table[row]
        return pieces, end

    def _rows(self, count: KindWord, begin: KindWord, words: int) -> range:
        """Return where rows of the table begin."""
        return range(self.table[begin], self.table[begin] + self.table[count] * words, words)

    def by(self, stand_ins: Mapping[Kernel, Kernel]) -> CpuKind:
        """Return the same nodes, some of their kernels with others in their place."""
        return replace(self, kernels=[stand_ins.get(k, k) for k in self.kernels], code=[])

    def without_kernel(self) -> CpuKind:
        """Return the same nodes, run by the reference of their op."""
        begin, end = self.table[KindWord.WRITTEN_AT], self.table[KindWord.REQUESTS_AT]
        table = _table(written=self.table[begin:end])
        return CpuKind(self.user, by_reference=True, table=table, copies=self.copies)


@dataclass(frozen=True, slots=True)
class _NoArena:
    """Says how large arenas are, and has no memory."""

    size: int

    def address(self, offset: int, size: int) -> int:
        """Nobody looks at it."""
        return 0


class _Recorder(Planner):
    """Takes down what one node asks for; scratch lies at made-up addresses."""

    def __init__(self, n_threads: int, arena: Arena, pause_address: int) -> None:
        super().__init__(n_threads, arena, pause_address=pause_address)
        self.pieces: list[ScratchPiece] = []
        self.keys: list[Hashable] = []
        self.sources: list[list[Span]] = []
        self.filling: list[int] = []
        self.finished: list[Tensor] = []
        self._fills = -1
        self.local = 0

    def _piece(self, piece: ScratchPiece) -> int:
        if len(self.pieces) == MOST_PIECES:
            raise RuntimeError(f"a node with more than {MOST_PIECES} pieces of scratch")
        needed = piece.offset + piece.size
        if needed > self._arena.size:
            # Less is seen when scratch is placed; sums of this might wrap there.
            raise MemoryError(f"graph needs {needed} bytes of scratch, limit {self._limit}")
        self.pieces.append(piece)
        return _MADE_UP[PIECES + len(self.pieces) - 1]

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
        return _MADE_UP[THREADS], stride

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
        return self._decided(specimen(signature, _MADE_UP))

    def decide(self, node: Tensor) -> None:
        """Raise what there is to say against a node itself, as of calling the maker."""
        self._decided(node)

    def _decided(self, node: Tensor) -> CpuKind:
        spec = check(node)
        if spec.is_view or node.empty:
            return CpuKind(node.op)
        written = _rows_of(spec.written(node))
        recorder = self._recorder()
        recorder.begin(node)
        if not self._lower(node, recorder):
            require(spec.reference is not None, f"{node.label}: {_NOT_IMPLEMENTED}")
            return CpuKind(
                node.op, by_reference=True, table=_table(written=written), copies=_copies(node)
            )
        return _kind(node.op, recorder, written, _copies(node))

    def item(self, item: PlanItem) -> CpuKind:
        """Return what is done for one item, whose addresses are what they are."""
        recorder = self._recorder()
        recorder.begin(item)
        item.emit(recorder)
        if recorder.pieces:
            raise RuntimeError(f"{item.label} asks for scratch")
        return _kind(item, recorder, _rows_of(recorder.finished))

    def _recorder(self) -> _Recorder:
        return _Recorder(self._n_threads, self._arena, self._pause_address)


def _copies(node: Tensor) -> int:
    """Bytes that a reference takes for its arrays of F32."""
    return 4 * touched_elements(node)


def _counted_from(address: int) -> tuple[int, int]:
    """Return base and offset of an address."""
    return address.counted() if isinstance(address, MadeUp) else (NOTHING, address)


def _rows_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return rows of base, offset and bytes of tensors that have any."""
    return [w for t in tensors if not t.empty for w in (*_counted_from(t.address), t.nbytes)]


def _span(span: Span) -> tuple[int, int, int]:
    """Return base, offset and bytes."""
    start, end = span
    return *_counted_from(start), int.__sub__(end, start)


def _kind(
    user: Op | PlanItem, recorder: _Recorder, written: Sequence[int], copies: int = 0
) -> CpuKind:
    """Put together what was taken down."""
    words, fields, places, spans = list[int](), list[int](), list[int](), list[int]()
    for record, filling in zip(recorder.records, recorder.filling, strict=True):
        fields += (record.work, record.private, record.parts, filling)
        fields += (len(places) // PLACE_WORDS, len(spans) // SPAN_WORDS)
        begin = len(words)
        words += record.words
        for word in _ADDRESSES:
            value = record.words[word]
            if type(value) is MadeUp:
                places += (word, *value.counted())
                words[begin + word] = 0
        for writes, listed in enumerate((record.reads, record.writes)):
            for span in listed:
                spans += (*_span(span), writes)
    fields += (0, 0, 0, -1, len(places) // PLACE_WORDS, len(spans) // SPAN_WORDS)
    if isinstance(user, Op) and max((*words, *spans), default=0) >> (_APART_BITS - 1):
        # No place has such an address: it lost its type, or stands where no kernel looks for one.
        _refuse()
    requests, pieces = list[int](), list[int]()
    for number, piece in enumerate(recorder.pieces):
        if piece.request < 0:
            pieces += (number, piece.offset)
            continue
        sources = [w for span in recorder.sources[piece.request] for w in _span(span)]
        sources += (NOTHING, 0, 0) * (MOST_SOURCES - len(sources) // 3)
        requests += (piece.size, number, *sources)
    return CpuKind(
        user,
        kernels=[r.kernel for r in recorder.records],
        keys=recorder.keys,
        table=_table(words, fields, places, spans, written, requests, pieces, recorder.local),
        threads=recorder.thread_bytes,
        copies=copies,
    )
