"""A client that does a bit of everything, by this project's client library, and then ends.

``python -m tests.conformance.clients --port N [--protocol X.Y]``: the status is 0 after all went
well, and 1, with a line that says why, where the server didn't do its part.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

import numpy as np

from client.backend import HASH_THRESHOLD, Backend
from client.connection import connect
from client.errors import AllocationFailed, ConnectionLost, GraphFailed, VersionMismatch
from client.tensors import ShapeError
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect, find_dialects
from protocol.errors import ProtocolError
from protocol.ggml.types import GgmlType, row_size


class NoDeviceError(Exception):
    """The server has no device to work with."""


async def work(port: int, dialect: Dialect, timeout: float) -> None:
    """Use every command that the dialect has."""
    commands = dialect.commands
    async with await connect("127.0.0.1", port, version=dialect, timeout=timeout) as c:
        if Command.DEVICE_COUNT in commands and not await c.device_count():
            raise NoDeviceError("the server has no device")
        b = await Backend.open(c)
        await c.get_device_memory()
        x = await b.tensor(GgmlType.F32, (64, 8), np.ones((8, 64), np.float32))
        # Rows that a server may want to pad, in one buffer with what lies behind them.
        w, v = b.graph.new_tensor(GgmlType.Q4_0, (96, 8)), b.graph.new_tensor(GgmlType.F32, (64,))
        buffers = await b.allocate([w, v])
        await b.upload(w, bytes(row_size(GgmlType.Q4_0, 96) * 8))
        await b.upload(v, np.arange(64, dtype=np.float32))
        large = await b.tensor(GgmlType.I8, (HASH_THRESHOLD + 64,))
        await b.upload(large, np.full(HASH_THRESHOLD + 64, 7, np.int8), cache=True)
        held = await c.get_tensor(large, HASH_THRESHOLD, 64)
        if held.tobytes() != b"\x07" * 64:
            raise ProtocolError("what was uploaded isn't there")
        plan = await b.prepare(b.graph.add(x, v))
        await plan.run()
        await plan.run()
        await b.download(plan.graph.nodes[-1])
        await c.copy_tensor(v, x)
        if Command.MEMSET_TENSOR in commands:
            await c.memset_tensor(v, 1, offset=4, size=8)
        await c.buffer_clear(buffers[0].handle, 3)
        # Every answer is waited for, so nothing is under way when the connection ends.
        await b.download(v)
        await plan.free()
        for tensor in (x, large):
            await c.free_buffer(tensor.buffer)
        await b.free(buffers, [w, v])
        await c.get_alignment()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.clients")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--protocol", default=DIALECTS[0].name)
    parser.add_argument("--timeout", type=float, default=10.0)
    options = parser.parse_args(arguments)
    dialect = find_dialects(options.protocol)[0]
    try:
        asyncio.run(work(options.port, dialect, options.timeout))
    except (
        AllocationFailed, ConnectionLost, GraphFailed, NoDeviceError, OSError, ProtocolError,
        ShapeError, TimeoutError, VersionMismatch,
    ) as error:  # fmt: skip
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
