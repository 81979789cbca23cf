"""What an attack is: a function that gets hold of a server's ports, and an entry in a table.

To add one: a function in a file of ``catalogue/``, under :func:`attack`, with a docstring that says
in a sentence what it sends. It is called again and again, in a process of its own, until its time
is over or the server has hung up on it for good. It keeps within its own buffers: what is looked at
is this project's server, and what others' servers do with it must be harmless.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.graph_payload import decode_graph
from protocol.requests import encode_frame
from protocol.split import ProgramStep, encode_program, split_caps, with_split
from tools.serving.processes import HOST
from tools.wire import Bytes, ClosedError, Wire, sources, tensor

SPLIT = with_split(DIALECTS[0])
MIB = 1 << 20
# What an attacker may meet: it is turned away.
TURNED_AWAY = (ClosedError, OSError, MemoryError, EOFError)


@dataclass(frozen=True, slots=True)
class Where:
    """The place of an attacked server: its ports, its folder of tensors, and its log."""

    port: int
    tls_port: int = 0
    metrics_port: int = 0
    cache: str = ""
    log: str = ""

    def encode(self) -> str:
        """Return it as an argument of a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return what :meth:`encode` made."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Attack:
    """One entry. ``kind`` is what it is an instance of, ``server`` what it is tried on."""

    name: str
    kind: str
    does: str
    run: Callable[[Attacker], None]
    server: str
    once: bool


CATALOGUE: dict[str, Attack] = {}

Function = Callable[["Attacker"], None]


def attack(
    kind: str, *, server: str = "worker", once: bool = False
) -> Callable[[Function], Function]:
    """Register a function as an attack of a kind; ``once`` if it goes on by itself."""

    def register(function: Function) -> Function:
        name = function.__name__.replace("_", "-")
        if name in CATALOGUE:
            raise RuntimeError(f"two attacks are called {name}")
        does = (function.__doc__ or "").strip().split("\n")[0]
        if not does:
            raise RuntimeError(f"attack {name} doesn't say what it does")
        CATALOGUE[name] = Attack(name, kind, does, function, server, once)
        return function

    return register


class AttackWire(Wire):
    """One connection of an attacker."""

    def post(self, command: Command, fields: dict[str, Any], body: Bytes = b"") -> None:
        """Send a request and don't wait for its answer."""
        self.send(command, codec(self.dialect.commands[command].request).build(fields), body)

    def pipeline(self, command: Command, fields: list[dict[str, Any]]) -> None:
        """Send many requests in one go, without waiting for answers (:meth:`answers`)."""
        spec = codec(self.dialect.commands[command].request)
        parts = []
        for one in fields:
            payload = spec.build(one)
            parts.append(encode_frame(command, len(payload)) + payload)
        self.socket.sendall(b"".join(parts))

    def answers(self, command: Command, count: int) -> None:
        """Take the answers to so many requests. Raises ClosedError."""
        for _ in range(count):
            self.answer(command)

    def settle(self) -> None:
        """Wait until all that was asked for is done. Raises ClosedError."""
        self.call(Command.GET_ALIGNMENT, {"device": 0})

    def run(self, nodes: list[dict[str, Any]], leaves: list[dict[str, Any]]) -> None:
        """Have a graph computed, and wait for it. Raises ClosedError."""
        self.send(Command.GRAPH_COMPUTE, self.graph(nodes, leaves))
        self.settle()

    def program(self, number: int, nodes: list[dict[str, Any]], leaves: list[dict[str, Any]],
                *, inputs: tuple[int, ...] = (), outputs: tuple[int, ...] = ()) -> Any:  # fmt: skip
        """Have a program made of one step; its answer's result."""
        tensors = decode_graph(self.graph(nodes, leaves), self.dialect).tensors
        step = ProgramStep(inputs, tuple(node["id"] for node in nodes), outputs)
        fields = {"device": 0, "program": number}
        return self.call(Command.SPLIT_PROGRAM, fields, encode_program([step], tensors)).result

    def op_of(self, id: int, name: str, ne: tuple[int, ...], place: tuple[int, int], *src: int,
              params: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:  # fmt: skip
        """Return a node.

        ``place`` is its buffer's handle and its address, ``src`` the sources' ids.
        """
        words = [*params, *[0] * (16 - len(params))]
        made = tensor(id, ne, *place, op=self.op(name), src=sources(*src), op_params=words)
        made.update(fields)
        return made


@dataclass(slots=True)
class Attacker:
    """The things that an attack has.

    These are the server, the time until it is over, and what it found out itself.
    """

    where: Where
    seconds: float
    findings: list[str] = field(default_factory=list)
    scratch: Path = field(default_factory=Path)
    _end: float = 0.0
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        """True if the time is over."""
        return time.monotonic() > self._end

    def hold(self) -> None:
        """Do nothing until the time is over."""
        while not self.over:
            time.sleep(0.02)

    def connect(self, *, hello: bool = True, port: int = 0) -> AttackWire:
        """Connect; it is closed when this call of the attack is over."""
        wire = AttackWire(port or self.where.port, hello=hello, timeout=max(1.0, self.seconds))
        return self._held.enter_context(wire)

    def buffer(self, size: int) -> tuple[AttackWire, int, int]:
        """Connect and allocate; the connection, and the buffer's handle and address."""
        wire = self.connect()
        return (wire, *wire.alloc(size))

    def coordinate(self) -> AttackWire:
        """Connect, speaking the split extension."""
        wire = AttackWire(self.where.port, SPLIT, hello=False, timeout=max(1.0, self.seconds))
        self._held.enter_context(wire)
        wire.send(Command.HELLO, split_caps())
        wire.answer(Command.HELLO)
        return wire

    def socket(self, port: int) -> socket.socket:
        """Open a bare socket, closed when this call of the attack is over."""
        made = socket.create_connection((HOST, port), timeout=max(1.0, self.seconds))
        return self._held.enter_context(made)

    def found(self, what: str) -> None:
        """Report a fault that the attack has seen by itself."""
        if what not in self.findings:
            self.findings.append(what)

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Close at the end what was opened within."""
        with contextlib.ExitStack() as self._held:
            yield


def many(template: dict[str, Any], count: int, first: int) -> list[dict[str, Any]]:
    """Return copies of a node, with ids from ``first`` on."""
    return [{**template, "id": first + i, "name": b"n"} for i in range(count)]


def floats(*values: float) -> tuple[int, ...]:
    """Return the parameters of an op as words."""
    return tuple(int(word) for word in np.array(values, np.float32).view(np.int32))
