"""Sequences of ops that models are made of: what a planner may fuse must give what the ops give.

Shapes are those of llama.cpp's graphs. Only the last results of a sequence are compared: upstream
doesn't write those in between where it fuses itself.
"""

from __future__ import annotations

from client.builder.products import ROPE_NEOX, ROPE_NORMAL
from conformance.differential.compare import PRODUCT_NMSE, Check
from conformance.differential.families.attention import cache, mask
from conformance.differential.families.rope import positions
from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import BF16, F16, F32, I32, I64
from conformance.differential.values import ValueKind
from protocol.ggml.ops import GluOp
from protocol.ggml.types import GgmlType, row_size
from protocol.tensor import Tensor

PRODUCT = Check(bound=PRODUCT_NMSE)

_EPS = (1e-6, 1e-5)
_INF = float("inf")

# Weights of each way of rounding activations.
_WEIGHTS = (
    F32,
    F16,
    BF16,
    GgmlType.Q8_0,
    GgmlType.Q4_0,
    GgmlType.Q4_1,
    GgmlType.Q4_K,
    GgmlType.Q6_K,
    GgmlType.IQ4_XS,
    GgmlType.IQ3_S,
)
_CACHES = (F16, F32, BF16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q5_1, GgmlType.IQ4_NL)


def reuse(s: Sketch, t: Tensor, *dead: Tensor) -> Tensor:
    """Let ``t`` lie perhaps in the memory of one of ``dead``, as ggml's allocator does it.

    Nothing but ``t`` itself, element by element, may read these from then on.
    """
    roots = [d for d in dead if d.view_src is None and d.nbytes >= t.nbytes]
    root = s.pick((None, *roots))
    if root is not None:
        t.view_src, t.view_offs = root, 0
    return t


def _tokens(s: Sketch) -> int:
    return s.pick((1, 1, 2, 7, s.size(40)))


def _hidden(s: Sketch, k: int, n_tokens: int) -> Tensor:
    return s.leaf(F32, (k, n_tokens), layout="dense")


# -- norms -----------------------------------------------------------------------------------------


def _normed(s: Sketch, name: str, *, residual: bool, scale: bool, bias: bool) -> None:
    """``name`` of rows (of a sum of two with ``residual``), times weights, plus a bias."""
    ne = (s.size(600), *(s.size(8) for _ in range(s.integer(1, 3))))
    x = s.leaf(F32, ne, layout="rows")
    dead = [x]
    if residual:
        y = s.leaf(F32, ne if s.flag() else s.broadcast_to(ne), layout="rows")
        x = reuse(s, s.g.add(x, y), x, y) if x.contiguous and y.contiguous else s.g.add(x, y)
        s.output(x)
        dead = []
    # A second use of the norm keeps it from vanishing in what follows.
    out = norm = reuse(s, getattr(s.g, name)(x, s.pick(_EPS)), *(d for d in dead if d.contiguous))
    if scale:
        weights = s.leaf(F32, s.pick(((ne[0],), ne, s.broadcast_to(ne))), layout="dense")
        swap = weights.ne == out.ne and s.flag()
        out = s.g.mul(weights, out) if swap else reuse(s, s.g.mul(out, weights), out)
    if bias:
        shift = s.leaf(F32, s.pick(((ne[0],), ne)), layout="dense")
        out = reuse(s, s.g.add(out, shift), out)
    s.output(out)
    if s.seldom() and norm.view_src is None and out.view_src is None:
        s.output(s.g.sqr(norm))


@family("RMS_NORM+MUL", examples=150)
def rms_norm_mul(s: Sketch, _: str) -> None:
    _normed(s, "rms_norm", residual=False, scale=True, bias=False)


@family("RMS_NORM+MUL+ADD", examples=100)
def rms_norm_mul_add(s: Sketch, _: str) -> None:
    _normed(s, "rms_norm", residual=False, scale=True, bias=True)


@family("NORM+MUL+ADD", examples=100)
def norm_mul_add(s: Sketch, _: str) -> None:
    _normed(s, "norm", residual=False, scale=True, bias=True)


@family("ADD+RMS_NORM", variants=["plain", "mul"], examples=75)
def add_rms_norm(s: Sketch, variant: str) -> None:
    _normed(s, "rms_norm", residual=True, scale=variant == "mul", bias=False)


@family("ADD chain", examples=100)
def add_chain(s: Sketch, _: str) -> None:
    """Several additions in a row, as where the outputs of experts are added up."""
    ne = (s.size(300), s.size(16), s.integer(1, 3))
    total = s.leaf(F32, ne, layout="rows")
    dead: list[Tensor] = []
    for _i in range(s.integer(2, 8)):
        part = s.leaf(F32, ne if s.flag() else (ne[0],), layout="rows")
        total = s.g.add(total, part)
        # What was added up so far is read here for the last time.
        reuse(s, total, *dead)
        dead = [total]
    s.output(total)


# -- products --------------------------------------------------------------------------------------


def _weight(s: Sketch, type: GgmlType, k: int, m: int) -> Tensor:
    return s.leaf(type, (k, m), ValueKind.NORMAL, 0.0, 0.1, layout="dense")


@family("MUL_MAT+ADD", variants=_WEIGHTS, examples=20)
def mul_mat_add(s: Sketch, type: GgmlType) -> None:
    """A bias, a residual, or both."""
    k, m, n_tokens = 256 * s.integer(1, 3), s.size(200), _tokens(s)
    out = s.g.mul_mat(_weight(s, type, k, m), _hidden(s, k, n_tokens))
    for shape in s.pick((((m,),), ((m, n_tokens),), ((m,), (m, n_tokens)))):
        other = s.leaf(F32, shape, layout="dense")
        if shape == (m, n_tokens) and s.flag():
            out = reuse(s, s.g.add(other, out), out, other)
        else:
            out = reuse(s, s.g.add(out, other), out)
    s.output(out, PRODUCT)


_GLUS = (GluOp.SWIGLU, GluOp.GEGLU, GluOp.REGLU, GluOp.GEGLU_QUICK, GluOp.GEGLU_ERF)


@family("gate up+GLU", variants=_WEIGHTS, examples=20)
def gate_up_glu(s: Sketch, type: GgmlType) -> None:
    """Norm, gate and up (in one product or two), activation, down, residual."""
    k, m, n_tokens = 256 * s.integer(1, 2), 256 * s.integer(1, 2), _tokens(s)
    x = _hidden(s, k, n_tokens)
    norm = s.g.mul(s.g.rms_norm(x, 1e-5), s.leaf(F32, (k,), layout="dense"))
    kind = s.pick(_GLUS)
    how = s.pick(("two", "two", "joined", "views", "silu mul"))
    if how in ("joined", "views"):
        both = s.g.mul_mat(_weight(s, type, k, 2 * m), norm)
        if how == "joined":
            hidden = s.g.glu(both, kind, swapped=s.flag())
        else:
            gate = s.g.view_2d(both, m, n_tokens, both.nb[1], 0)
            up = s.g.view_2d(both, m, n_tokens, both.nb[1], 4 * m)
            hidden = s.g.glu_split(gate, up, kind)
    else:
        up = s.g.mul_mat(_weight(s, type, k, m), norm)
        if s.flag():
            up = reuse(s, s.g.add(up, s.leaf(F32, (m,), layout="dense")), up)
        gate = s.g.mul_mat(_weight(s, type, k, m), norm)
        if how == "two":
            hidden = reuse(s, s.g.glu_split(gate, up, kind), gate, up)
        else:
            hidden = s.g.mul(reuse(s, s.g.silu(gate), gate), up)
    if s.flag():
        s.output(hidden, PRODUCT)
        return
    out = s.g.mul_mat(_weight(s, type, m, k), hidden)
    s.output(reuse(s, s.g.add(out, x), out, x), PRODUCT)


@family("QKV products", variants=_WEIGHTS, examples=20)
def qkv_products(s: Sketch, type: GgmlType) -> None:
    """Three products of one input, of equal or other types; perhaps with biases, norms, ROPE."""
    k, n_tokens = 256 * s.integer(1, 2), _tokens(s)
    head, n_heads = s.pick((32, 64, 80)), s.integer(1, 4)
    x = s.g.mul(s.g.rms_norm(_hidden(s, k, n_tokens), 1e-5), s.leaf(F32, (k,), layout="dense"))
    mode, turned = s.pick((ROPE_NORMAL, ROPE_NEOX)), s.flag()
    where = positions(s, n_tokens) if turned else None
    bias, norm = s.flag(), s.seldom()
    if s.seldom():
        # All three in one product, taken apart by views.
        whole = s.g.mul_mat(_weight(s, type, k, 3 * head * n_heads), x)
        step = head * n_heads * 4
        parts = [
            s.g.view_3d(whole, head, n_heads, n_tokens, head * 4, whole.nb[1], step * i)
            for i in range(3)
        ]
    else:
        parts = []
        for i, heads in enumerate((n_heads, max(n_heads // 2, 1), max(n_heads // 2, 1))):
            other = s.pick((type, type, GgmlType.Q6_K, F16)) if i == 2 else type
            part = s.g.mul_mat(_weight(s, other, k, head * heads), x)
            if bias:
                shift = s.leaf(F32, (head * heads,), layout="dense")
                part = reuse(s, s.g.add(part, shift), part)
            parts.append(s.g.reshape(part, head, heads, n_tokens))
    for i, part in enumerate(parts):
        out = part
        if norm and i < 2:
            out = s.g.mul(s.g.rms_norm(out, 1e-6), s.leaf(F32, (head,), layout="dense"))
        if where is not None and i < 2:
            out = s.g.rope(out, where, head, mode)
        s.output(out, PRODUCT)


# -- attention -------------------------------------------------------------------------------------


def _written(s: Sketch, root: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Rows of heads (head, heads, tokens) written to a cache as rows of all heads."""
    n = rows.ne[0] * rows.ne[1]
    flat = s.g.view_2d(rows, n, rows.ne[2], rows.nb[2])
    return s.g.set_rows(root, flat, ids)


@family("ROPE+SET_ROWS", variants=[F32, F16], examples=100)
def rope_set_rows(s: Sketch, type: GgmlType) -> None:
    """Keys turned and written to a cache, perhaps with their norm before."""
    head, heads, n_tokens = s.pick((32, 64, 80, 128)), s.integer(1, 4), _tokens(s)
    size = n_tokens + s.pick((0, 1, 30))
    x = s.leaf(F32, (head, heads, n_tokens), layout="rows")
    if s.flag():
        x = s.g.mul(s.g.rms_norm(x, 1e-6), s.leaf(F32, (head,), layout="dense"))
    n_dims = s.pick((head, head // 2))
    mode = s.pick((ROPE_NORMAL, ROPE_NEOX))
    factors = s.leaf(F32, (n_dims // 2,), ValueKind.UNIFORM, 0.9, 4.0, layout="dense")
    turned = s.g.rope_ext(x, positions(s, n_tokens), s.pick((None, factors)), n_dims, mode)
    ids = s.indices((n_tokens,), size, type=s.pick((I64, I32)), distinct=True)
    root = s.leaf(type, (head * heads, size), layout="dense")
    s.output(_written(s, root, turned, ids))
    if s.seldom():
        s.output(turned)


@family("KV write+FLASH_ATTN_EXT", variants=_CACHES, examples=30)
def kv_write_attention(s: Sketch, type: GgmlType) -> None:
    """A step of attention: new keys and values go to the caches, which are then read."""
    head, kv_heads, n_tokens = s.pick((64, 32, 96, 128)), s.integer(1, 3), _tokens(s)
    heads, n_kv = kv_heads * s.integer(1, 4), s.pick((32, 64, 256, 600)) + n_tokens
    size = n_kv + s.pick((0, 32))
    where = positions(s, n_tokens)
    ids = s.indices((n_tokens,), n_kv, type=I64, distinct=True)
    caches: list[Tensor] = []
    for is_key in (True, False):
        new = s.leaf(F32, (head, kv_heads, n_tokens), layout="dense")
        if is_key:
            new = s.g.rope(new, where, head, ROPE_NEOX)
        root = s.leaf(type, (head * kv_heads, size), layout="dense")
        written = _written(s, root, new, ids)
        s.output(s.g.cast(written, F32), PRODUCT)
        view = s.g.view_4d(
            root,
            head,
            kv_heads,
            n_kv,
            1,
            row_size(type, head),
            root.nb[1],
            root.nb[1] * size,
            0,
        )
        caches.append(s.g.permute(view, 0, 2, 1, 3))
    q = s.g.rope(s.leaf(F32, (head, heads, n_tokens), layout="dense"), where, head, ROPE_NEOX)
    masked = mask(s, F16, n_kv, n_tokens, 1, 1) if s.integer(0, 3) else None
    # Of random blocks of 8 bits logits would be great otherwise.
    scale = head**-0.5 * (0.25 if type in (GgmlType.Q8_0, GgmlType.IQ4_NL) else 1.0)
    out = s.g.flash_attn_ext(s.g.permute(q, 0, 2, 1, 3), caches[0], caches[1], masked, scale)
    out = s.g.reshape(out, head * heads, n_tokens)
    if s.flag():
        out = s.g.mul_mat(_weight(s, F16, head * heads, s.size(64)), out)
    s.output(out, PRODUCT)


@family("soft_max chain", variants=[F16, F32, BF16], examples=60)
def soft_max_chain(s: Sketch, type: GgmlType) -> None:
    """Attention of several ops, values transposed in the cache or not."""
    head, kv_heads, n_tokens = s.pick((64, 32, 80, 128)), s.integer(1, 3), _tokens(s)
    heads, n_kv = kv_heads * s.integer(1, 4), s.pick((32, 64, 256, 1, s.size(300)))
    q = s.g.permute(s.leaf(F32, (head, heads, n_tokens), layout="dense"), 0, 2, 1, 3)
    kq = s.g.mul_mat(cache(s, type, head, n_kv, kv_heads, 1), q, prec=10)
    if s.seldom():
        # Capped scores.
        kq = s.g.scale(s.g.tanh(s.g.scale(kq, 1.0 / 30.0)), 30.0)
    max_bias = s.pick((0.0, 0.0, 8.0))
    masked = mask(s, s.pick((F32, F16)), n_kv, n_tokens, 1, 1) if max_bias or s.flag() else None
    sinks = s.leaf(F32, (heads,), layout="dense") if s.seldom() else None
    scale = head**-0.5
    if s.flag():
        kq = reuse(s, s.g.scale(kq, scale), kq)
        scale = 1.0
    soft = s.g.soft_max_ext(kq, masked, scale, max_bias, sinks=sinks, inplace=s.flag())
    if s.flag():
        size = n_kv + s.pick((0, 32))
        root = s.leaf(type, (size, head, kv_heads), layout="dense")
        v = s.g.view_3d(root, n_kv, head, kv_heads, root.nb[1], root.nb[2], 0)
    else:
        v = s.g.cont(s.g.transpose(cache(s, type, head, n_kv, kv_heads, 1)))
    kqv = s.g.permute(s.g.mul_mat(v, soft), 0, 2, 1, 3)
    s.output(s.g.cont(kqv, head * heads, n_tokens), PRODUCT)


# -- experts ---------------------------------------------------------------------------------------


def _top(s: Sketch, values: Tensor, k: int) -> Tensor:
    order = s.g.argsort(values, descending=True)
    return s.g.view_4d(order, k, *order.ne[1:], *order.nb[1:], 0)


def _grouped(s: Sketch, scores: Tensor, groups: int, n_used: int) -> Tensor:
    """Scores with minus infinity for all experts but those of the best groups (DeepSeek's)."""
    n_experts, n_tokens = scores.ne[0], scores.ne[1]
    each = n_experts // groups
    by_group = s.g.reshape(scores, each, groups, n_tokens)
    best = _top(s, by_group, 2)
    values = s.g.get_rows(s.g.reshape(by_group, 1, each, groups, n_tokens), best)
    sums = s.g.sum_rows(s.g.reshape(values, 2, groups, n_tokens))
    chosen = _top(s, s.g.reshape(sums, groups, n_tokens), n_used)
    kept = s.g.get_rows(by_group, chosen)
    masked = s.g.set_rows(s.g.fill(by_group, -_INF), kept, chosen)
    return s.g.reshape(masked, n_experts, n_tokens)


@family("top-k MoE routing", variants=["softmax", "sigmoid", "weights", "grouped"], examples=60)
def moe(s: Sketch, gating: str) -> None:
    """Scores, choice and weights of experts, their products, and the sum of their outputs.

    Scores are far enough apart for rounding not to change the choice.
    """
    type = s.pick(_WEIGHTS)
    k, m, n_tokens = 256, s.pick((256, 512)), s.pick((1, 1, 2, 7, 33))
    n_experts = s.pick((4, 8, 16, 32))
    n_used = s.integer(1, 4)
    x = _hidden(s, k, n_tokens)
    logits = s.leaf(F32, (n_experts, n_tokens), ValueKind.DISTINCT, 0.0, 0.2, layout="dense")
    if s.flag():
        # A product that moves logits by much less than they are apart.
        gate_inp = s.leaf(F32, (k, n_experts), ValueKind.NORMAL, 0.0, 1e-4, layout="dense")
        logits = s.g.add(s.g.mul_mat(gate_inp, x), logits)
    probs = logits
    if gating == "softmax":
        probs = s.g.soft_max(logits)
    elif gating != "weights":
        probs = s.g.sigmoid(logits)
    scores = probs
    if gating == "grouped":
        scores = _grouped(s, scores, n_experts // 4 if n_experts > 8 else 2, 2)
    chosen = _top(s, scores, n_used)
    weights = s.g.get_rows(s.g.reshape(probs, 1, n_experts, n_tokens), chosen)
    if gating == "weights":
        weights = s.g.soft_max(s.g.reshape(weights, n_used, n_tokens))
        weights = s.g.reshape(weights, 1, n_used, n_tokens)
    if s.flag():
        weights = s.g.reshape(weights, n_used, n_tokens)
        total = s.g.clamp(s.g.sum_rows(weights), 6.103515625e-5, _INF)
        weights = s.g.reshape(s.g.div(weights, total), 1, n_used, n_tokens)
    if s.flag():
        weights = s.g.scale(weights, 2.5)
    s.output(weights)
    if s.seldom():
        return

    def experts(cols: int, rows: int) -> Tensor:
        return s.leaf(type, (cols, rows, n_experts), ValueKind.NORMAL, 0.0, 0.1, layout="dense")

    cur = s.g.reshape(x, k, 1, n_tokens)
    up = s.g.mul_mat_id(experts(k, m), cur, chosen)
    gate = s.g.mul_mat_id(experts(k, m), cur, chosen)
    if s.flag():
        gate = s.g.add_id(gate, s.leaf(F32, (m, n_experts), layout="dense"), chosen)
    hidden = reuse(s, s.g.glu_split(gate, up, s.pick((GluOp.SWIGLU, GluOp.GEGLU))), up)
    out = s.g.mul_mat_id(experts(m, k), hidden, chosen)
    out = reuse(s, s.g.mul(out, weights), out)
    parts = [s.g.view_2d(out, k, n_tokens, out.nb[2], i * out.nb[1]) for i in range(n_used)]
    total = parts[0]
    for part in parts[1:]:
        total = s.g.add(total, part)
    s.output(s.g.cont(total) if n_used == 1 else total, PRODUCT)


# -- state space models ----------------------------------------------------------------------------


@family("SSM step", examples=150)
def ssm_step(s: Sketch, _: str) -> None:
    """A layer of Mamba 2 but for its products: convolution, scan, gate, and both states kept."""
    d_conv, d_state, head = 4, s.pick((16, 32, 64, 128)), s.pick((16, 32, 64))
    n_heads, n_tokens, n_seqs = 2 * s.integer(1, 3), _tokens(s), s.integer(1, 3)
    groups = s.pick((1, 2))
    inner = head * n_heads
    width = inner + 2 * groups * d_state
    states = s.leaf(F32, (d_conv - 1, width, n_seqs), layout="dense")
    xbc = s.leaf(F32, (width, n_tokens, n_seqs), layout="dense")
    joined = s.g.concat(states, s.g.transpose(xbc), 0)
    last = s.g.view_3d(
        joined, d_conv - 1, width, n_seqs, joined.nb[1], joined.nb[2], n_tokens * joined.nb[0]
    )
    kept = s.leaf(F32, ((d_conv - 1) * width * n_seqs,), layout="dense")
    s.output(s.g.cpy(last, kept))
    conv = s.g.ssm_conv(
        joined, s.leaf(F32, (d_conv, width), ValueKind.NORMAL, 0.0, 0.3, layout="dense")
    )
    conv = s.g.add(conv, s.leaf(F32, (width,), layout="dense"))
    conv = reuse(s, s.g.silu(conv), conv)
    nb1, nb2 = conv.nb[1], conv.nb[2]
    x = s.g.view_4d(conv, head, n_heads, n_tokens, n_seqs, 4 * head, nb1, nb2, 0)
    shape = (d_state, groups, n_tokens, n_seqs)
    b = s.g.view_4d(conv, *shape, 4 * d_state, nb1, nb2, 4 * inner)
    c = s.g.view_4d(conv, *shape, 4 * d_state, nb1, nb2, 4 * (inner + groups * d_state))
    dt = s.leaf(F32, (n_heads, n_tokens, n_seqs), layout="dense")
    dt = s.g.add(dt, s.leaf(F32, (n_heads,), layout="dense"))
    a = s.leaf(F32, (1, n_heads), ValueKind.UNIFORM, -2.0, -0.1, layout="dense")
    old = s.leaf(F32, (d_state, head, n_heads, n_seqs + 1), layout="dense")
    ids = s.indices((n_seqs,), n_seqs + 1, distinct=True)
    scan = s.g.ssm_scan(old, x, dt, a, b, c, ids)
    new = s.g.view_1d(scan, d_state * inner * n_seqs, 4 * inner * n_tokens * n_seqs)
    s.output(s.g.cpy(new, s.leaf(F32, (d_state * inner * n_seqs,), layout="dense")))
    size = 4 * head * n_heads
    y = s.g.view_4d(scan, head, n_heads, n_tokens, n_seqs, 4 * head, size, size * n_tokens, 0)
    y = s.g.add(y, s.g.mul(x, s.leaf(F32, (1, n_heads), layout="dense")))
    z = s.leaf(F32, (inner, n_tokens, n_seqs), layout="dense")
    s.output(s.g.swiglu_split(z, s.g.reshape(y, inner, n_tokens, n_seqs)))
