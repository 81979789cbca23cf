"""Tensors: their sizes, where they lie, and how they are written for the wire."""

from __future__ import annotations

import pytest

from protocol.codec import codec
from protocol.ggml.ops import Op, TensorFlag
from protocol.ggml.types import GgmlType
from protocol.messages import MAX_SOURCES, RpcTensor
from protocol.tensor import (
    NO_SOURCES,
    Dims,
    Tensor,
    contiguous_strides,
    padded_sources,
    place_views,
    wire_name,
)

F32, F16, Q4_0, Q6_K = GgmlType.F32, GgmlType.F16, GgmlType.Q4_0, GgmlType.Q6_K


def dense(type_: GgmlType, *ne: int, name: str = "") -> Tensor:
    whole: Dims = ((*ne, 1, 1, 1, 1)[0], *(*ne, 1, 1, 1, 1)[1:4])  # type: ignore[assignment]
    return Tensor(7, type_, whole, contiguous_strides(type_, whole), name=name)


def view(of: Tensor, ne: Dims, nb: Dims, offset: int) -> Tensor:
    return Tensor(
        8, of.type, ne, nb, Op.VIEW, src=padded_sources([of]), view_src=of, view_offs=offset
    )


@pytest.mark.parametrize(
    ("type_", "ne", "strides"),
    [
        (F32, (3, 4, 5, 6), (4, 12, 48, 240)),
        (F16, (7, 1, 1, 1), (2, 14, 14, 14)),
        (Q4_0, (64, 3, 1, 1), (18, 36, 108, 108)),
        (Q6_K, (512, 2, 2, 1), (210, 420, 840, 1680)),
        # Part of a block counts for nothing, as in ggml.
        (Q4_0, (48, 3, 1, 1), (18, 18, 54, 54)),
        (F32, (0, 4, 1, 1), (4, 0, 0, 0)),
    ],
)
def test_strides_of_dense_data(type_: GgmlType, ne: Dims, strides: Dims) -> None:
    assert contiguous_strides(type_, ne) == strides


def test_sources_are_ten() -> None:
    t = dense(F32, 4)
    assert padded_sources([]) == NO_SOURCES == t.src == (None,) * MAX_SOURCES
    assert padded_sources([None, t]) == (None, t, *(None,) * 8)
    assert padded_sources([t] * 10) == (t,) * 10
    with pytest.raises(ValueError, match="11 sources, a tensor has 10 at most"):
        padded_sources([t] * 11)


def test_sizes() -> None:
    t = dense(Q4_0, 64, 3, 2)
    assert (t.type_size, t.block_size, t.quantized) == (18, 32, True)
    assert (t.nbytes, t.nelements, t.nrows, t.row_size) == (216, 384, 6, 36)
    assert t.contiguous
    assert not t.empty
    assert dense(F32, 4, 0).empty
    assert dense(F32, 4, 0).nbytes == 0


def test_layout_of_views() -> None:
    t = dense(F32, 8, 6, 4)
    rows = view(t, (8, 3, 4, 1), (4, 64, 192, 768), 0)
    assert (rows.nbytes, rows.contiguous_rows, rows.contiguous) == (
        3 * 192 + 2 * 64 + 32,
        True,
        False,
    )
    turned = view(t, (6, 8, 4, 1), (32, 4, 192, 768), 0)
    assert (turned.transposed, turned.contiguous_rows, turned.nbytes) == (True, False, t.nbytes)
    batches = view(t, (8, 6, 2, 1), (4, 32, 384, 768), 0)
    assert not batches.contiguous
    assert not batches.contiguous_above(1)
    assert batches.contiguous_above(2)


@pytest.mark.parametrize(
    ("small", "large", "fits"),
    [
        ((4, 1), (4, 6), True),
        ((2, 3), (4, 6), True),
        ((3, 3), (4, 6), False),
        ((4, 6), (4, 3), False),
        ((4, 6), (4, 0), True),
        # Nothing, however often, is nothing (ggml_can_repeat).
        ((0, 3), (4, 0), True),
        ((4, 0), (4, 6), False),
    ],
)
def test_what_repeats_to_what(small: tuple[int, ...], large: tuple[int, ...], fits: bool) -> None:
    assert dense(F32, *small).can_repeat_to(dense(F32, *large)) is fits


def test_a_view_lies_in_what_it_views() -> None:
    t = dense(F32, 8, 6)
    row = view(t, (8, 1, 1, 1), (4, 32, 32, 32), 64)
    assert (t.placed, row.placed, row.location) == (False, False, (0, 0))
    t.place(5, 4096)
    assert (t.location, row.placed, row.location) == ((5, 4096), True, (5, 4160))
    # Noted only when somebody wants that.
    assert row.address == 0
    place_views([t, row])
    assert ((t.buffer, t.address), (row.buffer, row.address)) == ((5, 4096), (5, 4160))
    # And what is sent goes by what the view is of, whatever was noted.
    t.place(6, 8192)
    assert row.location == (6, 8256)
    with pytest.raises(ValueError, match="is a view: place"):
        row.place(1, 0)


def test_fields_of_the_wire() -> None:
    t = dense(Q4_0, 64, 3, name="blk.0.ffn_up.weight")
    t.place(5, 4096)
    half = view(t, (32, 3, 1, 1), (18, 36, 108, (1 << 32) + 108), 18)
    half.op_params = (18, -1, *(0,) * 14)
    half.flags = TensorFlag.COMPUTE | TensorFlag.OUTPUT
    fields = half.fields(use_count=2)
    assert fields["src"] == [7] + [0] * 9
    assert (fields["view_src"], fields["view_offs"]) == (7, 18)
    assert (fields["buffer"], fields["data"]) == (5, 4114)
    assert fields["nb"] == [18, 36, 108, 108]
    number = {**fields, "op": 0}
    message = codec(RpcTensor).parse(codec(RpcTensor).build(number))
    assert (message.id, message.type, list(message.ne)) == (8, 2, [32, 3, 1, 1])
    assert list(message.op_params[:3]) == [18, -1, 0]
    assert (message.flags, message.use_count) == (18, 2)


def test_names_on_the_wire_end_with_a_zero() -> None:
    assert wire_name("blk.0") == b"blk.0"
    assert wire_name("a\0b") == b"a"
    assert wire_name("é" * 40) == ("é" * 31).encode() + b"\xc3"
    assert len(wire_name("x" * 100)) == 63


def test_how_messages_name_a_tensor() -> None:
    t = dense(F32, 8, 6, name="x")
    assert t.label == "NONE 'x' (F32 8x6x1x1)"
    assert repr(t) == "<Tensor 7 'x' NONE F32 8x6x1x1>"
