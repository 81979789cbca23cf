"""A long run of llama-server over a split whose workers are killed, stopped and started again.

    python -m tools.soak --minutes 30

llama-server answers the same few questions over and over, greedily, through a coordinator with two
workers. Meanwhile a worker is killed, or falls silent for longer than the coordinator waits, and
comes back. Each answer that is completed has to be the one of a run that nobody disturbed; each
that isn't has to be an error, within bounded time. llama.cpp ends its own process when its RPC
server hangs up on it; it is started again then, as a service manager would.

Exit codes: 0 if all that held, 1 if not, 2 for wrong options.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools import smollm2, upstream
from tools.arguments import command_line
from tools.serving.llama_server import LlamaServer
from tools.serving.ports import free_port
from tools.serving.processes import (
    HOST,
    PATIENCE,
    Process,
    ProgramError,
    listens,
    own_command,
    tail,
)

QUESTIONS = (
    "The harbour wakes before the town does, and boats come in with lamps still burning.\n" * 3
    + "The harbour",
    "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(99, 94, -1)),
    "".join(f"10:0{n}:00 INFO request {n} done in 12 ms\n" for n in range(1, 7)),
    "Q: What is your name?\nA: My name is Ann and I live in Oslo.\n\n" * 4 + "Q:",
)
# How long a worker may be silent before the coordinator gives it up (its --split-timeout).
SPLIT_TIMEOUT = 3
# What must not be in the log of a server of ours.
FAULTS = re.compile(r"internal error|Traceback|never retrieved")


@dataclass
class SoakTally:
    """The tally of what happened."""

    correct: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    starts_failed: int = 0
    recoveries: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class SoakServers:
    """Two workers and the coordinator over them, with one thread each. Raises ProgramError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._started: list[Process] = []
        self._ports = [free_port(), free_port()]
        self.port = free_port()
        names = ",".join(f"{HOST}:{port}" for port in self._ports)
        splitting = ("--split", names, "--split-timeout", str(SPLIT_TIMEOUT))
        try:
            self.workers = [self._start_worker(i) for i in range(2)]
            self.coordinator = self._start(
                "coordinator.log", self.port, *splitting,
                *("--tensor-split", "1,1", "--split-mode", "row"),
            )  # fmt: skip
        except ProgramError:
            self.stop()
            raise

    def _start(self, log: str, port: int, *options: str) -> Process:
        server = Process(own_command(port, "-t", "1", *options), self._folder / log)
        self._started.append(server)
        server.wait_until(lambda: listens(port), PATIENCE, "listening socket")
        return server

    def _start_worker(self, index: int) -> Process:
        log = f"worker-{index + 1}-{next(self._numbers)}.log"
        return self._start(log, self._ports[index], "--mem", "2G")

    def revive(self, index: int) -> None:
        """Start a killed worker where it was."""
        self.workers[index] = self._start_worker(index)

    def stop(self) -> None:
        for server in reversed(self._started):
            if server.alive:
                server.child.send_signal(signal.SIGCONT)
            server.stop()


class Disturber(threading.Thread):
    """Takes a worker away every now and then, and gives it back."""

    def __init__(self, servers: SoakServers, tally: SoakTally, every: float, seed: int) -> None:
        super().__init__(daemon=True)
        self._servers = servers
        self._tally = tally
        self._every = every
        self._random = random.Random(seed)
        self._over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for kind in itertools.cycle(("killed", "killed", "silent")):
                if self._over.wait(self._every * self._random.uniform(0.5, 1.5)):
                    return
                self._disturb(kind)
        except BaseException as error:
            self.error = error

    def _disturb(self, kind: str) -> None:
        index = self._random.randrange(2)
        worker, gone = self._servers.workers[index], self._random.uniform(0.2, 4)
        self._tally.disturbances[kind] += 1
        if kind == "killed":
            worker.kill()
            time.sleep(gone)
            self._servers.revive(index)
        else:
            worker.child.send_signal(signal.SIGSTOP)
            time.sleep(SPLIT_TIMEOUT + gone)
            worker.child.send_signal(signal.SIGCONT)

    def finish(self) -> None:
        self._over.set()
        self.join()


@dataclass
class SoakOptions:
    minutes: float
    every: float
    tokens: int
    pause: float
    model: Path
    build: int
    seed: int
    logs: Path | None


class Soak:
    """The run itself."""

    def __init__(self, options: SoakOptions, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self.tally = SoakTally()
        self.servers = SoakServers(folder)
        # Of the coordinator, at the start and at the end.
        self.memory: list[int] = []
        self._llama: LlamaServer | None = None

    def run(self) -> None:
        """Run the servers and break them, as asked.

        Raises ProgramError where nothing can be said, since it doesn't run undisturbed.
        """
        options, tally = self._options, self.tally
        llama = self._start()
        expected = [llama.complete(question, options.tokens)["content"] for question in QUESTIONS]
        say(f"{len(expected)} answers of a run that nobody disturbs; it begins")
        self.memory.append(self._measure())
        disturber = Disturber(self.servers, tally, options.every, options.seed)
        disturber.start()
        end = time.monotonic() + 60 * options.minutes
        told = time.monotonic()
        failed_at: float | None = None
        for number in itertools.cycle(range(len(QUESTIONS))):
            if not self.servers.coordinator.alive:
                break
            if time.monotonic() > end:
                # A run without a right answer says nothing: one is waited for, in peace.
                disturber.finish()
                if tally.correct or tally.wrong or time.monotonic() > end + PATIENCE:
                    break
            time.sleep(options.pause)
            try:
                answer = self._answer(number)
            except TimeoutError:
                tally.faults.append(f"no answer and no error within {PATIENCE:.0f} s")
                answer = None
            except (OSError, ProgramError) as error:
                tally.errors[reason(error)] += 1
                answer = None
            if answer is None:
                failed_at = failed_at or time.monotonic()
                # What a client does that tries again.
                time.sleep(0.5)
            elif answer == expected[number]:
                tally.correct += 1
                if failed_at is not None:
                    tally.recoveries.append(time.monotonic() - failed_at)
                    failed_at = None
            else:
                tally.wrong.append(f"{answer!r} instead of {expected[number]!r}")
            if time.monotonic() - told > 60:
                told = time.monotonic()
                say(f"{tally.correct} right, {len(tally.wrong)} wrong, "
                    f"{tally.errors.total()} errors, {tally.disturbances.total()} disturbances; "
                    f"{(end - told) / 60:.0f} minutes left")  # fmt: skip
        disturber.finish()
        self.memory.append(self._measure())
        if disturber.error is not None:
            tally.faults.append(f"a worker could not be started again: {disturber.error}")
        self._check_servers()

    def _measure(self) -> int:
        return self.servers.coordinator.rss() if self.servers.coordinator.alive else 0

    def _answer(self, number: int) -> str:
        """Raises OSError, ProgramError."""
        llama = self._llama
        if llama is None or not llama.alive:
            if llama is not None:
                self._note_end(llama)
            llama = self._start()
        answer: str = llama.complete(QUESTIONS[number], self._options.tokens)["content"]
        return answer

    def _start(self) -> LlamaServer:
        options = self._options
        self.tally.starts += 1
        rpc = f"{HOST}:{self.servers.port}"
        log = self._folder / f"llama-server-{self.tally.starts}.log"
        words = ("-c", "512", "-np", "1", "-t", "1")
        llama = LlamaServer(options.model, rpc, words, log, options.build)
        self._llama = llama
        try:
            llama.wait_until(llama.ready, PATIENCE, "loaded model", pause=0.2)
        except ProgramError:
            self.tally.starts_failed += 1
            if llama.alive:
                llama.kill()
                self.tally.faults.append(f"llama-server did not start within {PATIENCE:.0f} s")
            raise
        return llama

    def _note_end(self, llama: LlamaServer) -> None:
        status = llama.child.returncode
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        self.tally.ends[how] += 1
        self._llama = None

    def _check_servers(self) -> None:
        faults = self.tally.faults
        if not self.servers.coordinator.alive:
            faults.append(f"the coordinator has ended:\n{tail(self.servers.coordinator.log)}")
        for index, worker in enumerate(self.servers.workers, 1):
            if not worker.alive:
                faults.append(f"worker {index} has ended by itself:\n{tail(worker.log)}")
        for path in sorted(self._folder.glob("*.log")):
            if path.name.startswith("llama-server"):
                continue
            faults += [f"{path.name}: {line}" for line in lines_of(path) if FAULTS.search(line)]

    def stop(self) -> None:
        if self._llama is not None:
            self._llama.stop()
        self.servers.stop()

    def summary(self, seconds: float) -> str:
        t = self.tally
        recoveries = sorted(t.recoveries)
        before, after = (n >> 20 for n in self.memory)
        rows = [
            ("time", f"{seconds / 60:.1f} minutes"),
            ("answers that are right", str(t.correct)),
            ("answers that are wrong", str(len(t.wrong))),
            ("requests that failed", counted(t.errors)),
            ("workers taken away", counted(t.disturbances)),
            ("llama-server started", f"{t.starts} times, {t.starts_failed} of them in vain"),
            ("llama-server ended", counted(t.ends)),
            (
                "first failure to next right answer",
                f"{recoveries[len(recoveries) // 2]:.1f} s (median), {recoveries[-1]:.1f} s (most)"
                if recoveries
                else "none",
            ),
            ("memory of the coordinator", f"{before} MiB at the start, {after} MiB at the end"),
            ("faults of ours", str(len(t.faults))),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

    @property
    def passed(self) -> bool:
        t = self.tally
        return bool(t.correct and t.disturbances and not t.wrong and not t.faults)


def lines_of(path: Path) -> Iterator[str]:
    with path.open(errors="replace") as file:
        yield from file


def counted(counter: Counter[str]) -> str:
    """Return '5 (3 killed, 2 silent)'."""
    parts = ", ".join(f"{n} {what}" for what, n in counter.most_common())
    return f"{counter.total()} ({parts})" if parts else "0"


def reason(error: Exception) -> str:
    """Return what kind of error a client of llama-server got."""
    if isinstance(error, ProgramError):
        return "llama-server could not load the model"
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"{error.reason}"
    return type(error).__name__


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def parse(arguments: Sequence[str] | None) -> SoakOptions:
    parser = command_line("tools.soak", __doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, metavar="N", help="how long (default: %(default)s)")
    add("--every", type=float, default=60.0, metavar="SECONDS",
        help="mean time between disturbances (default: %(default)s)")  # fmt: skip
    add("--tokens", type=int, default=16, metavar="N", help="length of an answer (%(default)s)")
    add("--pause", type=float, default=0.0, metavar="SECONDS", help="between two questions (none)")
    add("--model", type=Path, help="a GGUF file (default: SmolLM2, downloaded once)")
    add("--build", type=int, default=upstream.DEFAULT_BUILD, help="llama.cpp's (%(default)s)")
    add("--seed", type=int, default=0, help="of the disturbances")
    add("--logs", type=Path, help="keep the logs of all servers in this folder")
    options = parser.parse_args(arguments)
    try:
        options.model = options.model or smollm2.fetch()
    except smollm2.ModelUnavailableError as error:
        parser.error(f"name a --model: {error}")
    return SoakOptions(**vars(options))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        try:
            soak = Soak(options, folder)
            try:
                soak.run()
            finally:
                soak.stop()
        except ProgramError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(soak.summary(time.monotonic() - started))
        for what in (*soak.tally.wrong, *soak.tally.faults):
            print(f"FAULT {what}")
        print("passed" if soak.passed else "FAILED")
        return 0 if soak.passed else 1


if __name__ == "__main__":
    sys.exit(main())
