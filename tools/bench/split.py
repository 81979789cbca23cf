"""Measures what a second machine brings: one worker, several, and upstream's tensor split.

    python -m tools.bench.split --model model.gguf
    python -m tools.bench.split --model model.gguf --setup "two workers, tensor"
    python -m tools.bench.split --model model.gguf --link 0.1:1 --link 0.25:1 --link 1:1

Every server has one thread and one core: worker 1 on the first core, worker 2 on the second. The
coordinator runs on the first core, beside worker 1 or with a share of its own instead; a third part
shares a core with another where there are two. This project's servers have the model from disk, in
large pages, and nothing is measured before these are made. All setups run in turn, `--rounds`
times; figures are medians over the rounds, and of ratios taken within each round.

What parts that share a core would do on cores of their own is told by processor time: a token takes
as long as the process that spends most on it, and what a coordinator without a share does besides.
That is counted in another run, of servers that sleep where they wait (tools.bench.sleeping), where
there are more parts than cores, and with --processor-time for all splits.

With --card none it is measured instead what an exchange takes on a server with a card that does
nothing (tools/bench/exchange.py); no model is needed.

With --link DELAY:RATE (milliseconds one way, Gbit/s) the setup of two machines is measured through
a relay that behaves like such a network, beside what the formula of docs/split.md predicts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from client.connection import connect
from protocol.commands import Command
from rpc_server.devices.cpu.machine import available_cores
from rpc_server.observability.progress import Task, begin, shown
from tools import upstream
from tools.arguments import command_line, positive
from tools.bench import llama
from tools.bench.cores import on_core, processor_seconds
from tools.bench.exchange import exchange_table, measure_exchanges
from tools.bench.link_picture import Bar, svg
from tools.bench.machine import describe_machine, describe_versions
from tools.bench.report import number, ratio
from tools.bench.rest import from_file, waiting
from tools.bench.results import Sample
from tools.bench.servers import ALONE, answers
from tools.serving.ports import free_port
from tools.serving.processes import Process, ProgramError, own_command, upstream_command

_START_SECONDS = 60.0
_HOST = "127.0.0.1"
_LOCAL = "local"
_SERVER, _SLEEPING = "rpc_server", "tools.bench.sleeping"
_COUNTED = """\
by processor time: tokens/s as if each part had a core of its own and nobody waited for another. Not
measured but derived, in a run of its own, from what the servers' processes spend on a token: the
most that any part does, and what a coordinator without a share does besides. To be held against its
own kind only.\
"""


@dataclass(frozen=True)
class Setup:
    """Servers as they are measured. ``workers`` run on their core; ``split`` is the coordinator's.

    ``split`` names parts by number of worker, 'local' for the coordinator itself; empty: llama.cpp
    talks to the workers by itself, with ``arguments``.
    """

    name: str
    workers: int
    upstream: bool = False
    split: tuple[str, ...] = ()
    mode: str = "row"
    arguments: tuple[str, ...] = ()
    # Who adds up in tensor mode: the parts among themselves, or the coordinator.
    sums: str = "parts"

    @property
    def label(self) -> str:
        """The mode, for a table."""
        return self.mode if self.sums == "parts" else f"{self.mode}, sums here"

    def is_counted(self, cores: int, *, always: bool) -> bool:
        """Return whether processor time is to tell how fast it is; of one worker as the measure.

        Parts that compute one after the other have nothing to do with it.
        """
        return self is ONE or (bool(self.split) and (always or len(self.split) > cores))

    def token_seconds(self, workers: Sequence[float], coordinator: float) -> float:
        """Return seconds of a token if nobody waited, by what the processes spend on one."""
        if _LOCAL in self.split:
            return max(*workers, coordinator)
        return max(workers) + coordinator


ONE = Setup("one worker", 1)
SETUPS = (
    ONE,
    Setup("two workers, by layers", 2),
    Setup("two workers, row", 2, split=("0", "1")),
    Setup("two workers, tensor, sums here", 2, split=("0", "1"), mode="tensor", sums="here"),
    Setup("two workers, tensor", 2, split=("0", "1"), mode="tensor"),
    Setup("local and a worker, row", 2, split=("local", "1")),
    Setup(
        "local and a worker, tensor, sums here", 2, split=("local", "1"), mode="tensor", sums="here"
    ),
    Setup("local and a worker, tensor", 2, split=("local", "1"), mode="tensor"),
    Setup("three workers, row", 3, split=("0", "1", "2")),
    Setup("three workers, tensor", 3, split=("0", "1", "2"), mode="tensor"),
    Setup("local and two workers, row", 3, split=("local", "1", "2")),
    Setup("local and two workers, tensor", 3, split=("local", "1", "2"), mode="tensor"),
    Setup("two of upstream's workers, tensor", 2, True, split=("0", "1"), mode="tensor"),
    Setup("upstream, one server", 1, True),
    Setup("upstream, two servers by layers", 2, True),
    Setup("upstream, -sm tensor over two", 2, True, arguments=("-sm", "tensor")),
)


@dataclass
class Measured:
    """Values of one setup over the rounds, tokens/s and bytes.

    ``counted`` is generation by processor time, empty where that tells nothing, and ``spent`` the
    seconds of a token that it is made of: of each worker, and of the coordinator.
    """

    generate: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    coordinator_bytes: list[int] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    spent: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class RunningSetup:
    """A setup that runs: its ports for llama.cpp, its processes, and the relay's port if any."""

    ports: list[int]
    workers: list[Process]
    coordinator: Process | None = None
    relay: int = 0


class TokenCount:
    """The cost to servers of a token that llama-bench generates; see llama.Heard.

    What a test takes besides, such as the first plan of a graph, is the same for another length:
    the difference of the last two tests counts.
    """

    def __init__(self, servers: RunningSetup) -> None:
        own = [] if servers.coordinator is None else [servers.coordinator]
        self._processes = [*servers.workers, *own]
        self._n_workers = len(servers.workers)
        # Tokens and processor time of each process, for each test.
        self._tests: list[tuple[int, list[float]]] = []
        self._before = self._spent()

    def _spent(self) -> list[float]:
        return [processor_seconds(process.child.pid) for process in self._processes]

    def __call__(self, test: llama.BenchTest) -> None:
        """Take note of a test that is over; the next one begins."""
        now = self._spent()
        spent = [b - a for a, b in zip(self._before, now, strict=True)]
        self._tests.append((test["n_gen"] * len(test["samples_ts"]), spent))
        self._before = now

    def seconds(self) -> tuple[list[float], float]:
        """Return processor time of a token, of each worker and of the coordinator."""
        (fewer, first), (more, second) = self._tests[-2:]
        each = [(b - a) / (more - fewer) for a, b in zip(first, second, strict=True)]
        return each[: self._n_workers], sum(each[self._n_workers :])


class NetworkLink(NamedTuple):
    """A network: seconds one way, bytes a second."""

    delay: float
    rate: float

    @classmethod
    def of(cls, text: str) -> NetworkLink:
        """Parse '0.25:1', which is 0.25 ms and 1 Gbit/s; ArgumentTypeError for anything else."""
        try:
            delay, rate = map(float, text.split(":"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not DELAY:RATE such as 0.25:1") from None
        return cls(delay / 1e3, rate * 1e9 / 8)

    @property
    def name(self) -> str:
        if not self.delay:
            return "the relay alone"
        return f"{self.delay * 1e3:g} ms, {self.rate * 8 / 1e9:g} Gbit/s"


def relay_command(listen: int, to: int, link: NetworkLink) -> list[str]:
    """Return what starts a relay between two ports that behaves like a network."""
    words = ["--listen", str(listen), "--to", f"{_HOST}:{to}"]
    words += ["--delay", str(link.delay * 1e3), "--rate", str(link.rate * 8 / 1e9)]
    return [sys.executable, "-m", "tools.bench.relay", *words]


def _start(stack: contextlib.ExitStack, core: int, command: list[str] | None, port: int) -> Process:
    if command is None:
        raise ProgramError("no ggml-rpc-server: run python -m tools.upstream")
    with on_core(core):
        process = stack.enter_context(Process(command, env=ALONE))
    process.wait_until(lambda: answers(port), _START_SECONDS, "answer to HELLO")
    return process


@contextlib.contextmanager
def running(
    setup: Setup, model: Path, link: NetworkLink | None = None, *, sleeping: bool = False
) -> Iterator[RunningSetup]:
    """Run the setup for a model; its workers are behind ``link``, one relay for each.

    Servers that are ``sleeping`` do so where they wait for others.
    """

    def own(port: int, *options: str) -> list[str]:
        words = own_command(port, "-t", "1", *options, *from_file(model))
        return [_SLEEPING if sleeping and word == _SERVER else word for word in words]

    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        workers: list[Process] = []
        relay = 0
        for number in range(setup.workers):
            if setup.split and str(number) not in setup.split:
                continue
            port = free_port()
            command = upstream_command(port, "-t", "1") if setup.upstream else own(port)
            workers.append(_start(stack, number, command, port))
            if link is not None:
                relay = free_port()
                _start(stack, number, relay_command(relay, port, link), relay)
                port = relay
            ports[str(number)] = port
        if not setup.split:
            yield RunningSetup(list(ports.values()), workers, relay=relay)
            return
        parts = ",".join(p if p == _LOCAL else f"{_HOST}:{ports[p]}" for p in setup.split)
        port = free_port()
        shares = ",".join("1" for _ in setup.split)
        mode = ("--split-mode", setup.mode, "--split-sums", setup.sums)
        command = own(port, "--split", parts, *mode, "--tensor-split", shares)
        yield RunningSetup([port], workers, _start(stack, 0, command, port), relay)


def tokens_per_second(
    ports: Sequence[int], options: argparse.Namespace, setup: Setup
) -> dict[str, float]:
    """Return llama-bench's figures on servers: of the prompt, ``pp``, and of generation, ``tg``."""
    return {s.name[:2]: s.value for s in _bench(ports, options, setup)}


def _bench(
    ports: Sequence[int],
    options: argparse.Namespace,
    setup: Setup,
    arguments: Sequence[str] = (),
    heard: llama.Heard = llama.nobody,
) -> list[Sample]:
    """Run llama-bench on servers at rest, with more arguments; ``heard`` as for llama.bench_at."""
    bench = llama.BenchOptions(options.prompt, options.generate, (0,), options.repetitions, 1, True)
    endpoints = ",".join(f"{_HOST}:{p}" for p in ports)
    words = (*setup.arguments, "-ub", str(options.ubatch), *waiting(options.model), *arguments)
    return llama.bench_at(endpoints, options.model, bench, words, heard)


def counted(setup: Setup, options: argparse.Namespace) -> tuple[list[float], float]:
    """Return processor time of a token, of each worker and of the coordinator."""
    with running(setup, options.model, sleeping=True) as servers:
        count = TokenCount(servers)
        # Twice, as the first one's graph is new.
        short = str(max(1, options.generate // 4))
        _bench(servers.ports, options, setup, ("-n", f"{short},{short}"), count)
        return count.seconds()


def chosen(names: Sequence[str]) -> list[Setup]:
    """Return the setups of these names, all without any; one worker is always among them."""
    return [s for s in SETUPS if not names or s is ONE or s.name in names]


def measure(options: argparse.Namespace) -> dict[str, Measured]:
    """Measure the setups in turn."""
    setups = chosen(options.setup)
    measured = {s.name: Measured() for s in setups}
    steps = [(number, setup) for number in range(options.rounds) for setup in setups]
    with begin("measuring", len(steps)) as task:
        for number, setup in steps:
            task.step(f"round {number + 1} of {options.rounds}: {setup.name}")
            values = measured[setup.name]
            with running(setup, options.model) as servers:
                rates = tokens_per_second(servers.ports, options, setup)
                values.generate.append(rates["tg"])
                values.prompt.append(rates["pp"])
                if servers.coordinator is not None:
                    values.coordinator_bytes.append(servers.coordinator.peak_rss())
            if setup.is_counted(available_cores(), always=options.processor_time):
                workers, own = counted(setup, options)
                values.counted.append(1 / setup.token_seconds(workers, own))
                values.spent.append([*workers, own])
    return measured


# -- networks


async def _round_trip(port: int) -> float:
    """Seconds of a small request through a relay, the median of some."""
    async with await connect(_HOST, port) as connection:
        times = []
        for _ in range(50):
            started = time.perf_counter()
            await connection.get_alignment()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


async def _status(port: int) -> Any:
    async with await connect(_HOST, port, split=True) as connection:
        return await connection.request(Command.SPLIT_STATUS, device=0)


@dataclass(frozen=True)
class Row:
    """One network: measured and predicted seconds a token.

    Beside ``exchanges`` with the coordinator a token takes as many ``swaps`` among the parts.
    """

    link: str
    mode: str
    round_trip: float
    exchanges: float
    swaps: float
    wire_bytes: float
    measured: float
    predicted: float


def predicted(base: float, round_trips: float, wire: float, extra: float, rate: float) -> float:
    """Return seconds a token over a network, from ``base`` over none, as docs/split.md does.

    ``extra`` is how much longer a round trip takes there, ``wire`` the bytes of a token; a swap is
    half of one.
    """
    return base + round_trips * extra + wire / rate


def measure_links(options: argparse.Namespace) -> tuple[list[Row], float]:
    """Measure two machines, one of them the coordinator, over each network; and one alone."""
    rows: list[Row] = []
    with running(ONE, options.model) as servers:
        alone = 1 / tokens_per_second(servers.ports, _decode_only(options), ONE)["tg"]
    setups = [s for s in chosen(options.setup) if s.split[:1] == (_LOCAL,) and len(s.split) == 2]
    with begin("measuring links", len(setups) * (1 + len(options.link))) as task:
        blocks = 0.0
        for setup in setups:
            rows += _measure_setup(options, setup, task, blocks)
            # What one exchange is for now is one swap for parts that add up among themselves.
            blocks = rows[-1].exchanges if setup.sums == "here" else 0.0
    return rows, alone


def _measure_setup(
    options: argparse.Namespace, setup: Setup, task: Task, blocks: float
) -> list[Row]:
    """One mode over each network, the first of which is none.

    ``blocks`` is how many exchanges a token takes where no part has a link to another, if known.
    """
    rows: list[Row] = []
    base = near = 0.0
    for link in (NetworkLink(0.0, 100e9), *options.link):
        task.step(f"{setup.name}: {link.name}")
        with running(setup, options.model, link) as servers:
            # The coordinator holds the relay's one connection to the worker, not the relay.
            round_trip = asyncio.run(_round_trip(servers.relay))
            (port,) = servers.ports
            before = asyncio.run(_status(port))
            rates = tokens_per_second(servers.ports, _decode_only(options), setup)
            after = asyncio.run(_status(port))
        part = next(i for i in range(after.n_parts) if after.parts[i].exchanges)
        tokens = after.tokens - before.tokens
        exchanges = after.parts[part].exchanges / tokens
        sent = after.parts[part].bytes_sent + after.parts[part].bytes_received
        seconds = 1 / rates["tg"]
        if not base:
            base, near = seconds, round_trip
        swaps = max(0.0, blocks - exchanges)
        trips, wire = exchanges + swaps / 2, sent / tokens
        expected = predicted(base, trips, wire, round_trip - near, link.rate)
        rows.append(
            Row(link.name, setup.label, round_trip, exchanges, swaps, wire, seconds, expected)
        )
    return rows


def _decode_only(options: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "prompt": 0})


# -- what is shown


def table(measured: dict[str, Measured]) -> str:
    """Return medians as Markdown, each beside its ratio to one worker, round by round."""
    lines = [
        "| servers | tg tokens/s | to one worker | by processor time | to one worker | pp tokens/s "
        "| to one worker | coordinator |",
        "|" + "---|" * 8,
    ]
    one = measured[ONE.name]
    for name, m in measured.items():
        pairs = ((m.generate, one.generate), (m.counted, one.counted), (m.prompt, one.prompt))
        cells = [cell for values, base in pairs for cell in _cells(values, base)]
        memory = f"{max(m.coordinator_bytes) >> 20} MiB" if m.coordinator_bytes else ""
        lines.append("| " + " | ".join([name, *cells, memory]) + " |")
    if any(m.counted for m in measured.values()):
        lines += ["", _COUNTED]
    return "\n".join(lines)


def _cells(values: Sequence[float], base: Sequence[float]) -> tuple[str, str]:
    """Return the median of values, and their ratio to ``base``; nothing where there are none."""
    return (number(statistics.median(values)), ratio(values, base)) if values else ("", "")


def link_table(rows: Sequence[Row]) -> str:
    """Return networks as Markdown."""
    head = (
        "network | mode | round trip us | exchanges a token | swaps | KiB a token | ms a token "
        "| predicted"
    )
    lines = [f"| {head} |", "|" + "---|" * 8]
    for r in rows:
        lines.append(
            f"| {r.link} | {r.mode} | {r.round_trip * 1e6:.0f} | {r.exchanges:.0f} | {r.swaps:.0f} "
            f"| {r.wire_bytes / 1024:.0f} | {r.measured * 1e3:.1f} | {r.predicted * 1e3:.1f} |"
        )
    return "\n".join(lines)


def _measure_card(json_file: Path | None) -> int:
    """Measure exchanges with a card that does nothing; return the exit status."""
    try:
        with shown(), begin("measuring exchanges"):
            figures = measure_exchanges()
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(exchange_table(figures))
    if json_file:
        result = {"machine": describe_machine(), "versions": describe_versions()}
        json_file.write_text(json.dumps({**result, "exchanges": [asdict(f) for f in figures]}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.bench.split", __doc__)
    add = parser.add_argument
    add("--model", type=Path, help="GGUF file")
    add("--card", choices=("none",), help="measure exchanges with a card that does nothing")
    names = [setup.name for setup in SETUPS]
    add("--setup", action="append", default=[], choices=names, metavar="NAME",
        help=f"measure this one, and one worker (all): {'; '.join(names)}")  # fmt: skip
    add("--processor-time", action="store_true", help="count it for all splits")
    add("-p", "--prompt", type=positive, default=64, help="tokens of the prompt (%(default)s)")
    add("-ub", "--ubatch", type=int, default=512, help="tokens of a graph (%(default)s)")
    add("-n", "--generate", type=positive, default=32, help="tokens to generate (%(default)s)")
    add("-r", "--repetitions", type=int, default=2, help="of llama-bench a round (%(default)s)")
    add("--rounds", type=int, default=3, help="starts of each setup (%(default)s)")
    add("--link", type=NetworkLink.of, action="append", default=[], metavar="DELAY:RATE")
    add("--picture", type=Path, metavar="FILE", help="draw what --link measured (SVG)")
    add("--json", type=Path, metavar="FILE", help="write all values to this file")
    options = parser.parse_args(arguments)
    if options.card:
        return _measure_card(options.json)
    if options.model is None:
        parser.error("--model is needed")
    if upstream.find_program("llama-bench") is None:
        print("error: no llama-bench: run python -m tools.upstream", file=sys.stderr)
        return 1
    try:
        llama.read_once(options.model)
        with shown():
            measured = measure(options) if options.rounds else {}
            rows, alone = measure_links(options) if options.link else ([], 0.0)
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if measured:
        print(table(measured))
    if rows:
        print(link_table(rows))
        print(f"one machine alone: {alone * 1e3:.1f} ms a token")
    if rows and options.picture:
        bars = [Bar(r.mode, r.link, r.measured, r.predicted) for r in rows]
        title = f"Two machines over a network: {options.model.stem}"
        options.picture.write_text(svg(title, bars, alone))
    if options.json:
        result = {
            "machine": describe_machine(),
            "versions": describe_versions(),
            "model": options.model.name,
            "setups": {name: asdict(m) for name, m in measured.items()},
            "links": [asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
