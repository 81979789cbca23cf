"""Every structure of the wire, declared with construct; all little-endian and packed.

A message's declaration is independent of its command and of the protocol version: ``dialects`` says
which command of which version uses which. From the declaration of ``rpc_tensor`` a numpy dtype is
derived, so that the thousand tensors of a graph are read as one array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from construct import (
    Array,
    Bytes,
    Construct,
    FormatField,
    Int8ul,
    Int32sl,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
)

MAX_DIMS = 4
MAX_SOURCES = 10
MAX_PARAM_WORDS = 16
# GGML_MAX_NAME as ggml has it, and as programs compile it that need longer names
# (stable-diffusion.cpp): nothing else of the wire differs.
MAX_NAME = 64
NAME_SIZES = (MAX_NAME, 128)
CONN_CAPS_SIZE = 24


def _rpc_tensor(name_size: int) -> Any:
    """Declare rpc_tensor of ggml-rpc.cpp.

    Its last four bytes were padding (sent as zero) before protocol 5.1.
    """
    return Struct(
        "id" / Int64ul,
        "type" / Int32ul,
        "buffer" / Int64ul,
        "ne" / Array(MAX_DIMS, Int32ul),
        "nb" / Array(MAX_DIMS, Int32ul),
        "op" / Int32ul,
        "op_params" / Array(MAX_PARAM_WORDS, Int32sl),
        "flags" / Int32sl,
        "src" / Array(MAX_SOURCES, Int64ul),
        "view_src" / Int64ul,
        "view_offs" / Int64ul,
        "data" / Int64ul,
        "name" / Bytes(name_size),
        "use_count" / Int32sl,
    )


# By the size of a name, bytes.
RPC_TENSORS = {size: _rpc_tensor(size) for size in NAME_SIZES}
RpcTensor = RPC_TENSORS[MAX_NAME]


def _numpy_field(field: Any) -> tuple[Any, tuple[int, ...]]:
    """numpy format and shape of one construct field."""
    if isinstance(field, Array):
        inner, shape = _numpy_field(field.subcon)
        return inner, (int(field.count), *shape)
    if isinstance(field, FormatField):
        # struct's letters have other sizes in numpy: go by signedness and length.
        kind = "i" if field.fmtstr[-1].islower() else "u"
        return np.dtype(f"{field.fmtstr[0]}{kind}{field.length}"), ()
    return np.dtype(f"S{field.sizeof()}"), ()


def numpy_dtype(struct: Any) -> np.dtype[Any]:
    """Return the packed structured dtype with the layout of a construct Struct of fixed size.

    Raises TypeError where that would have another size.
    """
    fields = [(field.name, *_numpy_field(field.subcon)) for field in struct.subcons]
    dtype = np.dtype(fields)
    if dtype.itemsize != struct.sizeof():
        raise TypeError(f"dtype of {dtype.itemsize} bytes for a struct of {struct.sizeof()}")
    return dtype


RPC_TENSOR_DTYPES = {size: numpy_dtype(tensor) for size, tensor in RPC_TENSORS.items()}
RPC_TENSOR_DTYPE = RPC_TENSOR_DTYPES[MAX_NAME]
RPC_TENSOR_SIZE = RPC_TENSOR_DTYPE.itemsize


def with_names(declaration: Any, size: int) -> Any:
    """Return a message's declaration with names of ``size`` bytes in its tensors."""
    if declaration in RPC_TENSORS.values():
        return RPC_TENSORS[size]
    if isinstance(declaration, Array):
        inner = with_names(declaration.subcon, size)
        return declaration if inner is declaration.subcon else Array(declaration.count, inner)
    if not isinstance(declaration, Struct):
        return declaration
    fields = [with_names(f.subcon, size) if f.name else f for f in declaration.subcons]
    pairs = list(zip(fields, declaration.subcons, strict=True))
    if all(new is (f.subcon if f.name else f) for new, f in pairs):
        return declaration
    return Struct(*(f.name / new if f.name else new for new, f in pairs))


Empty = Struct()

HelloRequest = Struct("conn_caps" / Bytes(CONN_CAPS_SIZE))
HelloResponse1 = Struct("major" / Int8ul, "minor" / Int8ul, "patch" / Int8ul)
HelloResponse4 = Struct(
    "major" / Int8ul,
    "minor" / Int8ul,
    "patch" / Int8ul,
    Padding(1),
    "conn_caps" / Bytes(CONN_CAPS_SIZE),
)

DeviceCountResponse = Struct("device_count" / Int32ul)

DeviceRequest = Struct("device" / Int32ul)

AllocBufferRequest = Struct("device" / Int32ul, "size" / Int64ul)
AllocBufferRequest1 = Struct("size" / Int64ul)
AllocBufferResponse = Struct("remote_ptr" / Int64ul, "remote_size" / Int64ul)

GetAlignmentResponse = Struct("alignment" / Int64ul)
GetMaxSizeResponse = Struct("max_size" / Int64ul)
GetDeviceMemoryResponse = Struct("free_mem" / Int64ul, "total_mem" / Int64ul)

BufferRequest = Struct("remote_ptr" / Int64ul)
BufferGetBaseResponse = Struct("base_ptr" / Int64ul)
BufferClearRequest = Struct("remote_ptr" / Int64ul, "value" / Int8ul)

InitTensorRequest = Struct("tensor" / RpcTensor)

GetAllocSizeRequest1 = Struct("tensor" / RpcTensor)
GetAllocSizeRequest3 = Struct("device" / Int32ul, "tensor" / RpcTensor)
GetAllocSizeRequest36 = Struct(
    "device" / Int32ul, "tensor" / RpcTensor, "srcs" / Array(MAX_SOURCES, RpcTensor)
)
GetAllocSizeResponse = Struct("alloc_size" / Int64ul)

MemsetTensorRequest = Struct(
    "tensor" / RpcTensor, "offset" / Int64ul, "size" / Int64ul, "value" / Int8ul
)

# The head of a SET_TENSOR; the bytes of the tensor follow it to the end of the message.
SetTensorHead1 = Struct("tensor" / RpcTensor, "offset" / Int64ul)
SetTensorHead7 = Struct("tensor" / RpcTensor, "cache_flag" / Int8ul, "offset" / Int64ul)

SetTensorHashRequest = Struct("tensor" / RpcTensor, "offset" / Int64ul, "hash" / Int64ul)
SetTensorHashResponse = Struct("result" / Int8ul)

GetTensorRequest = Struct("tensor" / RpcTensor, "offset" / Int64ul, "size" / Int64ul)

CopyTensorRequest = Struct("src" / RpcTensor, "dst" / RpcTensor)
CopyTensorResponse = Struct("result" / Int8ul)

GraphComputeResponse = Struct("result" / Int8ul)


def fixed_size(struct: Construct[Any, Any]) -> int:
    """Return the bytes of a message of this declaration."""
    return int(struct.sizeof())
