"""What passed so far, counted: bytes, messages, tokens, and how long answers took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.commands import Command
from protocol.observe.conversation import Conversation
from protocol.observe.events import Event, Failure, MessageKind, ObservedMessage, Side
from tools.record.frames import Address

# The logits: each row of them is what one token is chosen by.
_LOGITS = b"result_output"
_GRAPHS = frozenset({Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE, Command.SPLIT_RUN})


@dataclass(slots=True)
class CommandStats:
    """One command: how often, how many bytes, and the seconds until it was answered."""

    requests: int = 0
    size: int = 0
    answers: int = 0
    seconds: float = 0.0
    longest: float = 0.0

    @property
    def mean(self) -> float:
        return self.seconds / self.answers if self.answers else 0.0


@dataclass(slots=True)
class RecordStats:
    """Watches connections and counts; ``report`` takes lines for the user."""

    report: Callable[[str], None]
    connections: int = 0
    open: int = 0
    sent: dict[Side, int] = field(default_factory=lambda: dict.fromkeys(Side, 0))
    commands: dict[Command, CommandStats] = field(default_factory=dict)
    dialects: Counter[str] = field(default_factory=Counter)
    graphs: int = 0
    tokens: int = 0

    def opened(self, client: Address, server: Address, time_ns: int) -> CountedConnection:
        """Count a client that has been connected."""
        self.connections += 1
        self.open += 1
        return CountedConnection(self, client)

    def refused(self, client: Address, server: Address, time_ns: int) -> None:
        """Count a client for which the server could not be reached."""
        self.connections += 1

    def count(self, message: ObservedMessage) -> None:
        """Count a message that has passed."""
        command = message.command
        stats = self.commands.setdefault(command, CommandStats())
        stats.size += message.size
        if message.kind is MessageKind.REQUEST:
            stats.requests += 1
            self.graphs += command in _GRAPHS
        elif (latency := message.latency) is not None:
            stats.answers += 1
            stats.seconds += latency
            stats.longest = max(stats.longest, latency)
        if command is Command.HELLO and message.kind is MessageKind.ANSWER:
            self.dialects[message.dialect.name] += 1
        if command is Command.GET_TENSOR and message.kind is MessageKind.ANSWER:
            self.tokens += _rows_of_logits(message)


def _rows_of_logits(answer: ObservedMessage) -> int:
    request = answer.request
    if request is None or request.fields is None:
        return 0
    tensor = request.fields.tensor
    row = tensor.nb[1]
    named = tensor.name.split(b"\0", 1)[0] == _LOGITS
    return answer.body_size // row if named and row else 0


class CountedConnection:
    """One connection whose messages are counted, for as long as they can be read."""

    def __init__(self, stats: RecordStats, client: Address) -> None:
        self._stats = stats
        self._client = client
        self._conversation: Conversation | None = Conversation(keep=0)
        self._open = set(Side)

    def data(self, side: Side, data: bytes, time_ns: int) -> None:
        """Take ``data``, which ``side`` sent."""
        self._stats.sent[side] += len(data)
        if self._conversation is None:
            return
        try:
            self._take(self._conversation.feed(side, data, time_ns / 1e9))
        except Exception as error:
            # Whatever is wrong with reading them must not end connections that others rely on.
            self._stats.report(f"{self._client}: not counted any more: {error!r}")
            self._conversation = None

    def ended(self, side: Side, time_ns: int) -> None:
        """Take note that ``side`` sends nothing more."""
        self._end({side})

    def reset(self, side: Side, time_ns: int) -> None:
        """Take note that ``side`` has broken the connection off."""
        self._end(set(Side))

    def _end(self, sides: set[Side]) -> None:
        was_open = bool(self._open)
        self._open -= sides
        if was_open and not self._open:
            self._stats.open -= 1
            if self._conversation is not None:
                self._take(self._conversation.close())

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ObservedMessage):
                self._stats.count(event)
            elif isinstance(event, Failure):
                self._stats.report(f"{self._client}: {event.side.value}: {event.text}")
                # What follows is passed on and recorded, but means nothing here.
                self._conversation = None
                return
