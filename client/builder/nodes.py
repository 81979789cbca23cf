"""New tensors, views and generic nodes: what every op constructor of the builder stands on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from client.tensors import dims, encode_params, require
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.messages import MAX_SOURCES
from protocol.tensor import Dims, Tensor, contiguous_strides, padded_sources

Sources = Iterable[Tensor | None]
Params = Iterable[int | float]

# ggml_prec: what a product may accumulate in. The names are ggml's.
PREC_UNDEFINED = 0
PREC_F32 = 10


def is_vector(a: Tensor) -> bool:
    """Return whether all elements are in dimension 0 (ggml_is_vector)."""
    return a.ne[1:] == (1, 1, 1)


def require_mask_and_sinks(
    op: str, scores: Tensor, mask: Tensor | None, max_bias: float, sinks: Tensor | None
) -> None:
    """Require a mask for ALiBi, and of sinks one F32 for each of dimension 2 of ``scores``."""
    require(max_bias <= 0 or mask is not None, f"{op}: max_bias needs a mask")
    if sinks is not None:
        fits = sinks.type == GgmlType.F32 and sinks.ne[0] == scores.ne[2]
        require(fits, f"{op}: sinks {sinks!r} don't fit {scores!r}")


def _sources(src: Sources) -> tuple[Tensor | None, ...]:
    """Return sources as a tensor has them. Raises ShapeError for more than ten."""
    given = tuple(src)
    require(len(given) <= MAX_SOURCES, f"{len(given)} sources, a tensor has {MAX_SOURCES} at most")
    return padded_sources(given)


class NodeFactory:
    """Makes tensors with ids that are unique within this factory."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)

    # -- leaves

    def new_tensor(self, type: GgmlType, ne: Sequence[int], name: str = "") -> Tensor:
        """Return a dense leaf of 1 to 4 dimensions; ShapeError for part of a block."""
        return self.op(Op.NONE, type, ne, name=name)

    def new_tensor_1d(self, type: GgmlType, ne0: int, name: str = "") -> Tensor:
        return self.new_tensor(type, (ne0,), name)

    def new_tensor_2d(self, type: GgmlType, ne0: int, ne1: int, name: str = "") -> Tensor:
        return self.new_tensor(type, (ne0, ne1), name)

    def new_tensor_3d(self, type: GgmlType, ne0: int, ne1: int, ne2: int, name: str = "") -> Tensor:
        return self.new_tensor(type, (ne0, ne1, ne2), name)

    def new_tensor_4d(
        self, type: GgmlType, ne0: int, ne1: int, ne2: int, ne3: int, name: str = ""
    ) -> Tensor:
        return self.new_tensor(type, (ne0, ne1, ne2, ne3), name)

    # -- nodes

    def op(
        self,
        op: Op,
        type: GgmlType,
        ne: Sequence[int],
        src: Sources = (),
        params: Params = (),
        *,
        name: str = "",
    ) -> Tensor:
        """Return a node of any op.

        A dense result of ``type`` and ``ne``, made of ``src`` with ``params``.

        ``params`` are the op_params as words: ints as int32, floats as float32. Nothing is checked
        but that rows are whole blocks.
        """
        shape = dims(ne)
        result = Tensor(
            next(self._ids),
            type,
            shape,
            contiguous_strides(type, shape),
            op,
            encode_params(params),
            _sources(src),
            name,
        )
        block = TYPE_INFO[type].block_size
        require(result.ne[0] % block == 0, f"{result!r}: rows are not whole blocks of {block}")
        return result

    def like(
        self, op: Op, a: Tensor, src: Sources, params: Params = (), *, inplace: bool = False
    ) -> Tensor:
        """Return a node of the type and shape of ``a``; ``inplace`` in the memory of ``a``."""
        if inplace:
            return self.view_of(a, op, src, params)
        return self.op(op, a.type, a.ne, src, params)

    def view_of(
        self,
        a: Tensor,
        op: Op,
        src: Sources,
        params: Params = (),
        *,
        ne: Dims | None = None,
        nb: Dims | None = None,
        offset: int = 0,
        name: str = "",
    ) -> Tensor:
        """Return a node in the memory of ``a``, from byte ``offset`` of it on.

        Shape and strides are those of ``a`` unless given. As in ggml a view of a view is a view of
        what that one views. ShapeError if the dense size of ``ne`` doesn't fit.
        """
        root = a if a.view_src is None else a.view_src
        base = offset + (0 if a.view_src is None else a.view_offs)
        shape = a.ne if ne is None else ne
        if nb is None:
            nb = a.nb if ne is None else contiguous_strides(a.type, ne)
        result = Tensor(
            next(self._ids),
            a.type,
            shape,
            nb,
            op,
            encode_params(params),
            _sources(src),
            name or f"{a.name} (view)",
            view_src=root,
            view_offs=base,
        )
        size = row_size(a.type, shape[0]) * shape[1] * shape[2] * shape[3]
        require(offset >= 0, f"{result!r}: negative offset {offset}")
        require(
            size == 0 or size + base <= root.nbytes,
            f"{result!r}: {size} bytes from {base} on do not lie in {root!r} of {root.nbytes}",
        )
        return result

    # -- views

    def _view(self, a: Tensor, ne: Dims, nb: Sequence[int], offset: int) -> Tensor:
        # op_params of VIEW hold the 64-bit offset.
        result = self.view_of(a, Op.VIEW, (a,), (offset, offset >> 32), ne=ne, offset=offset)
        strides = [result.nb[0], *nb]
        for i in range(len(strides), 4):
            strides.append(strides[i - 1] * ne[i - 1])
        result.nb = strides[0], strides[1], strides[2], strides[3]
        return result

    def view_1d(self, a: Tensor, ne0: int, offset: int = 0) -> Tensor:
        """Return ``ne0`` elements from byte ``offset`` of ``a`` on."""
        ne = dims((ne0,))
        return self._view(a, ne, (row_size(a.type, ne0),), offset)

    def view_2d(self, a: Tensor, ne0: int, ne1: int, nb1: int, offset: int = 0) -> Tensor:
        """Return rows of ``ne0`` elements, ``nb1`` bytes apart."""
        return self._view(a, dims((ne0, ne1)), (nb1,), offset)

    def view_3d(
        self, a: Tensor, ne0: int, ne1: int, ne2: int, nb1: int, nb2: int, offset: int = 0
    ) -> Tensor:
        return self._view(a, dims((ne0, ne1, ne2)), (nb1, nb2), offset)

    def view_4d(
        self,
        a: Tensor,
        ne0: int,
        ne1: int,
        ne2: int,
        ne3: int,
        nb1: int,
        nb2: int,
        nb3: int,
        offset: int = 0,
    ) -> Tensor:
        return self._view(a, dims((ne0, ne1, ne2, ne3)), (nb1, nb2, nb3), offset)

    def reshape(self, a: Tensor, *ne: int) -> Tensor:
        """Return the elements of a contiguous tensor in another shape (ggml_reshape_1d to _4d)."""
        shape = dims(ne)
        require(a.contiguous, f"reshape: {a!r} is not contiguous")
        require(
            shape[0] * shape[1] * shape[2] * shape[3] == a.nelements,
            f"reshape: {a!r} has {a.nelements} elements, not {shape}",
        )
        return self.view_of(a, Op.RESHAPE, (a,), ne=shape, name=f"{a.name} (reshaped)")

    def permute(self, a: Tensor, axis0: int, axis1: int, axis2: int, axis3: int) -> Tensor:
        """Make dimension i of ``a`` dimension ``axis<i>``."""
        axes = (axis0, axis1, axis2, axis3)
        require(sorted(axes) == [0, 1, 2, 3], f"permute: {axes} is no permutation")
        ne, nb = [0] * 4, [0] * 4
        for i, axis in enumerate(axes):
            ne[axis], nb[axis] = a.ne[i], a.nb[i]
        result = self.view_of(a, Op.PERMUTE, (a,), axes, name=f"{a.name} (permuted)")
        result.ne = dims(ne)
        result.nb = nb[0], nb[1], nb[2], nb[3]
        return result

    def transpose(self, a: Tensor) -> Tensor:
        """Swap dimensions 0 and 1."""
        result = self.view_of(a, Op.TRANSPOSE, (a,), name=f"{a.name} (transposed)")
        result.ne = a.ne[1], a.ne[0], a.ne[2], a.ne[3]
        result.nb = a.nb[1], a.nb[0], a.nb[2], a.nb[3]
        return result
