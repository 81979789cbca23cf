"""Which servers can't be parts, by what they tell of themselves and where they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rpc_server.devices.split.identity import conflict, same_server

OWN = 1


@dataclasses.dataclass
class FakeWorker:
    """What is asked of a worker: its number, and those that it and its parts have."""

    name: str
    identity: int = 0
    members: tuple[int, ...] = ()
    peer_address: tuple[str, int] = ("192.0.2.1", 50052)


def told(worker: FakeWorker, *others: FakeWorker) -> str:
    reached: Any = worker
    parts: Any = others
    return conflict(reached, parts, OWN)


A = FakeWorker("a", 10, (10,))
B = FakeWorker("b", 20, (20,), ("192.0.2.2", 50052))


def test_servers_that_are_apart_can_be_parts() -> None:
    assert told(A, B) == ""
    assert told(FakeWorker("old", peer_address=("192.0.2.3", 50052)), A, B) == ""


@pytest.mark.parametrize(
    ("worker", "others", "message"),
    [
        (FakeWorker("me", OWN, (OWN,)), (), "this server itself"),
        (FakeWorker("other", 30, (30, OWN)), (), "splits over this server"),
        (FakeWorker("again", 10, (10,)), (A,), "the same server as a"),
        (FakeWorker("above", 30, (30, 10)), (A,), "splits over a, which is a part"),
        (A, (FakeWorker("above", 30, (30, 10)),), "above splits over a, which is a part"),
        (FakeWorker("x", 30, (30, 9)), (FakeWorker("y", 40, (40, 9)),), "over the same server"),
        # Servers without leases have no number: their address tells.
        (FakeWorker("old"), (FakeWorker("older"),), "the same server as older"),
    ],
)
def test_servers_that_would_wait_for_themselves_are_refused(
    worker: FakeWorker, others: tuple[FakeWorker, ...], message: str
) -> None:
    assert message in told(worker, *others)


async def test_a_worker_that_does_not_answer_is_known_by_its_address() -> None:
    others: Any = (dataclasses.replace(A, peer_address=("127.0.0.1", 50052)), B)
    assert "the same server as a" in await same_server(("127.0.0.1", 50052), others)
    assert await same_server(("127.0.0.1", 50053), others) == ""
