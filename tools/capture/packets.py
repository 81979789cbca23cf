"""TCP segments out of captured frames: link layers, VLAN tags, IPv4 and IPv6."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

import dpkt

from protocol.endpoint import format_endpoint
from tools.capture.files import Frame

FIN, SYN, RST, ACK = 1, 2, 4, 16

_ETHERNET, _NULL, _LOOP, _SLL, _SLL2 = 1, 0, 108, 113, 276
_RAW = frozenset({12, 14, 101, 228, 229})
LINKS = frozenset({_ETHERNET, _NULL, _LOOP, _SLL, _SLL2}) | _RAW

_IP4, _IP6 = 0x0800, 0x86DD
_TAGS = frozenset({0x8100, 0x88A8, 0x9100})
_IP4_HEAD = struct.Struct(">BxHxxHxBxx4s4s")
_TCP_HEAD = struct.Struct(">HHIIBB")
_TCP_HEAD_SIZE = 20
_TCP = 6


class Segment(NamedTuple):
    """A TCP segment; ``length`` is that of its payload on the wire, which may be cut here.

    Addresses are (bytes of the IP address, port).
    """

    source: tuple[bytes, int]
    destination: tuple[bytes, int]
    seq: int
    ack: int
    flags: int
    payload: memoryview
    length: int
    time: float


class PacketReader:
    """Takes frames apart; ``others`` counts by kind what is no TCP segment."""

    def __init__(self) -> None:
        self.others: dict[str, int] = {}

    def segment(self, frame: Frame) -> Segment | None:
        """Return the frame's segment, None for anything else."""
        time, link, data, length = frame
        try:
            if link == _ETHERNET and data[12:14] == b"\x08\x00":
                at, kind = 14, _IP4
            else:
                at, kind = _network(link, data)
            if kind == _IP4:
                return self._ip4(data, at, length, time)
            if kind == _IP6:
                return self._ip6(data, at, length, time)
        except (IndexError, struct.error):
            return self._other("cut off before their payload")
        return self._other("not IP")

    def _other(self, kind: str) -> Segment | None:
        self.others[kind] = self.others.get(kind, 0) + 1
        return None

    def _ip4(self, data: bytes, at: int, length: int, time: float) -> Segment | None:
        words, size, fragment, protocol, source, destination = _IP4_HEAD.unpack_from(data, at)
        if protocol != _TCP:
            return self._other("not TCP")
        if fragment & 0x3FFF:
            return self._other("IP fragments, which are not put together")
        # 0: the card cuts it into packets later.
        end = at + size if size else length
        return self._tcp(data, at + (words & 15) * 4, end, source, destination, time)

    def _ip6(self, data: bytes, at: int, length: int, time: float) -> Segment | None:
        size = data[at + 4] << 8 | data[at + 5]
        end = at + 40 + size if size else length
        following, start = data[at + 6], at + 40
        if following != _TCP:
            # Headers between: dpkt knows them.
            try:
                packet = dpkt.ip6.IP6(data[at:])
            except (dpkt.Error, IndexError, struct.error, ValueError):
                return self._other("not TCP")
            if packet.p != _TCP:
                return self._other("not TCP")
            if dpkt.ip.IP_PROTO_FRAGMENT in packet.extension_hdrs:
                return self._other("IP fragments, which are not put together")
            start += sum(len(header) for header in packet.all_extension_headers)
        addresses = data[at + 8 : at + 24], data[at + 24 : at + 40]
        return self._tcp(data, start, end, *addresses, time)

    def _tcp(
        self, data: bytes, at: int, end: int, source: bytes, destination: bytes, time: float
    ) -> Segment | None:
        sport, dport, seq, ack, words, flags = _TCP_HEAD.unpack_from(data, at)
        start = at + (words >> 4) * 4
        if start < at + _TCP_HEAD_SIZE or end < start:
            return self._other("malformed")
        payload = memoryview(data)[start:end]
        return Segment(
            (source, sport), (destination, dport), seq, ack, flags, payload, end - start, time
        )


def _network(link: int, data: bytes) -> tuple[int, int]:
    """Return where the network layer begins, and its ethertype (0 for others).

    Raises IndexError if cut.
    """
    if link == _ETHERNET:
        at = 14
        kind = data[12] << 8 | data[13]
    elif link == _SLL:
        at = 16
        kind = data[14] << 8 | data[15]
    elif link == _SLL2:
        at = 20
        kind = data[0] << 8 | data[1]
    else:
        at = 0 if link in _RAW else 4
        if link not in LINKS:
            return 0, 0
        return at, {4: _IP4, 6: _IP6}.get(data[at] >> 4, 0)
    while kind in _TAGS:
        kind = data[at + 2] << 8 | data[at + 3]
        at += 4
    return at, kind


def address_text(address: tuple[bytes, int]) -> str:
    """Return host:port, with an IPv6 host in brackets."""
    host, port = address
    family = socket.AF_INET if len(host) == 4 else socket.AF_INET6
    return format_endpoint(socket.inet_ntop(family, host), port)
