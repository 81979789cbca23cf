"""Ops with a state that goes from token to token, and what models with these need besides."""

from __future__ import annotations

from collections.abc import Sequence

from client.builder.nodes import NodeFactory, is_vector
from client.tensors import require
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

F32 = GgmlType.F32

_MAX_SNAPSHOTS = (1 << 31) - 1
# DSV4_HC_COMB is made for this many streams.
_STREAMS = 4


def _contiguous(op: Op, tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        require(t.contiguous, f"{op}: {t!r} is not contiguous")


def _f32(op: Op, tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        require(t.type == F32, f"{op}: {t!r} is not F32")


def _shape(op: Op, t: Tensor, *ne: int) -> None:
    """The first dimensions are ``ne``."""
    require(t.ne[: len(ne)] == ne, f"{op}: {t!r} is not {'x'.join(map(str, ne))}")


def _matrices_follow(t: Tensor) -> bool:
    """Elements and rows are dense; matrices may have any stride."""
    return t.nb[0] == TYPE_INFO[t.type].type_size and t.nb[1] == t.ne[0] * t.nb[0]


class RecurrentOps(NodeFactory):
    """Results are F32. Where states follow the outputs, a result is both in one tensor."""

    # -- Mamba

    def ssm_conv(self, sx: Tensor, c: Tensor) -> Tensor:
        """Multiply windows of ``sx`` by the rows of ``c``: (channels, tokens, sequences).

        ``sx`` (window - 1 + tokens, channels, sequences), ``c`` (window, channels).
        """
        require(sx.ne[3] == 1, f"ssm_conv: {sx!r} has four dimensions")
        require(c.ne[2:] == (1, 1), f"ssm_conv: {c!r} is not a matrix")
        n_tokens = sx.ne[0] - c.ne[0] + 1
        fits = sx.ne[1] == c.ne[1] and n_tokens >= 0
        require(fits, f"ssm_conv: {sx!r} and {c!r} don't fit")
        return self.op(Op.SSM_CONV, F32, (c.ne[1], n_tokens, sx.ne[2]), (sx, c))

    def ssm_scan(
        self,
        s: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        ids: Tensor,
        K: int = 1,
    ) -> Tensor:
        """Return outputs like ``x``, then the last ``K`` states of each sequence, in one dimension.

        States ``s`` (S, D, heads, any), ``x`` (D, heads, tokens, sequences), ``dt`` (heads, tokens,
        sequences), ``A`` (1 or S, heads), ``B`` and ``C`` (S, groups, tokens, sequences), ``ids``
        I32 (sequences): the state that each sequence starts with.
        """
        op = Op.SSM_SCAN
        require(1 <= K <= _MAX_SNAPSHOTS, f"{op}: {K} snapshots")
        _contiguous(op, (s, dt, A))
        for t in (x, B, C):
            require(_matrices_follow(t), f"{op}: rows of {t!r} do not follow each other")
        require(B.ne == C.ne, f"{op}: {B!r} and {C!r} differ")
        require(ids.type == GgmlType.I32 and is_vector(ids), f"{op}: {ids!r} is no I32 vector")
        n_state, (dim, n_heads, n_tokens, n_sequences) = s.ne[0], x.ne
        _shape(op, dt, n_heads, n_tokens, n_sequences, 1)
        _shape(op, s, n_state, dim, n_heads)
        _shape(op, B, n_state, B.ne[1], n_tokens, n_sequences)
        _shape(op, ids, n_sequences)
        _shape(op, A, A.ne[0], n_heads, 1, 1)
        require(A.ne[0] in (1, n_state), f"{op}: {A!r} for {n_state} elements of state")
        require(A.ne[0] == 1 or K == 1, f"{op}: {K} snapshots with {A!r}")
        size = x.nelements + K * n_state * dim * n_heads * n_sequences
        return self.op(op, F32, (size,), (s, x, dt, A, B, C, ids), (K,))

    # -- linear attentions

    def rwkv_wkv6(
        self, k: Tensor, v: Tensor, r: Tensor, tf: Tensor, td: Tensor, state: Tensor
    ) -> Tensor:
        """Do as :meth:`gated_linear_attn`; ``tf`` has one row a head for all tokens."""
        _contiguous(Op.RWKV_WKV6, (tf,))
        self._require_rows(Op.RWKV_WKV6, (k, v, r, td), state)
        return self._linear(Op.RWKV_WKV6, (k, v, r, tf, td, state))

    def rwkv_wkv7(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
    ) -> Tensor:
        """Do as :meth:`gated_linear_attn`."""
        self._require_rows(Op.RWKV_WKV7, (r, w, k, v, a, b), state)
        return self._linear(Op.RWKV_WKV7, (r, w, k, v, a, b, state))

    def gated_linear_attn(
        self, k: Tensor, v: Tensor, q: Tensor, g: Tensor, state: Tensor, scale: float
    ) -> Tensor:
        """Return (S * heads, tokens + S * sequences): the tokens' outputs, then the states.

        Sources are (S, heads, tokens), the state S * S * heads elements for each of its
        ``ne[1]`` sequences.
        """
        self._require_rows(Op.GATED_LINEAR_ATTN, (k, v, q, g), state)
        return self._linear(Op.GATED_LINEAR_ATTN, (k, v, q, g, state), (float(scale),))

    def _require_rows(self, op: Op, rows: Sequence[Tensor], state: Tensor) -> None:
        _contiguous(op, (*rows, state))
        size, n_heads, n_tokens = rows[0].ne[:3]
        for t in rows:
            _shape(op, t, size, n_heads, n_tokens)
        expected = size * size * n_heads * state.ne[1]
        require(state.nelements == expected, f"{op}: {state!r} has not {expected} elements")

    def _linear(
        self, op: Op, sources: Sequence[Tensor], params: Sequence[int | float] = ()
    ) -> Tensor:
        size, n_heads, n_tokens = sources[0].ne[:3]
        ne = (size * n_heads, n_tokens + size * sources[-1].ne[1])
        return self.op(op, F32, ne, sources, params)

    def gated_delta_net(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        K: int = 1,
    ) -> Tensor:
        """Return (S * heads, tokens * sequences + K * S * sequences): outputs, then ``K`` states.

        ``v`` (S, heads, tokens, sequences); ``g`` has 1 or S gates where ``beta`` has one rate;
        ``state`` (S, S, heads, sequences) before the first token. The latest state comes first.
        """
        op = Op.GATED_DELTA_NET
        for t in (q, k, v):
            require(t.contiguous_rows, f"{op}: rows of {t!r} are not contiguous")
        _contiguous(op, (g, beta, state))
        _f32(op, (q, k, v, g, beta, state))
        size, n_heads, n_tokens, n_sequences = v.ne
        require(g.ne[0] in (1, size), f"{op}: {g!r} for {size} elements")
        _shape(op, beta, 1)
        _shape(op, state, size, size, n_heads, n_sequences)
        require(1 <= K <= _MAX_SNAPSHOTS, f"{op}: {K} snapshots")
        ne = (size * n_heads, n_tokens * n_sequences + K * size * n_sequences)
        return self.op(op, F32, ne, (q, k, v, g, beta, state), (K,))

    def solve_tri(
        self, a: Tensor, b: Tensor, *, left: bool = True, lower: bool = True, uni: bool = False
    ) -> Tensor:
        """Return X of A X = B with ``a`` lower triangular; ggml has no other variants yet."""
        _f32(Op.SOLVE_TRI, (a, b))
        square = a.ne[0] == a.ne[1]
        require(square and a.ne[1:] == b.ne[1:], f"{Op.SOLVE_TRI}: {a!r} and {b!r} don't fit")
        _contiguous(Op.SOLVE_TRI, (a, b))
        require(lower and left and not uni, f"{Op.SOLVE_TRI}: only lower, left and not uni")
        return self.op(Op.SOLVE_TRI, F32, b.ne, (a, b))

    # -- DeepSeek's sparse attention and hyper connections

    def lightning_indexer(self, q: Tensor, k: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """Return how much tokens want positions: (positions, tokens, 1, streams).

        ``q`` (E, heads, tokens, streams), ``k`` (E, 1, positions, streams), ``weights`` (heads,
        tokens, 1, streams), ``mask`` F16 (positions, tokens, 1, streams or a divisor).
        """
        op = Op.LIGHTNING_INDEXER
        _f32(op, (q, weights))
        require(mask.type == GgmlType.F16, f"{op}: {mask!r} is not F16")
        size, n_heads, n_tokens, n_streams = q.ne
        _shape(op, k, size, 1, k.ne[2], n_streams)
        _shape(op, weights, n_heads, n_tokens, 1, n_streams)
        _shape(op, mask, k.ne[2], n_tokens, 1)
        require(mask.ne[3] > 0 and n_streams % mask.ne[3] == 0, f"{op}: {mask!r} for {q!r}")
        return self.op(op, F32, (k.ne[2], n_tokens, 1, n_streams), (q, k, weights, mask))

    def dsv4_hc_comb(
        self, mixes: Tensor, scale: Tensor, base: Tensor, eps: float, n_iter: int
    ) -> Tensor:
        """Return how streams are mixed, of the last 16 of ``mixes`` (24, tokens): (4, 4, tokens).

        ``scale`` (3 or more) and ``base`` (24) are vectors.
        """
        op = Op.DSV4_HC_COMB
        _f32(op, (mixes, scale, base))
        require(n_iter > 0, f"{op}: {n_iter} rounds")
        n_mixes = (2 + _STREAMS) * _STREAMS
        _shape(op, mixes, n_mixes, mixes.ne[1], 1, 1)
        require(is_vector(scale) and scale.ne[0] >= 3, f"{op}: {scale!r} is no vector of 3")
        _shape(op, base, n_mixes, 1, 1, 1)
        ne = (_STREAMS, _STREAMS, mixes.ne[1])
        return self.op(op, F32, ne, (mixes, scale, base), (float(eps), n_iter))

    def dsv4_hc_pre(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum the streams of ``x`` (E, streams, tokens) with their weights: (E, tokens).

        ``weights`` (streams, tokens).
        """
        return self._hc_pre(x, weights, 1.0, gated=False)

    def dsv4_hc_pre_gated(self, x: Tensor, gate: Tensor, scale: float) -> Tensor:
        """Do as :meth:`dsv4_hc_pre` with a gate for each element, and scaled."""
        return self._hc_pre(x, gate, scale, gated=True)

    def _hc_pre(self, x: Tensor, weights: Tensor, scale: float, *, gated: bool) -> Tensor:
        op = Op.DSV4_HC_PRE
        _f32(op, (x, weights))
        size, n_streams, n_tokens, _ = x.ne
        require(n_streams > 0 and x.ne[3] == 1, f"{op}: {x!r} are no streams")
        if gated:
            _shape(op, weights, size, n_streams, n_tokens, 1)
        else:
            _shape(op, weights, n_streams, n_tokens, 1, 1)
        return self.op(op, F32, (size, n_tokens), (x, weights), (float(scale), int(gated)))

    def dsv4_hc_post(
        self, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor | None = None
    ) -> Tensor:
        """Mix the streams ``residual`` and add ``x`` to each: (E, streams, tokens).

        ``x`` (E, tokens), ``post`` (streams, tokens): how much of it; ``comb`` (streams to, streams
        from, tokens), without which streams are not mixed.
        """
        op = Op.DSV4_HC_POST
        _f32(op, (x, residual, post))
        size, n_tokens = x.ne[:2]
        n_streams = residual.ne[1]
        require(n_streams > 0, f"{op}: {residual!r} has no streams")
        _shape(op, x, size, n_tokens, 1, 1)
        _shape(op, residual, size, n_streams, n_tokens, 1)
        _shape(op, post, n_streams, n_tokens, 1, 1)
        if comb is not None:
            _f32(op, (comb,))
            _shape(op, comb, n_streams, n_streams, n_tokens, 1)
        return self.op(op, F32, (size, n_streams, n_tokens), (x, residual, post, comb))
