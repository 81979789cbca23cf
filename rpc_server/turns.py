"""Long work on memory, done piece by piece on a thread of its own: the event loop stays free.

Clearing two gigabytes is a message of eighteen bytes. Whatever takes time in proportion to a number
that a client may choose is cut into pieces of some milliseconds; pieces of several clients take
turns, since each piece queues for the thread anew.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable

# Bytes that the event loop may touch in one go: new pages come at a gigabyte or two a second.
AT_ONCE = 1 << 20
# Bytes of a piece, some milliseconds.
PIECE = 8 << 20

Piece = Callable[[int, int], None]
# Whether work is still for somebody; asked from any thread.
Wanted = Callable[[], bool]


@functools.cache
def _thread() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="memory")


def always() -> bool:
    """Return True: work that nobody may end early goes on."""
    return True


def in_pieces(
    work: Piece, size: int, *, backwards: bool = False, wanted: Wanted = always
) -> concurrent.futures.Future[None]:
    """Call ``work(offset, n)`` for all of ``size`` bytes, on the thread, one piece after the other.

    ``backwards``: the last piece first. The future is done when all pieces are, when one has
    raised, or when ``wanted()`` was false between two of them.
    """
    offsets = range(0, size, PIECE)
    pieces = iter(reversed(offsets) if backwards else offsets)
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def step() -> None:
        try:
            at = next(pieces, None)
            if at is not None and wanted():
                work(at, min(PIECE, size - at))
                _thread().submit(step)
                return
        except Exception as error:
            future.set_exception(error)
            return
        future.set_result(None)

    _thread().submit(step)
    return future
