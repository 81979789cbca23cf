"""Judges a result against the reference's: error norms for numbers, bits or ranks for the rest."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from client.tensors import Array, from_bytes
from conformance.differential.values import flushed
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

# ggml's own bounds for backends (tests/test-backend-ops.cpp): for all ops, and for those which
# round activations or accumulate in their own order.
DEFAULT_NMSE = 1e-7
PRODUCT_NMSE = 5e-4


class Equality(enum.StrEnum):
    """The way in which two results are the same."""

    NMSE = "nmse"  # the error's norm against the reference's; NaN and infinities in the same places
    EXACT = "exact"  # the same bits
    ORDER = "order"  # indices that put the same values of `of` into the same order
    SET = "set"  # indices that choose the same values of `of`, in any order


@dataclass(frozen=True, slots=True)
class Check:
    """The way to compare an output.

    ``bound`` is NMSE's, ``of`` the tensor that indices refer to.
    """

    how: Equality = Equality.NMSE
    bound: float = DEFAULT_NMSE
    of: Tensor | None = None


EXACT = Check(Equality.EXACT)


def numbers(t: Tensor, array: Array) -> Array:
    """Return the values of a plain type as float64, integers as they are."""
    if t.type is GgmlType.BF16:
        wide = (array.astype(np.uint32) << 16).view(np.float32)
        return wide.astype(np.float64)
    return array if array.dtype.kind in "iu" else array.astype(np.float64)


def nmse(expected: Array, actual: Array) -> float:
    """Return the squared error over the squared norm of ``expected``.

    It is infinite if non-numbers differ.
    """
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return float("inf")
    if not np.isfinite(actual[finite]).all():
        return float("inf")
    error = float(((expected[finite] - actual[finite]) ** 2).sum())
    norm = float((expected[finite] ** 2).sum())
    if norm == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / norm


def difference(check: Check, t: Tensor, expected: CaseMemory, actual: CaseMemory) -> str:
    """Return what is wrong with ``t`` as computed by the server under test; empty if nothing is."""
    want, got = expected.array(t), actual.array(t)
    match check.how:
        case Equality.EXACT:
            return "" if want.tobytes() == got.tobytes() else _first_difference(want, got)
        case Equality.NMSE:
            a, b = numbers(t, want), numbers(t, got)
            if expected.flushes:
                # An infinity times a number on the way that was taken for 0.
                b = np.where(np.isinf(a) & np.isnan(b), a, b)
            error = nmse(a, b)
            if error <= check.bound:
                return ""
            return f"NMSE {error:.3g} > {check.bound:g}; {_first_difference(a, b)}"
        case Equality.ORDER | Equality.SET:
            assert check.of is not None
            return _ranks(check, want, got, numbers(check.of, expected.array(check.of)))


def _ranks(check: Check, want: Array, got: Array, values: Array) -> str:
    outside = (got < 0) | (got >= values.shape[-1])
    if outside.any():
        return f"index {int(got[outside][0])} of {values.shape[-1]}"
    ordered = np.sort(got, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "an index occurs twice in a row"
    a = np.take_along_axis(values, want.astype(np.int64), -1)
    b = np.take_along_axis(values, got.astype(np.int64), -1)
    if check.how is Equality.SET:
        a, b = np.sort(a, axis=-1), np.sort(b, axis=-1)
    return "" if np.array_equal(a, b, equal_nan=True) else _first_difference(a, b)


def _first_difference(want: Array, got: Array) -> str:
    """The element that is furthest off, by its ggml coordinates."""
    if want.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            gap = np.abs(want - got)
        same = (want == got) | (np.isnan(want) & np.isnan(got))
        gap = np.where(same, 0.0, np.where(np.isfinite(gap), gap, np.inf))
    else:
        gap = (want != got).astype(np.float64)
    if not gap.any():
        return "bits differ in what compares equal (zeros or NaN)"
    at = np.unravel_index(int(gap.argmax()), gap.shape)
    where = ", ".join(str(int(i)) for i in reversed(at))
    return f"[{where}] is {got[at]}, expected {want[at]} ({int((gap > 0).sum())} of {gap.size} off)"


@dataclass(frozen=True, slots=True)
class CaseMemory:
    """All bytes of a case after it ran on one server; ``offsets`` of roots in it.

    ``flushes``: values below the normal numbers count as 0, on the way to results as well.
    """

    image: npt.NDArray[np.uint8]
    offsets: dict[Tensor, int]
    flushes: bool = False

    def raw(self, t: Tensor) -> npt.NDArray[np.uint8]:
        """Return the bytes of the tensor's extent."""
        root = t if t.view_src is None else t.view_src
        start = self.offsets[root] + (t.view_offs if t.view_src is not None else 0)
        return self.image[start : start + t.nbytes]

    def array(self, t: Tensor) -> Array:
        """Return the tensor's values as (ne3, ne2, ne1, ne0), of quantized types rows of bytes."""
        if not t.nbytes:
            return np.empty(tuple(reversed(t.ne)), np.uint8)
        array: npt.NDArray[Any] = from_bytes(t, self.raw(t))
        return flushed(t.type, array) if self.flushes else array
