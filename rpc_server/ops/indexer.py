"""LIGHTNING_INDEXER: how much each token wants each position, for sparse attention."""

from __future__ import annotations

import dataclasses

from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.slices import rows_of, tiles
from rpc_server.ops.table import contract, reference, source


@contract(Op.LIGHTNING_INDEXER)
def _indexer_contract(t: Tensor) -> None:
    """Queries (E, heads, tokens, streams), keys (E, 1, positions, streams), which heads share.

    src2: weights of the heads, (heads, tokens, 1, streams). src3: mask, F16 (positions, tokens, 1,
    streams or a divisor of them, taking turns). The result is (positions, tokens, 1, streams).
    """
    q, k = checks.source(t, 0, F32_ONLY), checks.source(t, 1, DECODABLE)
    weights, mask = checks.source(t, 2, F32_ONLY), checks.source(t, 3, {GgmlType.F16})
    checks.result(t, F32_ONLY)
    size, n_heads, n_tokens, n_streams = q.ne
    n_kv = k.ne[2]
    checks.shape(k, (size, 1, n_kv, n_streams), "source 1")
    checks.shape(weights, (n_heads, n_tokens, 1, n_streams), "source 2")
    checks.shape(mask, (n_kv, n_tokens, 1, mask.ne[3]), "source 3")
    checks.whole_copies(n_streams, mask.ne[3], "streams over source 3")
    checks.shape(t, (n_kv, n_tokens, 1, n_streams), "the result")


@reference(Op.LIGHTNING_INDEXER)
def _indexer(ctx: ArrayContext, t: Tensor) -> None:
    """The weighted sum over heads of products of query and key, those below 0 left out."""
    xp, k = ctx.xp, source(t, 1)
    queries, weights, mask = ctx.f32(source(t, 0)), ctx.f32(source(t, 2)), ctx.view(source(t, 3))
    # Positions, which are in dimension 2, as rows of one matrix.
    rows = dataclasses.replace(
        k, ne=(k.ne[0], k.ne[2], 1, k.ne[3]), nb=(k.nb[0], k.nb[2], k.nb[2], k.nb[3])
    )
    size, n_heads, n_tokens, n_streams = source(t, 0).ne
    target = ctx.view(t)
    for stream in range(n_streams):
        for positions in tiles(k.ne[2], size):
            keys = ctx.f32(rows_of(rows, stream, 0, positions))[0, 0]
            for tokens in tiles(n_tokens, n_heads * len(positions)):
                at = slice(tokens.start, tokens.stop), slice(positions.start, positions.stop)
                # One product for all heads of all tokens: they share the keys.
                asked = queries[stream, at[0]].reshape(len(tokens) * n_heads, size)
                products = xp.matmul(asked, keys.T)
                xp.fmax(products, xp.float32(0), out=products)
                products = products.reshape(len(tokens), n_heads, len(positions))
                scores = xp.matmul(weights[stream, 0, at[0], None], products)[:, 0]
                target[stream, 0][at] = scores + mask[stream % len(mask), 0][at]
