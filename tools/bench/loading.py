"""Measures how long a model takes to its first token, from a server that has its file or not.

    python -m tools.bench.loading --large 1100
    python -m tools.bench.loading --model m.gguf --client 7.0.0 --client 5.1.0 --client 4.0.0
    python -m tools.bench.loading --large 1100 --split

Every server is behind a relay that behaves like a network (``--rate`` Gbit/s). All setups run in
turn in every round: llama.cpp by itself, upstream's server without a cache, this one without the
file and with it (``--models``), and one that has every weight and computes nothing
(``tools.bench.instant``); with ``--split`` two workers under a coordinator instead of the last
three. ``--client`` is a protocol version whose release is the client; its upstream server is of the
same release.

``first token`` is the time from the start of llama-completion, asked for one, until it has ended:
the median over the rounds, and the ``best`` of them. What the instant server leaves of it no server
can make less: reading the file, and the hash of every weight that is offered, on one thread of the
client's. The ratios are medians over the rounds: ``to local`` and ``to instant`` are how many times
longer a start takes than one without a server and one with that server. ``of the client`` is the
processor time of llama-completion itself; ``of servers`` that of all servers of a setup together,
which on a busy machine is steadier than what a clock says.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools import upstream
from tools.arguments import command_line
from tools.bench import llama
from tools.bench.cores import processor_seconds
from tools.serving.ports import free_port
from tools.serving.processes import (
    HOST,
    Process,
    ProgramError,
    listens,
    own_command,
    upstream_command,
)

_START_SECONDS = 60.0
# An index is made at a good disk's speed, or a slow one's.
_INDEX_SECONDS = 600.0
LOCAL, UPSTREAM, WITHOUT, WITH = "local", "upstream", "ours, no file", "ours, --models"
INSTANT = "instant"
SPLIT_NONE, SPLIT_ONE, SPLIT_BOTH = "split, no file", "split, one has it", "split, both have it"
SPLIT_CACHE = "split, -c, started before"


@dataclass(frozen=True)
class ClientStart:
    """One start of the client: seconds to its first token, processor time of it and of servers.

    ``wire`` counts bytes in both directions.
    """

    seconds: float
    processor: float
    servers: float
    wire: int


class LoadSite:
    """An endpoint for a client, the relays that count the bytes, and the servers behind them."""

    def __init__(
        self,
        endpoint: str | None,
        relays: Sequence[Process] = (),
        servers: Sequence[Process] = (),
    ) -> None:
        self.endpoint = endpoint
        self._relays = relays
        self._servers = servers

    def processor(self) -> float:
        """Return the processor time that the servers have used, in seconds."""
        return sum(processor_seconds(server.child.pid) for server in self._servers)

    def wire_bytes(self) -> int:
        """Return how many bytes the relays have passed on by their last pause."""
        logs = (relay.log for relay in self._relays)
        return sum(int(n) for log in logs for n in re.findall(r"relayed (\d+) bytes", log))

    def settle(self) -> None:
        """Wait until nothing goes through the relays."""
        last, same = -1, 0
        while same < 5:
            time.sleep(0.1)
            now = self.wire_bytes()
            last, same = now, same + 1 if now == last else 0


@dataclass
class LoadServers:
    """Starts servers for one client, and ends them with ``stack``."""

    stack: contextlib.ExitStack
    model: Path
    protocol: str
    rate: float
    threads: int

    def server(self, command: list[str] | None, port: int, *, models: bool = False) -> Process:
        if command is None:
            raise ProgramError("no ggml-rpc-server: run python -m tools.upstream")
        process = self.stack.enter_context(Process(command))
        if models:
            process.wait_for(r"tensors, .*indexed", _INDEX_SECONDS)
        process.wait_until(lambda: listens(port), _START_SECONDS, "its port")
        return process

    def relay(self, port: int) -> tuple[str, Process]:
        """Start a relay before a port; return its endpoint."""
        listen = free_port()
        words = ["--listen", str(listen), "--to", f"{HOST}:{port}", "--rate", str(self.rate)]
        command = [sys.executable, "-m", "tools.bench.relay", *words]
        process = self.stack.enter_context(Process(command))
        process.wait_until(lambda: listens(listen), _START_SECONDS, "its port")
        return f"{HOST}:{listen}", process

    def upstream(self, build: int) -> LoadSite:
        port = free_port()
        server = self.server(upstream_command(port, "-t", str(self.threads), build=build), port)
        endpoint, relay = self.relay(port)
        return LoadSite(endpoint, [relay], [server])

    def _own(
        self, *options: str, models: bool = False, threads: int | None = None
    ) -> tuple[int, Process]:
        port = free_port()
        words = [*options, "-t", str(threads or self.threads)]
        words += ["--models", str(self.model)] if models else []
        return port, self.server(own_command(port, *words), port, models=models)

    def ours(self, *, models: bool) -> LoadSite:
        port, server = self._own("--protocol", self.protocol, models=models)
        endpoint, relay = self.relay(port)
        return LoadSite(endpoint, [relay], [server])

    def instant(self) -> LoadSite:
        """Start the server that has every weight and computes nothing."""
        port = free_port()
        words = ["-m", "tools.bench.instant", "--port", str(port), "--protocol", self.protocol]
        server = self.server([sys.executable, *words], port)
        endpoint, relay = self.relay(port)
        return LoadSite(endpoint, [relay], [server])

    def split(self, have: Sequence[bool], *, cache: Path | None = None) -> LoadSite:
        """Start a coordinator; only its workers, which have the file or not, are behind relays."""
        relays, servers = [], []
        for number, models in enumerate(have):
            options = ["--cache-dir", str(cache / f"worker-{number}")] if cache else []
            port, worker = self._own(*options, models=models, threads=1)
            relays.append(self.relay(port))
            servers.append(worker)
        parts = ",".join(endpoint for endpoint, _ in relays)
        options = ["--cache-dir", str(cache / "coordinator")] if cache else []
        options += ["--split", parts, "--tensor-split", ",".join("1" for _ in have)]
        options += ["--split-mode", "row"]
        port, coordinator = self._own(*options, "--protocol", self.protocol, threads=1)
        servers.append(coordinator)
        return LoadSite(f"{HOST}:{port}", [relay for _, relay in relays], servers)


def first_token(build: int, site: LoadSite, model: Path, threads: int) -> ClientStart:
    """Start llama-completion for one token. Raises ProgramError where it fails."""
    program = upstream.find_program("llama-completion", build)
    if program is None:
        raise ProgramError(f"no llama-completion of build {build}: run python -m tools.upstream")
    words = [str(program), "-m", str(model), "-p", "the", "-n", "1", "-c", "256"]
    words += ["-t", str(threads), "--temp", "0", "-no-cnv", "--no-warmup"]
    words += ["-fit", "off", "-ngl", "99"]
    words += ["--rpc", site.endpoint] if site.endpoint else []
    wire, processor = site.wire_bytes(), site.processor()
    started = time.perf_counter()
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # What it has used is told only once it has ended.
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ProgramError(f"llama-completion ended with {process.returncode}")
    site.settle()
    return ClientStart(
        seconds,
        used.ru_utime + used.ru_stime,
        site.processor() - processor,
        site.wire_bytes() - wire,
    )


@dataclass
class LoadTimes:
    """Starts of one client in each setup, by round."""

    client: str
    model_bytes: int
    starts: dict[str, list[ClientStart]] = field(default_factory=dict)

    def seconds(self, setup: str) -> list[float]:
        return [start.seconds for start in self.starts.get(setup, [])]

    def ratio(self, above: str, below: str) -> float | None:
        """Return the median over the rounds of one setup's seconds over another's."""
        pairs = list(zip(self.seconds(above), self.seconds(below), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def lines(self) -> list[str]:
        """Return the table's lines, in Markdown."""
        made = [
            f"| client of {self.client} | first token | best | to local | to instant "
            "| faster than upstream | of the client | of servers | on the wire | of the model |",
            "|" + "---|" * 10,
        ]
        for setup, starts in self.starts.items():
            wire = statistics.median(start.wire for start in starts)
            own = statistics.median(start.processor for start in starts)
            servers = statistics.median(start.servers for start in starts)
            seconds = self.seconds(setup)
            ratios = [self.ratio(setup, other) for other in (LOCAL, INSTANT)]
            ratios.append(self.ratio(UPSTREAM, setup))
            shown = " | ".join("-" if r is None else f"{r:.2f}" for r in ratios)
            made.append(
                f"| {setup} | {statistics.median(seconds):.2f} s | {min(seconds):.2f} s "
                f"| {shown} | {own:.2f} s | {servers:.2f} s "
                f"| {wire / 1e6:.1f} MB | {100 * wire / self.model_bytes:.2f}% |"
            )
        return made


@contextlib.contextmanager
def _sites(version: str, model: Path, options: argparse.Namespace) -> Iterator[dict[str, LoadSite]]:
    """Start the servers of all setups for a client, and give where they are."""
    build = upstream.DIALECT_BUILDS[version]
    with contextlib.ExitStack() as stack:
        servers = LoadServers(stack, model, version, options.rate, options.threads)
        sites = {LOCAL: LoadSite(None)}
        if upstream.find_program("ggml-rpc-server", build) is not None:
            sites[UPSTREAM] = servers.upstream(build)
        if options.split:
            sites[SPLIT_NONE] = servers.split((False, False))
            sites[SPLIT_ONE] = servers.split((True, False))
            sites[SPLIT_BOTH] = servers.split((True, True))
            if options.cache is not None:
                sites[SPLIT_CACHE] = servers.split((False, False), cache=options.cache)
        else:
            sites[WITHOUT] = servers.ours(models=False)
            sites[WITH] = servers.ours(models=True)
            sites[INSTANT] = servers.instant()
        yield sites


def run(version: str, model: Path, options: argparse.Namespace) -> LoadTimes:
    """Measure all setups with one client. Raises ProgramError, OSError."""
    build = upstream.DIALECT_BUILDS[version]
    measured = LoadTimes(version, model.stat().st_size)
    llama.read_once(model)
    with _sites(version, model, options) as sites:
        for setup in {WITH, SPLIT_BOTH, SPLIT_CACHE} & set(sites):
            # Kernels are compiled, and a cache is filled.
            first_token(build, sites[setup], model, options.threads)
        for number in range(options.rounds):
            for setup, site in sites.items():
                print(f"{version}, round {number + 1}: {setup}", file=sys.stderr, flush=True)
                start = first_token(build, site, model, options.threads)
                measured.starts.setdefault(setup, []).append(start)
    return measured


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = command_line("tools.bench.loading", __doc__)
    add = made.add_argument
    add("--model", type=Path, metavar="FILE", help="a GGUF file")
    add("--large", type=int, default=1100, metavar="MiB", help="or a random model of this size")
    add(
        "--client",
        action="append",
        choices=list(upstream.DIALECT_BUILDS),
        help="protocol version of the client (7.0.0); may be repeated",
    )
    add("--split", action="store_true", help="two workers under a coordinator")
    add("--cache", type=Path, metavar="DIR", help="with --split also with caches, in this folder")
    add("--rate", type=float, default=1.0, metavar="GBIT", help="of the network (%(default)s)")
    add("-t", "--threads", type=int, default=2, metavar="N", help="of all programs (%(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="starts in each setup (%(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    try:
        model = options.model or llama.large_model(options.large)
        for version in options.client or ["7.0.0"]:
            print("\n".join(run(version, model, options).lines()), flush=True)
    except (ProgramError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
