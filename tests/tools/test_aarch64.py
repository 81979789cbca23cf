"""ARM in emulation: kernels compiled here for such processors give what kernels of this one do."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.devices.cpu.catalog import CONVERTERS, product_of
from rpc_server.devices.cpu.kernels.interface import abi
from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.interface.layout import (
    panel_columns,
    product_form,
    product_scratch,
    row_bytes,
)
from rpc_server.native.image import unpack
from tests.cpu.test_matmul import activations, weights
from tests.native import arm_program
from tests.ops.harness import nmse
from tests.ops.tensors import CONTEXT
from tools.aarch64.__main__ import Counted, main, table
from tools.aarch64.processors import PROCESSORS
from tools.serving.processes import PROJECT

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def test_table_has_ours_beside_upstreams() -> None:
    counts = [
        Counted("ours", "max", "m-Q8_0", 30e6),
        Counted("upstream", "max", "m-Q8_0", 40e6),
        Counted("ours", "max", "m-F16", 1e6),
    ]
    assert table(counts).splitlines()[2:] == [
        "| max | m-Q8_0 | 30.0 | 40.0 | 0.75 |",
        "| max | m-F16 | 1.0 | - | - |",
    ]


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["--root"]) == 1
    said = capsys.readouterr().err
    assert "no qemu-aarch64, " in said
    assert "apt-get install qemu-user g++-aarch64-linux-gnu" in said


def test_a_cpuinfo_names_its_features() -> None:
    for processor in PROCESSORS.values():
        told = processor.cpuinfo
        assert ("asimddp" in told) == ("dotprod" in processor.features)
        assert ("i8mm" in told) == ("i8mm" in processor.features)


def cross_compiled(folder: Path, processor: str, type_: GgmlType, isa: Isa) -> tuple[bytes, int]:
    """Return the image of a product for a processor, and where it is entered."""
    kernel = product_of(type_, isa)
    request = {
        "module": kernel.module,
        "name": kernel.name,
        "constants": kernel.constants,
        "file": "kernel.bin",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tools.aarch64.cross", processor, str(folder)],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT,
    )
    assert json.loads(done.stdout) is None
    header, image = unpack((folder / "kernel.bin").read_bytes())
    assert header["kind"] == "image"
    assert header["imports"] == {}
    return image, header["entry"]


def record(words: dict[int, int]) -> bytes:
    values = np.zeros(abi.RECORD_WORDS, np.int64)
    for word, value in words.items():
        values[word] = value
    return values.tobytes()


def slot(number: int, address: int, ne: tuple[int, int], nb1: int) -> dict[int, int]:
    at = abi.SLOT_WORDS * number
    sizes = [*ne, 1, 1, 4, nb1, nb1 * ne[1], nb1 * ne[1]]
    return {at: address, **{at + 2 + i: size for i, size in enumerate(sizes)}}


def call(address: int, record_: bytes) -> None:
    words = ctypes.create_string_buffer(record_)
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(address)
    assert function(ctypes.addressof(words), 0, 1, 0) == 0


def converted(type_: GgmlType, isa: Isa, n_columns: int, k: int) -> Bytes:
    """Columns in the form that a product reads, by this machine's kernels."""
    form = product_form(type_, isa)
    source = activations((k, n_columns))
    target = np.zeros(n_columns * row_bytes(form, k), np.uint8)
    words = slot(abi.SRC0, source.address, (k, n_columns), 4 * k)
    extra = (target.ctypes.data, row_bytes(form, k), int(form))
    words |= {abi.EXTRA_WORD + i: word for i, word in enumerate(extra)}
    call(CONVERTERS[form].address, record(words))
    return target


def product_words(
    type_: GgmlType, isa: Isa, at: dict[str, int], k: int, rows: int, n_columns: int
) -> dict[int, int]:
    """The record of a product of what lies at these addresses."""
    info = TYPE_INFO[type_]
    column = row_bytes(product_form(type_, isa), k)
    scratch = product_scratch(type_, isa, n_columns)
    extra = (at["columns"], column, 0, 0, 0, at["scratch"], scratch, panel_columns(isa, column))
    return {
        **slot(abi.DST, at["result"], (rows, n_columns), 4 * rows),
        **slot(abi.SRC0, at["weights"], (k, rows), k // info.block_size * info.type_size),
        **{abi.EXTRA_WORD + i: word for i, word in enumerate(extra)},
    }


TYPES = (
    *(GgmlType.Q4_0, GgmlType.Q8_0, GgmlType.Q5_0, GgmlType.Q4_K, GgmlType.Q6_K),
    *(GgmlType.IQ4_XS, GgmlType.IQ2_XS, GgmlType.F16),
)


def operands(type_: GgmlType, isa: Isa, k: int, rows: int, n_columns: int) -> dict[str, Bytes]:
    """What a product reads and writes, by name."""
    source = weights(type_, (k, rows))
    return {
        "weights": CONTEXT.memory(source.address, source.nbytes),
        "columns": converted(type_, isa, n_columns, k),
        "result": np.zeros(4 * rows * n_columns, np.uint8),
        "scratch": np.zeros(product_scratch(type_, isa, n_columns), np.uint8),
    }


@arm_program.needs_qemu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "isa", "type_"),
    [
        *(("cortex-a72", Isa.NEON, type_) for type_ in TYPES),
        *(("cortex-a76", Isa.DOTPROD, type_) for type_ in TYPES),
        *(("max", Isa.I8MM, type_) for type_ in TYPES),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_products_on_arm(tmp_path: Path, processor: str, isa: Isa, type_: GgmlType) -> None:
    """Sums of bytes are exact: they differ from GENERIC's by the rounding of float sums alone."""
    k, rows = (1029 if type_ is GgmlType.F16 else 512), 19
    image, entry = cross_compiled(tmp_path, processor, type_, isa)
    for n_columns in (1, 3, 9):
        data = operands(type_, Isa.GENERIC, k, rows, n_columns)
        here = {name: values.ctypes.data for name, values in data.items()}
        words = product_words(type_, Isa.GENERIC, here, k, rows, n_columns)
        call(product_of(type_, Isa.GENERIC).address, record(words))
        expected = data["result"].view(np.float32)
        # The record first, then the rest of it, as it lies in the program.
        memory, there = bytearray(8 * abi.RECORD_WORDS), {}
        data = operands(type_, isa, k, rows, n_columns)
        for name, values in data.items():
            memory += bytes(-len(memory) % 64)
            there[name] = arm_program.MEMORY + len(memory)
            memory += values.tobytes()
        made = record(product_words(type_, isa, there, k, rows, n_columns))
        memory[: len(made)] = made
        status, found = arm_program.run(
            tmp_path,
            image,
            entry,
            [arm_program.MEMORY, 0, 1, 0],
            bytes(memory),
            (there["result"], len(data["result"])),
            processor,
        )
        assert status == 0
        assert np.all(np.isfinite(expected))
        assert nmse(expected, np.frombuffer(found, np.float32)) < 1e-11
