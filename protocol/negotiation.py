"""Which protocol version a HELLO is answered with.

A client's own version is not on the wire: an empty HELLO is 1.x to 3.x, one of 24 bytes 4.x or
later. A client accepts a server of its own major number whose minor number is not above its own,
and hangs up on any other right after HELLO. So versions have to be tried, and a hang-up is the only
sign that one was wrong.

It is a poor sign. llama.cpp itself says HELLO and closes: when clients of 6.0 and later give back
what they had and the connection that it came by is gone already, they open one each time to do so;
a dry run of ``--fit`` leaves a handful of them, a device that got no layers as many. Monitors probe
like that, and anybody can. On the wire all these are equal to a refusal: whoever believes each of
them lets one client choose what its neighbours are offered, and whoever believes none never serves
a second version. What tells them apart is what else the address does:

- A client that accepts the version *begins* with a connection that goes on (DEVICE_COUNT; up to 2.0
  GET_DEVICE_MEMORY or GET_ALIGNMENT). Its own hang-ups follow within milliseconds of the end of
  such a connection.
- A refused client leaves a hang-up and nothing else: up to 5.1 it goes on without the server, from
  6.0 on it aborts. Then a person, or a script, starts it again. (2.0 tries three times in a start.)
- The capability bytes of a 24-byte HELLO: programs of this project mark them, and clients with RDMA
  fill them in. Each of these kinds is negotiated by itself.

What is guaranteed, for each address and kind of HELLO; n is how many versions there are to offer
(4 for 24 bytes, 5 for an empty HELLO):

1. **An address that accepted nothing yet** is offered one version after the other, from the newest
   to the oldest and over again, a step at each hang-up. A client is served at its n-th start at the
   latest, if nobody else hangs up in between.
2. **While a client is at work** the address is offered that client's version and nothing else, for
   ``WORKING`` seconds after one of its connections went on or ended. Hang-ups in this time mean
   nothing, whoever they are from and however many: nobody can get a client refused in the middle of
   its start. (Where several versions are at work at once, it is that of the one that went on last.)
3. **An accepted version stays the one that is offered** until hang-ups outside of that time make
   another client likely. One does, where the address's last client was there ``RECENT`` seconds ago
   or longer, or where the address has accepted several versions; two do, the HELLO of the second
   ``WORKING`` seconds after the first's end or later and without a client in between that went on,
   where the last client was there later. Then the
   next HELLO is a trial of another version: one that the address accepted before comes first, then
   the newest. (A connection that ends takes nothing back: who hung up while it was open and quiet
   may still be waiting for a version.)
4. **After a trial that was refused the accepted version is offered again.** A client of that
   version that happens upon a trial is served at its next start, unless another hang-up comes in
   between.
5. **A search in which trials were refused and none was accepted** is followed by a time in which
   hang-ups mean nothing: ``DOUBT`` seconds, twice as long after each such search in a row, up to
   ``MOST_DOUBT``. A search has n - 1 trials at most, so however many hang-ups there are, within h
   hours at most (n - 1) x (7 + h) of them end a trial.
6. **A client of another version** at an address that accepted one is served at its 2j-th start if
   its version is the j-th to be tried, and a start later where rule 3 wants two hang-ups; starts in
   the times of rules 2 and 5 don't count. Two accepted versions that take turns cost each other one
   refused start at each turn.

That an accepted version is never refused, and that another one is found at all, can't both be had
without "unless": a probe's hang-up and a refused client's are the same bytes, so what serves the
refused client at its next try refuses the accepted one that comes in its place. Who needs to be
certain pins a version.

No clock is read here: times are seconds of any monotonic clock, passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from protocol.dialects import (
    DIALECTS,
    Dialect,
    Version,
    distinct_numberings,
    find_dialects,
    version_name,
)
from protocol.errors import ProtocolError
from protocol.split import caps_version

# Seconds after a sign of life in which a client is taken to be at work. Its own hang-ups come
# within milliseconds; a person or a service manager takes longer to start another client.
WORKING = 3.0
# Seconds for which an address's last client is remembered well enough that one hang-up alone
# doesn't speak for another client.
RECENT = 600.0
# Seconds within which a refused client has to be started again for its starts to be seen together.
RETRY = 1800.0
# Seconds in which hang-ups mean nothing after they led nowhere, the first time and at most.
DOUBT = 60.0
MOST_DOUBT = 3600.0

# For clients that try until they are offered their version: seconds between tries, for a server to
# see the last one's end, and when more tries are of no use.
_BETWEEN_TRIES = 0.01
_MOST_TRIES = 16
_MOST_IN_A_ROW = 4

# How many are remembered: so many that accepted a version, and so many that did not yet.
_MAX_PEERS = 4096

_NEVER = float("-inf")

# An address, and what its HELLO is like: size, marked by a program of this project, has other caps.
_Key = tuple[str, int, bool, bool]


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
    """The state of one kind of HELLO from one address; offers are numbers below ``count``."""

    count: int
    # Accepted offers, the one that was accepted last first.
    known: list[int] = field(default_factory=list)
    # What the client at work speaks, and its last sign of life.
    working: int = 0
    seen: float = _NEVER
    # The search for another version: hang-ups that speak for it, whether the next HELLO is a
    # trial, and which trials were refused.
    hang_ups: int = 0
    last_hang_up: float = _NEVER
    trial: bool = False
    refused: set[int] = field(default_factory=set)
    # Searches in a row that led nowhere, and until when hang-ups mean nothing.
    fruitless: int = 0
    doubt_until: float = _NEVER

    def choose(self, now: float) -> int:
        """Return the offer for a HELLO."""
        if self._at_work(now):
            return self.working
        self._expire(now)
        if self.known and not self.trial:
            return self.known[0]
        return self._untried()[0]

    def accept(self, offer: int, now: float) -> bool:
        """Note that a client went on with an offer, and return whether that is news."""
        news = self.known[:1] != [offer]
        if news:
            self.known = [offer, *(i for i in self.known if i != offer)]
            self.fruitless, self.doubt_until = 0, _NEVER
            self._forget_search()
        else:
            self._give_up(now)
        self.working, self.seen = offer, now
        return news

    def leave(self, offer: int, now: float) -> None:
        """Note that a connection that had gone on has ended: its client may connect again."""
        if offer in self.known and (offer == self.working or not self._at_work(now)):
            self.working, self.seen = offer, now

    def hang_up(self, offer: int, opened: float, now: float) -> bool:
        """Note a connection that ended after HELLO, and return whether that is evidence."""
        if self._at_work(opened) or now < self.doubt_until:
            return False
        self._expire(now)
        if self.known and offer == self.known[0]:
            if self.count == 1 or not self._suffices(opened, now):
                return False
            self.trial = True
        else:
            self.refused.add(offer)
            self.trial = False
        self.last_hang_up = now
        if not self._untried():
            self._give_up(now)
        return True

    def withdraw(self, offer: int) -> None:
        """Forget that an offer was accepted."""
        self.known = [i for i in self.known if i != offer]
        if self.working == offer:
            self.seen = _NEVER

    def _at_work(self, now: float) -> bool:
        return now - self.seen < WORKING

    def _suffices(self, opened: float, now: float) -> bool:
        """Count a hang-up on the accepted offer, and return whether another one is to be tried.

        Its HELLO is what says when its client came: one that waits before it hangs up is not a
        second one.
        """
        if self.trial or self.refused:
            return True
        if self.hang_ups and opened - self.last_hang_up < WORKING:
            # A burst of them is one client's.
            return False
        self.hang_ups += 1
        self.last_hang_up = now
        likely = len(self.known) > 1 or opened - self.seen >= RECENT
        return likely or self.hang_ups > 1

    def _untried(self) -> list[int]:
        """Return the offers that may be tried now, the likeliest first."""
        others = self.known[1:] + [i for i in range(self.count) if i not in self.known]
        return [i for i in others if i not in self.refused]

    def _expire(self, now: float) -> None:
        if now - self.last_hang_up >= RETRY:
            self._give_up(self.last_hang_up)

    def _give_up(self, now: float) -> None:
        """End a search; if trials beside an accepted version were refused it led nowhere."""
        if self.known and self.refused:
            self.doubt_until = now + min(DOUBT * 2.0**self.fruitless, MOST_DOUBT)
            # More would change nothing, and one day not fit a float.
            self.fruitless = min(self.fruitless + 1, 16)
        self._forget_search()

    def _forget_search(self) -> None:
        self.hang_ups, self.trial, self.last_hang_up = 0, False, _NEVER
        self.refused.clear()


@dataclass(frozen=True, slots=True)
class HangUp:
    """The consequence of a connection that ended after HELLO, for its address.

    ``evidence``: whether it may have been a refusal. ``following`` is what the address is offered
    next, ``accepted`` what it accepted last (None: nothing yet). ``doubt``: for how many seconds
    hang-ups of the address mean nothing now, because those so far led nowhere.
    """

    evidence: bool
    following: Offer
    accepted: Offer | None
    doubt: float


class Greeting:
    """One connection's HELLO: what it is offered, and what it made of it."""

    __slots__ = ("_key", "_negotiator", "_news", "_opened", "_went_on", "offer")

    def __init__(self, negotiator: Negotiator, key: _Key, offer: Offer, opened: float) -> None:
        self.offer = offer
        self._negotiator = negotiator
        self._key = key
        self._opened = opened
        self._went_on = False
        self._news = False

    def accepted(self, now: float) -> bool:
        """Note the request after HELLO: the client accepts the version.

        Return whether the address is offered another version first from now on: clients connect a
        thousand times in a run.
        """
        self._went_on = True
        self._news = self._negotiator._accepted(self._key, self.offer, now)
        return self._news

    def ended(self, now: float) -> HangUp | None:
        """Note the end of the connection, and return what a hang-up means; None if it went on."""
        if self._went_on:
            self._negotiator._left(self._key, self.offer, now)
            return None
        return self._negotiator._hung_up(self._key, self.offer, self._opened, now)

    def broken(self) -> None:
        """Note that what came was no message of the version.

        If it was this connection by which the address came to be known for the version, that is
        forgotten. What others accepted stays.
        """
        if self._news:
            self._negotiator._withdrawn(self._key, self.offer)
            self._news = False


class Negotiator:
    """Chooses offers; ``pinned`` is a version such as '5.1' to be the only one, None for auto.

    Raises ValueError for a version that isn't known.
    """

    def __init__(self, pinned: str | None = None) -> None:
        dialects = list(DIALECTS) if pinned is None else find_dialects(pinned)
        # Names of the versions that clients may speak, newest first.
        self.spoken = tuple(dict.fromkeys(version_name(d.version) for d in dialects))
        self._ladders: dict[int, list[Offer]] = {}
        for size in {d.hello_size for d in DIALECTS}:
            self._ladders[size] = _offers([d for d in dialects if d.hello_size == size])
        self._pinned = pinned
        # Apart, so that hang-ups from many addresses don't push out what others accepted.
        self._new: OrderedDict[_Key, _Peer] = OrderedDict()
        self._known: OrderedDict[_Key, _Peer] = OrderedDict()

    def greet(self, address: str, caps: bytes, now: float) -> Greeting:
        """Return the greeting for a HELLO with these capability bytes from ``address``.

        Raises ProtocolError if the pinned version has another HELLO.
        """
        ladder = self._ladders.get(len(caps))
        if not ladder:
            raise ProtocolError(
                f"HELLO of {len(caps)} bytes is not of protocol {self._pinned}, "
                "the only one this server was told to speak"
            )
        marked = caps_version(caps) > 0
        key = (address, len(caps), marked, not marked and any(caps))
        return Greeting(self, key, ladder[self._peer(key).choose(now)], now)

    def _accepted(self, key: _Key, offer: Offer, now: float) -> bool:
        peer = self._peer(key)
        news = peer.accept(self._ladders[key[1]].index(offer), now)
        self._new.pop(key, None)
        _keep(self._known, key, peer)
        return news

    def _left(self, key: _Key, offer: Offer, now: float) -> None:
        self._peer(key).leave(self._ladders[key[1]].index(offer), now)

    def _hung_up(self, key: _Key, offer: Offer, opened: float, now: float) -> HangUp:
        peer = self._peer(key)
        ladder = self._ladders[key[1]]
        evidence = peer.hang_up(ladder.index(offer), opened, now)
        return HangUp(
            evidence=evidence,
            following=ladder[peer.choose(now)],
            accepted=ladder[peer.known[0]] if peer.known else None,
            doubt=max(0.0, peer.doubt_until - now),
        )

    def _withdrawn(self, key: _Key, offer: Offer) -> None:
        peer = self._peer(key)
        peer.withdraw(self._ladders[key[1]].index(offer))
        if not peer.known:
            self._known.pop(key, None)
            _keep(self._new, key, peer)

    def _peer(self, key: _Key) -> _Peer:
        peer = self._known.get(key)
        if peer is not None:
            self._known.move_to_end(key)
            return peer
        peer = self._new.get(key) or _Peer(len(self._ladders[key[1]]))
        _keep(self._new, key, peer)
        return peer


def retry_pause(refused: Sequence[Version]) -> float | None:
    """Return how many seconds a client waits before it tries a server again; None to give up.

    ``refused`` are the versions that it was offered and hung up on. A server that guesses offers
    another one, but not while it takes another client of the address to be at work.
    """
    in_a_row = 0
    for version in reversed(refused):
        if version != refused[-1]:
            break
        in_a_row += 1
    if in_a_row > _MOST_IN_A_ROW or len(refused) >= _MOST_TRIES:
        return None
    # Twice at most it has to see a client of ours at another moment than theirs.
    return WORKING + _BETWEEN_TRIES if 2 <= in_a_row < _MOST_IN_A_ROW else _BETWEEN_TRIES


def _keep(peers: OrderedDict[_Key, _Peer], key: _Key, peer: _Peer) -> None:
    """Put a peer in, and the one that was met longest ago out if there are too many."""
    peers[key] = peer
    peers.move_to_end(key)
    if len(peers) > _MAX_PEERS:
        peers.popitem(last=False)
