"""Puts many clients on one server and says whether each was served and all was given back.

    python -m tools.load --clients 50 --minutes 10
    python -m tools.load --endpoint HOST:PORT ...

Of ten clients six work without a pause, two pause between rounds, one asks for data and never reads
it, and one sends an upload in small pieces. A round uploads activations, computes a graph and
compares what comes back with numpy. Clients leave at random, many within a message or while their
graph runs, and come back.

Looked at: results; steady clients' shares of the rounds done; and after everybody has left the
server's memory, files and threads beside those after a warm-up (--endpoint: the memory that it says
is free, and nothing else). The server that is started here is this project's.

Exit codes: 0 all well, 1 a problem (printed), 2 wrong options or no server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.connection import connect_any
from tools.arguments import command_line, endpoint
from tools.load.clients import KINDS, Address, LoadClient, LoadTally, kinds
from tools.serving.processes import HOST, Process, ProgramError, own_command

# Clients' memory, by which what is used is known exactly.
_LIMIT_MIB = 4096
# After everybody has left. What the allocator keeps for next time is no leak.
_MOST_GROWTH = 32 << 20
_SETTLE_SECONDS = 20.0
_NOISE = 256 << 10
# The steady client with the least done, of their mean.
_LEAST_SHARE = 0.5
# Fewer rounds say more of how long connections are, of up to 40 rounds, than of shares.
_FEW_ROUNDS = 60
_FAULTS = re.compile(r"internal error|Traceback|never retrieved")


@dataclass(frozen=True, slots=True)
class Level:
    """The memory that a server takes: bytes, counts; those that can't be known from here are 0."""

    free: int
    rss: int = 0
    files: int = 0
    threads: int = 0

    def below(self, other: Level) -> bool:
        """Return whether it has fallen from ``other``, by more than noise."""
        fallen = other.rss - self.rss > _NOISE or other.files > self.files
        return fallen or other.threads > self.threads or other.free < self.free

    def __str__(self) -> str:
        parts = [f"{self.free / 2**20:.1f} MiB free for clients"]
        if self.rss:
            parts += [f"{self.rss / 2**20:.1f} MiB RSS", f"{self.files} files"]
            parts += [f"{self.threads} threads"]
        return ", ".join(parts)


@dataclass(slots=True)
class LoadResult:
    """The result of a run."""

    seconds: float
    tallies: list[LoadTally]
    before: Level
    after: Level
    peak_rss: int = 0
    problems: list[str] = field(default_factory=list)


class LoadedServer:
    """The server under load; ``process`` if it was started here."""

    def __init__(self, address: Address, process: Process | None) -> None:
        self.address = address
        self.process = process

    async def level(self) -> Level:
        """Return what it takes now, beside the connection that asks."""
        connection = await connect_any(*self.address)
        async with connection:
            free, _ = await connection.get_device_memory()
        if self.process is None:
            return Level(free)
        await asyncio.sleep(0.2)
        root = Path(f"/proc/{self.process.child.pid}")
        threads = len(list((root / "task").iterdir()))
        return Level(free, self.process.rss(), len(os.listdir(root / "fd")), threads)

    async def settled(self, like: Level | None = None) -> Level:
        """Return the level once it is no higher than ``like``.

        Without ``like`` it returns once the level no longer falls.
        """
        end = time.monotonic() + _SETTLE_SECONDS
        level = await self.level()
        while time.monotonic() < end:
            if like is not None and not _grown(like, level):
                break
            await asyncio.sleep(0.5)
            before, level = level, await self.level()
            if like is None and not level.below(before):
                break
        return level


def _grown(before: Level, after: Level) -> list[str]:
    problems = []
    if after.free < before.free:
        problems.append(f"{before.free - after.free} bytes of clients were not freed")
    if after.rss - before.rss > _MOST_GROWTH:
        problems.append(f"RSS grew by {(after.rss - before.rss) / 2**20:.1f} MiB")
    if after.files > before.files:
        problems.append(f"{after.files - before.files} files are open still")
    # A pool of threads may be filled up later than the warm-up.
    if after.threads > before.threads + 4:
        problems.append(f"{after.threads - before.threads} threads more")
    return problems


async def _crowd(address: Address, clients: int, seconds: float, seed: int) -> list[LoadTally]:
    """All clients at once for ``seconds``, and until each has left."""
    stop = asyncio.Event()
    tallies = [LoadTally(f"{kind} {i}", kind) for i, kind in enumerate(kinds(clients))]
    tasks = []
    for tally in tallies:
        client = LoadClient(address, tally, random.Random(f"{seed} {tally.name}"), stop)
        tasks.append(asyncio.create_task(KINDS[tally.kind](client)))
    asyncio.get_running_loop().call_later(seconds, stop.set)
    await asyncio.gather(*tasks)
    return tallies


async def load(
    subject: LoadedServer, clients: int, seconds: float, warm: float, seed: int
) -> LoadResult:
    """Warm up, measure, run, measure again."""
    print(f"warming up for {warm:.0f} s", flush=True)
    warmed = await _crowd(subject.address, clients, warm, seed - 1)
    before = await subject.settled()
    print(f"{clients} clients for {seconds:.0f} s, seed {seed}; before: {before}", flush=True)
    started = time.monotonic()
    tallies = await _crowd(subject.address, clients, seconds, seed)
    spent = time.monotonic() - started
    after = await subject.settled(before)
    result = LoadResult(spent, tallies, before, after)
    result.problems += [f"{t.name}: {p}" for t in (*warmed, *tallies) for p in t.problems]
    result.problems += _grown(before, after) + _unfair(tallies)
    if subject.process is not None:
        result.peak_rss = subject.process.peak_rss()
        faults = _FAULTS.findall(subject.process.log)
        result.problems += [f"{len(faults)} faults in the server's log"] if faults else []
    return result


def _unfair(tallies: Sequence[LoadTally]) -> list[str]:
    steady = [t for t in tallies if t.kind == "steady"]
    mean = statistics.mean(t.rounds for t in steady) if steady else 0.0
    if mean < _FEW_ROUNDS:
        return []
    return [
        f"{t.name}: {t.rounds} rounds, {t.rounds / mean:.0%} of a fair share"
        for t in steady
        if t.rounds < _LEAST_SHARE * mean
    ]


def report(result: LoadResult) -> str:
    """Return it as text."""
    lines = []
    for kind in KINDS:
        group = [t for t in result.tallies if t.kind == kind]
        if not group:
            continue
        rounds = [t.rounds for t in group]
        line = f"{len(group):3} {kind:9} {sum(t.connections for t in group):6} connections"
        if sum(rounds):
            times = sorted(s for t in group for s in t.times)
            mean = statistics.mean(rounds)
            line += (
                f", {sum(rounds)} rounds: {mean:.0f} a client, least {min(rounds)} "
                f"({min(rounds) / mean:.0%}), most {max(rounds)} ({max(rounds) / mean:.0%}); "
                f"a round took {times[len(times) // 2] * 1e3:.0f} ms, "
                f"one in a hundred {times[len(times) * 99 // 100] * 1e3:.0f} ms or more, "
                f"at most {times[-1] * 1e3:.0f} ms"
            )
        lines.append(line)
    left: Counter[str] = sum((t.left for t in result.tallies), Counter())
    lines.append("left " + ", ".join(f"{way} {n}" for way, n in sorted(left.items())))
    lines.append(f"before: {result.before}")
    lines.append(f"after:  {result.after}")
    if result.peak_rss:
        lines.append(f"peak:   {result.peak_rss / 2**20:.1f} MiB RSS")
    counted = Counter(result.problems)
    lines += [f"PROBLEM {text}" + (f" ({n} times)" if n > 1 else "") for text, n in counted.items()]
    if not counted:
        lines.append("no wrong result, nobody starved, nothing leaked")
    return "\n".join(lines)


@contextlib.contextmanager
def _subject(given: Address | None, options: Sequence[str]) -> Iterator[LoadedServer]:
    if given is not None:
        yield LoadedServer(given, None)
        return
    command = own_command(0, "--mem", str(_LIMIT_MIB), "--protocol", "7.0", *options)
    with Process(command) as process:
        port = int(process.wait_for(r"endpoint +: \S+:(\d+)")[1])
        yield LoadedServer((HOST, port), process)


def _parser() -> argparse.ArgumentParser:
    parser = command_line("tools.load", __doc__)
    add = parser.add_argument
    add("--clients", type=int, default=50, metavar="N", help="at once (%(default)s)")
    add("--minutes", type=float, default=10.0, metavar="N", help="how long (%(default)s)")
    add("--warm-up", type=float, metavar="SECONDS", help="before it (a fifth, 30 at most)")
    add("--endpoint", type=endpoint, metavar="HOST:PORT", help="a server that runs already")
    add("--seed", type=int, default=1, help="of what clients do (%(default)s)")
    add("--server-options", default="", metavar="'...'", help="for the server started here")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.clients < 1 or options.minutes <= 0:
        parser.error("it takes a client and some time")
    seconds = options.minutes * 60
    warm = min(seconds / 5, 30.0) if options.warm_up is None else options.warm_up
    try:
        with _subject(options.endpoint, options.server_options.split()) as subject:
            result = asyncio.run(load(subject, options.clients, seconds, warm, options.seed))
    except (OSError, ProgramError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(result))
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
