"""How a client of each version finds its dialect, seen from the client's side."""

from __future__ import annotations

import pytest

from protocol.dialects import DIALECTS, find_dialects
from protocol.errors import ProtocolError
from protocol.negotiation import Negotiator, Offer

HERE = "192.168.1.7"


def accepts(client: tuple[int, int], offer: Offer) -> bool:
    """llama.cpp's check of a server's version."""
    return offer.version[0] == client[0] and offer.version[1] <= client[1]


def tries_until_served(
    negotiator: Negotiator, client: tuple[int, int], address: str = HERE
) -> tuple[int, Offer]:
    """Starts the client again and again, as a user would; how often, and what it got."""
    size = 0 if client[0] < 4 else 24
    for tries in range(1, 10):
        offer = negotiator.choose(address, size)
        if accepts(client, offer):
            negotiator.accepted(address, offer)
            return tries, offer
        negotiator.refused(address, offer)
    raise AssertionError(f"client {client} was never served")


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
def test_each_client_is_served(
    client: tuple[int, int], tries: int, dialect: tuple[int, int, int]
) -> None:
    negotiator = Negotiator()
    needed, offer = tries_until_served(negotiator, client)
    assert (needed, offer.dialect.version) == (tries, dialect)
    # From then on the address gets it at once.
    assert tries_until_served(negotiator, client)[0] == 1


def test_addresses_are_told_apart() -> None:
    negotiator = Negotiator()
    tries_until_served(negotiator, (4, 0))
    assert tries_until_served(negotiator, (7, 0), "192.168.1.8")[0] == 1
    assert tries_until_served(negotiator, (4, 0))[0] == 1


def test_two_versions_on_one_address_take_turns() -> None:
    negotiator = Negotiator()
    tries_until_served(negotiator, (4, 0))
    tries, offer = tries_until_served(negotiator, (7, 0))
    assert (tries, offer.dialect.version) == (2, (7, 0, 0))
    assert tries_until_served(negotiator, (4, 0))[1].dialect.version == (4, 0, 3)


def test_nothing_suits_and_it_starts_over() -> None:
    negotiator = Negotiator()
    newest = negotiator.choose(HERE, 24)
    offers = []
    offer: Offer | None = newest
    while offer is not None:
        offers.append(offer)
        offer = negotiator.refused(HERE, offer)
    assert [o.version[0] for o in offers] == [7, 6, 5, 4]
    assert negotiator.choose(HERE, 24) == newest


def test_acceptance_is_news_once() -> None:
    negotiator = Negotiator()
    offer = negotiator.choose(HERE, 24)
    assert negotiator.accepted(HERE, offer)
    assert not negotiator.accepted(HERE, offer)


def test_patch_levels_are_candidates_newest_first() -> None:
    offer = Negotiator("4").choose(HERE, 24)
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
    offer = Negotiator(pinned).choose(HERE, find_dialects(pinned)[0].hello_size)
    assert (offer.version, [d.name for d in offer.dialects]) == (version, names)


def test_pinned() -> None:
    negotiator = Negotiator("5.1")
    assert negotiator.choose(HERE, 24).version == (5, 1, 0)
    with pytest.raises(ProtocolError, match=r"only one this server was told to speak"):
        negotiator.choose(HERE, 0)
    assert negotiator.refused(HERE, negotiator.choose(HERE, 24)) is None


def test_unknown_version() -> None:
    with pytest.raises(ValueError, match=r"8\.0 is not known; known are 7\.0"):
        Negotiator("8.0")


def test_forgotten_address_starts_with_the_newest() -> None:
    negotiator = Negotiator()
    _, offer = tries_until_served(negotiator, (4, 0))
    negotiator.forget(HERE, offer)
    assert negotiator.choose(HERE, 24).dialect is DIALECTS[0]
