"""Versions as tables: which commands, which answers, which numbers."""

from __future__ import annotations

import pytest

from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Body, Dialect, compatible_dialects, find_dialects
from protocol.ggml_ops import OPS_96, OPS_97, OPS_98, OPS_101, GluOp, Op, UnaryOp


def dialect(text: str) -> Dialect:
    return find_dialects(text)[0]


def names(text: str) -> list[str]:
    return [d.name for d in find_dialects(text)]


def test_newest_first_and_each_once() -> None:
    versions = [d.version for d in DIALECTS]
    assert versions == sorted(set(versions), reverse=True)


def test_find_dialects() -> None:
    assert names("7") == ["7.0.0"]
    assert names("5.1") == ["5.1.0"]
    assert names("5") == ["5.1.0", "5.0.0"]
    assert names("4.0") == ["4.0.3", "4.0.2", "4.0.1", "4.0.0"]
    assert names("4.0.2") == ["4.0.2"]


@pytest.mark.parametrize("text", ["", "7.", "seven", "7.0.0.0", "-7", "7.0.1", "99", "5.2", "v7"])
def test_find_dialects_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="protocol"):
        find_dialects(text)


def test_how_many_ops() -> None:
    assert [len(ops) for ops in (OPS_96, OPS_97, OPS_98, OPS_101)] == [96, 97, 98, 101]
    for ops in (OPS_96, OPS_97, OPS_98, OPS_101):
        assert len(set(ops)) == len(ops)
        assert ops[0] is Op.NONE


# Counted in enum ggml_op of ggml.h at b9093 (4.0.0), b9592 (4.0.1) and b11434 (7.0.0).
@pytest.mark.parametrize(
    ("op", "in_96", "in_97", "in_101"),
    [
        (Op.ADD, 2, 2, 2),
        (Op.RMS_NORM, 25, 25, 25),
        (Op.MUL_MAT, 29, 29, 29),
        (Op.SOFT_MAX, 46, 46, 46),
        (Op.ROPE, 48, 48, 48),
        (Op.CONV_2D, 55, 56, 56),
        (Op.FLASH_ATTN_EXT, 73, 74, 74),
        (Op.UNARY, 86, 87, 91),
        (Op.GLU, 95, 96, 100),
    ],
)
def test_numbers_of_ops(op: Op, in_96: int, in_97: int, in_101: int) -> None:
    for text, number in (("3.6.1", in_96), ("4.0.0", in_96), ("4.0.1", in_97), ("7.0", in_101)):
        assert dialect(text).op_number(op) == number
        assert dialect(text).ops[number] is op


def test_an_op_of_a_later_version_has_no_number() -> None:
    with pytest.raises(ValueError, match="COL2IM_1D"):
        dialect("4.0.0").op_number(Op.COL2IM_1D)
    assert dialect("4.0.1").op_number(Op.COL2IM_1D) == 55


def test_kinds_are_numbered_without_gaps() -> None:
    assert [int(u) for u in UnaryOp] == list(range(22))
    assert [int(g) for g in GluOp] == list(range(7))


def test_numbers_of_commands() -> None:
    assert [int(c) for c in Command] == [*range(18), *range(0x80, 0x85)]
    assert Command(14) is Command.HELLO


# Which version brought a command, and from which on it is no longer answered.
@pytest.mark.parametrize(
    ("command", "since", "silent_since"),
    [
        (Command.HELLO, (1, 0, 0), None),
        (Command.SET_TENSOR, (1, 0, 0), (2, 0, 0)),
        (Command.DEVICE_COUNT, (3, 0, 0), None),
        (Command.GRAPH_COMPUTE, (1, 0, 0), (3, 5, 0)),
        (Command.GRAPH_RECOMPUTE, (3, 5, 0), (3, 5, 0)),
        (Command.MEMSET_TENSOR, (5, 0, 0), (6, 0, 0)),
        (Command.FREE_BUFFER, (1, 0, 0), (6, 0, 0)),
        (Command.INIT_TENSOR, (1, 0, 0), (6, 0, 0)),
        (Command.BUFFER_CLEAR, (1, 0, 0), (6, 0, 0)),
        (Command.GET_TENSOR, (1, 0, 0), None),
    ],
)
def test_history_of_commands(
    command: Command, since: tuple[int, int, int], silent_since: tuple[int, int, int] | None
) -> None:
    for d in DIALECTS:
        spec = d.commands.get(command)
        assert (spec is not None) == (d.version >= since), d
        if spec is not None:
            silent = silent_since is not None and d.version >= silent_since
            assert (spec.answer is Answer.NEVER) == silent, d


def test_bodies() -> None:
    for d in DIALECTS:
        bodies = {c: spec.body for c, spec in d.commands.items() if spec.body is not Body.NONE}
        assert bodies == {Command.SET_TENSOR: Body.DATA, Command.GRAPH_COMPUTE: Body.GRAPH}


def test_compatible_dialects_share_all_but_the_numbers() -> None:
    assert [d.name for d in compatible_dialects(dialect("4.0.1"))] == [
        "4.0.1", "4.0.3", "4.0.2", "4.0.0",
    ]  # fmt: skip
    assert [d.name for d in compatible_dialects(dialect("7"))] == ["7.0.0"]
