"""Which servers a coordinator may not have as parts: itself, and none of them twice.

A server that waits for itself waits for ever, whether it is named as its own part, reached through
another coordinator, or named twice: a program runs on all parts at once, and a server runs one at a
time. Servers that have leases tell who they and those behind them are; of others the address at the
other end of the connection is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from protocol.endpoint import format_endpoint
from rpc_server.devices.split.worker import Worker


def conflict(worker: Worker, others: Iterable[Worker], own: int) -> str:
    """Return why a worker that was reached can't be a part, in one line; '' if it can."""
    if own and own in worker.members:
        if worker.identity == own:
            return f"worker {worker.name} is this server itself; its own share is called 'local'"
        return f"worker {worker.name} splits over this server: neither could ever go on"
    for other in others:
        if worker.identity and worker.identity == other.identity:
            return _twice(worker.name, other.name)
        shared = set(worker.members) & set(other.members)
        if other.identity in shared:
            return f"worker {worker.name} splits over {other.name}, which is a part as well"
        if worker.identity in shared:
            return f"worker {other.name} splits over {worker.name}, which is a part as well"
        if shared:
            return f"workers {worker.name} and {other.name} split over the same server"
        if not worker.identity and worker.peer_address == other.peer_address:
            return _twice(worker.name, other.name)
    return ""


async def same_server(endpoint: tuple[str, int], others: Iterable[Worker]) -> str:
    """Return that a worker which doesn't answer is one of ``others``; '' if it is none of them."""
    host, port = endpoint
    found = await asyncio.get_running_loop().getaddrinfo(host, port)
    addresses = {(str(address[0]), int(address[1])) for *_, address in found}
    for other in others:
        if other.peer_address in addresses:
            return _twice(format_endpoint(host, port), other.name)
    return ""


def _twice(name: str, other: str) -> str:
    return f"worker {name} is the same server as {other}: name each once"
