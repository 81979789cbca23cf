"""The lease of a device: who has it, who is next, and holders that don't give it up."""

from __future__ import annotations

import asyncio

import pytest

from rpc_server.limits import LimitReached
from rpc_server.session.leases import Lease

# No test waits for it.
LONG = 3600.0


class Client:
    def __init__(self, name: str) -> None:
        self.name = name
        self.error: LimitReached | None = None
        self.ended = asyncio.Event()

    def end(self, error: LimitReached) -> None:
        self.error = error
        self.ended.set()


async def test_one_client_has_it_and_the_others_get_it_in_their_order() -> None:
    lease, (a, b, c) = Lease(LONG), map(Client, "abc")
    assert lease.holder == ""
    assert lease.take(a)
    assert lease.take(a), "who has it has it"
    assert not lease.take(b)
    second, third = lease.wait(b), lease.wait(c)
    lease.release(b)
    assert lease.held_by(a), "only the holder can give it up"
    lease.release(a)
    assert lease.holder == "b"
    assert second.done()
    assert not third.done()
    lease.release(b)
    assert lease.held_by(c)
    assert third.done()
    lease.release(c)
    assert lease.holder == ""


async def test_who_leaves_the_queue_is_passed_over() -> None:
    lease, (a, b, c) = Lease(LONG), map(Client, "abc")
    lease.take(a)
    gone, waits = lease.wait(b), lease.wait(c)
    lease.leave(b)
    assert gone.cancelled()
    lease.release(a)
    assert waits.done()
    assert lease.held_by(c)


async def test_waiting_ends_with_the_lease_or_without() -> None:
    lease, (a, b) = Lease(LONG), map(Client, "ab")
    assert await lease.acquire(a, 0)
    assert not await lease.acquire(b, 0)
    assert not await lease.acquire(b, 0.001)
    lease.release(a)
    assert lease.holder == "", "who gave up waiting gets nothing"
    lease.take(a)
    waiting = asyncio.create_task(lease.acquire(b, LONG))
    await asyncio.sleep(0)
    lease.release(a)
    assert await waiting
    assert lease.held_by(b)


async def test_a_holder_keeps_it_unless_somebody_waits() -> None:
    let_go: list[str] = []
    lease, (a, b) = Lease(LONG, lambda: let_go.append("once")), map(Client, "ab")
    assert not lease.renew(a), "it has none"
    lease.take(a)
    assert lease.renew(a)
    assert let_go == []
    waits = lease.wait(b)
    assert not lease.renew(a)
    assert let_go == ["once"]
    assert waits.done()


async def waited_for() -> tuple[Lease, Client]:
    """A lease that another waits for, and its holder, which has run for longer than it may."""
    lease, (a, b) = Lease(0.0), map(Client, "ab")
    lease.take(a)
    lease.began()
    lease.wait(b)
    # The clock has to have gone on, if only by a tick.
    await asyncio.sleep(0.01)
    return lease, a


async def test_a_holder_that_runs_nothing_is_ended_when_others_wait() -> None:
    lease, a = await waited_for()
    assert a.error is None, "it runs a program"
    lease.ended()
    await asyncio.wait_for(a.ended.wait(), 60)
    assert "runs nothing and others wait" in str(a.error)


async def test_a_holder_that_lets_nobody_pass_may_start_no_other_run() -> None:
    lease, _ = await waited_for()
    with pytest.raises(LimitReached, match="one program after the other"):
        lease.began()
