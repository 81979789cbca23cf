"""Heads of GGUF files: every type in its place, and nothing taken on trust."""

from __future__ import annotations

import io
import math
from pathlib import Path

import gguf
import numpy as np
import pytest

from protocol.ggml.types import GgmlType
from rpc_server.models.header import Header, HeaderError, read_header
from tests.client.test_gguf_file import every_type, write


def header(data: bytes) -> Header:
    return read_header(io.BytesIO(data), len(data))


def test_every_type_is_found_in_its_place(tmp_path: Path) -> None:
    """Also those that the package gguf doesn't know."""
    written = every_type()
    data = write(tmp_path / "every.gguf", written).read_bytes()
    found = header(data)
    assert not found.unknown
    read = {t.name: (t.type, data[t.offset : t.offset + t.size]) for t in found.tensors}
    assert read == {name: (type_.name, content) for name, (type_, _, content) in written.items()}


# Of a type that nobody knows yet: 32 elements take 19 bytes.
NEW = 998


def of_new_type(*ne: int) -> tuple[int, tuple[int, ...], bytes]:
    size = math.prod(ne) // 32 * 19
    return NEW, ne, np.random.default_rng(size).bytes(size)


def contents(data: bytes) -> dict[str, bytes]:
    return {t.name: data[t.offset : t.offset + t.size] for t in header(data).tensors}


@pytest.mark.parametrize("padding", [True, False], ids=["padded", "cut where the data end"])
def test_a_type_that_nobody_knows_yet_tells_its_size(tmp_path: Path, padding: bool) -> None:
    """By its tensors with many rows; those with few, or none but one, take as much an element."""
    tensors = {
        "few": of_new_type(64, 3),
        "other": (GgmlType.F32, (4,), b"o" * 16),
        "many": of_new_type(96, 8, 5),
        "one": of_new_type(32),
        "last": of_new_type(64, 33),
    }
    data = write(tmp_path / "new.gguf", tensors).read_bytes()
    if not padding:
        data = data[: header(data).tensors[-1].offset + len(tensors["last"][2])]
    assert not header(data).unknown
    assert {t.type for t in header(data).tensors} == {"F32", "type 998"}
    assert contents(data) == {name: content for name, (_, _, content) in tensors.items()}


@pytest.mark.parametrize(
    "new",
    [
        pytest.param({"new": (NEW, (32,), b"n" * 70)}, id="many sizes would do"),
        pytest.param(
            {"new": of_new_type(32, 64), "more": (NEW, (32, 64), b"m" * 64 * 20)},
            id="no size does for both",
        ),
        pytest.param({"new": (NEW, (32, 0), b"")}, id="nothing in it"),
    ],
)
def test_a_type_whose_size_is_not_certain_hides_nothing_else(
    tmp_path: Path, new: dict[str, tuple[int, tuple[int, ...], bytes]]
) -> None:
    before = {"before": (GgmlType.F32, (4,), b"b" * 16)}
    behind = {"behind": (GgmlType.F32, (4,), b"e" * 16)}
    data = write(tmp_path / "new.gguf", {**before, **new, **behind}).read_bytes()
    assert header(data).unknown == tuple(new)
    assert contents(data) == {"before": b"b" * 16, "behind": b"e" * 16}


def test_all_kinds_of_metadata_are_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "rich.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(256)
    writer.add_bool("a", True)
    writer.add_float64("b", 1.0)
    writer.add_uint8("c", 1)
    writer.add_int16("d", -1)
    writer.add_uint64("e", 1 << 40)
    writer.add_string("f", "words" * 1000)
    writer.add_array("g", ["one", "", "three"])
    writer.add_array("h", [1, 2, 3])
    writer.add_array("i", [True, False])
    writer.add_tensor("w", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    (place,) = header(data).tensors
    assert place.offset % 256 == 0
    assert data[place.offset : place.offset + place.size] == np.arange(8, dtype="<f4").tobytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "w.gguf", {"w": (GgmlType.F32, (8,), b"w" * 32)}).read_bytes()
    for length in range(len(whole)):
        with pytest.raises(HeaderError, match=r"\w"):
            header(whole[:length])
    assert header(whole).tensors


def test_damaged_heads_end_in_a_refusal(tmp_path: Path) -> None:
    """Counts and sizes off a file lead nowhere, whatever they are."""
    tensors = {"new": of_new_type(32, 40), "w": (GgmlType.F32, (8,), b"w" * 32)}
    whole = write(tmp_path / "w.gguf", tensors).read_bytes()
    for at in range(header(whole).nbytes):
        for value in (0x00, 0x7F, 0xFF):
            damaged = bytearray(whole)
            damaged[at] = value
            try:
                found = header(bytes(damaged))
            except HeaderError:
                continue
            assert all(t.offset + t.size <= len(whole) for t in found.tensors)
