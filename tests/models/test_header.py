"""Heads of GGUF files: every type in its place, and nothing taken on trust."""

from __future__ import annotations

import io
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
    assert read == {name: (type_, content) for name, (type_, _, content) in written.items()}


def test_a_type_that_nobody_knows_yet_hides_nothing_else(tmp_path: Path) -> None:
    tensors = {
        "before": (GgmlType.F32, (4,), b"b" * 16),
        "new": (998, (32,), b"n" * 70),
        "behind": (GgmlType.F32, (4,), b"e" * 16),
    }
    data = write(tmp_path / "new.gguf", tensors).read_bytes()
    found = header(data)
    assert found.unknown == ("new",)
    assert [data[t.offset : t.offset + t.size] for t in found.tensors] == [b"b" * 16, b"e" * 16]


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
    whole = write(tmp_path / "w.gguf", {"w": (GgmlType.F32, (8,), b"w" * 32)}).read_bytes()
    for at in range(len(whole) - 32):
        for value in (0x00, 0x7F, 0xFF):
            damaged = bytearray(whole)
            damaged[at] = value
            try:
                found = header(bytes(damaged))
            except HeaderError:
                continue
            assert all(t.offset + t.size <= len(whole) for t in found.tensors)
