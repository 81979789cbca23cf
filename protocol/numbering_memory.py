"""What is known of the op numberings of the clients behind each address.

A graph that makes sense under one numbering alone tells how its client numbers ops. Small graphs
that come later, or on another connection, and make sense under several are read by what was seen
before. Clients of several releases may be behind one address: each that was seen stays known.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from protocol.dialects import Dialect

_MOST_ADDRESSES = 4096
# Releases behind one address; what was seen longest ago goes first.
_MOST_SEEN = 8

_Key = tuple[str, frozenset[str]]


class NumberingMemory:
    """By address and by the dialects that a version may be; any thread may use it."""

    def __init__(self, most: int = _MOST_ADDRESSES) -> None:
        self._most = most
        self._lock = threading.Lock()
        # Sets of names of dialects, what was seen last comes last. A client may be each of a set.
        self._seen: OrderedDict[_Key, list[frozenset[str]]] = OrderedDict()

        # Addresses whose clients have long names.
        self._long_names: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def long_names(self, address: str) -> bool:
        """Note that a client behind ``address`` has long names; return whether that is news."""
        with self._lock:
            news = address not in self._long_names
            self._long_names[address] = None
            self._long_names.move_to_end(address)
            if len(self._long_names) > self._most:
                self._long_names.popitem(last=False)
            return news

    def learn(self, address: str, version: Iterable[Dialect], left: Iterable[Dialect]) -> None:
        """Note that a client of ``version`` behind ``address`` can only be one of ``left``."""
        key, found = _key(address, version), frozenset(d.name for d in left)
        with self._lock:
            seen = self._seen.setdefault(key, [])
            self._seen.move_to_end(key)
            # The same client, of which more is known now.
            for i, earlier in enumerate(seen):
                if earlier & found:
                    found &= seen.pop(i)
                    break
            seen.append(found)
            del seen[:-_MOST_SEEN]
            if len(self._seen) > self._most:
                self._seen.popitem(last=False)

    def believed(self, address: str, version: Sequence[Dialect]) -> list[Dialect]:
        """Return those of ``version`` that clients behind ``address`` speak; [] if that is open."""
        key = _key(address, version)
        with self._lock:
            seen = self._seen.get(key)
            if seen is None:
                return []
            self._seen.move_to_end(key)
            names = frozenset().union(*seen)
        return [d for d in version if d.name in names]


def _key(address: str, version: Iterable[Dialect]) -> _Key:
    return address, frozenset(d.name for d in version)
