"""TCP connections put together from segments as captured: in any order, doubled, or missing.

What arrives in order goes on at once. A segment from further ahead waits until what is before it
came, or until that can be taken for lost: the other side has acknowledged it, so that it was on the
wire and only the capture lacks it, or too much is waiting. What was delivered once isn't again;
where overlapping segments differ, the first one counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.capture.packets import ACK, FIN, RST, SYN, Segment

_HALF = 1 << 31
_ALL = (1 << 32) - 1
# A hole is given up when the receiver has acknowledged it and so many more packets came or so much
# time went by: captures of several processors may have packets in another order.
_PATIENCE_PACKETS = 64
_PATIENCE_SECONDS = 2.0
# A connection whose start isn't captured begins with the earliest of so many segments.
_START_PACKETS = 16
_START_SECONDS = 0.05
# A hole is given up, too, when so much waits for it.
_MOST_WAITING = 8 << 20

Deliver = Callable[[memoryview, float], None]
Lose = Callable[[int, float], None]


@dataclass(slots=True)
class SegmentCounts:
    """The counts of one direction, in segments unless it says bytes."""

    bytes: int = 0
    out_of_order: int = 0
    repeated: int = 0
    repeated_bytes: int = 0
    cut: int = 0
    lost_bytes: int = 0

    def texts(self) -> list[str]:
        """Return what wasn't as on the wire, in words."""
        found = []
        if self.out_of_order:
            found.append(f"{self.out_of_order} segments out of order")
        if self.repeated:
            found.append(f"{self.repeated} repeated ({self.repeated_bytes} bytes)")
        if self.cut:
            found.append(f"{self.cut} cut short by the capture")
        if self.lost_bytes:
            found.append(f"{self.lost_bytes} bytes missing")
        return found


class CapturedStream:
    """One direction: segments in, bytes in order out. Sequence numbers are counted on past 2^32."""

    def __init__(self, deliver: Deliver, lose: Lose) -> None:
        self.counts = SegmentCounts()
        self.ended = False
        self.deliver = deliver
        self.lose = lose
        # Sequence numbers of the first byte and of the next one; None before the first segment.
        self.first: int | None = None
        self._next: int | None = None
        # Whether the SYN is to come, as the other side's was seen; and what came before it.
        self.start_follows = False
        self._early: list[Segment] = []
        self._waiting: list[tuple[int, int, memoryview, int, float]] = []
        self._waiting_bytes = 0
        self._serial = 0
        self._acknowledged = 0
        self._patience = 0
        self._hole_since = 0.0
        self._end: int | None = None

    @property
    def waits(self) -> bool:
        """True if there is a hole."""
        return bool(self._waiting)

    def begin(self, seq: int) -> None:
        """Begin with the first byte's sequence number; one that was seen already counts."""
        if self._next is not None:
            return
        self._next = self.first = seq & _ALL
        early, self._early = self._early, []
        for segment in early:
            self.segment(segment)

    def segment(self, segment: Segment) -> None:
        _, _, seq, _, flags, payload, length, time = segment
        if self._next is None:
            if self.start_follows and len(self._early) < _PATIENCE_PACKETS:
                self._early.append(segment)
                return
            self._begin_early(seq)
        assert self._next is not None
        expected = self._next
        ahead = (seq - expected) & _ALL
        if ahead == 0 and not self._waiting and len(payload) == length:
            self._next = expected + length
            self.counts.bytes += length
            if length:
                self.deliver(payload, time)
        elif length:
            if ahead >= _HALF:
                ahead -= 1 << 32
            self._place(expected + ahead, payload, length, time)
        if flags & FIN:
            self._end = expected + ((seq + length - expected + _HALF) & _ALL) - _HALF
        if self._end is not None and self._next >= self._end:
            self.ended = True

    def acknowledged(self, ack: int, time: float) -> None:
        """Take note that the receiver has all before this sequence number."""
        if self._next is None:
            return
        ahead = (ack - self._next) & _ALL
        if ahead < _HALF:
            self._acknowledged = max(self._acknowledged, self._next + ahead)
        self._patience += 1
        self._give_up(time)

    def flush(self, time: float) -> None:
        """Flush: what waits for a hole goes on without it, as nothing more will come."""
        if self._early:
            self._begin_early(self._early[0].seq)
        while self._waiting:
            self._skip_hole(time)

    def _begin_early(self, seq: int) -> None:
        """Nothing tells where the stream begins: by the earliest segment, this one or before."""
        self.begin(_earliest(seq, self._early))

    def _place(self, seq: int, payload: memoryview, length: int, time: float) -> None:
        """Put a segment that isn't simply the next one where it belongs."""
        assert self._next is not None
        if len(payload) < length:
            self.counts.cut += 1
        if seq > self._next:
            if not self._waiting:
                self._patience = 0
                self._hole_since = time
                self._acknowledged = 0
            self.counts.out_of_order += 1
            self._serial += 1
            heapq.heappush(self._waiting, (seq, self._serial, payload, length, time))
            self._waiting_bytes += len(payload)
            self._patience += 1
            self._give_up(time)
            return
        self._take(seq, payload, length, time)
        self._take_waiting()

    def _take(self, seq: int, payload: memoryview, length: int, time: float) -> None:
        """Deliver what is new in a segment that begins at the next byte or before it."""
        assert self._next is not None
        known = self._next - seq
        if known > 0:
            self.counts.repeated += 1
            self.counts.repeated_bytes += min(known, length)
            if known >= length:
                return
            payload, length = payload[known:], length - known
        self._next += length
        # Patience is with the hole that comes next.
        self._patience = 0
        self._hole_since = time
        self.counts.bytes += length
        if payload:
            self.deliver(payload, time)
        missing = length - len(payload)
        if missing > 0:
            self.counts.lost_bytes += missing
            self.lose(missing, time)

    def _take_waiting(self) -> None:
        while self._waiting and self._waiting[0][0] <= (self._next or 0):
            seq, _, payload, length, time = heapq.heappop(self._waiting)
            self._waiting_bytes -= len(payload)
            self._take(seq, payload, length, time)

    def _give_up(self, time: float) -> None:
        while self._waiting:
            first = self._waiting[0][0]
            known_sent = self._acknowledged >= first and (
                self._patience > _PATIENCE_PACKETS or time - self._hole_since > _PATIENCE_SECONDS
            )
            if not known_sent and self._waiting_bytes <= _MOST_WAITING:
                return
            self._skip_hole(time)

    def _skip_hole(self, time: float) -> None:
        assert self._next is not None
        missing = self._waiting[0][0] - self._next
        self._next += missing
        self.counts.lost_bytes += missing
        # It was sent before what waits for it.
        self.lose(missing, self._waiting[0][4])
        self._patience = 0
        self._hole_since = time
        self._take_waiting()


def _earliest(seq: int, segments: Sequence[Segment]) -> int:
    """The lowest sequence number of ``seq`` and those of segments, which may have wrapped."""
    return seq + min([0, *((s.seq - seq + _HALF & _ALL) - _HALF for s in segments)])


class Assembly:
    """Both streams of one connection, by the address of who sends.

    Where no SYN was seen, the first segments are held to begin with the earliest of them.
    """

    def __init__(
        self, client: tuple[bytes, int], streams: tuple[CapturedStream, CapturedStream]
    ) -> None:
        self._client = client
        self.streams = streams
        self.reset = False
        self._held: list[Segment] | None = []

    @property
    def ended(self) -> bool:
        return self.reset or (self.streams[0].ended and self.streams[1].ended)

    def segment(self, segment: Segment) -> None:
        """Take one more segment, SYN or not."""
        flags = segment.flags
        if flags & SYN:
            mine, other = self._streams_of(segment)
            mine.begin(segment.seq + 1)
            if flags & ACK:
                other.begin(segment.ack)
            self._release()
        elif self._held is not None:
            self._held.append(segment)
            late = segment.time - self._held[0].time > _START_SECONDS
            if late or len(self._held) >= _START_PACKETS:
                self._release()
        else:
            self._process(segment)

    def _streams_of(self, segment: Segment) -> tuple[CapturedStream, CapturedStream]:
        """The stream that it is of, and the other one."""
        first, second = self.streams
        return (first, second) if segment.source == self._client else (second, first)

    def _release(self) -> None:
        held, self._held = self._held, None
        if not held:
            return
        for stream in self.streams:
            own = [s for s in held if s.length and self._streams_of(s)[0] is stream]
            if own and not stream.start_follows:
                stream.begin(_earliest(own[0].seq, own))
        for segment in held:
            self._process(segment)

    def _process(self, segment: Segment) -> None:
        mine, other = self.streams
        if segment.source != self._client:
            mine, other = other, mine
        flags = segment.flags
        # A reset may carry words for people as its payload.
        if not flags & RST:
            mine.segment(segment)
        if other.waits and flags & ACK:
            other.acknowledged(segment.ack, segment.time)
        if flags & RST:
            self.reset = True

    def expect_start(self) -> None:
        """Expect the connection's start: what is before a SYN is out of order."""
        for stream in self.streams:
            stream.start_follows = True

    def restarts(self, segment: Segment) -> bool:
        """Return whether this SYN is of another connection between the same ports."""
        mine = self.streams[0 if segment.source == self._client else 1]
        return mine.first is not None and mine.first != (segment.seq + 1) & _ALL

    def flush(self, time: float) -> None:
        """Flush, as nothing more will come."""
        self._release()
        for stream in self.streams:
            stream.flush(time)
