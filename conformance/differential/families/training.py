"""Losses, the steps of optimizers, and the gradients that no op's own family covers."""

from __future__ import annotations

from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import F32
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.tensor import Dims, Tensor

# -- CROSS_ENTROPY_LOSS, CROSS_ENTROPY_LOSS_BACK ---------------------------------------------------


def _predictions(s: Sketch, layout: str) -> tuple[Tensor, Tensor]:
    """Logits and labels. No label is negative: the loss has nothing that cancels out."""
    ne = s.shape(s.pick((256, 4096, 16384)))
    low, high = s.pick(((0.0, 1.0), (-3.0, 10.0), (0.0, 200.0)))
    logits = s.leaf(
        F32, ne, (ValueKind.NORMAL, ValueKind.CONSTANT, ValueKind.UNIFORM), low, high, layout=layout
    )
    return logits, s.leaf(F32, ne, (ValueKind.UNIFORM, ValueKind.INTEGERS), 0.0, 1.0, layout=layout)


@family(Op.CROSS_ENTROPY_LOSS, examples=300)
def _cross_entropy_loss(s: Sketch, _: str) -> None:
    s.output(s.g.cross_entropy_loss(*_predictions(s, "even")))


@family(Op.CROSS_ENTROPY_LOSS_BACK, examples=300)
def _cross_entropy_loss_back(s: Sketch, _: str) -> None:
    logits, labels = _predictions(s, "contiguous")
    gradient = s.leaf(F32, (1,), ValueKind.UNIFORM, 0.5, 2.0, layout="contiguous")
    s.output(s.g.cross_entropy_loss_back(gradient, logits, labels))


# -- OPT_STEP_ADAMW, OPT_STEP_SGD ------------------------------------------------------------------


class _Likes:
    """Tensors of one shape and the same strides: upstream steps through all by those of one."""

    def __init__(self, s: Sketch) -> None:
        self._s = s
        self.ne: Dims = s.shape(s.pick((256, 4096)))
        self._pad = 0 if s.flag() else s.integer(0, 5)

    def draw(self, kinds: tuple[ValueKind, ...], low: float, high: float) -> Tensor:
        n0, *outer = self.ne
        g = self._s.g
        root = self._s.leaf(F32, (n0 + self._pad, *outer), kinds, low, high, layout="dense")
        _, nb1, nb2, nb3 = root.nb
        start = 4 * min(self._pad, 2) if root.nelements else 0
        return g.view_4d(root, *self.ne, nb1, nb2, nb3, start) if self._pad else root


_NUMBERS = (ValueKind.NORMAL, ValueKind.NORMAL, ValueKind.UNIFORM, ValueKind.SPECIAL)


@family(Op.OPT_STEP_ADAMW, examples=300)
def _opt_step_adamw(s: Sketch, _: str) -> None:
    like = _Likes(s)
    weights, gradient, mean = (like.draw(_NUMBERS, 0.0, 1.0) for _ in range(3))
    square = like.draw((ValueKind.UNIFORM, ValueKind.CONSTANT), 0.0, 1.0)
    settings = s.leaf(F32, (7,), ValueKind.UNIFORM, 0.0625, 1.0, layout="contiguous")
    # ggml's constructor wants a leaf that is marked as a parameter; a server can't tell.
    t = s.g.like(
        Op.OPT_STEP_ADAMW, weights, (weights, gradient, mean, square, settings), inplace=True
    )
    for output in (t, mean, square):
        s.output(output)


@family(Op.OPT_STEP_SGD, examples=350)
def _opt_step_sgd(s: Sketch, _: str) -> None:
    like = _Likes(s)
    weights, gradient = (like.draw(_NUMBERS, 0.0, 1.0) for _ in range(2))
    settings = s.leaf(
        F32, (2,), (ValueKind.UNIFORM, ValueKind.CONSTANT), 0.0, 1.0, layout="contiguous"
    )
    s.output(s.g.like(Op.OPT_STEP_SGD, weights, (weights, gradient, settings), inplace=True))


# -- FLASH_ATTN_BACK -------------------------------------------------------------------------------


@family(Op.FLASH_ATTN_BACK, variants=["causal", "whole"], examples=120)
def _flash_attn_back(s: Sketch, mask: str) -> None:
    """ggml's constructor of the node is switched off; this is what it made."""
    size, n_tokens = s.pick((64, 32, 1, 3, 20, 80)), s.integer(1, 20)
    n_kv = n_tokens + s.pick((0, 1, s.integer(0, 40)))
    kv_heads = s.integer(1, 3)
    # Upstream places gradients of later batches by the number of heads: outside of the result.
    repeats, batches = s.pick(((1, 1), (1, 2), (1, 3), (2, 1), (3, 1)))
    shape = (size, n_tokens, kv_heads * repeats, batches)
    high = s.pick((1.0, 0.25))
    q = s.leaf(F32, shape, high=high, layout="rows")
    k = s.leaf(F32, (size, n_kv, kv_heads, batches), high=high, layout="rows")
    v = s.leaf(F32, (n_kv, size, kv_heads, batches), layout="rows")
    gradient = s.leaf(F32, shape, layout="any")
    # Each gradient starts at a multiple of 16 bytes. What lies between is zeroed.
    n = sum(-(-t.nelements // 4) * 4 for t in (q, k, v))
    params = (int(mask == "causal"),)
    s.output(s.g.op(Op.FLASH_ATTN_BACK, F32, (n,), (q, k, v, gradient), params))
