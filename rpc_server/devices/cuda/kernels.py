"""A kernel by name, and what it is compiled with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.devices.cuda.compile import source_text


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of compiling: a source, with the macros it is made for."""

    source: str
    macros: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        return "-".join([self.source, *(value for _, value in self.macros if value)])

    @property
    def text(self) -> str:
        """The whole text, for the compiler."""
        defines = "".join(f"#define {name} {value}\n" for name, value in self.macros)
        return defines + source_text(self.source)


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """A function of a unit; a block of it has ``threads`` threads at most."""

    unit: Unit
    name: str
    threads: int

    @property
    def label(self) -> str:
        return f"{self.unit.label}.{self.name}"


@functools.cache
def kernel(source: str, name: str, threads: int = 256) -> CudaKernel:
    """Return a kernel of a source that is made for nothing in particular."""
    return CudaKernel(Unit(source), name, threads)


def kernels(source: str, names: str) -> list[CudaKernel]:
    """Return the kernels of a source that are called these, with a space between two."""
    return [kernel(source, name) for name in names.split()]


@functools.cache
def kernel_of_weights(source: str, name: str, weights: GgmlType, threads: int = 128) -> CudaKernel:
    """Return a kernel of a source that is compiled for each type of weights."""
    macros = [("WEIGHTS", weights.name)]
    if not TYPE_INFO[weights].quantized:
        macros.append(("FLOATS", ""))
    return CudaKernel(Unit(source, tuple(macros)), name, threads)


# Rows of values that a kernel of attention is compiled for, in units of 32 elements.
ATTENTION_SIZES = (2, 4, 8, 16)


@functools.cache
def attention_kernel(values: int) -> CudaKernel:
    """Return a kernel for rows of up to ``values`` times 32 elements, one of ATTENTION_SIZES."""
    return CudaKernel(Unit("attention", (("VALUES", str(values)),)), "attention", 128)


@functools.cache
def attention_by_matrices(values: int) -> CudaKernel:
    """Return a kernel for tensor cores, for rows of values of up to ``values`` * 32 elements.

    ``values`` is one of ATTENTION_SIZES but the last, for which a thread has too few registers.
    """
    unit = Unit("attention_matrices", (("VALUES", str(values)),))
    return CudaKernel(unit, "attention_matrices", 128)


@functools.cache
def attention_of_few_rows(keys: GgmlType, values: GgmlType, units: int, rows: int) -> CudaKernel:
    """Return the kernel for ``rows`` queries, and keys and values of these types.

    Rows of keys and of values have up to 256 elements times ``units``, 1 or 2.
    """

    def number(of: GgmlType) -> str:
        # In CUDA a type of blocks by itself is a struct.
        return f"AS_{of.name}" if TYPE_INFO[of].quantized else of.name

    types = (("KEY_TYPE", number(keys)), ("VALUE_TYPE", number(values)))
    unit = Unit("attention_few", (*types, ("UNITS", str(units)), ("ROWS", str(rows))))
    return CudaKernel(unit, "attention_few", 128)
