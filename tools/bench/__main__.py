"""Compares this server with upstream's ggml-rpc-server, driven by the same llama-bench.

    python -m tools.bench --model model.gguf
    python -m tools.bench --model model.gguf -p 256 -n 64 --rounds 5 --json result.json

The two servers run alternately in one go, never at the same time, so that what else the machine
does falls on both; figures are medians over the rounds, and what counts is their ratio. Also told:
time from start to the first answered HELLO, and the server's peak memory.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol.commands import Command
from protocol.messages import CONN_CAPS_SIZE
from tools import upstream
from tools.ports import free_port

OURS, UPSTREAM = "ours", "upstream"


class BenchError(RuntimeError):
    """A program that is measured did not do its part."""


@dataclass
class Samples:
    """What was measured of one server, by name of the figure, a value a round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


def _command(which: str, port: int, threads: int) -> list[str]:
    options = ["-p", str(port), "-t", str(threads)]
    if which == OURS:
        return [sys.executable, "-m", "rpc_server", *options, "--log-level", "warning"]
    return [str(upstream.bin_dir() / "ggml-rpc-server"), *options]


def _hello(port: int) -> bool:
    """Whether a server answers HELLO on this port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as peer:
            peer.settimeout(5)
            request = struct.pack("<BQ", Command.HELLO, CONN_CAPS_SIZE) + bytes(CONN_CAPS_SIZE)
            # A second command shows that this was no client which dislikes the version.
            peer.sendall(request + struct.pack("<BQ", Command.DEVICE_COUNT, 0))
            return len(peer.recv(1)) == 1
    except OSError:
        return False


def _peak_memory(pid: int) -> int:
    """Peak resident bytes of a process."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) * 1024 if match else 0


@contextmanager
def _serving(which: str, threads: int, samples: Samples) -> Iterator[int]:
    port = free_port()
    started = time.perf_counter()
    process = subprocess.Popen(
        _command(which, port, threads), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not _hello(port):
            if process.poll() is not None:
                raise BenchError(f"the server ({which}) ended with status {process.returncode}")
            time.sleep(0.01)
        samples.add("start to HELLO, s", time.perf_counter() - started)
        yield port
        samples.add("peak memory, MiB", _peak_memory(process.pid) / (1 << 20))
    finally:
        process.terminate()
        process.wait(20)


def _llama_bench(port: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [
        str(upstream.bin_dir() / "llama-bench"),
        *("-m", str(options.model), "--rpc", f"127.0.0.1:{port}", "-ngl", "99"),
        *("-t", str(options.threads), "-p", str(options.prompt), "-n", str(options.generate)),
        *("-r", str(options.repetitions), "-o", "json", "-fa", "1" if options.flash else "0"),
        *(("-d", str(options.depth)) if options.depth else ()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"llama-bench failed:\n{done.stderr[-2000:]}")
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def _figure(result: dict[str, Any]) -> str:
    kind = f"pp{result['n_prompt']}" if result["n_prompt"] else f"tg{result['n_gen']}"
    return f"{kind}, tokens/s"


def measure(options: argparse.Namespace) -> dict[str, Samples]:
    """Run all rounds; what was measured, by server."""
    measured = {OURS: Samples(), UPSTREAM: Samples()}
    for number in range(options.rounds):
        # Neither always comes second.
        order = (OURS, UPSTREAM) if number % 2 == 0 else (UPSTREAM, OURS)
        for which in order:
            print(f"round {number + 1} of {options.rounds}: {which}", file=sys.stderr, flush=True)
            with _serving(which, options.threads, measured[which]) as port:
                for result in _llama_bench(port, options):
                    measured[which].add(_figure(result), result["avg_ts"])
    return measured


def report(measured: dict[str, Samples]) -> str:
    """A table of medians and their ratio."""
    lines = [f"{'':24} {OURS:>10} {UPSTREAM:>10} {'ratio':>8}"]
    for name in measured[OURS].values:
        ours, theirs = measured[OURS].median(name), measured[UPSTREAM].median(name)
        lines.append(f"{name:24} {ours:10.2f} {theirs:10.2f} {ours / theirs:8.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="GGUF file")
    add("-p", "--prompt", type=int, default=128, help="tokens of the prompt (%(default)s)")
    add("-n", "--generate", type=int, default=32, help="tokens to generate (%(default)s)")
    add("-d", "--depth", type=int, default=0, help="tokens in the KV cache before (%(default)s)")
    add("-t", "--threads", type=int, default=2, help="threads of the server (%(default)s)")
    add("-r", "--repetitions", type=int, default=2, help="of llama-bench a round (%(default)s)")
    add("--rounds", type=int, default=3, help="starts of each server (%(default)s)")
    add("--flash", action="store_true", help="flash attention")
    add("--json", type=Path, metavar="FILE", help="write all values to this file")
    options = parser.parse_args(arguments)
    try:
        measured = measure(options)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(measured))
    if options.json:
        options.json.write_text(json.dumps({k: v.values for k, v in measured.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
