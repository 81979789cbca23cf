"""Which protocol version a HELLO is answered with.

A client's own version is not on the wire: an empty HELLO is 1.x to 3.x, one of 24 bytes 4.x or
later. A client accepts a server of its own major number whose minor number is not above its own,
and hangs up on any other right after HELLO. So the newest version of the group is offered first,
with the lowest minor number that its dialect serves; when a client hangs up, the next one from its
address is offered the next older version. What an address accepted is offered to it first from then
on.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from protocol.dialects import DIALECTS, Dialect, Version, distinct_numberings, find_dialects
from protocol.errors import ProtocolError

_MAX_PEERS = 4096


@dataclass(frozen=True, slots=True)
class Offer:
    """A version to answer with, and the dialects its clients may be speaking, likeliest first."""

    version: Version
    dialects: tuple[Dialect, ...]

    @property
    def dialect(self) -> Dialect:
        return self.dialects[0]

    @property
    def name(self) -> str:
        """As users know it: major and minor, with the range of minors that it serves."""
        newest = self.dialects[0].version
        low = f"{self.version[0]}.{self.version[1]}"
        return low if newest[1] == self.version[1] else f"{low}-{newest[0]}.{newest[1]}"


def _offers(dialects: list[Dialect]) -> list[Offer]:
    """One offer for each set of commands among ``dialects`` (newest first)."""
    offers: list[Offer] = []
    seen: list[Dialect] = []
    for dialect in dialects:
        twins = [
            d
            for d in dialects
            if d.version[0] == dialect.version[0] and d.commands is dialect.commands
        ]
        if dialect in seen:
            continue
        seen.extend(twins)
        lowest = min(d.version for d in twins)
        major, minor = lowest[:2]
        patch = max(d.version[2] for d in twins if d.version[:2] == (major, minor))
        offers.append(Offer((major, minor, patch), distinct_numberings(twins)))
    return offers


@dataclass(slots=True)
class _Peer:
    current: int = 0
    accepted: int | None = None
    refused: set[int] = field(default_factory=set)


class Negotiator:
    """Chooses offers; ``pinned`` is a version such as '5.1' to be the only one, None for auto.

    Raises ValueError for a version that isn't known.
    """

    def __init__(self, pinned: str | None = None) -> None:
        dialects = list(DIALECTS) if pinned is None else find_dialects(pinned)
        self._ladders: dict[int, list[Offer]] = {}
        for size in {d.hello_size for d in DIALECTS}:
            self._ladders[size] = _offers([d for d in dialects if d.hello_size == size])
        self._pinned = pinned
        self._peers: OrderedDict[tuple[str, int], _Peer] = OrderedDict()

    def choose(self, address: str, hello_size: int) -> Offer:
        """The offer for a HELLO of ``hello_size`` bytes from ``address``.

        Raises ProtocolError if the pinned version has another HELLO.
        """
        ladder = self._ladders.get(hello_size)
        if not ladder:
            raise ProtocolError(
                f"HELLO of {hello_size} bytes is not of protocol {self._pinned}, "
                "the only one this server was told to speak"
            )
        return ladder[self._peer(address, hello_size).current]

    def accepted(self, address: str, offer: Offer) -> bool:
        """The client went on after HELLO: its address gets this offer first from now on.

        True if that is news: clients connect a thousand times in a run.
        """
        size = offer.dialect.hello_size
        peer = self._peer(address, size)
        peer.current = self._ladders[size].index(offer)
        peer.refused.clear()
        news = peer.accepted != peer.current
        peer.accepted = peer.current
        return news

    def refused(self, address: str, offer: Offer) -> Offer | None:
        """The client hung up on the offer; what its address is offered next, None if all was."""
        size = offer.dialect.hello_size
        ladder = self._ladders[size]
        peer = self._peer(address, size)
        peer.refused.add(ladder.index(offer))
        untried = [i for i in range(len(ladder)) if i not in peer.refused]
        if not untried:
            peer.refused.clear()
            peer.current = 0
            return None
        peer.current = untried[0]
        return ladder[peer.current]

    def forget(self, address: str, offer: Offer) -> None:
        """The client spoke something else after all: start with the newest again."""
        self._peers.pop((address, offer.dialect.hello_size), None)

    def _peer(self, address: str, hello_size: int) -> _Peer:
        key = (address, hello_size)
        peer = self._peers.setdefault(key, _Peer())
        self._peers.move_to_end(key)
        if len(self._peers) > _MAX_PEERS:
            self._peers.popitem(last=False)
        return peer
