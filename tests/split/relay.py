"""Counts what goes to a server, and takes its time with it."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from protocol.commands import Command
from protocol.requests import FRAME
from tools.serving.processes import HOST

_START_SECONDS = 20.0


class _Messages:
    """Tells where messages begin in what goes to a server.

    A piece that was read may begin anywhere in one, such as between two numbers of a weight.
    """

    def __init__(self) -> None:
        self._head = b""
        self._left = 0

    def find(self, data: bytes, command: Command) -> int | None:
        """Go on over ``data``; return where the first message with this command begins in it."""
        at = 0
        while at < len(data):
            if self._left:
                skipped = min(self._left, len(data) - at)
                self._left -= skipped
                at += skipped
                continue
            if not self._head and data[at] == command:
                return at
            rest = data[at : at + FRAME.size - len(self._head)]
            self._head += rest
            at += len(rest)
            if len(self._head) == FRAME.size:
                _, self._left = FRAME.unpack(self._head)
                self._head = b""
        return None


class Relay:
    """Passes connections on to ``port`` and counts the bytes on their way there.

    What goes there is ``delay`` seconds late. From the first message that ``holds`` names on,
    nothing comes back on that connection, and if it ``hangs``, on none; the first ``after`` bytes
    from that message's on still go there. A relay that ``cuts`` hangs up instead. ``holding`` tells
    that it has come to that.
    """

    def __init__(
        self,
        port: int,
        delay: float = 0.0,
        *,
        holds: Command | None = None,
        hangs: bool = False,
        after: int = 0,
        cuts: bool = False,
    ) -> None:
        self.sent = 0
        self.holding = threading.Event()
        self._holds, self._hangs = holds, hangs
        self._after, self._cuts = after, cuts
        self._delay = delay
        self._target = port
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._pass_on, HOST, 0))
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self._loop.run_forever()

        threading.Thread(target=serve, daemon=True).start()
        assert started.wait(_START_SECONDS)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(HOST, self._target)

        held, messages = False, _Messages()
        left: int | None = None

        async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter, count: bool) -> None:
            nonlocal held, left
            with contextlib.suppress(ConnectionError):
                while data := await source.read(1 << 18):
                    if held or (self._hangs and self.holding.is_set()):
                        continue
                    if self._holds is not None and count:
                        if left is None:
                            begun = messages.find(data, self._holds)
                            left = None if begun is None else begun + self._after
                        if left is not None and left < len(data):
                            held = True
                            data = data[:left]
                            self.holding.set()
                        elif left is not None:
                            left -= len(data)
                    self.sent += len(data) * count
                    if count and self._delay:
                        await asyncio.sleep(self._delay)
                    to.write(data)
                    await to.drain()
                    if held and self._cuts:
                        writer.close()
                        break
            to.close()

        await asyncio.gather(copy(reader, back, True), copy(there, writer, False))

    def let_go(self) -> None:
        """Hold nothing any more of connections that are made from now on."""
        self._holds, self._hangs = None, False

    def close(self) -> None:
        """Break all connections off."""

        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            # After they have ended.
            self._loop.call_later(0.1, self._loop.stop)

        self._loop.call_soon_threadsafe(end)
