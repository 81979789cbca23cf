"""Lowerings of the CUDA device, a file for each family of ops; importing this registers all."""

from rpc_server.devices.cuda.lower import (
    attention,
    back,
    convolution,
    copy,
    elementwise,
    fill,
    fused,
    matmul,
    move,
    norm,
    recurrent,
    reduce,
    rope,
    rows,
    softmax,
    streams,
)

__all__ = [
    "attention",
    "back",
    "convolution",
    "copy",
    "elementwise",
    "fill",
    "fused",
    "matmul",
    "move",
    "norm",
    "recurrent",
    "reduce",
    "rope",
    "rows",
    "softmax",
    "streams",
]
