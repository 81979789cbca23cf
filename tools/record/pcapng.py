"""Writes pcapng block by block, as packets come.

Packets are written from the memory that they arrived in (``writev``), so that recording an upload
costs one copy into the kernel. A file holds whole blocks at any time: one that could be written in
part only, on a full disk, is taken back.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from tools.capture.blocks import STATISTICS, block, interface, options, packet_ends, section

Buffer = bytes | bytearray | memoryview

_ETHERNET = 1

# Options, by their block.
_COMMENT = 1
_SECTION_APPLICATION = 4
_INTERFACE_NAME = 2
_STATISTICS_RECEIVED = 4
_STATISTICS_DROPPED = 5

_STATISTICS_SIZE = 52
# writev takes at most 1024 pieces on Linux; a packet is at most 4 of them.
_MOST_PIECES = 1024


class PcapngWriter:
    """A capture of Ethernet frames with times in nanoseconds, written to a new file.

    ``comment`` is the section's, shown by Wireshark among the file's properties. ``limit`` is the
    size that the file will not exceed, bytes. OSError if the file can't be made.
    """

    def __init__(self, path: Path, *, comment: str = "", limit: int | None = None) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._limit = limit
        self._pieces: list[Buffer] = []
        # Bytes that were added and not written.
        self.pending = 0
        # Bytes of whole blocks on disk.
        self._written = 0
        self._packets = 0
        self._time = (0, 0)
        about = [(_SECTION_APPLICATION, b"ggml-rpc-server tools.record")]
        if comment:
            about.insert(0, (_COMMENT, comment.encode()))
        self._add(section(*about), interface(_ETHERNET, (_INTERFACE_NAME, b"rpc")))

    @property
    def size(self) -> int:
        """Bytes of the file, with those that are about to be written."""
        return self._written + self.pending

    def packet(self, time_ns: int, *pieces: Buffer) -> bool:
        """Add a frame made of ``pieces``; they may not change until the next :meth:`flush`.

        False, and nothing is added, if the file would exceed its limit.
        """
        length = sum(map(len, pieces))
        head, end = packet_ends(0, time_ns, length, length)
        size = len(head) + length + len(end)
        if self._limit is not None and self.size + size > self._limit - _STATISTICS_SIZE:
            return False
        self._time = time_ns >> 32, time_ns & 0xFFFFFFFF
        self._add(head, *pieces, end)
        self._packets += 1
        return True

    def flush(self) -> None:
        """Write what was added. OSError if that fails: the file ends with the block before."""
        pieces, self._pieces = self._pieces, []
        self.pending = 0
        try:
            for at in range(0, len(pieces), _MOST_PIECES):
                self._write(pieces[at : at + _MOST_PIECES])
        except OSError:
            self._take_back()
            raise

    def close(self, dropped: int = 0) -> None:
        """End the file with the counts of packets in it and of those left out."""
        counts = options(
            (_STATISTICS_RECEIVED, struct.pack("<Q", self._packets + dropped)),
            (_STATISTICS_DROPPED, struct.pack("<Q", dropped)),
        )
        try:
            self._add(block(STATISTICS, struct.pack("<III", 0, *self._time) + counts))
            self.flush()
        finally:
            os.close(self._fd)

    def abandon(self) -> None:
        """Close the file as it is."""
        os.close(self._fd)

    def _add(self, *pieces: Buffer) -> None:
        self._pieces.extend(pieces)
        self.pending += sum(map(len, pieces))

    def _write(self, pieces: Sequence[Buffer]) -> None:
        left = [memoryview(piece) for piece in pieces if len(piece)]
        total = sum(map(len, left))
        done = os.writev(self._fd, left)
        while done < total:
            # The disk took a part; the next try says why, or goes on.
            rest = done
            while rest >= len(left[0]):
                rest -= len(left.pop(0))
            left[0] = left[0][rest:]
            total -= done
            done = os.writev(self._fd, left)
        self._written = os.lseek(self._fd, 0, os.SEEK_CUR)

    def _take_back(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._written)
            os.lseek(self._fd, self._written, os.SEEK_SET)
