"""Which nodes of a graph are products of split weights, and which of them share an exchange.

Products of the same input (q, k and v; gate and up) make one exchange: the input goes out once,
before the first of them. Their results are taken off the stream where the graph has the nodes, so
that what lies between runs while workers compute, and no memory is needed for results that wait.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from protocol.ggml_ops import Op
from protocol.ggml_types import GgmlType
from rpc_server.graph.tensor import Tensor
from rpc_server.split.exchange import Transfer
from rpc_server.split.weights import SplitStorage, SplitWeight

_PRODUCTS = frozenset({Op.MUL_MAT, Op.MUL_MAT_ID})


@dataclass(slots=True, eq=False)
class Product:
    """A node that multiplies by a split weight."""

    node: Tensor
    weight: SplitWeight


@dataclass(slots=True, eq=False)
class Group:
    """Products that share their inputs: the activations, and for experts the choice of them."""

    inputs: tuple[Tensor, ...]
    products: list[Product] = field(default_factory=list)


@dataclass(slots=True)
class Rewritten:
    """``groups`` in the order of their exchanges; ``whole`` are weights that are needed here."""

    groups: list[Group]
    whole: list[tuple[SplitStorage, SplitWeight]]


class WeightIndex:
    """Finds the split weight that an address lies in."""

    def __init__(self, storages: Iterable[SplitStorage]) -> None:
        found = [(s.address + w.start, s, w) for s in storages for w in s.weights]
        self._weights = sorted(found, key=lambda entry: entry[0])
        self._starts = [start for start, _, _ in self._weights]

    def __bool__(self) -> bool:
        return bool(self._weights)

    def find(self, address: int) -> tuple[SplitStorage, SplitWeight, int] | None:
        """Storage, weight, and offset in the weight."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        start, storage, weight = self._weights[i]
        offset = address - start
        return (storage, weight, offset) if offset < weight.tensor.nbytes else None


def rewrite(items: Sequence[Tensor | Transfer], index: WeightIndex) -> Rewritten:
    """Groups of products, and weights that some node uses in another way."""
    groups: list[Group] = []
    whole: dict[int, tuple[SplitStorage, SplitWeight]] = {}
    current: Group | None = None
    for node in items:
        if not isinstance(node, Tensor):
            current = None
            continue
        product = _as_product(node, index)
        for i, source in enumerate(node.src):
            if source is None or not source.address or (product is not None and i == 0):
                continue
            # A view by itself reads nothing; who reads the view is looked at in its turn.
            found = None if _is_view(node) else index.find(source.address)
            if found is not None and not found[1].gathered:
                whole[id(found[1])] = found[:2]
        if product is None:
            if current is not None and not _is_view(node) and _writes(node, current.inputs):
                current = None
            continue
        inputs = tuple(s for s in node.src[1:3] if s is not None)
        if current is None or not _same(current.inputs, inputs):
            current = Group(inputs)
            groups.append(current)
        current.products.append(product)
        if _writes(node, inputs):
            current = None
    return Rewritten(groups, list(whole.values()))


def _as_product(node: Tensor, index: WeightIndex) -> Product | None:
    weight, x = node.src[0], node.src[1]
    if node.op not in _PRODUCTS or weight is None or x is None or node.empty:
        return None
    found = index.find(weight.address)
    if found is None or found[2]:
        return None
    stored = found[1].tensor
    if (weight.type, weight.ne, weight.nb) != (stored.type, stored.ne, stored.nb):
        return None
    simple = (
        node.type is GgmlType.F32
        and node.contiguous
        and x.type is GgmlType.F32
        and all(s.contiguous_rows and not s.empty for s in node.src[1:3] if s is not None)
        and index.find(x.address) is None
    )
    return Product(node, found[1]) if simple else None


def _is_view(t: Tensor) -> bool:
    return t.op in (Op.NONE, Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE)


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    keys = [[(t.address, t.type, t.ne, t.nb) for t in tensors] for tensors in (some, others)]
    return keys[0] == keys[1]


def _writes(node: Tensor, tensors: Iterable[Tensor]) -> bool:
    end = node.address + node.nbytes
    return any(t.address < end and node.address < t.address + t.nbytes for t in tensors)
