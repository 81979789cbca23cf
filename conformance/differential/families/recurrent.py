"""Ops with a state that goes from token to token, and those of sparse attention."""

from __future__ import annotations

import math

from conformance.differential.compare import Check
from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import BF16, DECODABLE, F16, F32
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

_NUMBERS = (ValueKind.NORMAL, ValueKind.NORMAL, ValueKind.SPECIAL)
# Where there are many sources: one that isn't finite spoils most of the result.
_SELDOM_SPECIAL = (*[ValueKind.NORMAL] * 9, ValueKind.SPECIAL)


def _count(s: Sketch, options: tuple[int, ...]) -> int:
    """One of ``options``, or none at all."""
    return 0 if s.seldom() and s.seldom() else s.pick(options)


# -- SSM_CONV, SSM_SCAN ----------------------------------------------------------------------------


@family(Op.SSM_CONV, examples=300)
def _ssm_conv(s: Sketch, _: str) -> None:
    window, tokens = s.pick((4, 1, 2, 3, 5, 9)), _count(s, (1, 2, 3, 4, 5, 8, 33))
    channels, sequences = s.size(300), _count(s, (1, 2, 3, 4))
    x = s.leaf(F32, (window - 1 + tokens, channels, sequences), _NUMBERS, layout="planes")
    weights = s.leaf(F32, (window, channels), _NUMBERS, layout="contiguous")
    s.output(s.g.ssm_conv(x, weights))


# Decays are one for an element of state (Mamba) or one for a head (Mamba 2, of which more than the
# last state can be kept).
@family(Op.SSM_SCAN, variants=["elements", "heads", "snapshots"], examples=120)
def _ssm_scan(s: Sketch, decays: str) -> None:
    n_state = s.pick((16, 128, 64, 32, 256, 1, 7, 20, 100))
    dim = s.pick((1, 64, 2, 3, 16, 80))
    most = max(20000 // (n_state * dim), 1)
    groups = s.pick((1, 1, 2, 3, min(8, most)))
    n_heads = groups * s.integer(1, max(min(most // groups, 12), 1))
    n_tokens, n_sequences = s.pick((1, 2, 3, 5, 8)), s.integer(1, 3)
    n_states = s.integer(1, 5)
    shape = (n_state, dim, n_heads, n_states)
    states = s.leaf(F32, shape, (*_SELDOM_SPECIAL, ValueKind.CONSTANT), layout="contiguous")
    x = s.leaf(F32, (dim, n_heads, n_tokens, n_sequences), _SELDOM_SPECIAL, layout="planes")
    low, high = s.pick(((-3.0, 3.0), (-20.0, -10.0), (0.0, 1.0), (18.0, 22.0)))
    steps = (n_heads, n_tokens, n_sequences)
    dt = s.leaf(F32, steps, ValueKind.UNIFORM, low, high, layout="contiguous")
    a = s.leaf(
        F32,
        (n_state if decays == "elements" else 1, n_heads),
        ValueKind.UNIFORM,
        s.pick((-1.0, -16.0, -0.0625)),
        0.0,
        layout="contiguous",
    )
    inner = (n_state, groups, n_tokens, n_sequences)
    b, c = (s.leaf(F32, inner, _SELDOM_SPECIAL, layout="planes") for _ in "BC")
    ids = s.indices((n_sequences,), n_states, layout="contiguous")
    # Of more snapshots than tokens those of before are left as they are.
    kept = s.integer(2, n_tokens + 2) if decays == "snapshots" else 1
    # ggml's bounds for these.
    bound = Check(bound=2e-7 if dim > 1 else 1e-7)
    s.output(s.g.ssm_scan(states, x, dt, a, b, c, ids, kept), bound)


# -- RWKV_WKV6, RWKV_WKV7, GATED_LINEAR_ATTN -------------------------------------------------------


class _Heads:
    """Sources of a linear attention: rows of heads, and a state for each sequence."""

    def __init__(self, s: Sketch, sizes: tuple[int, ...], *, finite: bool = False) -> None:
        self._s = s
        self._kinds = (ValueKind.NORMAL,) if finite else _SELDOM_SPECIAL
        self.size = s.pick(sizes)
        self.n_heads = s.integer(1, max(min(20000 // self.size**2, 5), 1))
        self.n_sequences = s.integer(1, 3)
        self.n_tokens = self.n_sequences * s.integer(1, 7)

    def rows(self) -> Tensor:
        """Numbers that keep states from growing."""
        shape = (self.size, self.n_heads, self.n_tokens)
        high = 1 / math.sqrt(self.size)
        return self._s.leaf(F32, shape, self._kinds, high=high, layout="contiguous")

    def decays(self) -> Tensor:
        shape = (self.size, self.n_heads, self.n_tokens)
        return self._s.leaf(F32, shape, ValueKind.UNIFORM, 0.0, 1.0, layout="contiguous")

    def shared(self) -> Tensor:
        return self._s.leaf(F32, (self.size, self.n_heads), layout="contiguous")

    def states(self) -> Tensor:
        shape = (self.size**2 * self.n_heads, self.n_sequences)
        return self._s.leaf(F32, shape, (*self._kinds, ValueKind.CONSTANT), layout="contiguous")


_SIZES = (64, 32, 16, 128, 8, 1, 3, 20, 33)


@family(Op.RWKV_WKV6, examples=300)
def _rwkv_wkv6(s: Sketch, _: str) -> None:
    # Upstream multiplies what a token adds by its factors one after the other, each element of it:
    # with an infinity that is another number than the formula's.
    of = _Heads(s, _SIZES, finite=True)
    k, v, r = (of.rows() for _ in "kvr")
    s.output(s.g.rwkv_wkv6(k, v, r, of.shared(), of.decays(), of.states()))


@family(Op.RWKV_WKV7, examples=400)
def _rwkv_wkv7(s: Sketch, _: str) -> None:
    # Upstream works on 64 elements at once (on some processors 32), whatever a head has.
    of = _Heads(s, (64, 128))
    r, w = of.rows(), of.decays()
    k, v, a, b = (of.rows() for _ in "kvab")
    s.output(s.g.rwkv_wkv7(r, w, k, v, a, b, of.states()))


@family(Op.GATED_LINEAR_ATTN, examples=300)
def _gated_linear_attn(s: Sketch, _: str) -> None:
    of = _Heads(s, _SIZES)
    k, v, q = (of.rows() for _ in "kvq")
    scale = s.pick((0.125, 1.0, s.real(0.0, 2.0)))
    s.output(s.g.gated_linear_attn(k, v, q, of.decays(), of.states(), scale))


# -- GATED_DELTA_NET -------------------------------------------------------------------------------


@family(Op.GATED_DELTA_NET, variants=["head", "elements"], examples=175)
def _gated_delta_net(s: Sketch, gate: str) -> None:
    size = s.pick((64, 128, 32, 16, 1, 3, 20, 33))
    key_heads = s.integer(1, 3)
    n_heads = key_heads * s.integer(1, 3) if s.flag() else s.integer(1, 7)
    key_sequences = s.integer(1, 2)
    n_sequences = key_sequences * s.integer(1, 2)
    n_tokens = _count(s, (1, 2, 3, 4, 5, 6, 7, 9))
    v_shape = (size, n_heads, n_tokens, n_sequences)
    q_shape = (size, key_heads, n_tokens, key_sequences)
    high = 1 / math.sqrt(size)
    q, k = (s.leaf(F32, q_shape, _SELDOM_SPECIAL, high=high, layout="rows") for _ in "qk")
    v = s.leaf(F32, v_shape, _SELDOM_SPECIAL, layout="rows")
    outer = v_shape[1:]
    gates = (size if gate == "elements" else 1, *outer)
    g = s.leaf(F32, gates, ValueKind.UNIFORM, s.pick((-1.0, -20.0)), 0.0, layout="contiguous")
    beta = s.leaf(F32, (1, *outer), ValueKind.UNIFORM, 0.0, 1.0, layout="contiguous")
    state = s.leaf(
        F32,
        (size, size, n_heads, n_sequences),
        (*_SELDOM_SPECIAL, ValueKind.CONSTANT),
        layout="contiguous",
    )
    # Of more snapshots than tokens those of before are left as they are.
    kept = s.pick((1, 1, 2, max(n_tokens, 1), n_tokens + 1))
    s.output(s.g.gated_delta_net(q, k, v, g, beta, state, kept))


# -- SOLVE_TRI -------------------------------------------------------------------------------------


@family(Op.SOLVE_TRI, examples=250)
def _solve_tri(s: Sketch, _: str) -> None:
    n, k = s.size(64), s.size(70)
    batches = (s.integer(1, 4), s.integer(1, 3))
    # A diagonal that outweighs the rest: of other systems every rounding is in the solution.
    rest = s.leaf(F32, (n, n, *batches), ValueKind.UNIFORM, -0.25, 0.25, layout="contiguous")
    diagonal = s.leaf(F32, (n, 1, *batches), ValueKind.UNIFORM, 1.5, 3.0, layout="contiguous")
    b = s.leaf(
        F32, (k, n, *batches), (ValueKind.NORMAL, ValueKind.CONSTANT), 1.0, layout="contiguous"
    )
    s.output(s.g.solve_tri(s.g.add(rest, s.g.diag(diagonal)), b))


# -- LIGHTNING_INDEXER -----------------------------------------------------------------------------

# ggml's bound for it.
_INDEXER = Check(bound=1e-6)


@family(Op.LIGHTNING_INDEXER, variants=[F32, F16, BF16, *DECODABLE], examples=16)
def _lightning_indexer(s: Sketch, type: GgmlType) -> None:
    block = TYPE_INFO[type].block_size
    size = s.pick((128, 64, 32, 256)) if block == 1 else block * s.pick((1, 2, 4))
    if block == 1 and s.seldom():
        size = s.pick((1, 3, 33))
    n_heads, n_tokens = _count(s, (1, 2, 5, 64)), _count(s, (1, 2, 3, 8))
    n_kv = 0 if s.seldom() and s.seldom() else s.size(100)
    masks = s.integer(1, 2)
    n_streams = masks * s.integer(1, 2)
    plain = block == 1 and s.seldom()
    kinds = (ValueKind.SPECIAL,) if plain else (ValueKind.NORMAL,)
    q = s.leaf(F32, (size, n_heads, n_tokens, n_streams), kinds, layout="rows")
    k = s.leaf(type, (size, 1, n_kv, n_streams), kinds, layout="rows")
    weights = s.leaf(F32, (n_heads, n_tokens, 1, n_streams), kinds, layout="rows")
    numbers = (ValueKind.MASK, ValueKind.NORMAL, ValueKind.CONSTANT)
    mask = s.leaf(F16, (n_kv, n_tokens, 1, masks), numbers, layout="rows")
    s.output(s.g.lightning_indexer(q, k, weights, mask), _INDEXER)


# -- DSV4_HC_COMB, DSV4_HC_PRE, DSV4_HC_POST -------------------------------------------------------

_TOKENS = (1, 2, 3, 7, 9, 33)


@family(Op.DSV4_HC_COMB, examples=250)
def _dsv4_hc_comb(s: Sketch, _: str) -> None:
    mixes = s.leaf(F32, (24, _count(s, _TOKENS)), high=s.pick((1.0, 4.0)))
    scale = s.leaf(F32, (s.pick((3, 4, 5)),))
    base = s.leaf(F32, (24,))
    eps = s.pick((1e-6, 1e-2, 1e-5))
    s.output(s.g.dsv4_hc_comb(mixes, scale, base, eps, s.pick((20, 1, 2, 3))))


@family(Op.DSV4_HC_PRE, variants=["weights", "gates"], examples=125)
def _dsv4_hc_pre(s: Sketch, of: str) -> None:
    size, n_streams, n_tokens = s.size(300), s.pick((4, 1, 2, 3, 8)), _count(s, _TOKENS)
    x = s.leaf(F32, (size, n_streams, n_tokens), _NUMBERS)
    if of == "weights":
        s.output(s.g.dsv4_hc_pre(x, s.leaf(F32, (n_streams, n_tokens), _NUMBERS)))
        return
    high = s.pick((1.0, 40.0))
    gates = s.leaf(F32, (size, n_streams, n_tokens), _NUMBERS, high=high)
    s.output(s.g.dsv4_hc_pre_gated(x, gates, s.pick((1.0, 0.0, s.real(-2.0, 2.0)))))


@family(Op.DSV4_HC_POST, variants=["mixed", "apart"], examples=125)
def _dsv4_hc_post(s: Sketch, streams: str) -> None:
    size, n_streams, n_tokens = s.size(300), s.pick((4, 1, 2, 3, 8)), _count(s, _TOKENS)
    x = s.leaf(F32, (size, n_tokens), _NUMBERS)
    residual = s.leaf(F32, (size, n_streams, n_tokens), _NUMBERS)
    post = s.leaf(F32, (n_streams, n_tokens), _NUMBERS)
    comb = None
    if streams == "mixed":
        comb = s.leaf(F32, (n_streams, n_streams, n_tokens), _NUMBERS)
    s.output(s.g.dsv4_hc_post(x, residual, post, comb))
