"""What is seen of a connection: messages, and bytes that are none."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.commands import Command
from protocol.dialects import Answer, CommandSpec, Dialect
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload


class Side(enum.Enum):
    """The side that sent it."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def other(self) -> Side:
        return Side.SERVER if self is Side.CLIENT else Side.CLIENT


class MessageKind(enum.Enum):
    """The kind of a message.

    INPUTS and OUTPUTS are the bytes of a step of a SPLIT_RUN, SWAPS those on a connection that
    SPLIT_JOIN has made a link, a message for each piece that is seen: nothing on a link says what
    belongs together.
    """

    REQUEST = "request"
    ANSWER = "answer"
    INPUTS = "inputs"
    OUTPUTS = "outputs"
    SWAPS = "swaps"


@dataclass(slots=True, eq=False)
class ObservedMessage:
    """One message, all of it if ``missing`` is 0.

    ``head`` is its frame and fixed part as sent and ``fields`` what that says (None if bytes of it
    are missing); ``body_size`` bytes of data or of a graph follow, in ``body`` unless they are too
    many to keep. ``start`` and ``end`` are offsets in the stream of its side, ``started`` and
    ``ended`` the times of its first and last byte as fed. ``number`` counts requests from 0; an
    answer has that of its ``request``.
    """

    kind: MessageKind
    side: Side
    command: Command
    dialect: Dialect
    spec: CommandSpec
    number: int = 0
    start: int = 0
    started: float | None = None
    head: bytes = b""
    fields: Any = None
    body_size: int = 0
    body: bytes | bytearray | None = None
    end: int = 0
    ended: float | None = None
    request: ObservedMessage | None = None
    step: int = 0
    # The decoded body of a graph or program.
    graph: GraphPayload | ProgramPayload | None = None
    # Bytes that were not seen, and what is wrong with the content although its frame is right.
    missing: int = 0
    problem: str = ""

    @property
    def name(self) -> str:
        """Return what it is, for messages."""
        command = self.command.name
        return {
            MessageKind.REQUEST: command,
            MessageKind.ANSWER: f"the answer to {command}",
            MessageKind.INPUTS: f"the inputs of step {self.step} of {command}",
            MessageKind.OUTPUTS: f"the outputs of step {self.step} of {command}",
            MessageKind.SWAPS: "the swaps on a link",
        }[self.kind]

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return self.end - self.start

    @property
    def data(self) -> bytes:
        """The bytes of the message as far as they were kept."""
        return self.head + bytes(self.body or b"")

    @property
    def answered(self) -> bool:
        """Return whether this is a request that gets an answer."""
        return self.kind is MessageKind.REQUEST and self.spec.answer is not Answer.NEVER

    @property
    def latency(self) -> float | None:
        """Seconds from the last byte of the request to the last of its answer, if both are known.

        For an answer; of outputs from the last bytes of the client before them. Swaps have none.
        """
        if self.request is None or self.kind is MessageKind.SWAPS:
            return None
        before = self.request.ended
        return None if before is None or self.ended is None else self.ended - before


@dataclass(frozen=True, slots=True)
class Failure:
    """The bytes at ``offset`` are no message: nothing after them is read on that side."""

    side: Side
    offset: int
    time: float | None
    text: str


@dataclass(frozen=True, slots=True)
class SkippedBytes:
    """Bytes of a stream, seen or not, that belong to no message that could be read, and why."""

    side: Side
    start: int
    end: int
    time: float | None
    text: str

    @property
    def size(self) -> int:
        return self.end - self.start


Event = ObservedMessage | Failure | SkippedBytes
# Takes bytes of a message's body: the message (its end is not known yet), where in the body they
# belong, and the bytes, which are only lent. Holes show in the offsets.
Sink = Callable[[ObservedMessage, int, "bytes | bytearray | memoryview"], None]
