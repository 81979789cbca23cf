"""Products, rows by index, copies, positions, attention."""

from __future__ import annotations

from client.builder.nodes import PREC_UNDEFINED, NodeFactory, is_vector, require_mask_and_sinks
from client.tensors import dims, require
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, padded_sources

# ggml's rope modes.
ROPE_NORMAL = 0
ROPE_NEOX = 2
ROPE_MROPE = 8
ROPE_VISION = 24
ROPE_IMROPE = 40

# ggml_op_hint: source 0 of a product is a Hadamard matrix divided by the root of its size.
HINT_NONE = 0
HINT_SRC0_IS_HADAMARD = 1


class ProductOps(NodeFactory):
    """The ops that mix rows; results are dense."""

    # -- copies

    def dup(self, a: Tensor, *, inplace: bool = False) -> Tensor:
        return self.like(Op.DUP, a, (a,), inplace=inplace)

    def cont(self, a: Tensor, *ne: int) -> Tensor:
        """Make ``a`` contiguous, in another shape if ``ne`` are given (ggml_cont_1d to _4d)."""
        shape = dims(ne) if ne else a.ne
        elements = shape[0] * shape[1] * shape[2] * shape[3]
        require(elements == a.nelements, f"cont: {a!r} doesn't have the elements of {shape}")
        return self.op(Op.CONT, a.type, shape, (a,), name=f"{a.name} (cont)")

    def cpy(self, a: Tensor, b: Tensor) -> Tensor:
        """Write the elements of ``a`` to ``b``, converted to its type; a view of ``b``."""
        require(a.nelements == b.nelements, f"cpy: {a!r} and {b!r} differ in size")
        name = f"{b.name} (copy of {a.name})" if b.name else f"{a.name} (copy)"
        return self.view_of(b, Op.CPY, (a, b), name=name)

    def cast(self, a: Tensor, type: GgmlType) -> Tensor:
        """Convert ``a`` to another type."""
        result = self.op(Op.CPY, type, a.ne, (a,), name=f"{a.name} (copy)")
        # As in ggml, where a copy's second source is its destination.
        result.src = padded_sources((a, result))
        return result

    # -- products

    def mul_mat(
        self, a: Tensor, b: Tensor, *, prec: int = PREC_UNDEFINED, hint: int = HINT_NONE
    ) -> Tensor:
        """Multiply rows of ``a`` by rows of ``b``: F32 (a.ne1, b.ne1, b.ne2, b.ne3).

        ``a`` is repeated in dimensions 2 and 3. ``prec`` as ggml_mul_mat_set_prec, ``hint`` as
        ggml_mul_mat_set_hint.
        """
        self._require_product(Op.MUL_MAT, a, b)
        ne = (a.ne[1], b.ne[1], b.ne[2], b.ne[3])
        return self.op(Op.MUL_MAT, GgmlType.F32, ne, (a, b), (prec, hint))

    def _require_product(self, op: Op, a: Tensor, b: Tensor) -> None:
        fits = (
            a.ne[0] == b.ne[0]
            and 0 not in a.ne[2:]
            and b.ne[2] % a.ne[2] == 0
            and b.ne[3] % a.ne[3] == 0
        )
        require(fits, f"{op}: {a!r} and {b!r} don't fit")
        require(not a.transposed, f"{op}: {a!r} is transposed")

    def mul_mat_id(self, experts: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        """Multiply each row of ``b`` by the expert that ``ids`` names.

        The result is F32 (rows, n_used, n_tokens).

        ``experts`` (cols, rows, n_expert), ``b`` (cols, n_used or a divisor, n_tokens), ``ids`` I32
        (n_used, n_tokens).
        """
        require(not experts.transposed, f"mul_mat_id: {experts!r} is transposed")
        require(ids.type == GgmlType.I32, f"mul_mat_id: {ids!r} is not I32")
        fits = (
            experts.ne[3] == 1
            and b.ne[3] == 1
            and ids.ne[2:] == (1, 1)
            and ids.ne[1] == b.ne[2]
            and experts.ne[0] == b.ne[0]
            and b.ne[1] != 0
            and ids.ne[0] % b.ne[1] == 0
        )
        require(fits, f"mul_mat_id: {experts!r}, {b!r} and {ids!r} don't fit")
        ne = (experts.ne[1], ids.ne[0], b.ne[2])
        return self.op(Op.MUL_MAT_ID, GgmlType.F32, ne, (experts, b, ids))

    def out_prod(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum outer products over dimension 1: F32 (a.ne0, b.ne0, b.ne2, b.ne3)."""
        fits = (
            a.ne[1] == b.ne[1]
            and 0 not in a.ne[2:]
            and b.ne[2] % a.ne[2] == 0
            and b.ne[3] % a.ne[3] == 0
        )
        require(fits and not a.transposed, f"out_prod: {a!r} and {b!r} don't fit")
        return self.op(Op.OUT_PROD, GgmlType.F32, (a.ne[0], b.ne[0], b.ne[2], b.ne[3]), (a, b))

    # -- rows by index

    def get_rows(self, a: Tensor, b: Tensor) -> Tensor:
        """Return rows of ``a`` that the I32 ``b`` names, as F32 (I32 of an I32 ``a``)."""
        require(b.type == GgmlType.I32, f"get_rows: {b!r} is not I32")
        fits = a.ne[2] == b.ne[1] and a.ne[3] == b.ne[2] and b.ne[3] == 1
        require(fits, f"get_rows: {a!r} and {b!r} don't fit")
        type = GgmlType.I32 if a.type == GgmlType.I32 else GgmlType.F32
        return self.op(Op.GET_ROWS, type, (a.ne[0], *b.ne[:3]), (a, b))

    def set_rows(self, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        """Write the rows of ``b`` (F32 or F16) to the rows of ``a`` that ``ids`` names.

        ``ids`` are I64 or I32; the result is a view of ``a``.
        """
        require(b.type in (GgmlType.F32, GgmlType.F16), f"set_rows: type of {b!r}")
        require(ids.type in (GgmlType.I64, GgmlType.I32), f"set_rows: type of {ids!r}")
        fits = (
            (a.ne[0], *a.ne[2:]) == (b.ne[0], *b.ne[2:])
            and b.ne[1] == ids.ne[0]
            and 0 not in ids.ne[1:3]
            and b.ne[2] % ids.ne[1] == 0
            and b.ne[3] % ids.ne[2] == 0
            and ids.ne[3] == 1
        )
        require(fits, f"set_rows: {a!r}, {b!r} and {ids!r} don't fit")
        dense = a.contiguous_rows and b.contiguous_rows
        require(dense, f"set_rows: rows of {a!r} or {b!r} are not contiguous")
        return self.view_of(a, Op.SET_ROWS, (b, ids, a))

    # -- positions and attention

    def rope(self, a: Tensor, positions: Tensor, n_dims: int, mode: int = ROPE_NORMAL) -> Tensor:
        return self.rope_ext(a, positions, None, n_dims, mode)

    def rope_ext(
        self,
        a: Tensor,
        positions: Tensor,
        freq_factors: Tensor | None,
        n_dims: int,
        mode: int = ROPE_NORMAL,
        n_ctx_orig: int = 0,
        freq_base: float = 10000.0,
        freq_scale: float = 1.0,
        ext_factor: float = 0.0,
        attn_factor: float = 1.0,
        beta_fast: float = 0.0,
        beta_slow: float = 0.0,
        *,
        sections: tuple[int, int, int, int] = (0, 0, 0, 0),
        n_offs: int = 0,
        inplace: bool = False,
    ) -> Tensor:
        """Apply rotary positions to heads of ``a`` (head size, heads, tokens).

        ``positions`` are I32, one a token (four of the multi modes, with ``sections``, as
        ggml_rope_multi); ``freq_factors`` at least n_dims/2 F32. ``n_offs`` as
        ggml_rope_set_offset.
        """
        require(mode & 1 == 0, f"rope: mode {mode} is no longer supported")
        require(
            positions.type == GgmlType.I32 and is_vector(positions),
            f"rope: {positions!r} is no I32 vector",
        )
        multi = bool(mode & ROPE_MROPE)
        tokens = a.ne[2] * (4 if multi else 1)
        require(tokens == positions.ne[0], f"rope: {positions!r} for {tokens} positions")
        if freq_factors is not None:
            fits = freq_factors.type == GgmlType.F32 and freq_factors.ne[0] >= n_dims // 2
            require(fits, f"rope: {freq_factors!r} for {n_dims} dimensions")
        require(n_offs >= 0 and not (n_offs and mode == ROPE_VISION), f"rope: offset {n_offs}")
        params = (
            0,
            n_dims,
            mode,
            0,
            n_ctx_orig,
            *map(float, (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)),
            *(sections if multi else (0, 0, 0, 0)),
            n_offs,
        )
        return self.like(Op.ROPE, a, (a, positions, freq_factors), params, inplace=inplace)

    def flash_attn_ext(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        max_bias: float = 0.0,
        logit_softcap: float = 0.0,
        *,
        sinks: Tensor | None = None,
        prec: int = PREC_UNDEFINED,
    ) -> Tensor:
        """Do attention in one op: F32 (v.ne0, heads, tokens, batch).

        ``q`` (head size, tokens, heads, batch), ``k`` and ``v`` (head size, n_kv, kv heads, batch),
        ``mask`` F16 (n_kv, tokens or more), ``sinks`` one F32 a head.
        """
        self._require_product(Op.FLASH_ATTN_EXT, k, q)
        require(q.ne[3] == k.ne[3] == v.ne[3], f"flash_attn_ext: batches of {q!r}, {k!r}, {v!r}")
        if mask is not None:
            fits = (
                mask.type == GgmlType.F16
                and mask.contiguous
                and 0 not in mask.ne[2:]
                and q.ne[2] % mask.ne[2] == 0
                and q.ne[3] % mask.ne[3] == 0
            )
            require(fits, f"flash_attn_ext: mask {mask!r} doesn't fit {q!r}")
        require_mask_and_sinks("flash_attn_ext", q, mask, max_bias, sinks)
        return self.op(
            Op.FLASH_ATTN_EXT,
            GgmlType.F32,
            (v.ne[0], q.ne[2], q.ne[1], q.ne[3]),
            (q, k, v, mask, sinks),
            (float(scale), float(max_bias), float(logit_softcap), prec),
        )
