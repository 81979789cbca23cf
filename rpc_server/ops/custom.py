"""MAP_CUSTOM* and CUSTOM: a function of the client's own, which no other process can call."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.ops.table import contract, refuse


@contract(Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM)
def _no_function_here(t: Tensor) -> None:
    refuse("its op_params are a function pointer of the client's process, which can't run here")
