"""What a search found: the smallest value that breaks a property, as text, as a file, once more."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conformance.properties.properties import PROPERTIES, Property, PropertyTarget
from conformance.properties.reduce import reduced
from conformance.properties.search import Search, search
from conformance.suite.context import accepts
from conformance.suite.errors import CaseEnded, Failed, NotOffered
from conformance.suite.probe import introduce_numbering, probe
from conformance.suite.target import Target as Server
from conformance.suite.transcript import Transcript, TranscriptMessage
from protocol.commands import Command
from protocol.dialects import Dialect, Version, compatible_dialects, find_dialects
from protocol.errors import ProtocolError
from protocol.observe.annotate import describe, message_of_answer, message_of_request

# Bytes of one message that are printed; the file has more.
_SHOWN = 64
_MOST_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Finding:
    """``value`` breaks ``property``, and ``reason`` says how; ``messages`` are the exchange.

    ``transcript`` is the same exchange, of a finding that was made here.
    """

    property: Property
    dialect: Dialect
    value: Any
    reason: str
    messages: tuple[tuple[str, str], ...] = ()
    transcript: Transcript | None = None

    def summary(self) -> str:
        """Return what happened, and the value."""
        lines = [f"{self.property.name}, protocol {self.dialect.name}: {self.reason}"]
        return "\n".join([*lines, *("  " + line for line in self.property.lines(self.value))])

    def text(self) -> str:
        """Return text for people: what happened, the value, the messages in words and bytes."""
        lines = [self.summary()]
        hidden = len(self.messages) - _MOST_SHOWN
        if self.messages:
            lines.append("  the messages:")
        if hidden > 0:
            lines.append(f"    ({hidden} earlier ones are in the file)")
        for words, data in self.messages[-_MOST_SHOWN:]:
            shown = data[: 2 * _SHOWN]
            lines.append(f"    {words}")
            lines.append(f"      {shown}{'...' if len(data) > len(shown) else ''}")
        return "\n".join(lines)

    def dumps(self) -> str:
        """Return JSON for ``--replay``."""
        data = {
            "property": self.property.name,
            "protocol": self.dialect.name,
            "reason": self.reason,
            "value": self.property.to_json(self.value),
            "messages": [{"message": words, "bytes": data} for words, data in self.messages],
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def loads(cls, text: str) -> Finding:
        """Return what dumps gave. Raises ValueError for anything else."""
        try:
            data = json.loads(text)
            kept = PROPERTIES[data["property"]]
            messages = tuple((m["message"], m["bytes"]) for m in data["messages"])
            value = kept.from_json(data["value"])
            dialect = find_dialects(data["protocol"])[0]
            return cls(kept, dialect, value, data["reason"], messages)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no finding of these properties ({error!r})") from None

    def save(self, folder: Path) -> Path:
        """Write it to a new file in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.property.name}-{self.dialect.name}"
        paths = (folder / f"{stem}-{i}.json" for i in range(1 << 30))
        path = next(p for p in paths if not p.exists())
        path.write_text(self.dumps())
        return path


def readable(transcript: Transcript) -> Iterable[tuple[str, str]]:
    """Yield the messages of an exchange, each in words and as hexadecimal bytes."""
    for message in transcript.messages:
        yield (
            f"{message.peer} {'>' if message.sent else '<'} {_words(message, transcript)}",
            (message.data.hex()),
        )


def _words(message: TranscriptMessage, transcript: Transcript) -> str:
    if message.note:
        return message.note
    dialect = transcript.dialects.get(message.peer)
    plain = f"{message.command} {message.size} bytes".strip()
    if dialect is None or message.command not in Command.__members__:
        return plain
    try:
        if message.sent:
            return describe(message_of_request(message.data, dialect))
        return describe(message_of_answer(message.data, Command[message.command], dialect))
    except ProtocolError:
        # Cut off, or not one message.
        return plain


class Broken(AssertionError):  # noqa: N818
    """A property does not hold; ``transcript`` is the exchange that shows it."""

    def __init__(self, reason: str, transcript: Transcript) -> None:
        super().__init__(reason)
        self.transcript = transcript


def attempt(target: PropertyTarget, property_: Property, value: Any) -> None:
    """Hold the property to one value. Raises Broken."""
    with target.context() as context:
        try:
            property_.hold(target, context, value)
        except (AssertionError, CaseEnded) as error:
            raise Broken(str(error), context.transcript) from None


def explore(
    target: PropertyTarget, property_: Property, examples: int, seed: int
) -> tuple[Search[Any], Finding | None]:
    """Search for a value that breaks the property; the finding has the smallest one's messages."""

    def fails(value: Any) -> bool:
        try:
            attempt(target, property_, value)
        except Broken:
            return True
        return False

    values = property_.values(target)
    done = search(
        values, lambda value: attempt(target, property_, value), examples, seed, shrink=False
    )
    if done.found is None:
        return done, None
    value = reduced(done.found.value, property_.smaller, fails)
    smallest = Finding(property_, target.dialect, value, done.found.reason)
    again = replay(target, smallest)
    if again is None:
        again = replace(smallest, reason=f"{smallest.reason} (not again when it was repeated)")
    return done, again


def replay(target: PropertyTarget, finding: Finding) -> Finding | None:
    """Try the value of a finding once more; what is found now, None if all is well."""
    try:
        attempt(target, finding.property, finding.value)
    except Broken as error:
        return replace(
            finding,
            dialect=target.dialect,
            reason=str(error),
            messages=tuple(readable(error.transcript)),
            transcript=error.transcript,
        )
    return None


def spoken(server: Server, wanted: Sequence[Dialect], patience: float) -> Iterator[PropertyTarget]:
    """Yield a target for each of these versions that the server speaks.

    Of those that differ in the numbering of ops alone it is the first: a server takes all that
    comes from one address for what it knows of its clients.
    """
    facts = probe(server.address, wanted[0] if len(wanted) == 1 else None, patience)
    seen: list[Dialect] = []
    # What a server that always says the same answers this size of HELLO with.
    fixed: dict[int, Version] = {}
    for dialect in wanted:
        only = fixed.get(dialect.hello_size)
        if only is not None and not accepts(dialect, only):
            continue
        if any(dialect in compatible_dialects(other) for other in seen):
            continue
        seen.append(dialect)
        target = PropertyTarget(server.address, replace(facts, dialect=dialect), patience=patience)
        try:
            with target.context() as context:
                peer = context.connect()
                introduce_numbering(peer)
        except NotOffered as error:
            if len(set(error.offered)) == 1:
                fixed[dialect.hello_size] = error.offered[0]
            continue
        except Failed:
            continue
        yield replace(target, facts=replace(target.facts, version=peer.version))


def run_replay(path: Path, server: Server, patience: float = 20.0) -> int:
    """Try the finding in a file once more; the exit status. ValueError for a file without one."""
    finding = Finding.loads(path.read_text())
    targets = list(spoken(server, [finding.dialect], patience))
    if not targets:
        print(f"error: the server doesn't speak {finding.dialect.name}", file=sys.stderr)
        return 2
    again = replay(targets[0], finding)
    print("all is well" if again is None else again.text())
    return 0 if again is None else 1
