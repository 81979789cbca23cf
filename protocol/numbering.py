"""Which numbering of ops a graph was written by, where the protocol's version doesn't tell.

Everything that differs between clients of one version is here: numbers of ops, numbers of the
functions of UNARY and GLU, and PAD without op_params. A *reading* is what a graph says under one
numbering, by names that mean the same in all. Graphs whose readings are alike compute the same;
readings that differ are told apart by what no graph of ggml has: ops that never travel, functions
that don't exist, too few or too many sources. What is left is for whoever knows the contracts of
ops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.dialects import Dialect
from protocol.errors import NotInRelease
from protocol.ggml.ops import NUMBERING_101, OPS_101, Numbering, Op

_NEVER = frozenset({Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM})
_FUNCTIONS = (Op.UNARY, Op.GLU)

# A reading's word for a node: the op's place in OPS_101 in the high half, its function in the low.
_FUNCTION_BITS = 16
_UNKNOWN = -1
# In the low half: a PAD whose op_params mean nothing.
_BEHIND = 1
_PLACE = {op: i for i, op in enumerate(OPS_101)}


def canonical_params(numbering: Numbering, op: Op, params: tuple[int, ...]) -> tuple[int, ...]:
    """Return op_params with the function of a UNARY or GLU by the number that we know it by.

    A function that ``numbering`` doesn't have becomes -1, which is none.
    """
    functions = numbering.functions.get(op)
    if functions is None:
        return params
    number = params[0]
    known = functions[number] if 0 <= number < len(functions) else _UNKNOWN
    return params if known == number else (known, *params[1:])


def wire_params(numbering: Numbering, op: Op, params: Sequence[int]) -> Sequence[int]:
    """Return op_params as clients of ``numbering`` send them: the reverse of canonical_params.

    Raises:
        NotInRelease: These clients can't say it: no such function, or a PAD before the elements.
    """
    if op is Op.PAD and numbering.pads_behind:
        if any(params[0:8:2]) or any(params[8:]):
            raise NotInRelease(f"with {len(numbering.ops)} ops PAD pads behind, with zeros")
        return (0,) * len(params)
    numbers = numbering.function_numbers.get(op)
    if numbers is None or params[0] not in NUMBERING_101.function_numbers[op]:
        return params
    if params[0] not in numbers:
        raise NotInRelease(f"with {len(numbering.ops)} ops {op} has no function {params[0]}")
    return (numbers[params[0]], *params[1:])


def padding_behind(
    shape: Sequence[int], source_shape: Sequence[int], n_params: int
) -> tuple[int, ...]:
    """Return op_params of a PAD to ``shape`` that says nothing itself and pads behind."""
    behind = [max(0, n - m) for n, m in zip(shape, source_shape, strict=True)]
    words = [word for n in behind for word in (0, n)]
    return (*words, *[0] * (n_params - len(words)))


def reading(tensors: Any, numbering: Numbering) -> npt.NDArray[np.int32]:
    """Return int32[n]: what each of ``tensors`` (rpc_tensor rows) does under ``numbering``.

    Words are equal where the same is done, whatever the numbering; -1 is an op that it lacks.
    """
    table = _words(numbering)
    numbers = np.minimum(tensors["op"], len(table) - 1).astype(np.intp)
    words: npt.NDArray[np.int32] = table[numbers]
    for op in _FUNCTIONS:
        number = numbering.numbers.get(op)
        if number is None:
            continue
        (rows,) = np.nonzero(tensors["op"] == number)
        if len(rows):
            functions = np.array([*numbering.functions[op], 0xFFFF], np.int32)
            chosen = tensors["op_params"][rows, 0].astype(np.int64)
            chosen[(chosen < 0) | (chosen >= len(functions))] = len(functions) - 1
            words[rows] |= functions[chosen]
    return words


@functools.cache
def _words(numbering: Numbering) -> npt.NDArray[np.int32]:
    """The words by number on the wire; the last one is that of all that are none."""
    words = [_PLACE[op] << _FUNCTION_BITS for op in numbering.ops]
    if numbering.pads_behind:
        words[numbering.numbers[Op.PAD]] |= _BEHIND
    return np.array([*words, _UNKNOWN], np.int32)


def fits(tensors: Any, dialect: Dialect) -> bool:
    """Return whether all ``tensors`` (rpc_tensor rows) have ops of ``dialect`` with sources to
    match.
    """
    numbering = dialect.numbering
    words = reading(tensors, numbering)
    counts = np.count_nonzero(tensors["src"], axis=1)
    for word, count in set(zip(words.tolist(), counts.tolist(), strict=True)):
        if word == _UNKNOWN:
            return False
        op = OPS_101[word >> _FUNCTION_BITS]
        if op is Op.NONE:
            continue
        if op in _NEVER or not op.min_sources <= count <= op.max_sources:
            return False
        if op in _FUNCTIONS and word & 0xFFFF == 0xFFFF:
            return False
    return True


def alike(tensors: Any, dialects: Iterable[Dialect]) -> list[list[Dialect]]:
    """Return ``dialects`` in groups that read ``tensors`` (rpc_tensor rows) alike, in order."""
    groups: dict[bytes, list[Dialect]] = {}
    for dialect in dialects:
        groups.setdefault(reading(tensors, dialect.numbering).tobytes(), []).append(dialect)
    return list(groups.values())


def tells(tensors: Any, dialects: Sequence[Dialect]) -> bool:
    """Return whether ``dialects`` read the graph's tensors differently."""
    return len(alike(tensors, dialects)) > 1
