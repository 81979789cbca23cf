"""Lowerings of gradients, losses, and the steps of optimizers."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel, kernels
from rpc_server.devices.cuda.lower.walk import as_floats, elements
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.ops.table import source

# A thread for each element.
_ELEMENTS = {
    Op.SILU_BACK: kernel("back", "silu_back"),
    Op.REPEAT_BACK: kernel("back", "repeat_back"),
    Op.OPT_STEP_ADAMW: kernel("back", "adamw"),
    Op.OPT_STEP_SGD: kernel("back", "sgd"),
    Op.GET_ROWS_BACK: kernel("back", "get_rows_back"),
}
# A block for each row.
_ROWS = {
    Op.RMS_NORM_BACK: kernel("back", "rms_norm_back"),
    Op.SOFT_MAX_BACK: kernel("back", "soft_max_back"),
    Op.CROSS_ENTROPY_LOSS_BACK: kernel("back", "cross_entropy_back"),
}
_OUT_PROD, _LOSS_ROWS, _LOSS_MEAN = kernels(
    "back", "out_prod cross_entropy_rows cross_entropy_mean"
)


@lowers(*_ELEMENTS)
def lower_elements(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_ELEMENTS[t.op], t, planner)


@lowers(*_ROWS)
def lower_rows(t: Tensor, planner: CudaPlanner) -> bool:
    return planner.each_row(_ROWS[t.op], t, t.nrows, t.ne[0])


@lowers(Op.OUT_PROD)
def lower_out_prod(t: Tensor, planner: CudaPlanner) -> bool:
    a = as_floats(source(t, 0), planner)
    return elements(_OUT_PROD, t, planner, slots=(t, a, t.src[1]))


@lowers(Op.CROSS_ENTROPY_LOSS)
def lower_loss(t: Tensor, planner: CudaPlanner) -> bool:
    logits = source(t, 0)
    losses = planner.scratch(8 * max(logits.nrows, 1))
    if logits.nrows:
        planner.each_row(_LOSS_ROWS, t, logits.nrows, logits.ne[0], extra=(losses,))
    planner.launch(_LOSS_MEAN, t, (1,), 256, extra=(losses, logits.nrows))
    return True
