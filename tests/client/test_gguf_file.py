"""GGUF files with tensors of every type ggml has, also those the package gguf doesn't know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from client.gguf_file import GgufFile, read_tensors
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size

ROWS = 3
Content = Mapping[str, tuple[int, tuple[int, ...], bytes]]


def write(path: Path, tensors: Content) -> Path:
    """A file with these tensors: type, ne (innermost first), bytes."""
    writer = gguf.GGUFWriter(path, "test")
    writer.add_string("general.description", "made by a test")
    for name, (type_, ne, data) in tensors.items():
        # As int8 the writer leaves shape and type as they are given.
        values = np.frombuffer(data, np.int8)
        writer.add_tensor(name, values, raw_shape=ne[::-1], raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def every_type() -> dict[str, tuple[GgmlType, tuple[int, ...], bytes]]:
    """A tensor of each type with two blocks a row, behind one another."""
    random = np.random.default_rng(5)
    made: dict[str, tuple[GgmlType, tuple[int, ...], bytes]] = {}
    for type_, info in TYPE_INFO.items():
        ne = (2 * info.block_size, ROWS)
        made[f"of.{type_.name}"] = (type_, ne, random.bytes(row_size(type_, ne[0]) * ROWS))
    return made


def test_every_type_is_read_in_its_place(tmp_path: Path) -> None:
    """A wrong size of one type would show in its own bytes."""
    written = every_type()
    assert {GgmlType.Q1_0, GgmlType.Q2_0, GgmlType.Q8_1} <= {
        type_ for type_, _, _ in written.values()
    }
    read = read_tensors(write(tmp_path / "every.gguf", written))
    assert {name: (t.type, t.ne, t.data.tobytes()) for name, t in read.items()} == written


def test_metadata_beside_new_types(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "every.gguf", every_type()))
    assert file.fields["general.architecture"].contents() == "test"
    assert file.fields["general.description"].contents() == "made by a test"


def test_bytes_stay_in_the_mapped_file(tmp_path: Path) -> None:
    """A model larger than memory can be uploaded."""
    read = read_tensors(write(tmp_path / "every.gguf", every_type()))
    for tensor in read.values():
        assert not tensor.data.flags.owndata
        assert not tensor.data.flags.writeable


@pytest.mark.parametrize(
    ("type_", "ne", "size", "message"),
    [
        (999, (32, 1), 32, "type 999"),
        (GgmlType.Q2_0, (65, 1), 36, "blocks of 64"),
        (GgmlType.F32, (1, 1, 1, 1, 1), 4, "elements"),
        (GgmlType.F32, (1 << 62, 1 << 62), 4, "behind the file"),
        (GgmlType.Q8_0, (64, 2), 64, "behind the file"),
    ],
)
def test_what_ggml_would_not_load_is_refused(
    type_: int, ne: tuple[int, ...], size: int, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "odd.gguf", {"w": (type_, ne, bytes(size))})
    with pytest.raises(ValueError, match=message):
        read_tensors(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", {"w": (GgmlType.Q1_0, (128, 2), bytes(36))}).read_bytes()
    # The last bytes are padding behind the last tensor.
    padding = -36 % 32
    cut = tmp_path / "cut.gguf"
    for length in range(1, len(whole) - padding):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"\w"):
            read_tensors(cut)
    cut.write_bytes(whole[: len(whole) - padding])
    assert read_tensors(cut)["w"].data.nbytes == 36
