"""Ops of training: losses, gradients, and the steps of optimizers."""

from __future__ import annotations

from typing import Any

from client.builder.nodes import is_vector
from client.builder.products import ProductOps
from client.tensors import require
from protocol.ggml.ops import Op, TensorFlag
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

F32 = GgmlType.F32


def _matrix(a: Tensor) -> bool:
    return a.ne[2:] == (1, 1)


class TrainingOps(ProductOps):
    """Of a gradient op the first source is the gradient of the op's result."""

    def set_param(self, a: Tensor) -> Tensor:
        """Mark a leaf as what training changes (ggml_set_param); returns it."""
        require(a.op is Op.NONE, f"set_param: {a!r} is computed")
        a.flags |= TensorFlag.PARAM
        return a

    # -- losses

    def count_equal(self, a: Tensor, b: Tensor) -> Tensor:
        """Count the elements of ``a`` and ``b`` that are the same: one I64."""
        require(a.ne == b.ne, f"count_equal: {a!r} and {b!r} differ in shape")
        return self.op(Op.COUNT_EQUAL, GgmlType.I64, (1,), (a, b))

    def cross_entropy_loss(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean loss over rows of logits ``a`` with the probabilities ``b``.

        The result is one element.
        """
        require(a.ne == b.ne, f"cross_entropy_loss: {a!r} and {b!r} differ in shape")
        return self.op(Op.CROSS_ENTROPY_LOSS, a.type, (1,), (a, b))

    def cross_entropy_loss_back(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Return the gradient of the logits ``b``, with probabilities ``c``.

        ``a`` is one element.
        """
        require(a.ne == (1, 1, 1, 1), f"cross_entropy_loss_back: {a!r} has more than one element")
        require(b.ne == c.ne, f"cross_entropy_loss_back: {b!r} and {c!r} differ in shape")
        return self.like(Op.CROSS_ENTROPY_LOSS_BACK, b, (a, b, c))

    # -- gradients

    def silu_back(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the gradient of what SILU was applied to, ``b``."""
        return self.like(Op.SILU_BACK, a, (a, b))

    def rms_norm_back(self, a: Tensor, b: Tensor, eps: float) -> Tensor:
        """Return the gradient of what RMS_NORM was applied to, ``b``."""
        return self.like(Op.RMS_NORM_BACK, a, (a, b), (float(eps),))

    def soft_max_ext_back(
        self, a: Tensor, b: Tensor, scale: float, max_bias: float, *, inplace: bool = False
    ) -> Tensor:
        """Return the gradient of SOFT_MAX, whose result is ``b``."""
        params = (float(scale), float(max_bias))
        return self.like(Op.SOFT_MAX_BACK, a, (a, b), params, inplace=inplace)

    def rope_ext_back(self, a: Tensor, positions: Tensor, *args: Any, **options: Any) -> Tensor:
        """Turn back what rope_ext with the same arguments turns (and ggml_rope_multi_back)."""
        result = self.rope_ext(a, positions, *args, **options)
        result.op = Op.ROPE_BACK
        return result

    def get_rows_back(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Add up the rows of ``a`` where the I32 ``b`` says they are from: F32 like ``c``.

        ``c``, of which only the shape counts, is what GET_ROWS was applied to.
        """
        require(_matrix(a), f"get_rows_back: {a!r} is not a matrix")
        indices = b.type == GgmlType.I32 and is_vector(b)
        require(indices, f"get_rows_back: {b!r} is no I32 vector")
        fits = _matrix(c) and a.ne[0] == c.ne[0]
        require(fits, f"get_rows_back: {a!r} are no rows of {c!r}")
        return self.op(Op.GET_ROWS_BACK, F32, c.ne[:2], (a, b))

    def repeat_back(self, a: Tensor, b: Tensor) -> Tensor:
        """Add up the copies of ``b`` that ``a`` is made of, in the shape of ``b``."""
        require(b.can_repeat_to(a), f"repeat_back: {b!r} can't be repeated to {a!r}")
        return self.op(Op.REPEAT_BACK, a.type, b.ne, (a,))

    # -- optimizers

    def opt_step_adamw(
        self, a: Tensor, grad: Tensor, m: Tensor, v: Tensor, adamw_params: Tensor
    ) -> Tensor:
        """Change ``a``, and its averages ``m`` and ``v``, in place by a step of AdamW.

        ``adamw_params`` are 7 F32: alpha, beta1, beta2, eps, weight decay and 1 / (1 - beta^step)
        of both betas.
        """
        return self._step(Op.OPT_STEP_ADAMW, (a, grad, m, v), adamw_params, 7)

    def opt_step_sgd(self, a: Tensor, grad: Tensor, sgd_params: Tensor) -> Tensor:
        """Change ``a`` in place by a step of gradient descent.

        ``sgd_params`` are 2 F32: alpha, weight decay.
        """
        return self._step(Op.OPT_STEP_SGD, (a, grad), sgd_params, 2)

    def _step(self, op: Op, tensors: tuple[Tensor, ...], params: Tensor, n_params: int) -> Tensor:
        a = tensors[0]
        require(bool(a.flags & TensorFlag.PARAM), f"{op}: {a!r} is not marked as a parameter")
        for t in tensors[1:]:
            require(t.ne == a.ne, f"{op}: {t!r} and {a!r} differ in shape")
        fits = params.type == F32 and params.nelements == n_params
        require(fits, f"{op}: {params!r} are not {n_params} F32")
        return self.like(op, a, (*tensors, params), inplace=True)
