"""How a client of each version finds its dialect, seen from the client's side."""

from __future__ import annotations

import pytest

from protocol import negotiation
from protocol.dialects import DIALECTS, find_dialects
from protocol.errors import ProtocolError
from protocol.messages import CONN_CAPS_SIZE
from protocol.negotiation import DOUBT, MOST_DOUBT, RECENT, RETRY, WORKING, Negotiator, Offer
from protocol.split import split_caps

HERE = "192.168.1.7"
NEW = bytes(CONN_CAPS_SIZE)


def accepts(client: tuple[int, int], offer: Offer) -> bool:
    """llama.cpp's check of a server's version."""
    return offer.version[0] == client[0] and offer.version[1] <= client[1]


class House:
    """A negotiator, a clock, and the clients behind one address."""

    def __init__(self, pinned: str | None = None) -> None:
        self.negotiator = Negotiator(pinned)
        self.now = 1000.0

    def offer(self, caps: bytes = NEW, address: str = HERE) -> Offer:
        """What a HELLO would be answered with now."""
        return self.negotiator.greet(address, caps, self.now).offer

    def start(
        self, client: tuple[int, int], address: str = HERE, caps: bytes | None = None
    ) -> bool:
        """Start a client: its first connection asks something and is closed, or is refused."""
        if caps is None:
            caps = NEW if client[0] >= 4 else b""
        greeting = self.negotiator.greet(address, caps, self.now)
        served = accepts(client, greeting.offer)
        if served:
            greeting.accepted(self.now)
        greeting.ended(self.now)
        return served

    def starts(self, client: tuple[int, int], address: str = HERE, every: float = 10.0) -> int:
        """Start a client again and again, as a user would; how often until it was served."""
        for tries in range(1, 20):
            if self.start(client, address):
                return tries
            self.now += every
        raise AssertionError(f"client {client} was never served")

    def probe(self, times: int = 1, caps: bytes = NEW) -> None:
        """Say HELLO and hang up."""
        for _ in range(times):
            self.negotiator.greet(HERE, caps, self.now).ended(self.now)


@pytest.fixture
def house() -> House:
    return House()


@pytest.mark.parametrize(
    ("client", "tries", "dialect"),
    [
        ((7, 0), 1, (7, 0, 0)),
        ((6, 0), 2, (6, 0, 0)),
        ((5, 1), 3, (5, 1, 0)),
        ((5, 0), 3, (5, 1, 0)),
        ((4, 0), 4, (4, 0, 3)),
        ((3, 6), 1, (3, 6, 1)),
        ((3, 5), 2, (3, 5, 0)),
        ((3, 4), 3, (3, 0, 0)),
        ((3, 0), 3, (3, 0, 0)),
        ((2, 0), 4, (2, 0, 0)),
        ((1, 0), 5, (1, 0, 0)),
    ],
)
@pytest.mark.parametrize("every", [0.001, 5.0, 600.0])
def test_each_client_is_served(
    house: House,
    client: tuple[int, int],
    tries: int,
    dialect: tuple[int, int, int],
    every: float,
) -> None:
    assert house.starts(client, every=every) == tries
    assert house.offer(NEW if client[0] >= 4 else b"").dialect.version == dialect
    # From then on the address gets it at once, however long it was away.
    for away in (0.0, WORKING, RECENT, RETRY, 1e7):
        house.now += away
        assert house.starts(client) == 1


@pytest.mark.parametrize("client", [(7, 0), (4, 0), (3, 0)])
@pytest.mark.parametrize("probes", [1, 2, 3, 4, 5, 1000])
def test_hang_ups_right_behind_a_client_mean_nothing(
    house: House, client: tuple[int, int], probes: int
) -> None:
    caps = NEW if client[0] >= 4 else b""
    house.starts(client)
    for pause in (0.0, 0.01, WORKING - 0.02):
        house.now += pause
        house.probe(probes, caps)
        assert house.start(client)


@pytest.mark.parametrize("probes", [1, 2, 5, 1000])
def test_a_burst_of_probes_between_starts(house: House, probes: int) -> None:
    house.starts((4, 0))
    for _ in range(50):
        house.now += 60.0
        house.probe(probes)
        house.now += 60.0
        assert house.start((4, 0))


def test_hang_ups_right_behind_a_client_are_not_remembered(house: House) -> None:
    for clients in ([(7, 0)], [(4, 0), (7, 0)]):
        for client in clients:
            house.now += RECENT
            house.starts(client)
        house.probe(4)
        house.now += 2 * WORKING
        if len(clients) == 1:
            house.probe()
        assert house.start((7, 0))


def test_a_steady_monitor_is_found_out(house: House) -> None:
    house.starts((5, 1))
    refused = 0
    for minute in range(24 * 60):
        house.now += 30.0
        house.probe()
        house.now += 30.0
        house.probe()
        house.now += 0.5
        if minute % 60 == 59:
            refused += not house.start((5, 1))
    assert refused <= 3


@pytest.mark.parametrize("every", [0.001, 1.0, WORKING, 30.0, 600.0, RETRY])
def test_a_thousand_hang_ups_shift_little(house: House, every: float) -> None:
    house.starts((7, 0))
    begin = house.now
    trials = 0
    for _ in range(1000):
        house.now += every
        trials += house.offer().version[0] != 7
        house.probe()
    hours = (house.now - begin) / 3600
    assert trials <= 3 * (7 + hours)
    house.now += MOST_DOUBT
    assert house.start((7, 0))


def test_a_new_release_at_a_known_address(house: House) -> None:
    house.starts((4, 0))
    house.now += RECENT
    # It is refused once, and is what is offered from then on.
    assert house.starts((7, 0)) == 2
    assert house.starts((7, 0)) == 1


def test_a_new_release_right_after_the_old_one(house: House) -> None:
    house.starts((4, 0))
    house.now += WORKING
    assert house.starts((7, 0)) == 3


@pytest.mark.parametrize("client", [(7, 0), (6, 0), (5, 1), (5, 0), (4, 0)])
@pytest.mark.parametrize("known", [(7, 0), (6, 0), (5, 1), (4, 0)])
def test_any_release_at_a_known_address(
    house: House, known: tuple[int, int], client: tuple[int, int]
) -> None:
    house.starts(known)
    tried = [major for major in (7, 6, 5, 4) if major != known[0]]
    house.now += RECENT
    expected = 1 if client[0] == known[0] else 2 * (tried.index(client[0]) + 1)
    assert house.starts(client) == expected


def test_two_releases_take_turns(house: House) -> None:
    house.starts((4, 0))
    house.now += RECENT
    house.starts((7, 0))
    for _ in range(20):
        house.now += WORKING
        assert house.starts((4, 0)) == 2
        house.now += WORKING
        assert house.starts((7, 0)) == 2


def test_who_happens_upon_a_trial_is_served_at_the_next_start(house: House) -> None:
    house.starts((7, 0))
    house.now += RECENT
    assert not house.start((4, 0))
    assert not house.start((7, 0))
    assert house.start((7, 0))
    # The other one has not been given up: it is looked for again a little later.
    house.now += DOUBT
    assert house.starts((4, 0)) <= 7


def test_a_client_that_leaves_may_connect_again(house: House) -> None:
    greeting = house.negotiator.greet(HERE, NEW, house.now)
    greeting.accepted(house.now)
    house.now += RECENT
    assert house.starts((4, 0)) == 6
    house.now += 3600.0
    greeting.ended(house.now)
    # As it gives back what it had, it connects some more times.
    assert house.offer().version == (7, 0, 0)
    house.probe(4)
    house.now += WORKING
    assert house.start((4, 0))


def test_addresses_are_told_apart(house: House) -> None:
    house.starts((4, 0))
    assert house.starts((7, 0), "192.168.1.8") == 1
    assert house.starts((4, 0)) == 1


def test_marked_clients_are_told_apart(house: House) -> None:
    house.starts((4, 0))
    assert house.start((7, 0), caps=split_caps())
    house.probe(3, split_caps())
    assert house.start((4, 0))
    # As are those with another transport.
    assert house.start((7, 0), caps=b"\x5a" * CONN_CAPS_SIZE)
    assert house.start((4, 0))


def test_nothing_suits_and_it_starts_over(house: House) -> None:
    offers = []
    for _ in range(9):
        offers.append(house.offer().version[0])
        house.probe()
    assert offers == [7, 6, 5, 4, 7, 6, 5, 4, 7]


def test_an_unfinished_search_is_forgotten(house: House) -> None:
    house.probe()
    assert house.offer().version[0] == 6
    house.now += RETRY
    assert house.offer().version[0] == 7


def test_acceptance_is_news_once(house: House) -> None:
    for news in (True, False):
        greeting = house.negotiator.greet(HERE, NEW, house.now)
        assert greeting.accepted(house.now) == news
        assert greeting.ended(house.now) is None


def test_what_a_hang_up_means(house: House) -> None:
    def hang_up() -> negotiation.HangUp:
        told = house.negotiator.greet(HERE, NEW, house.now).ended(house.now)
        assert told is not None
        return told

    told = hang_up()
    assert (told.evidence, told.following.name, told.accepted) == (True, "6.0", None)
    house.starts((6, 0))
    told = hang_up()
    assert not told.evidence
    assert told.accepted == told.following == house.offer()
    house.now += RECENT
    told = hang_up()
    assert told.evidence
    assert told.accepted is not None
    assert (told.accepted.name, told.following.name) == ("6.0", "7.0")
    for _ in range(5):
        told = hang_up()
    assert told.following.name == "6.0"
    assert told.doubt == DOUBT


def test_patch_levels_are_candidates_newest_first() -> None:
    offer = House("4").offer()
    assert [d.version for d in offer.dialects] == [(4, 0, p) for p in (3, 2, 1, 0)]
    assert len({d.ops for d in offer.dialects}) == 4


@pytest.mark.parametrize(
    ("pinned", "version", "names"),
    [
        ("4.0.0", (4, 0, 0), ["4.0.0"]),
        ("4.0", (4, 0, 3), ["4.0.3", "4.0.2", "4.0.1", "4.0.0"]),
        ("3.6", (3, 6, 1), ["3.6.1", "3.6.0"]),
        ("2.0.0-86", (2, 0, 0), ["2.0.0-86"]),
        ("2.0", (2, 0, 0), ["2.0.0-90", "2.0.0-88", "2.0.0-86", "2.0.0-82"]),
    ],
)
def test_a_pinned_row_is_read_by_that_row_alone(
    pinned: str, version: tuple[int, int, int], names: list[str]
) -> None:
    offer = House(pinned).offer(bytes(find_dialects(pinned)[0].hello_size))
    assert (offer.version, [d.name for d in offer.dialects]) == (version, names)


def test_pinned() -> None:
    house = House("5.1")
    assert house.offer().version == (5, 1, 0)
    with pytest.raises(ProtocolError, match=r"only one this server was told to speak"):
        house.offer(b"")
    for _ in range(3):
        house.probe(10)
        house.now += RECENT
        assert house.offer().version == (5, 1, 0)
        assert house.start((5, 1))


def test_unknown_version() -> None:
    with pytest.raises(ValueError, match=r"8\.0 is not known; known are 7\.0"):
        Negotiator("8.0")


def test_what_turns_out_to_be_no_client_is_forgotten(house: House) -> None:
    greeting = house.negotiator.greet(HERE, NEW, house.now)
    greeting.accepted(house.now)
    house.now += RECENT
    house.probe()
    other = house.negotiator.greet(HERE, NEW, house.now)
    assert other.offer.version == (6, 0, 0)
    other.accepted(house.now)
    other.broken()
    other.ended(house.now)
    assert house.offer().version == (7, 0, 0)


def test_a_broken_connection_does_not_undo_what_others_accepted(house: House) -> None:
    house.starts((4, 0))
    for _ in range(10):
        greeting = house.negotiator.greet(HERE, NEW, house.now)
        greeting.accepted(house.now)
        greeting.broken()
        greeting.ended(house.now)
        greeting = house.negotiator.greet(HERE, NEW, house.now)
        greeting.broken()
        assert house.start((4, 0))
        house.now += RECENT


def test_memory_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negotiation, "_MAX_PEERS", 8)
    house.starts((4, 0))
    for i in range(100):
        house.negotiator.greet(f"10.0.0.{i}", NEW, house.now).ended(house.now)
    assert len(house.negotiator._new) == 8
    # Addresses at which nobody was served push out none at which somebody was.
    assert house.offer().version[0] == 4
    for i in range(100):
        house.start((7, 0), f"10.0.1.{i}")
    assert len(house.negotiator._known) == 8
    assert house.offer().version[0] == 7


def test_every_offer_is_of_a_known_dialect(house: House) -> None:
    for caps in (NEW, b""):
        for _ in range(6):
            offer = house.offer(caps)
            assert offer.dialect in DIALECTS
            assert offer.dialect.hello_size == len(caps)
            house.probe(caps=caps)
