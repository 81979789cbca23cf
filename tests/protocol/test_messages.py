"""Declarations of messages, the codecs compiled from them, and the numpy view of rpc_tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from construct import Array, Bytes, FormatField, Struct
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages
from protocol.codec import Message, codec
from protocol.dialects import DIALECTS, Answer
from protocol.messages import (
    MAX_SOURCES,
    RPC_TENSOR_DTYPE,
    RPC_TENSOR_SIZE,
    RpcTensor,
    fixed_size,
    numpy_dtype,
)

DECLARATIONS = {
    id(declaration): declaration
    for dialect in DIALECTS
    for spec in dialect.commands.values()
    for declaration in (spec.request, spec.response)
}.values()
NAMES = {id(value): name for name, value in vars(messages).items() if isinstance(value, Struct)}


def plain(value: Any) -> Any:
    """What a codec or construct has parsed, as dicts and lists without padding."""
    if isinstance(value, Message):
        value = value.__dict__
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k and not k.startswith("_")}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=lambda d: NAMES[id(d)])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_codec_reads_and_writes_what_is_declared(declaration: Any, data: st.DataObject) -> None:
    # Messages are flat: any bytes of the right size are one.
    size = fixed_size(declaration)
    seed = data.draw(st.integers(0, 2**32 - 1))
    fill = data.draw(st.sampled_from([None, b"\0", b"\xff", b"\x80"]))
    raw = np.random.default_rng(seed).bytes(size) if fill is None else fill * size
    record = codec(declaration).parse(b"??" + raw, 2)
    declared = declaration.parse(raw)
    assert plain(record) == plain(declared)
    written = codec(declaration).build(record)
    assert written == declaration.build(declared)
    assert codec(declaration).build(plain(record)) == written
    assert plain(codec(declaration).parse(written)) == plain(record)


def test_codec_needs_every_field_and_the_right_lengths() -> None:
    pair = Struct("a" / FormatField("<", "H"), "b" / Array(3, FormatField("<", "B")))
    assert codec(pair).build({"a": 0x1234, "b": [1, 2, 3]}) == b"\x34\x12\1\2\3"
    with pytest.raises(KeyError):
        codec(pair).build({"a": 1})
    with pytest.raises(ValueError, match="2 items for an array of 3"):
        codec(pair).build({"a": 1, "b": [1, 2]})


def test_sizes_are_those_of_the_packed_structs() -> None:
    # sizeof() of the structs in ggml-rpc.cpp, between #pragma pack(push, 1) and pop.
    assert RPC_TENSOR_SIZE == 296
    sizes = {
        "HelloRequest": 24,
        "HelloResponse1": 3,
        "HelloResponse4": 28,
        "AllocBufferRequest1": 8,
        "AllocBufferRequest": 12,
        "AllocBufferResponse": 16,
        "BufferClearRequest": 9,
        "GetAllocSizeRequest1": 296,
        "GetAllocSizeRequest3": 300,
        "GetAllocSizeRequest36": 300 + 2960,
        "MemsetTensorRequest": 313,
        "SetTensorHead1": 304,
        "SetTensorHead7": 305,
        "SetTensorHashRequest": 312,
        "GetTensorRequest": 312,
        "CopyTensorRequest": 592,
    }
    assert {name: fixed_size(getattr(messages, name)) for name in sizes} == sizes


def test_numpy_dtype_is_the_declaration_field_by_field() -> None:
    at = 0
    for field in RpcTensor.subcons:
        assert RPC_TENSOR_DTYPE.fields is not None
        dtype, offset = RPC_TENSOR_DTYPE.fields[field.name][:2]
        assert offset == at
        assert dtype.itemsize == field.sizeof()
        at += field.sizeof()
    assert at == RPC_TENSOR_DTYPE.itemsize == RPC_TENSOR_SIZE


@given(st.binary(min_size=8, max_size=8))
def test_numpy_reads_what_the_codec_reads(seed: bytes) -> None:
    rng = np.random.default_rng(list(seed))
    raw = rng.bytes(2 * RPC_TENSOR_SIZE)
    rows = np.frombuffer(raw, RPC_TENSOR_DTYPE)
    for i, row in enumerate(rows):
        record = codec(RpcTensor).parse(raw, i * RPC_TENSOR_SIZE)
        for name in RPC_TENSOR_DTYPE.names or ():
            # numpy strings end at their trailing zeros.
            expected = getattr(record, name)
            if name == "name":
                expected = expected.rstrip(b"\0")
            assert np.array_equal(row[name], expected), name


def test_numpy_dtype_of_another_struct() -> None:
    declared = Struct("a" / FormatField("<", "h"), "b" / Bytes(5))
    assert numpy_dtype(declared) == np.dtype([("a", "<i2"), ("b", "S5")])


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_only_unanswered_commands_lack_a_response(dialect: Any) -> None:
    for command, spec in dialect.commands.items():
        if spec.answer is not Answer.FIXED:
            assert fixed_size(spec.response) == 0, command


def test_room_for_sources_is_the_same_everywhere() -> None:
    request = codec(messages.GetAllocSizeRequest36).parse(bytes(3260))
    assert len(request.srcs) == len(request.tensor.src) == MAX_SOURCES
