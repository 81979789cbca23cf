"""Parts that add up among themselves, and what comes between them at each point of an exchange.

Before one of two workers is a relay, through which the coordinator reaches it and the other worker
comes to it. From some point on it says nothing, or hangs up. The client gets what is right or loses
its connection, in the time of a few exchanges, and all goes on once the way is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator

import pytest

from client.errors import ConnectionLost
from client.tensors import Array
from protocol.codec import codec
from protocol.commands import Command
from protocol.requests import FRAME
from protocol.split import SplitJoinRequest
from tests.parameters import mostly_slow
from tests.split.cluster import Coordinator, WorkerProcess, backend
from tests.split.relay import Relay
from tests.split.test_links import LINKED, WIDTH, Model, is_close, rounds, rounds_again
from tools.serving.processes import PATIENCE

# Seconds that one exchange may take.
EXCHANGE = 2
_JOIN = FRAME.size + codec(SplitJoinRequest).size
# Of the first graph, which has five tokens, one sum of a part.
_SUM = 5 * WIDTH * 4

# By what is passed on last: the message that is held, and how many bytes from its first on are not.
POINTS: dict[str, tuple[Command, int]] = {
    "half-a-sum": (Command.SPLIT_JOIN, _JOIN + 1001),
    "half-the-inputs": (Command.SPLIT_RUN, 1000),
    "no-group": (Command.SPLIT_PEERS, 0),
    "half-a-group": (Command.SPLIT_PEERS, 700),
    "no-link": (Command.SPLIT_JOIN, 0),
    "half-a-link": (Command.SPLIT_JOIN, 20),
    "no-lease": (Command.SPLIT_ACQUIRE, 0),
    "no-program": (Command.SPLIT_PROGRAM, 0),
    "half-a-program": (Command.SPLIT_PROGRAM, 3000),
    "no-run": (Command.SPLIT_RUN, 0),
    "no-sum": (Command.SPLIT_JOIN, _JOIN),
    "one-sum": (Command.SPLIT_JOIN, _JOIN + _SUM),
    "two-sums-and-a-half": (Command.SPLIT_JOIN, _JOIN + 2 * _SUM + _SUM // 2),
}


@contextlib.contextmanager
def behind_a_relay(point: str, *, cuts: bool) -> Iterator[tuple[Coordinator, Relay]]:
    """A coordinator over two workers, the first of which is reached as far as ``point`` says."""
    command, after = POINTS[point]
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(WorkerProcess()) for _ in range(2))
        # One that answers others is given minutes to compile what a program needs.
        hangs = command is Command.SPLIT_PROGRAM and not cuts
        relay = Relay(first.port, holds=command, after=after, cuts=cuts, hangs=hangs)
        stack.callback(relay.close)
        options = ("--split-mode", "tensor", "--tensor-split", "1,1")
        made = stack.enter_context(
            Coordinator([relay.address, second], *options, "--split-timeout", str(EXCHANGE))
        )
        yield made, relay
        for server in (made, first, second):
            assert server.alive, server.log
            for word in ("internal error", "Traceback", "never retrieved"):
                assert word not in server.log, server.log


@pytest.fixture
async def right(whole: WorkerProcess) -> list[Array]:
    return await rounds(whole)


@pytest.mark.parametrize("cuts", [False, True], ids=["silent", "gone"])
@pytest.mark.parametrize("point", mostly_slow(POINTS, quick=2))
async def test_a_part_is_lost(point: str, cuts: bool, right: list[Array]) -> None:
    with behind_a_relay(point, cuts=cuts) as (coordinator, relay):
        started = time.monotonic()
        try:
            got = await rounds(coordinator)
        except ConnectionLost:
            got = []
            assert "ERROR" in coordinator.log
        else:
            # Who can't reach the other says so, and the coordinator adds up.
            assert "sums of the parts go through this server" in coordinator.log
            assert is_close(got, right)
        assert relay.holding.is_set()
        assert time.monotonic() - started < PATIENCE
        if not got:
            relay.let_go()
            assert is_close(await rounds_again(coordinator), right)
            assert LINKED in coordinator.log


async def test_a_part_is_slow_at_each_message(right: list[Array]) -> None:
    """What goes to it comes late each time, which costs time alone."""
    with WorkerProcess() as first, WorkerProcess() as second:
        relay = Relay(first.port, delay=0.02)
        try:
            with Coordinator(
                [relay.address, second], "--split-mode", "tensor", "--tensor-split", "1,1"
            ) as coordinator:
                assert is_close(await rounds(coordinator), right)
                assert LINKED in coordinator.log
                assert "ERROR" not in coordinator.log
        finally:
            relay.close()


async def prompt_and_token(server: WorkerProcess) -> list[Array]:
    async with backend(server) as b:
        model = await Model.load(b, 3)
        return [await model.step(24, 0), await model.step(1, 24)]


async def test_a_part_has_no_room_for_activations(whole: WorkerProcess) -> None:
    """Its share of weights and caches fits, what is computed of a prompt does not.

    Then the coordinator adds up, and does all of it if there is no room for that either.
    """
    wanted = await prompt_and_token(whole)
    with WorkerProcess("--mem", "4.36") as small, WorkerProcess() as other:
        options = ("--split-mode", "tensor", "--tensor-split", "1,1")
        with Coordinator([small, other], *options) as coordinator:
            got = await asyncio.wait_for(prompt_and_token(coordinator), PATIENCE)
            assert is_close(got, wanted)
            assert re.search(
                rf"worker {small.address} has no room for [^\n]*: sums of this graph go through "
                "this server",
                coordinator.log,
            )
            assert "ERROR" not in coordinator.log
