"""The packets that a TCP connection would have been made of, from the bytes that it carried.

A proxy sees streams; a capture has Ethernet frames. :class:`TcpFrames` makes the frames of one
connection, with the sequence numbers, acknowledgements and checksums that TCP would have given
them. Segments are as long as IP allows: one frame for what was received at once, up to 64 KiB.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from protocol.endpoint import format_endpoint
from protocol.observe.events import Side

Buffer = bytes | memoryview
# A frame in pieces: headers, and bytes of the stream.
Frame = tuple[Buffer, ...]

# Addresses that nobody owns: locally administered ones.
_CLIENT_MAC = bytes.fromhex("020000000001")
_SERVER_MAC = bytes.fromhex("020000000002")

_TCP = 6
_TCP_HEAD = struct.Struct(">HHIIBBHHH")
_FIN, _SYN, _RST, _PSH, _ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_MAX_SEGMENT = 65535 - 40 - 20
# Largest segment, window scaling by 2^14: a sender never waits, whatever is on its way.
_SYN_OPTIONS = struct.pack(">BBHBBBB", 2, 4, _MAX_SEGMENT, 3, 3, 14, 0)
_WINDOW = 0xFFFF
# So many bytes of one side are acknowledged if the other says nothing.
_ACKNOWLEDGE_EVERY = 1 << 20
# Bytes that Python adds faster than numpy is called.
_FEW = 512


class Address(NamedTuple):
    """A TCP endpoint; ``host`` is an IPv4 or IPv6 address in its usual notation."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_endpoint(self.host, self.port)


def ones_complement_sum(data: Buffer) -> int:
    """Return the Internet checksum's sum of 16-bit words, folded.

    An odd end is padded with zero.
    """
    if len(data) < _FEW:
        number = int.from_bytes(bytes(data) + bytes(len(data) % 2), "big")
        # Folding is the remainder by 65535, but for what is not zero and has the remainder zero.
        return number % 0xFFFF or (0xFFFF if number else 0)
    # Sums don't depend on byte order but for a swap at the end, so whole words are added.
    words = np.frombuffer(data, "<u4", len(data) // 4)
    total = int(words.sum(dtype=np.uint64))
    total += int.from_bytes(bytes(data[len(data) // 4 * 4 :]), "little")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int.from_bytes(total.to_bytes(2, "little"), "big")


def _checksum(*sums: int) -> int:
    total = sum(sums)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@dataclass(slots=True)
class _Endpoint:
    port: int
    address: bytes
    ethernet: bytes
    # Next byte to send, and how much of what the other sent was acknowledged.
    sequence: int = 0
    acknowledged: int = 0
    ended: bool = False
    identification: int = 0


@dataclass(slots=True)
class TcpFrames:
    """Makes the frames of one connection.

    ``client`` and ``server`` must be of one address family; ValueError if they are not.
    """

    client: Address
    server: Address
    _ends: dict[Side, _Endpoint] = field(init=False)
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        parsed = [
            ipaddress.ip_address(a.host.partition("%")[0]) for a in (self.client, self.server)
        ]
        if parsed[0].version != parsed[1].version:
            raise ValueError(f"{self.client} and {self.server} are of two address families")
        self._version = parsed[0].version
        kind = b"\x08\x00" if self._version == 4 else b"\x86\xdd"
        client = _Endpoint(self.client.port, parsed[0].packed, _SERVER_MAC + _CLIENT_MAC + kind)
        server = _Endpoint(self.server.port, parsed[1].packed, _CLIENT_MAC + _SERVER_MAC + kind)
        self._ends = {Side.CLIENT: client, Side.SERVER: server}

    def opened(self) -> Iterator[Frame]:
        """Yield the three frames that open a connection."""
        yield self._frame(Side.CLIENT, _SYN, options=_SYN_OPTIONS)
        self._ends[Side.CLIENT].sequence += 1
        yield self._frame(Side.SERVER, _SYN | _ACK, options=_SYN_OPTIONS)
        self._ends[Side.SERVER].sequence += 1
        yield self._frame(Side.CLIENT, _ACK)

    def refused(self) -> Iterator[Frame]:
        """Yield the frames of a connection that nobody accepts."""
        yield self._frame(Side.CLIENT, _SYN, options=_SYN_OPTIONS)
        self._ends[Side.CLIENT].sequence += 1
        yield self._frame(Side.SERVER, _RST | _ACK)

    def data(self, side: Side, data: Buffer) -> Iterator[Frame]:
        """Yield the frames that carry ``data``; they refer to its memory."""
        view = memoryview(data)
        sender, receiver = self._ends[side], self._ends[side.other]
        for at in range(0, len(view), _MAX_SEGMENT):
            part = view[at : at + _MAX_SEGMENT]
            last = at + len(part) == len(view)
            yield self._frame(side, _ACK | (_PSH if last else 0), part)
            sender.sequence += len(part)
        if sender.sequence - receiver.acknowledged >= _ACKNOWLEDGE_EVERY:
            yield self._frame(side.other, _ACK)

    def ended(self, side: Side) -> Iterator[Frame]:
        """Yield the frames by which a side says that it will send nothing more."""
        sender = self._ends[side]
        if sender.ended:
            return
        sender.ended = True
        yield self._frame(side, _FIN | _ACK)
        sender.sequence += 1
        yield self._frame(side.other, _ACK)

    def reset(self, side: Side) -> Iterator[Frame]:
        """Yield the frame by which a side breaks the connection off."""
        for end in self._ends.values():
            end.ended = True
        yield self._frame(side, _RST | _ACK)

    def _frame(self, side: Side, flags: int, data: Buffer = b"", options: bytes = b"") -> Frame:
        sender, receiver = self._ends[side], self._ends[side.other]
        acknowledged = 0
        if flags & _ACK:
            acknowledged = sender.acknowledged = receiver.sequence
        length = _TCP_HEAD.size + len(options) + len(data)
        fields = (
            *(sender.port, receiver.port),
            *(sender.sequence & 0xFFFFFFFF, acknowledged & 0xFFFFFFFF),
            *((_TCP_HEAD.size + len(options)) // 4 << 4, flags, _WINDOW),
        )
        pseudo = sender.address + receiver.address + struct.pack(">II", length, _TCP)
        checksum = _checksum(
            ones_complement_sum(pseudo),
            ones_complement_sum(_TCP_HEAD.pack(*fields, 0, 0) + options),
            ones_complement_sum(data),
        )
        tcp = _TCP_HEAD.pack(*fields, checksum, 0) + options
        head = sender.ethernet + self._ip(sender, receiver, length) + tcp
        return (head, data) if len(data) else (head,)

    def _ip(self, sender: _Endpoint, receiver: _Endpoint, length: int) -> bytes:
        addresses = sender.address + receiver.address
        if self._version == 6:
            return struct.pack(">IHBB", 6 << 28, length, _TCP, 64) + addresses
        sender.identification = sender.identification + 1 & 0xFFFF
        fields = (0x45, 0, 20 + length, sender.identification, 0x4000, 64, _TCP)
        head = struct.pack(">BBHHHBB", *fields)
        checksum = _checksum(ones_complement_sum(head), ones_complement_sum(addresses))
        return head + struct.pack(">H", checksum) + addresses
