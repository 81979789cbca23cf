"""12.1 to 12.39: a KV cache as llama.cpp keeps it: filled, read, saved, shifted, moved."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np

from client.builder.products import ROPE_NORMAL
from conformance.cases.groups import SEQUENCES
from conformance.suite import Context
from conformance.suite.arrays import PRODUCT_BOUND, Array, Bench, close, same, values, weights
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType, row_size
from protocol.tensor import Tensor

F32, F16 = GgmlType.F32, GgmlType.F16
PLAIN = (F16, F32)
QUANTIZED = (GgmlType.Q8_0, GgmlType.Q4_0)
# Cells and numbers a cell of the caches here.
CELLS, WIDTH = 64, 64
# Cells that a sequence has: from this one on, so many.
_FIRST, _USED = 3, 11
_SAVED = "tests/data/captures/clients/slots-flash; llama-kv-cache.cpp state_write, state_read"
_FILLED = "tests/data/captures/clients/slots-flash; llama-kv-cache.cpp cpy_k, cpy_v"
# What rounding to a type may cost, of values of ordinary size: a step of its blocks.
_ROUNDING = {F32: 1e-12, F16: 1e-6, GgmlType.BF16: 1e-4, GgmlType.Q8_0: 1e-4, GgmlType.Q4_0: 2e-2}


class Cache:
    """A cache of one layer on a server, with random content: ``raw`` bytes, ``numbers``."""

    def __init__(self, b: Bench, type: GgmlType, seed: int, cells: int = CELLS) -> None:
        self.b = b
        self.type = type
        self.raw, self.numbers = weights(type, WIDTH, cells, seed)
        self.tensor = b.leaf(self.raw, type, (WIDTH, cells))

    @property
    def row(self) -> int:
        """Bytes of a cell."""
        return row_size(self.type, WIDTH)

    def range(self, first: int, count: int) -> tuple[int, int]:
        """Return where cells begin in the cache, and how many bytes they have."""
        return first * self.row, count * self.row

    def held(self) -> bytes:
        """Return the cache's bytes as the server has them now."""
        return self.b.peer.get(self.b._wire(self.tensor), len(self.raw))

    def check(self, c: Context, expected: bytes, what: str) -> None:
        c.equal(self.held(), expected, what)

    def now(self) -> Array:
        """Return the cache's numbers as the server has them now, (cells, WIDTH)."""
        return numbers_of(self.type, self.held()).reshape(-1, WIDTH)


def numbers_of(type: GgmlType, raw: bytes) -> Array:
    """Return the numbers that bytes of a type stand for."""
    if type is F32:
        return np.frombuffer(raw, np.float32)
    if type is F16:
        return np.frombuffer(raw, np.float16).astype(np.float32)
    if type is GgmlType.BF16:
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return np.asarray(dequantize(np.frombuffer(raw, np.uint8), GGMLQuantizationType(int(type))))


def caches(c: Context, type: GgmlType) -> tuple[Bench, Cache, Cache]:
    """Open a connection with a cache for keys and one for values."""
    b = Bench(c.connect())
    keys, content = Cache(b, type, 1), Cache(b, type, 2)
    b.build([b.g.reshape(cache.tensor, *cache.tensor.ne) for cache in (keys, content)])
    return b, keys, content


class CheckOfType(Protocol):
    """The check of a case for one type of cache."""

    def __call__(self, c: Context, type: GgmlType) -> None: ...


def _by_type(
    first: int,
    name: str,
    types: tuple[GgmlType, ...],
    sends: str,
    expects: str,
    source: str,
    why: str,
    check: CheckOfType,
) -> None:
    """Declare a case for each type of cache."""
    for number, type in enumerate(types, first):
        SEQUENCES.case(
            number,
            name=f"{name}-{type.name.lower().replace('_', '')}",
            sends=sends.format(type=type.name),
            expects=expects,
            source=source,
            why=why,
        )(partial(check, type=type))


# -- saved and restored ----------------------------------------------------------------------------


def _save(c: Context, type: GgmlType) -> None:
    b, *pair = caches(c, type)
    for cache, what in zip(pair, ("keys", "values"), strict=True):
        start, size = cache.range(_FIRST, _USED)
        found = b.peer.get(b._wire(cache.tensor), size, start)
        c.equal(found, cache.raw[start : start + size], what)


def _restore(c: Context, type: GgmlType) -> None:
    b, *pair = caches(c, type)
    for seed, cache in enumerate(pair, 7):
        start, size = cache.range(_FIRST, _USED)
        new, _ = weights(type, WIDTH, _USED, seed)
        b.peer.set(b._wire(cache.tensor), new, start)
        cache.check(c, cache.raw[:start] + new + cache.raw[start + size :], "the cache")


def _save_transposed(c: Context, type: GgmlType) -> None:
    b, _, cache = caches(c, type)
    # A row is one dimension of all cells: the values of some cells are a piece of each row.
    step = row_size(type, 1)
    for channel in range(WIDTH):
        start = (channel * CELLS + _FIRST) * step
        found = b.peer.get(b._wire(cache.tensor), _USED * step, start)
        c.equal(found, cache.raw[start : start + _USED * step], f"channel {channel}")


def _restore_transposed(c: Context, type: GgmlType) -> None:
    b, _, cache = caches(c, type)
    step = row_size(type, 1)
    expected = bytearray(cache.raw)
    for channel in range(WIDTH):
        start = (channel * CELLS + _FIRST) * step
        new = np.random.default_rng(channel).bytes(_USED * step)
        b.peer.set(b._wire(cache.tensor), new, start)
        expected[start : start + len(new)] = new
    cache.check(c, bytes(expected), "the cache")


_ALL = (*PLAIN, GgmlType.BF16, *QUANTIZED, GgmlType.Q4_1, GgmlType.Q5_0)
_by_type(
    1, "slot-saved-with-flash-attention", _ALL,
    "GET_TENSOR of a sequence's cells out of caches of {type}, keys and then values",
    "their bytes", _SAVED, "A saved slot is a file of these bytes, read by another run.", _save,
)  # fmt: skip
_by_type(
    8, "slot-restored-with-flash-attention", _ALL,
    "SET_TENSOR of a sequence's cells into caches of {type}",
    "these cells written, all others as they were", _SAVED,
    "Other slots go on while one is restored.", _restore,
)  # fmt: skip
_by_type(
    15, "slot-saved-without-flash-attention", PLAIN,
    "GET_TENSOR of a sequence's cells out of a transposed cache of {type}, a channel at a time",
    "their bytes", "tests/data/captures/clients/slots; llama-kv-cache.cpp state_write_data",
    "Without flash attention values lie transposed: a range for each channel.", _save_transposed,
)  # fmt: skip
_by_type(
    17, "slot-restored-without-flash-attention", PLAIN,
    "SET_TENSOR of a sequence's cells into a transposed cache of {type}, a channel at a time",
    "these cells written, all others as they were",
    "tests/data/captures/clients/slots; llama-kv-cache.cpp state_read_data",
    "Some dozens of small uploads follow each other without an answer.", _restore_transposed,
)  # fmt: skip


# -- filled ----------------------------------------------------------------------------------------


def _needs(c: Context, op: Op) -> None:
    if op not in c.dialect.ops:
        c.skip(f"protocol {c.dialect.name} has no {op.value}")


def _store(c: Context, type: GgmlType) -> None:
    _needs(c, Op.SET_ROWS)
    b, keys, _ = caches(c, type)
    rows, cells = values(5, WIDTH, seed=3), np.array([60, 2, 3, 33, 0], np.int64)
    b.compute(b.g.set_rows(keys.tensor, b.leaf(rows), b.leaf(cells, GgmlType.I64)))
    expected = keys.numbers.copy()
    expected[cells] = rows
    close(c, keys.now(), expected, "the cache", _ROUNDING[type])
    kept = np.setdiff1d(np.arange(CELLS), cells)
    same(c, keys.now()[kept], keys.numbers[kept], "cells that nobody wrote")


def _store_transposed(c: Context, type: GgmlType) -> None:
    _needs(c, Op.SET_ROWS)
    b, _, cache = caches(c, type)
    tokens, cells = values(3, WIDTH, seed=4), np.array([5, 9, 63])
    # llama.cpp takes the cache for rows of one number each, and says for each where it goes.
    places = (np.arange(WIDTH)[None, :] * CELLS + cells[:, None]).astype(np.int64)
    g = b.g
    whole = g.reshape(cache.tensor, 1, CELLS * WIDTH)
    rows = g.reshape(b.leaf(tokens), 1, 3 * WIDTH)
    b.compute(g.set_rows(whole, rows, b.leaf(places.reshape(-1), GgmlType.I64)))
    expected = cache.numbers.reshape(-1).copy()
    expected[places.reshape(-1)] = tokens.reshape(-1)
    close(c, cache.now().reshape(-1), expected, "the cache", _ROUNDING[type])


_by_type(
    19, "cells-filled", (*PLAIN, GgmlType.BF16, *QUANTIZED),
    "SET_ROWS of five tokens into cells of a cache of {type}, in no order",
    "each in its cell, rounded to the type; all other cells to the bit as they were", _FILLED,
    "Free cells are wherever other sequences left them.", _store,
)  # fmt: skip
_by_type(
    24, "transposed-cells-filled", PLAIN,
    "SET_ROWS of three tokens into a transposed cache of {type}, number by number",
    "each number in its channel and cell", "tests/data/captures/clients/slots: attn_inp_v_idxs",
    "Without flash attention an index is of one number, not of a row.", _store_transposed,
)  # fmt: skip


# -- shifted and moved -----------------------------------------------------------------------------


def _turned(x: Array, positions: Array) -> Array:
    """Return (cells, WIDTH) rotated as ROPE in its plain mode does."""
    half = WIDTH // 2
    angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    even, odd = x[:, 0::2].astype(np.float64), x[:, 1::2].astype(np.float64)
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def _shift(c: Context, type: GgmlType) -> None:
    b, keys, _ = caches(c, type)
    g, by = b.g, np.where(np.arange(CELLS) < 20, 0, -7).astype(np.int32)
    view = g.view_3d(keys.tensor, WIDTH, 1, CELLS, keys.row, keys.row)
    positions = b.leaf(by, GgmlType.I32)
    if type in PLAIN:
        b.compute(g.rope_ext(view, positions, None, WIDTH, ROPE_NORMAL, inplace=True))
    else:
        turned = g.rope_ext(g.cast(view, F32), positions, None, WIDTH, ROPE_NORMAL)
        b.compute(g.cpy(turned, view))
    close(c, keys.now(), _turned(keys.numbers, by), "the shifted keys", 4 * _ROUNDING[type])


def _move(c: Context, type: GgmlType) -> None:
    b, keys, _ = caches(c, type)
    g = b.g
    moves = ((40, 2, 6), (12, 50, 3))

    def cells(first: int, count: int) -> Tensor:
        return g.view_2d(keys.tensor, WIDTH, count, keys.row, first * keys.row)

    b.compute(*(g.cpy(cells(a, n), cells(z, n)) for a, z, n in moves))
    expected = bytearray(keys.raw)
    for a, z, n in moves:
        start, size = keys.range(a, n)
        expected[z * keys.row : z * keys.row + size] = keys.raw[start : start + size]
    keys.check(c, bytes(expected), "the cache")


_by_type(
    26, "context-shifted", (*PLAIN, *QUANTIZED),
    "ROPE over all keys of a cache of {type} by how far each moves; quantized ones by way of F32",
    "keys as of their new positions; cells that don't move as they were",
    "llama-kv-cache.cpp build_rope_shift, build_graph_shift",
    "A context that is full goes on without its first tokens.", _shift,
)  # fmt: skip
_by_type(
    30, "cells-moved", (*PLAIN, *QUANTIZED),
    "CPY between views of one cache of {type}: cells that are used to where others were",
    "these cells' bytes there, everything else as it was",
    "llama-kv-cache.cpp of releases up to 2025-08, build_graph_defrag",
    "A copy of quantized blocks to their own type changes no bit.", _move,
)  # fmt: skip


# -- read ------------------------------------------------------------------------------------------


def mask_of(tokens: Array, cells: Array, sequences: tuple[Array, Array] | None = None) -> Array:
    """Return 0 where a token (by its position) sees a cell, else -inf: (tokens, cells)."""
    seen = cells[None, :] <= tokens[:, None]
    if sequences is not None:
        seen &= sequences[0][:, None] == sequences[1][None, :]
    return np.where(seen, np.float32(0), np.float32(-np.inf))


def attended(q: Array, keys: Array, content: Array, mask: Array) -> Array:
    """Return attention of one head in double precision: (tokens, WIDTH)."""
    s = q.astype(np.float64) @ keys.astype(np.float64).T * WIDTH**-0.5 + mask
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True) @ content.astype(np.float64))


def _flash(c: Context, type: GgmlType) -> None:
    b, keys, content = caches(c, type)
    q = values(4, WIDTH, seed=5)
    mask = mask_of(np.arange(20, 24), np.arange(CELLS))
    g = b.g
    k, v = (
        g.permute(g.view_3d(t.tensor, WIDTH, 1, CELLS, t.row, t.row), 0, 2, 1, 3)
        for t in (keys, content)
    )
    heads = g.permute(g.reshape(b.leaf(q), WIDTH, 1, 4), 0, 2, 1, 3)
    result = g.flash_attn_ext(heads, k, v, b.leaf(mask, F16), WIDTH**-0.5)
    (found,) = b.compute(result)
    expected = attended(q, keys.numbers, content.numbers, mask)
    close(c, found.reshape(4, WIDTH), expected, "attention", PRODUCT_BOUND)


def _written_out(c: Context, type: GgmlType) -> None:
    b, keys, content = caches(c, type)
    q = values(4, WIDTH, seed=6)
    mask = mask_of(np.arange(30, 34), np.arange(CELLS))
    g = b.g
    scores = g.soft_max_ext(g.mul_mat(keys.tensor, b.leaf(q)), b.leaf(mask), WIDTH**-0.5, 0.0)
    # The other cache is transposed: CELLS numbers a channel.
    (found,) = b.compute(g.mul_mat(content.tensor, scores))
    expected = attended(q, keys.numbers, content.numbers.T, mask)
    close(c, found, expected, "attention", PRODUCT_BOUND)


_by_type(
    34, "cells-read-by-flash-attention", (*PLAIN, *QUANTIZED),
    "FLASH_ATTN_EXT over permuted views of caches of {type}, a mask of which cells are seen",
    "attention over these cells",
    "tests/data/captures/clients/slots-flash; llama-graph.cpp build_attn_mha",
    "Cells behind the last token hold what was there before.", _flash,
)  # fmt: skip
_by_type(
    38, "cells-read-without-flash-attention", PLAIN,
    "MUL_MAT with keys of {type}, SOFT_MAX with a mask, MUL_MAT with transposed values",
    "attention over the cells that are seen",
    "tests/data/captures/clients/slots; llama-graph.cpp build_attn_mha",
    "The older way, and that of models with odd heads.", _written_out,
)  # fmt: skip
