"""Any clients, probes and dry runs behind one address, in any order: what is promised holds.

The clients here connect as llama.cpp's do. A client that is refused hangs up and ends; one that is
let in goes on at once, connects again and again, may hang up on further connections in bursts (dry
runs, a device without layers, what it gives back at its end), and leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from protocol.messages import CONN_CAPS_SIZE
from protocol.negotiation import (
    MOST_DOUBT,
    RECENT,
    RETRY,
    WORKING,
    Greeting,
    Negotiator,
    Offer,
)

HERE = "192.168.1.7"
# With minor versions that this project's table doesn't name: their clients accept lower ones.
VERSIONS = [(7, 0), (6, 0), (5, 1), (5, 0), (4, 0), (3, 6), (3, 5), (3, 2), (3, 0), (2, 0), (1, 0)]
CAPS = {True: bytes(CONN_CAPS_SIZE), False: b""}
# How many versions there are to offer, by whether the HELLO has 24 bytes.
OFFERS = {True: 4, False: 5}
Client = tuple[int, int]
# One of the versions of a run.
WHICH = st.integers(0, 2)


def accepts(client: Client, offer: Offer) -> bool:
    """llama.cpp's check of a server's version."""
    return offer.version[0] == client[0] and offer.version[1] <= client[1]


@dataclass
class Process:
    """A client that was let in."""

    client: Client
    offer: Offer
    # When it last gave a sign of life, and its connections that are open.
    seen: float
    connections: list[Greeting] = field(default_factory=list)

    @property
    def kind(self) -> bool:
        return self.client[0] >= 4


@dataclass
class Apart:
    """A hang-up outside of the time in which a client was at work, as it was when it came."""

    # Of its HELLO, and its own.
    opened: float
    ended: float
    # How long before its HELLO the last sign of life was.
    quiet: float


@dataclass
class Kind:
    """What the world has done by one kind of HELLO."""

    # Which offers were accepted, the last one first, and the signs of life by offer.
    accepted: list[Offer] = field(default_factory=list)
    signs: list[tuple[float, Offer]] = field(default_factory=list)
    # Hang-ups since the last client went on.
    hang_ups: list[Apart] = field(default_factory=list)
    # Hang-ups on another version than the accepted one, since that was accepted.
    trials: list[float] = field(default_factory=list)
    accepted_at: float = 0.0
    # Whether the accepted version was refused by its own client at the last HELLO of all.
    owed: bool = False


class Behind(RuleBasedStateMachine):
    """The world behind one address."""

    processes = Bundle("processes")
    lingering = Bundle("lingering")

    @initialize(versions=st.lists(st.sampled_from(VERSIONS), min_size=1, max_size=3))
    def begin(self, versions: list[Client]) -> None:
        # Few at a time, so that they meet.
        self.versions = versions
        self.negotiator = Negotiator()
        self.now = 1000.0
        self.kinds = {True: Kind(), False: Kind()}
        self.count = 0

    # -- the world -----------------------------------------------------------------------------

    def version(self, which: int) -> Client:
        return self.versions[which % len(self.versions)]

    def hello(self, kind: bool) -> Greeting:
        return self.negotiator.greet(HERE, CAPS[kind], self.now)

    def accepted(self, greeting: Greeting, kind: bool) -> None:
        world = self.kinds[kind]
        news = greeting.accepted(self.now)
        assert news == (world.accepted[:1] != [greeting.offer])
        if news:
            world.accepted = [greeting.offer, *(o for o in world.accepted if o != greeting.offer)]
            world.trials.clear()
            world.accepted_at = self.now
        world.signs.append((self.now, greeting.offer))
        world.hang_ups.clear()
        world.owed = False

    def left(self, greeting: Greeting, kind: bool) -> None:
        assert greeting.ended(self.now) is None
        self.kinds[kind].signs.append((self.now, greeting.offer))

    def hung_up(self, greeting: Greeting, kind: bool, opened: float) -> None:
        world = self.kinds[kind]
        told = greeting.ended(self.now)
        assert told is not None
        assert told.accepted == (world.accepted[0] if world.accepted else None)
        quiet = opened - world.signs[-1][0] if world.signs else float("inf")
        if quiet >= WORKING:
            world.hang_ups.append(Apart(opened, self.now, quiet))
        if world.accepted and greeting.offer != world.accepted[0] and told.evidence:
            world.trials.append(self.now)

    def only_one_at_work(self, process: Process) -> bool:
        """Whether a client has just given a sign of life, and none of another version did."""
        signs = self.kinds[process.kind].signs
        return self.now - process.seen < WORKING and all(
            offer == process.offer or at < process.seen - WORKING for at, offer in signs
        )

    # -- time ----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.001, 1.0, WORKING - 0.5]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from([WORKING, 10.0, 60.0]))
    def wait_until_nobody_is_at_work(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from([300.0, RECENT, RETRY, MOST_DOUBT, 1e5]))
    def wait_for_long(self, seconds: float) -> None:
        self.now += seconds

    # -- clients -------------------------------------------------------------------------------

    @rule(target=processes, which=WHICH)
    def start(self, which: int):  # type: ignore[no-untyped-def]
        process = self._start(self.version(which))
        return multiple() if process is None else process

    @rule(
        target=processes,
        which=WHICH,
        quiet=st.sampled_from([0.0, WORKING, RECENT]),
        probes=st.sampled_from([0, 1, 2]),
    )
    def start_twice(self, which: int, quiet: float, probes: int):  # type: ignore[no-untyped-def]
        """Start a client, and again if it was refused, some time after probes."""
        self.now += quiet
        self.probe(which, probes, WORKING)
        process = self._start(self.version(which)) or self._start(self.version(which))
        return multiple() if process is None else process

    def _start(self, client: Client) -> Process | None:
        kind = client[0] >= 4
        world = self.kinds[kind]
        served_before = bool(world.accepted) and accepts(client, world.accepted[0])
        greeting = self.hello(kind)
        if accepts(client, greeting.offer):
            self.accepted(greeting, kind)
            self.left(greeting, kind)
            return Process(client, greeting.offer, self.now)
        # A start while another version is at work doesn't count.
        by_trial = served_before and self._refused_by_a_trial(world)
        # Twice in a row only if others hung up in between.
        assert not (by_trial and world.owed)
        self.hung_up(greeting, kind, self.now)
        world.owed = by_trial
        return None

    def _refused_by_a_trial(self, world: Kind) -> bool:
        """Return whether it was no other version at work that refused the accepted one.

        Then it was hang-ups that the docstring names: nothing else does it.
        """
        last = world.signs[-1][0]
        if self.now - last < WORKING and any(
            at >= last - WORKING and offer != world.accepted[0] for at, offer in world.signs
        ):
            return False
        # A connection that ends is a sign of life, but takes nothing back: who hung up
        # before, while it was open and quiet, may still wait for a version.
        apart = world.hang_ups
        assert apart, "nothing speaks for another client"
        assert self.now - last >= WORKING
        if len(world.accepted) == 1 and all(one.quiet < RECENT for one in apart):
            last_opened = max(one.opened for one in apart)
            first_ended = min(one.ended for one in apart)
            assert last_opened - first_ended >= WORKING, "one event speaks for another client"
        return True

    @rule(process=processes, stay=st.booleans())
    def connect(self, process: Process, stay: bool) -> None:
        """One more connection of a client that was let in."""
        if not self.only_one_at_work(process):
            # It may be refused as one that starts; it is not asked for more here.
            return
        greeting = self.hello(process.kind)
        assert accepts(process.client, greeting.offer), "refused in the middle of its start"
        self.accepted(greeting, process.kind)
        process.seen = self.now
        if stay:
            process.connections.append(greeting)
        else:
            self.left(greeting, process.kind)

    @rule(process=processes, times=st.sampled_from([1, 4, 8]))
    def dry_run(self, process: Process, times: int) -> None:
        """Connections that say HELLO and close."""
        if self.only_one_at_work(process):
            self._give_back(process, times)

    @rule(process=consumes(processes), work=st.sampled_from([60.0, 7200.0]), which=WHICH)
    def work_for_long(self, process: Process, work: float, which: int) -> None:
        """Stay while others come, then leave."""
        if not self.only_one_at_work(process):
            return
        self.connect(process, stay=True)
        self.now += work
        for _ in range(3):
            self._start(self.version(which))
            self.now += 10.0
        self.leave(process, 4)

    def _give_back(self, process: Process, times: int) -> None:
        for _ in range(times):
            greeting = self.hello(process.kind)
            assert accepts(process.client, greeting.offer), "refused in the middle of its work"
            self.hung_up(greeting, process.kind, self.now)

    @rule(process=consumes(processes), times=st.sampled_from([0, 4]))
    def leave(self, process: Process, times: int) -> None:
        """The end of a client, which gives back what it had by new connections."""
        for greeting in process.connections:
            process.seen = self.now
            self.left(greeting, process.kind)
        if self.only_one_at_work(process):
            self._give_back(process, times)

    # -- others --------------------------------------------------------------------------------

    @rule(
        which=WHICH,
        times=st.sampled_from([1, 1, 1, 2, 3, 4, 7, 1000]),
        every=st.sampled_from([0.0, 0.0, 0.01, 1.0, 30.0]),
    )
    def probe(self, which: int, times: int, every: float) -> None:
        kind = self.version(which)[0] >= 4
        for _ in range(times):
            greeting = self.hello(kind)
            self.kinds[kind].owed = False
            self.hung_up(greeting, kind, self.now)
            self.now += every

    @rule(target=lingering, which=WHICH)
    def linger(self, which: int) -> tuple[Greeting, bool, float]:
        """Say HELLO and nothing more, for now."""
        kind = self.version(which)[0] >= 4
        return self.hello(kind), kind, self.now

    @rule(lingerer=consumes(lingering))
    def end_of_lingering(self, lingerer: tuple[Greeting, bool, float]) -> None:
        greeting, kind, opened = lingerer
        self.kinds[kind].owed = False
        self.hung_up(greeting, kind, opened)

    @rule(lingerer=consumes(lingering))
    def garbage_after_lingering(self, lingerer: tuple[Greeting, bool, float]) -> None:
        """What comes is no message: the server closes the connection, and nobody is worse off."""
        lingerer[0].broken()

    # -- whoever keeps trying is served --------------------------------------------------------

    @precondition(lambda self: self.kinds[True].accepted or self.kinds[False].accepted)
    @rule(
        target=processes,
        which=WHICH,
        every=st.sampled_from([WORKING, 20.0, 240.0]),
    )
    def insist(self, which: int, every: float):  # type: ignore[no-untyped-def]
        """A client that is started again and again after the address was quiet for long."""
        client = self.version(which)
        self.now += MOST_DOUBT
        kind = client[0] >= 4
        world = self.kinds[kind]
        known = [accepts(client, offer) for offer in world.accepted]
        world.owed = False
        for tries in range(1, 2 * OFFERS[kind]):
            process = self._start(client)
            if process is not None:
                if True in known:
                    # A version that was accepted before: refused once for each that came later.
                    assert tries <= 2 * known.index(True) + (known.index(True) == 0)
                elif known:
                    assert tries <= 2 * (OFFERS[kind] - 1)
                else:
                    assert tries <= OFFERS[kind]
                return process
            self.now += every
        raise AssertionError(f"client {client} was never served")

    @invariant()
    def hang_ups_shift_little(self) -> None:
        """However many there are: see the fifth rule of protocol.negotiation."""
        for kind, world in getattr(self, "kinds", {}).items():
            hours = (self.now - world.accepted_at) / 3600
            assert len(world.trials) <= (OFFERS[kind] - 1) * (7 + hours)


Behind.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestBehindOneAddress = Behind.TestCase
