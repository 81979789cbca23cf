#!/usr/bin/env bash
# Surprise: uvloop's transport.write() doesn't copy a bytearray that it can't send at once: what
# one puts in the buffer afterwards is what the peer gets.
#
# Why a good guess is wrong: With asyncio's own loop of Python 3.11 the same program is right,
# since what could not be sent is copied; and with uvloop it is right as long as the socket takes
# everything, so that tests on an idle machine pass. asyncio's documentation of write() says that
# data is buffered.
#
# Who it hurts: Servers of binary protocols that build answers in one reused bytearray, or send a
# memoryview of a buffer pool: with a slow peer they send bytes of a later answer in an earlier
# one. Send bytes(), or reuse a buffer only after drain() has waited for an empty queue.
#
# Seen with: uvloop 0.22.1, CPython 3.11.7 (asyncio's own loop of later versions was not run)
. "$(dirname "$0")/common.bash"
install uvloop==0.22.1

venv/bin/python - <<'PYTHON'
import asyncio
import sys

import uvloop

AHEAD = 32 << 20  # more than the buffers of two sockets


async def received() -> bytes:
    """Send two answers from one buffer to a peer that reads late; what it gets of them."""
    read, got = asyncio.Event(), bytearray()
    over = asyncio.get_running_loop().create_future()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read.wait()
        while data := await reader.read(1 << 20):
            got.extend(data)
        writer.close()
        over.set_result(None)

    server = await asyncio.start_server(peer, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(bytes(AHEAD))
    answer = bytearray(b"first ")
    writer.write(answer)
    answer[:] = b"second"
    writer.write(answer)
    read.set()
    await writer.drain()
    writer.close()
    await over
    server.close()
    return bytes(got[AHEAD:])


print("Python", sys.version.split()[0])
print("asyncio:", asyncio.run(received()))
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    got = runner.run(received())
print(f"uvloop {uvloop.__version__}: {got}")
assert got == b"secondsecond", "this has changed"
PYTHON
