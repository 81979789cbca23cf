"""Attacks on upstream's server that were reported in public, in every dialect that has the means.

Each is refused: the connection of the attacker is closed with a line in the log, the server goes
on, and what another client has in memory around the attacker's is as it was, byte by byte.

The three advisories of 2024 (llama.cpp's GHSA-wcr5-566p-9cwj, GHSA-5vm9-p64x-gqw9 and
GHSA-mqp6-7pv6-fqjf) are followed as databases of vulnerabilities describe them (CVE-2024-42479: a
write to any address by SET_TENSOR; 42478: a read by GET_TENSOR; 42477: a type behind the end of
the table of types), and github.com/ggml-org/ggml pull request 1103, which ended them. Issues and
pull requests are llama.cpp's, unless it is said otherwise.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect
from protocol.ggml.types import GgmlType
from tests.server.process import ServerProcess, Wire, running, sources, tensor

F32, I32, I64 = GgmlType.F32, GgmlType.I32, GgmlType.I64
BUFFER = 4096
# Servers offer these by --protocol; of two with one name the newer is spoken.
SPOKEN = {d.version[:2]: d for d in reversed(DIALECTS)}


class Attacker:
    """A connection with one buffer, ``victim`` an address of another client's."""

    def __init__(self, wire: Wire, victim: tuple[int, int]) -> None:
        self.wire = wire
        self.dialect = wire.dialect
        self.victim, self.victim_base = victim
        self.handle, self.base = wire.alloc(BUFFER)

    def has(self, *names: str) -> bool:
        return all(name in list(map(str, self.dialect.ops)) for name in names)

    def tensor(self, id: int, ne: tuple[int, ...] = (4,), at: int = 0, **fields: Any) -> Any:
        return tensor(id, ne, self.handle, self.base + at, **fields)

    def node(
        self, op: str, id: int, src: Sequence[int], ne: tuple[int, ...] = (4,), **fields: Any
    ) -> Any:
        at = fields.pop("at", 2048)
        return self.tensor(id, ne, at, op=self.wire.op(op), src=sources(*src), **fields)

    def put(self, leaf: Any, *values: int) -> None:
        kind = np.int64 if leaf["type"] == I64 else np.int32
        self.wire.set_tensor(leaf, np.array(values, kind).tobytes())

    def request(self, command: Command, data: bytes = b"", **fields: Any) -> None:
        head = codec(self.dialect.commands[command].request).build({"cache_flag": 0, **fields})
        self.wire.send(command, head, data)

    def graph(self, nodes: list[Any], leaves: list[Any]) -> None:
        self.wire.send(Command.GRAPH_COMPUTE, self.wire.graph(nodes, leaves))


Attack = Callable[[Attacker], None]


@dataclass
class Report:
    """``attack`` is done with each of ``variants``; the log then has the text ``says``."""

    name: str
    attack: Callable[..., None]
    says: str
    variants: Sequence[Any] = ()
    commands: tuple[Command, ...] = ()
    ops: tuple[str, ...] = field(default=())

    @property
    def cases(self) -> list[tuple[str, Attack]]:
        def bind(variant: Any) -> Attack:
            return lambda a: self.attack(a, variant)

        if not self.variants:
            return [(self.name, self.attack)]
        return [(f"{self.name} [{_told(variant)}]", bind(variant)) for variant in self.variants]


def _told(variant: Any) -> str:
    return variant.name if isinstance(variant, Command) else str(variant)


REPORTS: list[Report] = []


def report(
    says: str,
    variants: Sequence[Any] = (),
    commands: tuple[Command, ...] = (),
    ops: tuple[str, ...] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(attack: Callable[..., None]) -> Callable[..., None]:
        REPORTS.append(Report(attack.__name__, attack, says, variants, commands, ops))
        return attack

    return register


# -- pointers: a tensor's buffer and data are what the client says


def aim(a: Attacker, where: str) -> dict[str, Any]:
    """A tensor whose data is in another client's buffer, or anywhere."""
    buffer, data = {
        "no buffer": (0, a.victim_base),
        "own buffer": (a.handle, a.victim_base),
        "the victim's buffer": (a.victim, a.victim_base),
        "stack": (0, 0x7FFF_FFFF_E000),
        "before": (a.handle, a.base - 64),
        "behind": (a.handle, a.base + BUFFER),
        "null": (0, 0),
        "end of addresses": (a.handle, (1 << 64) - 8),
    }[where]
    return {**tensor(1, (4,)), "buffer": buffer, "data": data}


PLACES = (
    "no buffer", "own buffer", "the victim's buffer", "stack", "before", "behind", "null",
    "end of addresses",
)  # fmt: skip
REFUSED = "is no buffer of this client|outside the buffer"


@report(REFUSED, PLACES)
def ghsa_wcr5_566p_9cwj(a: Attacker, where: str) -> None:
    """Write what where: SET_TENSOR to the address in rpc_tensor.data, which was not checked."""
    a.request(Command.SET_TENSOR, b"x" * 16, tensor=aim(a, where), offset=0)


@report(REFUSED, PLACES)
def ghsa_5vm9_p64x_gqw9(a: Attacker, where: str) -> None:
    """Read what where: GET_TENSOR from the address in rpc_tensor.data, which was not checked."""
    a.request(Command.GET_TENSOR, tensor=aim(a, where), offset=0, size=16)


@report(REFUSED, PLACES, (Command.MEMSET_TENSOR,))
def the_same_with_memset(a: Attacker, where: str) -> None:
    """MEMSET_TENSOR came after these reports; it has the same fields."""
    a.request(Command.MEMSET_TENSOR, tensor=aim(a, where), offset=0, size=16, value=1)


@report(REFUSED, ("SET_TENSOR", "SET_TENSOR_HASH", "GET_TENSOR", "COPY_TENSOR"))
def pull_14868(a: Attacker, command: str) -> None:
    """A buffer that isn't known was a null pointer in four commands."""
    lost = {**tensor(1, (4,)), "buffer": 0xDEAD_BEEF, "data": a.base}
    {
        "SET_TENSOR": lambda: a.request(Command.SET_TENSOR, b"x" * 16, tensor=lost, offset=0),
        "SET_TENSOR_HASH": lambda: a.request(
            Command.SET_TENSOR_HASH, tensor=lost, offset=0, hash=1
        ),
        "GET_TENSOR": lambda: a.request(Command.GET_TENSOR, tensor=lost, offset=0, size=16),
        "COPY_TENSOR": lambda: a.request(Command.COPY_TENSOR, src=a.tensor(2), dst=lost),
    }[command]()


OFFSETS = (BUFFER, BUFFER - 15, 1 << 32, (1 << 63) + 1, (1 << 64) - 16, (1 << 64) - 1)


@report("outside the buffer", [(c, n) for c in ("set", "get", "memset", "hash") for n in OFFSETS])
def pull_13069_bounds(a: Attacker, variant: tuple[str, int]) -> None:
    """Offsets beyond the buffer, and such that adding the size wraps around, ended the process."""
    command, offset = variant
    where: dict[str, Any] = {"tensor": a.tensor(1), "offset": offset}
    if command == "set":
        a.request(Command.SET_TENSOR, b"x" * 16, **where)
    elif command == "get" or (
        command == "memset" and Command.MEMSET_TENSOR not in a.dialect.commands
    ):
        a.request(Command.GET_TENSOR, size=16, **where)
    elif command == "memset":
        a.request(Command.MEMSET_TENSOR, size=16, value=1, **where)
    else:
        # Of no content nothing is written: an offset to the very end is no fault yet.
        where["offset"] = max(offset, BUFFER + 1)
        a.request(Command.SET_TENSOR_HASH, hash=1, **where)


@report("outside the buffer", (512, 1024, 1 << 20, 1 << 29))
def ggml_pull_1103(a: Attacker, elements: int) -> None:
    """COPY_TENSOR: as many bytes as the source has were written, however small the target is.

    With that an object beside the target buffer was overwritten, and code run ("a 10k word
    writeup" is mentioned there).
    """
    small = a.tensor(2, at=BUFFER - 16)
    a.request(Command.COPY_TENSOR, src=a.tensor(1, (elements,)), dst=small)


@report("data of source 0 't1' not here", ("no buffer", "the victim's buffer", "stack"))
def pull_20908(a: Attacker, where: str) -> None:
    """Checks were skipped for tensors of a graph whose buffer is null (GHSA-j8rj-fmpv-wcxw)."""
    a.graph(
        [
            a.node("CPY", 3, (1, 2)),
        ],
        [aim(a, where), a.tensor(2, at=2048)],
    )


@report("has no memory on this server|not here", ("no buffer", "the victim's buffer", "stack"))
def pull_20908_written(a: Attacker, where: str) -> None:
    """The same for what the graph writes."""
    target = {**aim(a, where), "id": 3, "op": a.wire.op("SQR"), "src": sources(2)}
    a.graph([target], [a.tensor(2)])


# -- numbers that are used as an index or a divisor

TYPED = ("SET_TENSOR", "SET_TENSOR_HASH", "GET_TENSOR", "COPY_TENSOR", "INIT_TENSOR",
         "GET_ALLOC_SIZE", "MEMSET_TENSOR", "GRAPH_COMPUTE")  # fmt: skip


def send_tensor(a: Attacker, command: str, bad: dict[str, Any]) -> None:
    """A command about a tensor that is wrong in itself."""
    number = Command[command]
    if number not in a.dialect.commands:
        number = Command.GET_TENSOR
    where: dict[str, Any] = {"tensor": bad, "offset": 0}
    if number is Command.GRAPH_COMPUTE:
        a.graph([a.node("SQR", 2, (1,))], [bad])
    elif number is Command.SET_TENSOR:
        a.request(number, b"x" * 4, **where)
    elif number is Command.COPY_TENSOR:
        a.request(number, src=bad, dst=a.tensor(2, at=1024))
    else:
        others: dict[str, Any] = {
            "hash": 1,
            "size": 4,
            "value": 0,
            "device": 0,
            "srcs": [a.tensor(0)] * 10,
        }
        a.request(number, **where, **others)


BAD_TYPES = (43, 255, 1 << 16, 0x7FFF_FFFF, 0xFFFF_FFFF)


@report("unknown type", [(c, t) for c in TYPED for t in BAD_TYPES])
def ghsa_mqp6_7pv6_fqjf(a: Attacker, variant: tuple[str, int]) -> None:
    """A type beyond the table of types: what lies behind the table was read (ggml_type_size)."""
    send_tensor(a, variant[0], {**a.tensor(1), "type": variant[1]})


@report("unknown type", [(c, t) for c in TYPED for t in (4, 5, 31, 36)])
def issue_13067(a: Attacker, variant: tuple[str, int]) -> None:
    """SET_TENSOR with an invalid type failed an assertion, and the server was gone.

    Removed types are the rest of it: their block size of 0 was divided by (pull request 20712).
    """
    send_tensor(a, variant[0], {**a.tensor(1), "type": variant[1]})


@report("not whole blocks", TYPED)
def issue_25288(a: Attacker, command: str) -> None:
    """A row of less than a block failed an assertion in ggml_row_size."""
    send_tensor(a, command, {**a.tensor(1), "type": int(GgmlType.Q4_0), "ne": [1, 1, 1, 1]})


@report("a function pointer of the client", ("MAP_CUSTOM1", "MAP_CUSTOM2", "MAP_CUSTOM3",
                                                     "CUSTOM"))  # fmt: skip
def issue_25289(a: Attacker, op: str) -> None:
    """A custom op's parameters are the address of a function, and that was called."""
    words = struct.unpack("<16i", struct.pack("<Q", 0x4242_4242_4242).ljust(64, b"\0"))
    a.graph([a.node(op, 2, (1, 1, 1)[: int(op[-1]) if op[-1].isdigit() else 1],
                    op_params=list(words))], [a.tensor(1)])  # fmt: skip


# -- graphs whose shapes don't fit: ggml's constructors check them, the server didn't


@report("GET_ROWS 't3'", (2, 4, 64))
def issue_26825(a: Attacker, batches: int) -> None:
    """GET_ROWS whose indices have more batches than the rows: read behind the rows."""
    rows, indices = a.tensor(1, (4, 1)), a.tensor(2, (1, batches), 1024, type=I32)
    a.put(indices, *[0] * batches)
    a.graph([a.node("GET_ROWS", 3, (1, 2), (4, 1, batches))], [rows, indices])


@report("GET_ROWS 't3'", ("rows", "columns", "strides"))
def pull_25542(a: Attacker, what: str) -> None:
    """GET_ROWS into a result that is smaller than what is fetched: written behind it.

    With it an address in an object of the server's was overwritten and jumped to.
    """
    count = 256
    rows, indices = a.tensor(1, (4, 4)), a.tensor(2, (count,), 1024, type=I32)
    a.put(indices, *[1] * count)
    fields: dict[str, Any] = {}
    if what == "rows":
        fields = {"ne": (4, 1)}
    elif what == "columns":
        rows = a.tensor(1, (64, 4))
        fields = {"ne": (4, count // 8), "at": BUFFER - 16 * count // 8}
    else:
        fields = {"ne": (4, 1), "nb": [4, 1 << 20, 1 << 20, 1 << 20]}
    a.graph([a.node("GET_ROWS", 3, (1, 2), **fields)], [rows, indices])


@report("SET_ROWS 't3'", (16, 64, 4096, -4096, 1 << 16), ops=("SET_ROWS",))
def issue_26912(a: Attacker, distance: int) -> None:
    """SET_ROWS with more batches than the target has: a write at a distance of choice.

    The stride of a dimension of 1 isn't part of a tensor's extent, so it was not checked.
    """
    source = a.tensor(1, (4, 1, 2))
    indices = a.tensor(2, (1,), 1024, type=I64)
    a.put(indices, 0)
    stride = distance % (1 << 32)
    node = a.node("SET_ROWS", 3, (1, 2), (4, 1), nb=[4, 16, stride, stride])
    a.graph([node], [source, indices])


@report("(ACC|SET) 't3'", ("ACC", "SET"))
def issue_25764(a: Attacker, op: str) -> None:
    """Negative strides in the parameters that cancel out in the one corner that was checked."""
    words = [-4096, 4096, 0, 0, 0]
    node = a.node(op, 3, (1, 2), (4, 4, 4), op_params=words + [0] * 11)
    a.graph([node], [a.tensor(1, (4, 4, 4)), a.tensor(2, (4, 2, 2), 1024)])


@report("SSM_SCAN 't9'", (3, 1 << 24, -1, -(1 << 31)), ops=("SSM_SCAN",))
def issue_25765(a: Attacker, state: int) -> None:
    """SSM_SCAN: numbers of states are data, which no check of shapes sees."""
    shapes = [(2, 3, 4, 2), (3, 4, 2, 1), (4, 2, 1), (2, 4), (2, 2, 2, 1), (2, 2, 2, 1)]
    leaves = [a.tensor(i, ne, 256 * (i - 1)) for i, ne in enumerate(shapes, 1)]
    ids = a.tensor(7, (1,), 1800, type=I32)
    a.put(ids, state)
    node = a.node("SSM_SCAN", 9, range(1, 8), (72,), op_params=[1] + [0] * 15)
    a.graph([node], [*leaves, ids])


@report("GATED_DELTA_NET 't9'", (-1, 2, 4, 1 << 20, (1 << 31) - 1), ops=("GATED_DELTA_NET",))
def issue_25704(a: Attacker, snapshots: int) -> None:
    """GATED_DELTA_NET: the number of states to keep, a parameter, says where they are written."""
    shapes = [(4, 1, 4), (4, 2, 4), (4, 2, 4), (1, 2, 4), (1, 2, 4), (4, 4, 2)]
    leaves = [a.tensor(i, ne, 256 * (i - 1)) for i, ne in enumerate(shapes, 1)]
    node = a.node("GATED_DELTA_NET", 9, range(1, 7), (8, 8), op_params=[snapshots] + [0] * 15)
    a.graph([node], leaves)


# -- the tests


class Bystander:
    """Another client, with bytes of random content on both sides of what comes after it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.parts = [self._make(seed) for seed in range(2)]
        self.victim = self.parts[-1][1]["buffer"], self.parts[-1][1]["data"]

    def _make(self, seed: int) -> tuple[bytes, Any]:
        data = np.random.default_rng(seed).bytes(1 << 16)
        handle, base = self.wire.alloc(len(data))
        whole = tensor(1, (len(data) // 4,), handle, base)
        self.wire.set_tensor(whole, data)
        return data, whole

    def surround(self) -> None:
        """Once the attacker has its buffer: another one behind it."""
        if len(self.parts) > 2:
            self.wire.call(Command.FREE_BUFFER, {"remote_ptr": self.parts.pop()[1]["buffer"]})
        self.parts.append(self._make(7))

    def check(self) -> None:
        for data, whole in self.parts:
            assert self.wire.get_tensor(whole, len(data)) == data


@pytest.fixture(scope="module", params=SPOKEN.values(), ids=lambda d: d.name)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, Bystander]]:
    dialect: Dialect = request.param
    with (
        # By one numbering: what is wrong with a node is then told of the op that it is.
        running("--protocol", dialect.name) as server,
        Wire(server.port, dialect) as wire,
    ):
        yield server, Bystander(wire)


def is_possible(report: Report, dialect: Dialect) -> bool:
    names = set(map(str, dialect.ops))
    return names.issuperset(report.ops) and all(c in dialect.commands for c in report.commands)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_reported_attack(target: tuple[ServerProcess, Bystander], report: Report) -> None:
    server, bystander = target
    dialect = bystander.wire.dialect
    if not is_possible(report, dialect):
        pytest.skip(f"protocol {dialect.name} doesn't have it")
    for name, attack in report.cases:
        before = len(server.log)
        with Wire(server.port, dialect) as wire:
            attacker = Attacker(wire, bystander.victim)
            bystander.surround()
            attack(attacker)
            assert wire.closed_by_server(), name
        server.wait_for(
            rf"(?s)^.{{{before}}}.*ERROR[^\n]*({report.says})[^\n]*closing the connection"
        )
        assert "Traceback" not in server.log
        assert server.alive
        bystander.check()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_pull_14882(target: tuple[ServerProcess, Bystander]) -> None:
    """Handles and addresses that clients are given were the server's own pointers.

    Here they say nothing about where its memory is.
    """
    server, bystander = target
    maps = Path(f"/proc/{server.child.pid}/maps").read_text()
    ranges = [
        (int(low, 16), int(high, 16))
        for low, high in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", maps, re.MULTILINE)
    ]
    assert ranges
    for _, whole in bystander.parts:
        for number in (whole["buffer"], whole["data"]):
            assert not any(low <= number < high for low, high in ranges)
