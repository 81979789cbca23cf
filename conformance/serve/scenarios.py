"""The scenarios: what the scripted server does in each, and what a client has to do then.

Expectations are a table, not code: four ways in which a run of a client may have to end, below.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from conformance.serve.faults import Fault, Mishap
from conformance.serve.server import Offered, Script
from conformance.serve.state import Properties
from protocol.commands import Command
from protocol.dialects import Answer, Dialect, Version


class Conduct(enum.Enum):
    """The way a run of a client has to end. Rules are kept and nothing hangs in every one."""

    SUCCEEDS = "The client does its work; a program ends with status 0."
    REFUSES = (
        "The client closes the connection and sends nothing more on it; a program says so and "
        "ends with a status other than 0, without a crash."
    )
    NOTICES = (
        "The client sends nothing more on that connection and uses nothing of it; a program says "
        "so and ends with a status other than 0, without a crash."
    )
    COPES = "The client goes on without what it didn't get, or says so and ends, without a crash."


class Topic(enum.Enum):
    """The groups of scenarios; values are number, word to select by, and title."""

    RULES = (20, "rules", "What a client keeps, whatever it is answered")
    DIALECTS = (21, "dialects", "Every protocol version, a plain server")
    VERSIONS = (22, "versions", "Versions that a client has to refuse or to take")
    LIMITS = (23, "limits", "Servers with limits of their own")
    CLOSED = (24, "closed", "The connection is closed instead of an answer")
    CUT = (25, "cut", "The connection is closed within an answer")
    WRONG = (26, "wrong", "Answers of a wrong size")
    SLOW = (27, "slow", "Answers that are late, or come in pieces")
    SILENT = (28, "silent", "Answers that never come")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way of a server to behave; ``name`` is unique.

    The version answered is the client's own moved by ``shift``, or that of ``dialect``; ``needs``
    is the command without which there is nothing to see.
    """

    subject: Topic
    name: str
    does: str
    expected: Conduct
    why: str
    properties: Properties = field(default_factory=Properties)
    fault: Fault | None = None
    shift: tuple[int, int, int] = (0, 0, 0)
    needs: Command | None = None
    # A second run of the client, against what the first one left, is the one that counts.
    repeated: bool = False
    dialect: Dialect | None = None

    def script(self, dialect: Dialect, version: Version | None = None) -> Script:
        """Return the server's script for clients of ``dialect``, which accept ``version``."""
        if self.dialect is not None:
            dialect, version = self.dialect, self.dialect.version
        spoken = version or dialect.version
        major, minor, patch = (max(0, a + b) for a, b in zip(spoken, self.shift, strict=True))
        if self.shift[0] < 0:
            minor = 0

        def offer(size: int) -> Offered | None:
            return Offered((major, minor, patch), dialect) if size == dialect.hello_size else None

        return Script(offer, self.properties, self.fault)


_MANY = 100


def _versions() -> list[Scenario]:
    subject = Topic.VERSIONS
    reads = "Another major version may have other messages altogether."
    newer = "A newer minor version may expect what this client doesn't send."
    return [
        Scenario(
            subject, "newer-major", "HELLO is answered with the next major version",
            Conduct.REFUSES, reads, shift=(1, 0, 0),
        ),
        Scenario(
            subject, "older-major", "HELLO is answered with the major version before",
            Conduct.REFUSES, reads, shift=(-1, 0, 0),
        ),
        Scenario(
            subject, "newer-minor", "HELLO is answered with a newer minor version",
            Conduct.REFUSES, newer, shift=(0, _MANY, 0),
        ),
        Scenario(
            subject, "newer-patch", "HELLO is answered with a newer patch number",
            Conduct.SUCCEEDS, "Patch numbers aren't compared.", shift=(0, 0, _MANY),
        ),
    ]  # fmt: skip


def _limits() -> list[Scenario]:
    subject, succeeds, copes = Topic.LIMITS, Conduct.SUCCEEDS, Conduct.COPES

    def row(
        name: str,
        does: str,
        expected: Conduct,
        why: str,
        needs: Command | None = None,
        repeated: bool = False,
        **properties: object,
    ) -> Scenario:
        plain = Properties()
        made = replace(plain, **properties)  # type: ignore[arg-type]
        return Scenario(subject, name, does, expected, why, made, needs=needs, repeated=repeated)

    return [
        row(
            "alignment", "tensors have to lie on multiples of 4096 bytes", succeeds,
            "Devices need what GET_ALIGNMENT answers.", alignment=4096,
        ),
        row(
            "max-size", "a buffer may have 4 MiB", copes,
            "Devices have a largest allocation; a client splits what is larger, or says that it "
            "can't.", max_size=4 << 20,
        ),
        row(
            "alloc-size", "quantized tensors need 4096 bytes more than they have", succeeds,
            "Devices pad rows of quantized types; what lies there is overwritten.", pad=4096,
            needs=Command.GET_ALLOC_SIZE,
        ),
        row(
            "larger-buffer", "buffers are 64 KiB larger than was asked for", succeeds,
            "remote_size is what there is, not what was asked for.", spare=64 << 10,
        ),
        row(
            "two-devices", "the server has two devices", succeeds,
            "Devices have numbers; each has its own buffers and graphs.",
            needs=Command.DEVICE_COUNT, devices=2,
        ),
        row(
            "no-device", "DEVICE_COUNT is answered 0", copes,
            "A server may have nothing to offer.", needs=Command.DEVICE_COUNT, devices=0,
        ),
        row(
            "no-memory-told", "GET_DEVICE_MEMORY is answered 0 free of 0", copes,
            "A device may be full, or not tell.", needs=Command.GET_DEVICE_MEMORY,
            told_memory=(0, 0),
        ),
        row(
            "no-memory", "every ALLOC_BUFFER is answered 0", copes,
            "0 is no handle: the buffer isn't there.", allocations=0,
        ),
        row(
            "memory-runs-out", "ALLOC_BUFFER is answered 0 from the second one on", copes,
            "0 is no handle: the buffer isn't there.", allocations=1,
        ),
        row(
            "hash-hit", "data over 10 MiB are known from the run before", succeeds,
            "After the answer 1 the data are on the server.",
            needs=Command.SET_TENSOR_HASH, repeated=True, caches=True,
        ),
        row(
            "copy-refused", "every COPY_TENSOR is answered 0", succeeds,
            "A server that can't copy says so; the client then copies through itself.",
            needs=Command.COPY_TENSOR, copies=False,
        ),
    ]  # fmt: skip


def _named(command: Command) -> str:
    return command.name.lower().replace("_", "-")


def _faults(dialect: Dialect) -> list[Scenario]:
    answering = [c for c, spec in dialect.commands.items() if spec.answer is not Answer.NEVER]
    made: list[Scenario] = []

    def add(
        subject: Topic,
        how: Mishap,
        command: Command,
        expected: Conduct,
        why: str,
        name: str = "",
        does: str = "",
        number: int = 1,
        within: bool = False,
        seconds: float = 0.0,
    ) -> None:
        made.append(
            Scenario(
                subject,
                name or f"{subject.value[1]}-{_named(command)}",
                does or f"the server {how.value} to {command.name}",
                expected,
                why,
                fault=Fault(how, command, number, within, seconds),
                needs=command,
            )
        )

    gone = "The server is gone, and with it all that the client had there."
    torn = "What came of the answer is no answer."
    size = "An answer of another size is of another protocol, or damaged: nothing after it fits."
    for command in dialect.commands:
        add(Topic.CLOSED, Mishap.CLOSE, command, Conduct.NOTICES, gone)
    add(
        Topic.CLOSED, Mishap.CLOSE, Command.SET_TENSOR, Conduct.NOTICES, gone,
        "closed-within-set-tensor", "the server closes the connection within the data", within=True,
    )  # fmt: skip
    add(
        Topic.CLOSED, Mishap.RESET, Command.GRAPH_COMPUTE, Conduct.NOTICES, gone,
        "reset-graph-compute", "the server resets the connection at the first graph",
    )  # fmt: skip
    for command in answering:
        empty = not dialect.commands[command].response.sizeof()
        if dialect.commands[command].answer is Answer.FIXED and empty:
            continue
        add(Topic.CUT, Mishap.CUT, command, Conduct.NOTICES, torn)
    add(
        Topic.CUT, Mishap.CUT_SIZE, Command.GET_TENSOR, Conduct.NOTICES, torn, "cut-size",
        "the server closes the connection within the size of an answer",
    )  # fmt: skip
    for command in answering:
        add(
            Topic.WRONG, Mishap.LONG, command, Conduct.REFUSES, size, f"long-{_named(command)}",
        )  # fmt: skip
    add(Topic.WRONG, Mishap.SHORT, Command.HELLO, Conduct.REFUSES, size, "short-hello")
    add(Topic.WRONG, Mishap.SHORT, Command.GET_TENSOR, Conduct.REFUSES, size, "short-get-tensor")
    add(Topic.WRONG, Mishap.HUGE, Command.GET_TENSOR, Conduct.REFUSES, size, "huge-get-tensor")
    add(
        Topic.SLOW, Mishap.DELAY, Command.GET_TENSOR, Conduct.SUCCEEDS,
        "A large graph takes its time.", "late", "the first GET_TENSOR is answered 3 s late",
        seconds=3.0,
    )  # fmt: skip
    made.append(
        Scenario(
            Topic.SLOW,
            "dribble",
            "answers come byte by byte, large ones in uneven pieces",
            Conduct.SUCCEEDS,
            "TCP is a stream: an answer may arrive in any pieces.",
            fault=Fault(Mishap.DRIBBLE),
        )
    )
    for command in (Command.HELLO, Command.GET_TENSOR):
        add(
            Topic.SILENT, Mishap.SILENT, command, Conduct.REFUSES,
            "A server that hangs is as lost as one that is gone.", f"silent-{_named(command)}",
        )  # fmt: skip
    return made


def scenarios(dialect: Dialect) -> list[Scenario]:
    """Return all scenarios for clients of one dialect, but those of other dialects."""
    known = dialect.commands
    made = [*_versions(), *_limits(), *_faults(dialect)]
    return [s for s in made if s.needs is None or s.needs in known]


def plain(dialect: Dialect) -> Scenario:
    """Return a plain server of one version."""
    return Scenario(
        Topic.DIALECTS,
        f"plain-{dialect.name}",
        f"a plain server of protocol {dialect.name}",
        Conduct.SUCCEEDS,
        "A client of this version has to work with it.",
        dialect=dialect,
    )


def foreign(dialect: Dialect) -> Scenario:
    """Return a plain server of a version that isn't the client's."""
    return replace(plain(dialect), expected=Conduct.REFUSES, why="It is another version.")


def select(made: Iterable[Scenario], wanted: str) -> list[Scenario]:
    """Return those that a comma-separated list of scenarios and subjects names, in their order.

    ValueError for an item that names none.
    """
    made = list(made)
    chosen: set[str] = set()
    for item in filter(None, map(str.strip, wanted.split(","))):
        found = [s for s in made if item in (s.name, s.subject.value[1], str(s.subject.value[0]))]
        if not found:
            raise ValueError(f"no scenario '{item}' (see --list)")
        chosen.update(s.name for s in found)
    return [s for s in made if s.name in chosen]
