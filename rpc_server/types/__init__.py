"""ggml's types to float32 and back, as array code: what op references read and write.

``to_f32`` knows every type that ggml can decode. ``from_f32`` knows every type that a graph can
write (see ENCODABLE); it is bit-equal to ggml's encoders on x86 for all but NaN. It lacks the IQ1-,
IQ2- and IQ3-types, which ggml's graphs can't write either: their encoders need tables that are made
for quantizing files, and most need an importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml.types import DECODABLE, TYPE_INFO, GgmlType
from rpc_server.types import decode, encode, encode_iq4, encode_k, floats
from rpc_server.types.blocks import in_parts

# Types that graphs may write through float32; those that they may read are DECODABLE.
_BLOCK_ENCODERS = encode.ENCODERS | {
    type: in_parts(encoder) for type, encoder in (encode_iq4.ENCODERS | encode_k.ENCODERS).items()
}
ENCODABLE: frozenset[GgmlType] = frozenset(floats.ENCODERS) | frozenset(_BLOCK_ENCODERS)

# Encoders and decoders work on this many elements at a time, to keep what they allocate small.
_CHUNK = 1 << 20


def to_f32(type: GgmlType, rows: Any, xp: ModuleType = np) -> Any:
    """Decode ``rows``, uint8 (..., row bytes), into float32 (..., elements) of the module ``xp``.

    Raises NotImplementedError for a type that ggml can't decode (integers, F64).
    """
    if type in floats.DECODERS:
        return floats.DECODERS[type](rows, xp)
    if type not in DECODABLE:
        raise NotImplementedError(f"{type.name} has no conversion to F32")
    info = TYPE_INFO[type]
    forms = (np.uint8, info.type_size), (np.float32, info.block_size)
    return _in_chunks(decode.decoder(type), rows, forms, info.block_size, xp)


def from_f32(type: GgmlType, values: Any, xp: ModuleType = np) -> Any:
    """Encode float32 (..., elements), whole blocks a row, as uint8 (..., row bytes).

    Raises NotImplementedError for types outside ENCODABLE.
    """
    if type in floats.ENCODERS:
        with np.errstate(all="ignore"):
            return floats.ENCODERS[type](values, xp)
    if type not in _BLOCK_ENCODERS:
        raise NotImplementedError(f"no encoder for {type.name}")
    info = TYPE_INFO[type]
    forms = (np.float32, info.block_size), (np.uint8, info.type_size)
    return _in_chunks(_BLOCK_ENCODERS[type], values, forms, info.block_size, xp)


def _in_chunks(
    convert: Callable[[Any], Any],
    array: Any,
    forms: tuple[tuple[Any, int], tuple[Any, int]],
    block: int,
    xp: ModuleType,
) -> Any:
    """Convert blocks of ``block`` elements; ``forms``: (dtype, length) of one before and after."""
    (dtype, width), (new_dtype, new_width) = forms
    host = array if xp is np else xp.asnumpy(array)
    shape = (*host.shape[:-1], host.shape[-1] // width * new_width)
    blocks = np.ascontiguousarray(host, dtype).reshape(-1, width)
    converted = np.empty((len(blocks), new_width), new_dtype)
    step = max(_CHUNK // block, 1)
    # Infinite scales and NaN are data like any other.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            converted[start : start + step] = convert(blocks[start : start + step])
    return xp.asarray(converted.reshape(shape))
