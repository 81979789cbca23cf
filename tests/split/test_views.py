"""Views of cut tensors: expressed exactly on the parts, or said to have no slices there."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from client.split.partition import Rows, partition
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Dims, Tensor, contiguous_strides, padded_sources
from rpc_server.devices.split.views import cut_view, part_period
from rpc_server.ops.shards import Shard

F32, F16, Q8_0, Q4_0 = GgmlType.F32, GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_0
BASE = 1 << 20
ROUNDS = 2000


def dims(values: Sequence[int]) -> Dims:
    a, b, c, d = (*values, 1, 1, 1)[:4]
    return a, b, c, d


def root_of(type_: GgmlType, ne: Sequence[int]) -> Tensor:
    shape = dims(ne)
    nb = contiguous_strides(type_, shape)
    return Tensor(1, type_, shape, nb, name="root", address=BASE)


def seen(of: Tensor, ne: Sequence[int], nb: Sequence[int], offset: int = 0) -> Tensor:
    """A view of a view is a view of what that one views."""
    made = Tensor(2, of.type, dims(ne), dims(nb), Op.VIEW, address=of.address + offset)
    made.src = padded_sources([of])
    made.view_src = of if of.view_src is None else of.view_src
    return made


def reshaped(of: Tensor, ne: Sequence[int]) -> Tensor:
    return seen(of, ne, contiguous_strides(of.type, dims(ne)))


def permuted(of: Tensor, axes: Sequence[int]) -> Tensor:
    ne, nb = [0] * 4, [0] * 4
    for i, axis in enumerate(axes):
        ne[axis], nb[axis] = of.ne[i], of.nb[i]
    return seen(of, ne, nb)


def cut(dim: int, *edges: int) -> Shard:
    """Along ``dim`` from 0 to the first edge, from there to the next, ..."""
    return Shard(dim, tuple(Rows(a, b) for a, b in zip((0, *edges), edges, strict=False)))


# -- as llama.cpp has them


def test_rows_seen_as_heads_and_back() -> None:
    rows = root_of(F32, (128, 3))
    heads = reshaped(rows, (32, 4, 3))
    found = cut_view(rows, cut(0, 64, 128), heads)
    assert found is not None
    assert found.shard == cut(1, 2, 4)
    assert cut_view(rows, cut(0, 48, 128), heads) is None
    heads = root_of(F32, (32, 4, 3))
    found = cut_view(heads, cut(1, 1, 4), reshaped(heads, (128, 3)))
    assert found is not None
    assert found.shard == cut(0, 32, 128)


def test_a_permutation_takes_the_cut_along() -> None:
    heads = root_of(F32, (32, 4, 3))
    found = cut_view(heads, cut(1, 2, 4), permuted(heads, (0, 2, 1, 3)))
    assert found is not None
    assert found.shard == cut(2, 2, 4)


def test_a_cache_seen_as_heads() -> None:
    cache = root_of(F16, (128, 16))
    heads = seen(cache, (32, 4, 8), (2, 64, 256, 256 * 8))
    found = cut_view(cache, cut(0, 64, 128), heads)
    assert found is not None
    assert found.shard == cut(1, 2, 4)
    assert cut_view(cache, cut(0, 48, 128), heads) is None
    later = seen(cache, (128, 8), (2, 256, 256 * 8, 256 * 8), 256 * 4)
    found = cut_view(cache, cut(0, 64, 128), later)
    assert found is not None
    assert found.shard == cut(0, 64, 128)
    assert found.place(1, 128) == (128 * 4, (2, 128, 128 * 8, 128 * 8))


def test_a_cache_of_several_sequences() -> None:
    """Stored as rows of all, read as heads of some of them."""
    width, cells, sequences = 128, 16, 4
    cache = root_of(F16, (width, cells, sequences))
    rows = reshaped(cache, (width, cells * sequences))
    halves = cut(0, 64, 128)
    found = cut_view(cache, halves, rows)
    assert found is not None
    assert found.shard == halves
    assert found.shape(1) == (64, cells * sequences, 1, 1)
    row = 2 * width
    nb = (2, 64, row, row * cells)
    heads = seen(cache, (32, 4, 8, 2), nb, row * cells)
    found = cut_view(cache, halves, heads)
    assert found is not None
    assert found.shard == cut(1, 2, 4)
    assert found.place(1, 128) == (128 * cells, (2, 64, 128, 128 * cells))


def test_values_that_lie_across_have_no_slices() -> None:
    """A cache of which each element is a row, as it is stored without flash attention."""
    cache = root_of(F16, (128, 16))
    assert cut_view(cache, cut(0, 64, 128), reshaped(cache, (1, 128 * 16))) is None


def test_a_view_beside_its_root_has_no_slices() -> None:
    cache = root_of(F16, (128, 16))
    halves = cut(0, 64, 128)
    assert cut_view(cache, halves, seen(cache, (128, 8), cache.nb, -256)) is None
    assert cut_view(cache, halves, seen(cache, (128, 8), cache.nb, 256 * 9)) is None
    assert cut_view(cache, halves, seen(cache, (128, 2), (2, 256 * 16, 1, 1))) is None
    other = seen(cache, (64, 8), (4, 256, 1, 1))
    other = Tensor(3, F32, other.ne, other.nb, Op.VIEW, address=BASE)
    assert cut_view(cache, halves, other) is None


# -- any


def factors(n: int, count: int, rng: random.Random) -> list[int]:
    """``count`` numbers whose product is ``n``."""
    found = []
    for _ in range(count - 1):
        factor = rng.choice([d for d in range(1, n + 1) if n % d == 0])
        found.append(factor)
        n //= factor
    return [*found, n]


def another(t: Tensor, root: Tensor, rng: random.Random) -> Tensor:
    """A random view of a tensor, as a client may make it."""
    block = t.block_size
    kind = rng.choice(["reshape", "permute", "range", "range", "strides"])
    if kind == "reshape" and t.contiguous:
        inner, *outer = factors(t.nelements // block, 4, rng)
        return reshaped(t, (inner * block, *outer))
    if kind == "permute":
        axes = list(range(4))
        if t.quantized:
            axes[1:] = rng.sample(axes[1:], 3)
        else:
            rng.shuffle(axes)
        return permuted(t, axes)
    if kind == "strides" and not t.quantized:
        # Anything that stays in the root.
        ne = [rng.randint(1, 4) for _ in range(4)]
        nb = [t.type_size * rng.choice([0, 1, 2, 3, 8, 32, rng.randint(0, 80)]) for _ in range(4)]
        offset = t.type_size * rng.randint(0, 40)
        made = seen(root, ne, nb, offset)
        return made if offset + made.nbytes <= root.nbytes else t
    # A part of some dimension, as by ggml_view.
    dim = rng.randrange(4)
    unit = block if dim == 0 else 1
    n = t.ne[dim] // unit
    first = rng.randrange(n)
    ne = list(t.ne)
    ne[dim] = unit * rng.randint(1, n - first)
    return seen(t, ne, t.nb, first * t.nb[dim])


def places(t: Tensor, offset: int, ne: Dims, nb: Dims) -> npt.NDArray[np.int64]:
    """The byte offset of each block of a view: (ne3, ne2, ne1, blocks)."""
    counts = (ne[0] // t.block_size, *ne[1:])
    steps = [np.arange(n) * stride for n, stride in zip(counts, nb, strict=True)]
    at = steps[3][:, None, None, None] + steps[2][:, None, None] + steps[1][:, None] + steps[0]
    return np.asarray(offset + at, np.int64)


def contents(root: Tensor, shard: Shard, part: int) -> npt.NDArray[np.int64]:
    """What a part has of the root's blocks, which are numbered, in the order of its memory."""
    block = root.block_size
    shape = tuple(reversed((root.ne[0] // block, *root.ne[1:])))
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    rows = shard.bounds[part]
    unit = block if shard.dim == 0 else 1
    picked = [slice(None)] * 4
    picked[3 - shard.dim] = slice(rows.first // unit, rows.last // unit)
    return numbers[tuple(picked)].reshape(-1)


def check(root: Tensor, shard: Shard, view: Tensor) -> bool:
    """Whether a view has slices; if so they are held against what the whole view has."""
    found = cut_view(root, shard, view)
    if found is None:
        return False
    size = root.type_size
    whole = places(view, view.address - root.address, view.ne, view.nb) // size
    for part, rows in enumerate(found.shard.bounds):
        if not len(rows):
            continue
        dense = contents(root, shard, part)
        ne = list(root.ne)
        ne[shard.dim] = len(shard.bounds[part])
        strides = contiguous_strides(root.type, dims(ne))
        offset, nb = found.place(part, part_period(shard, part, strides))
        at = places(root, offset, found.shape(part), nb)
        assert at.min() >= 0
        assert not (at % size).any()
        assert at.max() < len(dense) * size
        unit = root.block_size if found.shard.dim == 0 else 1
        picked = [slice(None)] * 4
        picked[3 - found.shard.dim] = slice(rows.first // unit, rows.last // unit)
        assert np.array_equal(dense[at // size], whole[tuple(picked)])
        # In this server's own share rows lie as far apart as those of the whole.
        offset, nb = found.place(part, found.period)
        at = places(root, offset + found.first_bytes[part], found.shape(part), nb)
        assert np.array_equal(at // size, whole[tuple(picked)])
    assert sum(map(len, found.shard.bounds)) == view.ne[found.shard.dim]
    return True


@pytest.mark.parametrize("type_", [F32, F16, Q8_0, Q4_0], ids=lambda t: t.name)
def test_any_view_has_exact_slices_or_none(type_: GgmlType, seed: int) -> None:
    rng = random.Random(seed)
    expressed = 0
    for _ in range(ROUNDS):
        block = root_of(type_, (32,)).block_size
        ne = (block * rng.choice([1, 2, 4, 6, 8]), *(rng.randint(1, 5) for _ in range(3)))
        root = root_of(type_, ne)
        dim = rng.choice([0, 0, 1, 2, 3])
        shares = [rng.choice([0, 1, 1, 2]) for _ in range(rng.randint(1, 3))]
        if not sum(shares):
            continue
        unit = block if dim == 0 else 1
        shard = Shard(dim, tuple(partition(ne[dim], shares, unit)))
        view = root
        for _ in range(rng.randint(1, 5)):
            view = another(view, root, rng)
            expressed += check(root, shard, view)
    # Otherwise the rule could decline all.
    assert expressed > ROUNDS / 4, f"only {expressed} views had slices"
