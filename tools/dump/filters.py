"""Which messages are shown."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.commands import Command
from protocol.endpoint import format_endpoint
from protocol.observe.annotate import text_of
from protocol.observe.conversation import ObservedMessage

if TYPE_CHECKING:
    # Not at run time: the command line is read without what captures need.
    from tools.capture.connections import CapturedConnection


@dataclass(frozen=True, slots=True)
class Filters:
    """An empty filter lets everything through. ``tensors`` are patterns of names."""

    commands: frozenset[Command] = frozenset()
    tensors: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    connections: frozenset[int] = frozenset()

    def wants(self, connection: CapturedConnection) -> bool:
        if self.connections and connection.number not in self.connections:
            return False
        return not self.clients or any(
            client == connection.client or connection.client.startswith(format_endpoint(client, ""))
            for client in self.clients
        )

    def shows(self, message: ObservedMessage) -> bool:
        """Return whether a message of a connection that is wanted is shown.

        Answers are shown as their requests.
        """
        if self.commands and message.command not in self.commands:
            return False
        if not self.tensors:
            return True
        return any(
            fnmatch.fnmatchcase(name, pattern)
            for name in tensor_names(message.request or message)
            for pattern in self.tensors
        )

    @property
    def of_messages(self) -> bool:
        """True if only some messages of a connection are shown."""
        return bool(self.commands or self.tensors)


def pattern(text: str) -> str:
    """Return a pattern of names; plain text is looked for anywhere in them."""
    return text if any(mark in text for mark in "*?[") else f"*{text}*"


def message_tensors(message: ObservedMessage) -> Iterator[Any]:
    """Yield the rpc_tensors in a message's fields."""
    if message.fields is None:
        return
    for value in vars(message.fields).values():
        for item in value if isinstance(value, tuple) else (value,):
            if hasattr(item, "op_params"):
                yield item


def tensor_names(message: ObservedMessage) -> Iterator[str]:
    """Yield names of the tensors that a message is about, those of its graph included."""
    for tensor in message_tensors(message):
        yield text_of(tensor.name)
    if message.graph is not None:
        yield from map(text_of, message.graph.tensors["name"].tolist())
