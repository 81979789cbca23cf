"""pcap and pcapng files: frames out, and frames in.

dpkt knows the formats; its headers and blocks are used for all that occurs once. The packets
themselves are taken apart here: dpkt takes 5 us for each, which would be half of all the time that
a large capture takes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tools.capture.blocks import (
    INTERFACE,
    PACKET,
    SECTION,
    SIMPLE_PACKET,
    interface,
    packet_ends,
    section,
)
from tools.capture.errors import CaptureError, MissingToolError

try:
    import dpkt
except ModuleNotFoundError as error:
    raise MissingToolError(
        "reading captures needs the packages of the extra 'tools': "
        "pip install 'ggml-rpc-server[tools]'"
    ) from error

_CHUNK = 1 << 20
_MOST = 16 << 20
# Bytes of blocks that are read here, without anything in them.
_LEAST = {SECTION: 28, PACKET: 32, SIMPLE_PACKET: 16, INTERFACE: 20}
_NANO = (dpkt.pcap.TCPDUMP_MAGIC_NANO, dpkt.pcap.PMUDPCT_MAGIC_NANO)
_SWAPPED = (dpkt.pcap.PMUDPCT_MAGIC, dpkt.pcap.PMUDPCT_MAGIC_NANO)


class Frame(NamedTuple):
    """A packet as captured: ``data`` may be cut; ``length`` is what was on the wire.

    ``link`` is the number of its link layer (LINKTYPE_*), ``time`` seconds since 1970.
    """

    time: float
    link: int
    data: bytes
    length: int


class _Source:
    """Reads a file, or a pipe as far as it is filled: ``buffer`` from ``at`` on is to be read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._read = getattr(file, "read1", file.read)
        self._before = 0
        # Whether the file is compressed and ends before its end.
        self.cut = False
        self.buffer = b""
        self.at = 0

    @property
    def position(self) -> int:
        """Bytes of the file that were taken."""
        return self._before + self.at

    def have(self, n: int) -> bool:
        """Return whether ``n`` bytes are there; wait for them."""
        if len(self.buffer) - self.at >= n:
            return True
        parts = [self.buffer[self.at :]]
        size = len(parts[0])
        while size < n:
            more = self._more(max(_CHUNK, n - size))
            if not more:
                break
            parts.append(more)
            size += len(more)
        self._before += self.at
        self.buffer = b"".join(parts)
        self.at = 0
        return size >= n

    def _more(self, n: int) -> bytes:
        """Up to ``n`` bytes more, none at the end. Raises CaptureError."""
        if self.cut:
            return b""
        try:
            more: bytes = self._read(n)
        except EOFError:
            # A compressed file that was cut short is as good as one that wasn't compressed.
            self.cut = True
            return b""
        except (OSError, zlib.error) as error:
            raise CaptureError(f"the file is damaged: {error}") from None
        return more

    def peek(self, n: int) -> bytes:
        self.have(n)
        return self.buffer[self.at : self.at + n]

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes, which must be there."""
        at = self.at
        self.at = at + n
        return self.buffer[at : self.at]


class Capture:
    """The frames of a file or pipe, one after the other.

    ``truncated`` is true after the last one if the file ends within a packet. ``position`` is how
    many bytes of the file have been read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Raises CaptureError for what is no capture."""
        if hasattr(file, "peek") and file.peek(2)[:2] == b"\x1f\x8b":
            file = cast(IO[bytes], gzip.GzipFile(fileobj=file))
        self._source = _Source(file)
        self.truncated = False
        magic = self._source.peek(4)
        if not magic:
            raise CaptureError("the capture is empty: nothing was written, not even its header")
        if magic == struct.pack("<I", SECTION):
            self._frames = self._read_pcapng()
        elif struct.unpack(">I", magic.ljust(4, b"\0"))[0] in dpkt.pcap.MAGIC_TO_PKT_HDR:
            self._frames = self._read_pcap()
        else:
            raise CaptureError("neither pcap nor pcapng: the file doesn't begin like one")

    @property
    def position(self) -> int:
        return self._source.position

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def _read_pcap(self) -> Iterator[Frame]:
        source = self._source
        if not source.have(dpkt.pcap.FileHdr.__hdr_len__):
            raise CaptureError("a pcap file that ends within its header")
        raw = source.take(dpkt.pcap.FileHdr.__hdr_len__)
        header = dpkt.pcap.FileHdr(raw)
        magic = header.magic
        little = magic in _SWAPPED
        if little:
            header = dpkt.pcap.LEFileHdr(raw)
        # The upper bits of the link type may say how long a frame check sequence is.
        link = header.linktype & 0x0FFFFFFF
        head = struct.Struct("<IIII" if little else ">IIII")
        unit = 1e-9 if magic in _NANO else 1e-6
        size, unpack = head.size, head.unpack_from
        while source.have(size):
            # All that is in the buffer, without a call for each packet.
            buffer, at = source.buffer, source.at
            last = len(buffer) - size
            while at <= last:
                seconds, fraction, caught, length = unpack(buffer, at)
                end = at + size + caught
                if end > last + size:
                    break
                source.at = end
                yield Frame(seconds + fraction * unit, link, buffer[at + size : end], length)
                at = end
            caught = unpack(source.peek(size).ljust(size, b"\0"), 0)[2]
            if caught > _MOST:
                raise CaptureError(f"a packet of {caught} bytes: the file is damaged")
            if source.have(size) and not source.have(size + caught):
                break
        self.truncated = bool(source.peek(1)) or source.cut

    def _read_pcapng(self) -> Iterator[Frame]:
        source = self._source
        order = "<"
        interfaces: list[tuple[int, float, int, int]] = []
        while source.have(8):
            kind, size = struct.unpack(order + "II", source.peek(8))
            if kind == SECTION:
                interfaces = []
                order = "<" if source.peek(12)[8:] == b"\x4d\x3c\x2b\x1a" else ">"
                (size,) = struct.unpack(order + "I", source.peek(8)[4:])
                packet = struct.Struct(order + "IIIIIII")
            if size < _LEAST.get(kind, 12) or size % 4 or size > _MOST:
                raise CaptureError(f"a block of {size} bytes: the file is damaged")
            if not source.have(size):
                self.truncated = True
                return
            block = source.take(size)
            if kind == PACKET:
                _, _, number, high, low, caught, length = packet.unpack_from(block)
                if number >= len(interfaces) or caught > size - 32:
                    raise CaptureError("a packet that doesn't fit its block: the file is damaged")
                link, unit, offset, _ = interfaces[number]
                time = offset + (high << 32 | low) * unit
                yield Frame(time, link, block[28 : 28 + caught], length)
            elif kind == INTERFACE:
                interfaces.append(_interface(block, order == "<"))
            elif kind == SIMPLE_PACKET and interfaces:
                (length,) = struct.unpack_from(order + "I", block, 8)
                link, _, _, snap = interfaces[0]
                caught = min(length, snap or length, size - 16)
                yield Frame(0.0, link, block[12 : 12 + caught], length)
        self.truncated = bool(source.peek(1)) or source.cut


def _interface(block: bytes, little: bool) -> tuple[int, float, int, int]:
    """Link type, seconds of a unit of time, offset of times, and the most bytes of a packet."""
    try:
        parsed: Any = (
            dpkt.pcapng.InterfaceDescriptionBlockLE(block)
            if little
            else dpkt.pcapng.InterfaceDescriptionBlock(block)
        )
    except (dpkt.Error, ValueError, IndexError, struct.error) as error:
        raise CaptureError(f"an interface that can't be read: {error}") from None
    unit, offset = 1e-6, 0
    for option in parsed.opts:
        if option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSRESOL and option.data:
            resolution = option.data[0]
            unit = 2.0 ** -(resolution & 0x7F) if resolution & 0x80 else 10.0**-resolution
        elif option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSOFFSET and len(option.data) == 8:
            offset = int.from_bytes(option.data, "little" if little else "big", signed=True)
    return parsed.linktype, unit, offset, parsed.snaplen


def open_file(path: str | Path) -> BufferedReader:
    """Open a file; raise CaptureError where it can't be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}") from None


def read_capture(path: str | Path) -> Iterator[Frame]:
    """Yield the frames of a file. Raises CaptureError."""
    with open_file(path) as file:
        yield from Capture(file)


class CaptureWriter:
    """Writes a pcapng file of frames of any link types, times in nanoseconds."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._links: dict[int, int] = {}
        file.write(section())

    def write(self, frame: Frame) -> None:
        number = self._links.get(frame.link)
        if number is None:
            number = self._links[frame.link] = len(self._links)
            self._file.write(interface(frame.link))
        data = bytes(frame.data)
        head, end = packet_ends(number, round(frame.time * 1e9), len(data), frame.length)
        self._file.write(head + data + end)
