"""A whole check of a client: which scenarios, in which dialect, and the results for the reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from conformance.serve.faults import Mishap
from conformance.serve.judge import judge
from conformance.serve.memory import HashStore
from conformance.serve.program import Ended, run_client
from conformance.serve.rules import RULES, Notes
from conformance.serve.scenarios import Conduct, Scenario, Topic, foreign, plain, scenarios
from conformance.serve.server import PATIENCE, Offered, Script, ScriptedServer, Visit
from conformance.suite.registry import Case, Group
from conformance.suite.results import CaseResult, Verdict
from protocol.dialects import DIALECTS, Dialect, Version
from protocol.negotiation import Greeting, Negotiator

# A client may have a time limit for answers; one that has none waits as long as it is let.
_SILENT_PATIENCE = 15.0
# Of what the program printed the report has so many lines.
_LAST_LINES = 12
# A client of a known HELLO size accepts one of so many versions at most.
_MOST_TRIES = 8


class NoClient(Exception):  # noqa: N818 - what happened
    """No client came, or none that accepts a version known here; the message says which."""


@dataclass(frozen=True, slots=True)
class Client:
    """The client under test: a command with {port} in it, or empty for one that comes by itself."""

    command: str = ""
    timeout: float = 60.0
    patience: float = PATIENCE
    host: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True, slots=True)
class ClientVersion:
    """A client's version: what it accepted, and the dialect."""

    version: Version
    dialect: Dialect


@dataclass(slots=True)
class ClientCampaign:
    """Runs scenarios with one client; ``announce`` is told of each before it begins."""

    client: Client
    announce: Callable[[str, int], None] = lambda text, port: None
    notes: Notes = field(default_factory=Notes)
    _groups: dict[Topic, Group] = field(default_factory=dict)

    # -- one visit

    def visit(self, script: Script, store: HashStore | None = None) -> tuple[Visit, Ended | None]:
        """Run the client once against a server with this script."""
        client = self.client
        silent = script.fault is not None and script.fault.how is Mishap.SILENT
        patience = max(client.patience, _SILENT_PATIENCE) if silent else client.patience
        server = ScriptedServer(script, client.host, client.port, patience, store)
        try:
            if not client.command:
                self.announce("waiting for a client", server.port)
                server.wait_for_visit()
                return server.visit, None
            ended = run_client(client.command, server.port, client.timeout)
            # A process that has ended has closed its sockets; what came last may still be read.
            server.settle(2.0)
            return server.visit, ended
        finally:
            server.close()

    # -- the client's version

    def find_version(self) -> ClientVersion:
        """Find the newest version that the client accepts, by offering one after the other.

        Raises NoClient.
        """
        negotiator = Negotiator()
        offers = _Offers(negotiator)
        for _ in range(_MOST_TRIES):
            self.announce("finding out the client's version", 0)
            visit, ended = self.visit(Script(offers.offer))
            if visit.went_on:
                assert offers.last is not None
                return ClientVersion(offers.last.version, offers.last.dialect)
            if not any(record.hello_size is not None for record in visit.connections):
                said = f":\n{ended.output}" if ended is not None else ""
                raise NoClient(f"the client sent no HELLO{said}")
            if not offers.refused():
                break
        raise NoClient("the client accepts no version that is known here")

    # -- scenarios

    def run(self, scenario: Scenario, found: ClientVersion) -> CaseResult:
        """Run one scenario; return its result."""
        started = time.monotonic()
        self.announce(f"{scenario.name}: {scenario.does}", 0)
        store = HashStore()
        script = scenario.script(found.dialect, found.version)
        for _ in range(2 if scenario.repeated else 1):
            visit, ended = self.visit(script, store)
            if scenario.expected is not Conduct.SUCCEEDS:
                # Whoever can't go on may leave without tidying up.
                visit.notes.tested.pop("buffer/all-freed", None)
                visit.notes.broken.pop("buffer/all-freed", None)
            self.notes.add(visit.notes)
        verdict, came = judge(scenario, visit, ended)
        result = CaseResult(self._case(scenario), verdict, came, seconds=time.monotonic() - started)
        self._tell(result, visit, ended, found.dialect)
        return result

    def _tell(
        self, result: CaseResult, visit: Visit, ended: Ended | None, dialect: Dialect
    ) -> None:
        """Add what was seen to a result, in words."""

        def line(who: str, sent: bool, text: str) -> None:
            result.transcript.dialects[who] = dialect
            result.transcript.add(who, sent=sent, note=text)

        found = result.verdict in (Verdict.FAIL, Verdict.DIFFERS)
        for record in visit.connections:
            who = f"connection {record.number}"
            line(who, True, f"the client sent {record.story}")
            if found:
                result.transcript.messages.extend(record.messages)
            if record.refusal:
                line(who, False, f"closed: {record.refusal}")
        if found and ended is not None:
            said = ended.output.splitlines()[-_LAST_LINES:]
            line("the program", True, "\n".join([*said, ended.words]))

    def rule_results(self) -> Iterator[CaseResult]:
        """Yield the verdict on every rule, over all that was seen."""
        group = self._group(Topic.RULES)
        for number, rule in enumerate(RULES.values(), 1):
            verdict, came = self.notes.verdict(rule.name)
            case = Case(
                group=group,
                number=number,
                name=rule.name,
                sends="any plain answer",
                expects=rule.requirement,
                why="Servers rely on it.",
                source="docs/protocol.md",
                check=_not_called,
            )
            yield CaseResult(case, verdict, came if verdict is not Verdict.PASS else "")

    def _group(self, subject: Topic) -> Group:
        number, name, title = subject.value
        return self._groups.setdefault(subject, Group(number, name, title))

    def _case(self, scenario: Scenario) -> Case:
        group = self._group(scenario.subject)
        number = next((n for n, c in group.cases.items() if c.name == scenario.name), None)
        number = number or len(group.cases) + 1
        case = Case(
            group=group,
            number=number,
            name=scenario.name,
            sends=scenario.does,
            expects=scenario.expected.value,
            why=scenario.why,
            source="docs/conformance.md, Checking a client",
            check=_not_called,
        )
        group.cases[number] = case
        return case


def _not_called(context: object) -> None:
    raise NotImplementedError("scenarios are run by a campaign")


class _Offers:
    """Versions to offer one after the other, whichever HELLO the client has."""

    def __init__(self, negotiator: Negotiator) -> None:
        self._negotiator = negotiator
        self._greeting: Greeting | None = None
        self._tried: set[Version] = set()
        self.last: Offered | None = None

    def offer(self, size: int) -> Offered | None:
        # Of a client that connects several times in a run all are offered the same.
        self._greeting = self._negotiator.greet("client", bytes(size), 0.0)
        offer = self._greeting.offer
        self.last = Offered(offer.version, offer.dialect)
        return self.last

    def refused(self) -> bool:
        """Go to the next version, as the client hung up; False if there is none."""
        if self._greeting is None:
            return False
        refused = self._greeting.offer
        self._tried.add(refused.version)
        hang_up = self._greeting.ended(0.0)
        return hang_up is not None and hang_up.following.version not in self._tried


def planned(found: ClientVersion, every_dialect: bool) -> list[Scenario]:
    """Return the scenarios for a client of this version, in the order of the report."""
    # By the version that the client took: of several with the same messages it may be an older.
    made: list[Scenario] = [replace(plain(found.dialect), dialect=None)]
    if every_dialect:
        for dialect in DIALECTS:
            if dialect.version[:2] == found.dialect.version[:2]:
                continue
            accepted = dialect.version[0] == found.version[0] and (
                dialect.version[1] <= found.version[1]
            )
            if not accepted:
                made.append(foreign(dialect))
    return made + scenarios(found.dialect)
