"""Where the bytes of a stream go: small heads through one buffer, large bodies straight into place.

Both readers, the server's of requests and the client's of answers, receive through a
:class:`ReceiveBuffer`; what the bytes mean is theirs.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from protocol.codec import Codec

_SIZE = 64 << 10
# A body whose rest is shorter is received into the buffer, together with what follows it.
_DIRECT_FROM = 4 << 10


class ReceiveBuffer:
    """Bytes that arrived and were not taken, and the body that is being received, if there is one.

    A body begins with :meth:`begin` and is over when :meth:`fill` says so.
    """

    __slots__ = ("_buffer", "_end", "_start", "_target", "_view", "filled")

    def __init__(self) -> None:
        self._buffer = bytearray(_SIZE)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._target: memoryview | None = None
        # Bytes of the body that are in place.
        self.filled = 0

    def __len__(self) -> int:
        """Bytes that arrived and were not taken."""
        return self._end - self._start

    @property
    def in_body(self) -> bool:
        return self._target is not None

    @property
    def full(self) -> bool:
        """Return whether nothing can be received before something is taken."""
        return len(self) == _SIZE

    @property
    def _receives_directly(self) -> bool:
        return (
            self._target is not None
            and self._start == self._end
            and len(self._target) - self.filled >= _DIRECT_FROM
        )

    def receive_buffer(self) -> memoryview:
        """Return where the next bytes of the stream belong; not empty unless :attr:`full`."""
        if self._receives_directly:
            assert self._target is not None
            return self._target[self.filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _SIZE or self._start > _SIZE // 2:
            staged = len(self)
            self._buffer[:staged] = self._buffer[self._start : self._end]
            self._start, self._end = 0, staged
        return self._view[self._end :]

    def received(self, n: int) -> None:
        """Take the ``n`` bytes that were written to the start of :meth:`receive_buffer`."""
        if self._receives_directly:
            self.filled += n
        else:
            self._end += n

    def parse(self, codec: Codec) -> Any:
        """Take a message off the front; ``codec.size`` bytes must be there."""
        record = codec.parse(self._buffer, self._start)
        self._start += codec.size
        return record

    def unpack(self, form: Struct) -> tuple[Any, ...]:
        """Take the values of ``form`` off the front; ``form.size`` bytes must be there."""
        values = form.unpack_from(self._buffer, self._start)
        self._start += form.size
        return values

    def take(self, n: int) -> bytes:
        """Take ``n`` bytes off the front, which must be there."""
        data = bytes(self._view[self._start : self._start + n])
        self._start += n
        return data

    def peek(self, n: int) -> bytes:
        """Return the ``n`` bytes at the front, which must be there, and leave them."""
        return bytes(self._view[self._start : self._start + n])

    def begin(self, target: memoryview) -> None:
        """Fill ``target`` with the bytes from here on."""
        self._target = target
        self.filled = 0

    def fill(self) -> bool:
        """Move what is staged into the body; True when that has ended it."""
        target = self._target
        assert target is not None
        n = min(len(target) - self.filled, len(self))
        if n:
            target[self.filled : self.filled + n] = self._view[self._start : self._start + n]
            self.filled += n
            self._start += n
        if self.filled < len(target):
            return False
        self._target = None
        return True

    def abandon(self) -> None:
        """Let go of a body that will not be finished."""
        self._target = None
