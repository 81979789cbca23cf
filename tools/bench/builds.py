"""Compares builds and settings of this server with each other, and with upstream's.

    python -m tools.bench.builds --model m.gguf --build before=../other --build after=.
    python -m tools.bench.builds --large 1100 --build upstream \\
        --build small=.,GGML_RPC_LARGE_PAGES=off --build large=.

A build is a name, the folder of a checkout, and variables of its environment; the word `upstream`
is the build of that name. All of them run in turn in every round, never at the same time, and the
order changes from round to round. What counts is the ratio to the first build, which is taken round
by round. Where the machine is busy with other things, the server's processor time is the steadier
figure: it is that of a whole run of llama-bench, the model's upload with it.

`plain sum` is what as many threads read of an array in large pages that they do nothing else with:
the roof of `weights`, the bytes of weights that generation reads in a second.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from client.gguf_file import GgufFile
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.observability.progress import begin, shown
from tools.arguments import command_line, numbers
from tools.bench import llama
from tools.bench.cores import processor_seconds
from tools.bench.report import number
from tools.bench.results import OURS, UPSTREAM, Sample
from tools.bench.servers import ALONE, answers, command
from tools.serving.ports import free_port
from tools.serving.processes import PROJECT, Process, ProgramError

_START_SECONDS = 60.0
# Of the plain sum: more than any cache holds, and how long a look at it takes.
_SUM_BYTES = 512 << 20
_SUM_SECONDS = 1.0


@dataclass(frozen=True)
class Build:
    """A server to be measured: a checkout's, with variables, or upstream's (no folder)."""

    name: str
    folder: Path | None
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Build:
        """Return a build as --build has it; ArgumentTypeError for anything else."""
        name, equals, rest = text.partition("=")
        if text == UPSTREAM:
            return cls(text, None)
        folder, *settings = rest.split(",")
        pairs = [setting.partition("=") for setting in settings]
        if not (name and equals and all(variable and is_ for variable, is_, _ in pairs)):
            raise argparse.ArgumentTypeError(f"not NAME=FOLDER[,VARIABLE=VALUE...]: {text!r}")
        path = Path(folder).resolve()
        if not (path / "rpc_server" / "__main__.py").exists():
            raise argparse.ArgumentTypeError(f"no checkout of this project: {folder}")
        return cls(name, path, {variable: value for variable, _, value in pairs})

    def start(self, port: int, threads: int) -> Process:
        """Start it; raises ProgramError where it doesn't answer."""
        process = Process(
            command(UPSTREAM if self.folder is None else OURS, port, threads),
            env={**ALONE, **self.env},
            folder=self.folder or PROJECT,
        )
        process.wait_until(lambda: answers(port), _START_SECONDS, "answer to HELLO")
        return process


class LargePages:
    """Looks now and then how many bytes of a process are in large pages; ``most`` is the most."""

    def __init__(self, pid: int) -> None:
        self.most = 0
        self._path = Path(f"/proc/{pid}/smaps_rollup")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(1.0):
            found = re.search(r"^AnonHugePages:\s+(\d+) kB", self._path.read_text(), re.MULTILINE)
            self.most = max(self.most, int(found[1]) * 1024 if found else 0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def plain_sum(threads: int) -> float:
    """Return bytes per second that threads read of memory in large pages, all together."""
    storage = HostStorage(_SUM_BYTES)
    values = np.frombuffer(storage.place(0, _SUM_BYTES), np.float32)
    values[:] = 1
    # Until the background has made large what the upload left small.
    time.sleep(3.0)
    parts = np.array_split(values, threads)
    rates = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + _SUM_SECONDS
        while time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(_SUM_BYTES / (time.perf_counter() - began))
    del values, parts
    storage.close()
    return max(rates)


def weight_bytes(model: Path) -> int:
    """Return the bytes of weights that a token reads: all matrices, but the table of tokens."""
    matrices = {
        name: tensor.data.nbytes
        for name, tensor in GgufFile(model).tensors.items()
        if len(tensor.ne) > 1
    }
    if "output.weight" in matrices:
        # The table of tokens isn't multiplied then: a token is one row of it.
        matrices.pop("token_embd.weight", None)
    return sum(matrices.values())


def measure(build: Build, model: Path, options: argparse.Namespace) -> list[Sample]:
    """Measure one build's figures of one round."""
    samples = []
    for prompt, generate in ((options.prompt, 0), (0, options.generate)):
        if not prompt + generate:
            continue
        tests = llama.BenchOptions(
            prompt, generate, options.depth, options.repetitions, options.threads, options.flash
        )
        port = free_port()
        with build.start(port, options.threads) as process:
            pid = process.child.pid
            before = processor_seconds(pid)
            with LargePages(pid) as large:
                found = llama.bench(port, model, tests)
            samples += found
            what = f"pp{prompt}" if prompt else f"tg{generate}"
            used = processor_seconds(pid) - before
            samples.append(Sample(f"processor time of {what}", "s", False, used))
            if generate:
                rate = weight_bytes(model) * found[0].value / 1e9
                samples.append(Sample("weights", "GB/s", True, rate))
                samples.append(Sample("in large pages", "MiB", True, large.most / 2**20))
            samples.append(
                Sample(f"peak memory of {what}", "MiB", False, process.peak_rss() / 2**20)
            )
    return samples


class BuildTable:
    """Samples of figures by build, a round after the other."""

    def __init__(self, builds: Sequence[str]) -> None:
        self.builds = list(builds)
        self._samples: dict[str, dict[str, list[float]]] = {}

    def add(self, build: str, samples: Sequence[Sample]) -> None:
        """Add a round's figures of one build."""
        for sample in samples:
            by_build = self._samples.setdefault(f"{sample.name}, {sample.unit}", {})
            by_build.setdefault(build, []).append(sample.value)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a header and the figures.

        They are medians, and of all builds but the first their ratio to it.
        """
        first, *others = self.builds
        rows = [("figure", *self.builds, *(f"{name} / {first}" for name in others))]
        for figure, by_build in self._samples.items():
            cells = [
                number(statistics.median(by_build[name])) if name in by_build else "-"
                for name in self.builds
            ]
            cells += [self._ratio(by_build.get(first, []), by_build.get(n, [])) for n in others]
            rows.append((figure, *cells))
        return rows

    @staticmethod
    def _ratio(first: list[float], other: list[float]) -> str:
        """The median of the rounds' ratios and its range."""
        if not first or len(first) != len(other) or not all(first):
            return "-"
        ratios = [b / a for a, b in zip(first, other, strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"

    def text(self) -> str:
        """Return the rows with aligned columns."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in rows
        )


def run(options: argparse.Namespace, model: Path) -> BuildTable:
    """Measure a model on all builds in all rounds. Raises ProgramError, OSError."""
    builds: list[Build] = options.build
    result = BuildTable([build.name for build in builds])
    llama.read_once(model)
    for build in builds:
        # Its kernels are compiled.
        port = free_port()
        with build.start(port, options.threads):
            llama.first_token(port, model, options.threads)
    with begin("measuring", options.rounds * len(builds)) as task:
        for turn in range(options.rounds):
            if options.sum:
                sample = Sample("plain sum", "GB/s", True, plain_sum(options.threads) / 1e9)
                for build in builds:
                    result.add(build.name, [sample])
            # Whoever is first in one round is last in the next.
            for build in builds if turn % 2 == 0 else builds[::-1]:
                task.step(f"round {turn + 1} of {options.rounds}: {build.name}")
                result.add(build.name, measure(build, model, options))
    return result


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = command_line("tools.bench.builds", __doc__)
    add = made.add_argument
    add("--build", type=Build.parse, action="append", default=[], metavar="NAME=FOLDER[,VAR=VALUE]")
    add("--model", type=Path, action="append", default=[], metavar="FILE")
    add("--large", type=int, default=0, metavar="MiB", help="also a random model of this size")
    add("-p", "--prompt", type=int, default=512, metavar="N", help="%(default)s; 0: none")
    add("-n", "--generate", type=int, default=32, metavar="N", help="%(default)s; 0: nothing")
    add("-d", "--depth", type=numbers, default=(0,), metavar="N,...", help="tokens before these")
    add("--flash", action="store_true", help="flash attention")
    add("-t", "--threads", type=int, default=2, metavar="N", help="of the server (%(default)s)")
    add("-r", "--repetitions", type=int, default=2, metavar="N", help="of llama-bench a round")
    add("--rounds", type=int, default=3, metavar="N", help="starts of each build (%(default)s)")
    add("--sum", action="store_true", help="in each round also the plain sum")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    if not options.build:
        made.error("no --build to measure")
    try:
        models = [*options.model, *([llama.large_model(options.large)] if options.large else [])]
        for model in models:
            with shown():
                table = run(options, model)
            print(f"{model.stem}\n{table.text()}\n", flush=True)
    except (ProgramError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
