"""Results over what kernels read, and places that are none: bytes of others stay as they are."""

from __future__ import annotations

import numpy as np

from protocol.commands import Command
from protocol.ggml.types import GgmlType
from tools.neighbour.attack import MIB, Attacker, attack, floats
from tools.wire import sources, tensor

READ_TWICE = "values that decide an address, and may change"
ODD_PLACES = "addresses and strides that are odd"


@attack(READ_TWICE)
def rows_under_their_index(a: Attacker) -> None:
    """GET_ROWS of zeros whose result lies on its own index, of zeros"""
    wire, handle, base = a.buffer(65536)
    rows = tensor(1, (64, 16), handle, base)
    index = tensor(2, (16,), handle, base + 8192, GgmlType.I32)
    wire.run([wire.op_of(3, "GET_ROWS", (64, 16), (handle, base + 8192), 1, 2)], [rows, index])


@attack(READ_TWICE)
def an_index_that_a_graph_makes(a: Attacker) -> None:
    """Two nodes: the first writes the index that the second reads, in and out of range in turn"""
    wire, handle, base = a.buffer(65536)
    rows = tensor(1, (64, 16), handle, base)
    numbers = tensor(2, (4,), handle, base + 8192)
    for last in (15.0, 16.0):
        wire.set_tensor(numbers, np.array([0, 1, 2, last], np.float32).tobytes())
        index = wire.op_of(3, "CPY", (4,), (handle, base + 12288), 2, type=int(GgmlType.I32))
        index["src"] = sources(2, 3)
        result = wire.op_of(4, "GET_ROWS", (64, 4), (handle, base + 16384), 1, 3)
        wire.run([index, result], [rows, numbers])


@attack(READ_TWICE)
def experts_under_a_product(a: Attacker) -> None:
    """MUL_MAT_ID of zeros whose result lies on the experts' numbers, zeros too"""
    wire, handle, base = a.buffer(MIB)
    weights = tensor(1, (64, 32, 4), handle, base)
    x = tensor(2, (64, 1, 8), handle, base + 65536)
    ids = tensor(3, (2, 8), handle, base + 131072, GgmlType.I32)
    node = wire.op_of(4, "MUL_MAT_ID", (32, 2, 8), (handle, base + 131072), 1, 2, 3)
    wire.run([node], [weights, x, ids])


@attack(READ_TWICE)
def positions_under_a_rotation(a: Attacker) -> None:
    """ROPE of zeros whose result lies on its positions"""
    wire, handle, base = a.buffer(MIB)
    x = tensor(1, (64, 4, 16), handle, base)
    positions = tensor(2, (16,), handle, base + 65536, GgmlType.I32)
    params = (0, 64, 0, 0, 0, *floats(10000.0, 1.0, 0.0, 1.0, 32.0, 1.0))
    node = wire.op_of(3, "ROPE", (64, 4, 16), (handle, base + 65536), 1, 2, params=params)
    wire.run([node], [x, positions])


def _refused(a: Attacker, **changed: object) -> None:
    """A sum one of whose sources lies oddly, within its buffer."""
    wire, handle, base = a.buffer(65536)
    x = tensor(1, (64, 4), handle, base + 1024)
    for name, value in changed.items():
        x[name] = value if name != "data" else base + 1024 + int(str(value))
    node = wire.op_of(2, "ADD", (64, 4), (handle, base + 32768), 1, 1)
    wire.run([node], [x])


@attack(ODD_PLACES)
def floats_at_an_odd_address(a: Attacker) -> None:
    """F32 that begin two bytes into one"""
    _refused(a, data=2)


@attack(ODD_PLACES)
def strides_that_are_no_multiple(a: Attacker) -> None:
    """Rows of F32 that are 258 bytes apart"""
    _refused(a, nb=[4, 258, 1032, 1032])


@attack(ODD_PLACES)
def blocks_that_begin_within_blocks(a: Attacker) -> None:
    """A product with weights of Q4_0 that begin one byte into a block"""
    wire, handle, base = a.buffer(65536)
    weights = tensor(1, (64, 8), handle, base + 1, GgmlType.Q4_0, nb=[18, 36, 288, 288])
    x = tensor(2, (64, 2), handle, base + 8192)
    wire.run([wire.op_of(3, "MUL_MAT", (8, 2), (handle, base + 16384), 1, 2)], [weights, x])


@attack(ODD_PLACES)
def the_last_byte_of_a_buffer(a: Attacker) -> None:
    """Uploads, fills and answers that end with the buffer, and one byte behind it"""
    wire, handle, base = a.buffer(4096)
    whole = tensor(1, (1024,), handle, base)
    for size in (1, 0, 2):
        fields = {"tensor": whole, "offset": 4095, "size": size, "value": 7}
        wire.call(Command.MEMSET_TENSOR, fields)
        wire.get_tensor(whole, size, 4095)
