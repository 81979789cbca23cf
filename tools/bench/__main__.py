"""Compares this server with upstream's ggml-rpc-server, both driven by the same programs.

    python -m tools.bench                                     # single parts of a server's work
    python -m tools.bench --model a.gguf --model b.gguf       # and models, a table each
    python -m tools.bench --model a.gguf -d 0,4096 --flash    # generation with a full context, too
    python -m tools.bench --model a.gguf --slots 4,8          # and llama-server with several users
    python -m tools.bench --model a.gguf --cold               # and the first start of all
    python -m tools.bench --show result.json --picture result.svg

The two servers run in turn in one go, never at the same time, so that what else the machine does
falls on both. Figures are medians over the rounds; what counts is their ratio, ours over
upstream's, which is taken round by round. `pp` is a prompt, `tg` generation, both by llama-bench;
`load` and `first token` are seconds that llama-completion takes on a server that has just started.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rpc_server.observability.progress import begin, shown
from rpc_server.options import NO_PREPARE_VARIABLE
from tools.arguments import command_line, numbers
from tools.bench import llama, micro, picture, report, slots
from tools.bench.machine import describe_machine, describe_versions
from tools.bench.results import OURS, SERVERS, BenchResult, ResultTable, Sample
from tools.bench.servers import serving
from tools.serving.processes import ProgramError

# How long a server is idle before the first client comes, with --cold, seconds.
_IDLE = 15

# What one server did in one round.
Measure = Callable[[str], list[Sample]]


def _micro(options: argparse.Namespace) -> Measure:
    sizes = micro.MicroOptions(upload_bytes=options.upload << 20)

    def measure(server: str) -> list[Sample]:
        with serving(server, options.threads) as running:
            return running.startup() + micro.measure(running.port, running.process.child.pid, sizes)

    return measure


def _model(options: argparse.Namespace, model: Path) -> Measure:
    tests = llama.BenchOptions(
        options.prompt,
        options.generate,
        options.depth,
        options.repetitions,
        options.threads,
        options.flash,
    )

    def measure(server: str) -> list[Sample]:
        samples = _cold(server, options, model) if options.cold else []
        # A server for each program: the first token is one of a server that has just started.
        with serving(server, options.threads) as running:
            samples += llama.first_token(running.port, model, options.threads)
        with serving(server, options.threads) as running:
            samples += llama.bench(running.port, model, tests)
            samples += running.memory()
        if options.slots:
            with serving(server, options.threads) as running:
                samples += slots.measure(running.port, model, options.slots)
        return samples

    return measure


def _cold(server: str, options: argparse.Namespace, model: Path) -> list[Sample]:
    """The first token of a server that finds no compiled kernels; upstream's has none.

    Once a client is there as soon as it serves, once it had some seconds before to compile them.
    """
    found = []
    for seconds, told in ((0, "no compiled kernels"), (_IDLE, f"started {_IDLE} s before")):
        with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
            env = {"XDG_CACHE_HOME": folder, NO_PREPARE_VARIABLE: ""}
            with serving(server, options.threads, env) as running:
                time.sleep(seconds if server == OURS else 0)
                samples = llama.first_token(running.port, model, options.threads)
        found += [
            replace(sample, name=f"{sample.name}, {told}")
            for sample in samples
            if sample.name == "first token"
        ]
    return found


def _load(options: argparse.Namespace, model: Path) -> Measure:
    def measure(server: str) -> list[Sample]:
        with serving(server, options.threads) as running:
            samples = llama.first_token(running.port, model, options.threads)
            return samples + running.memory()

    return measure


def _get_ready(options: argparse.Namespace, model: Path) -> None:
    """Have the kernels of a model compiled and its file in memory: neither is measured."""
    with begin("getting ready", 1) as task, serving(OURS, options.threads) as running:
        task.step(model.stem)
        llama.read_once(model)
        llama.first_token(running.port, model, options.threads)


def plan(options: argparse.Namespace) -> list[tuple[str, Measure]]:
    """Get everything ready; what to measure: titles of tables, and what fills them."""
    subjects: list[tuple[str, Measure]] = []
    if options.upload:
        with serving(OURS, options.threads) as running:
            micro.measure(running.port, running.process.child.pid, micro.LEAST)
        subjects.append(("The server by itself", _micro(options)))
    for model in options.model:
        _get_ready(options, model)
        subjects.append((model.stem, _model(options, model)))
    if options.load:
        model = llama.large_model(options.load)
        _get_ready(options, model)
        subjects.append((f"Random model of {options.load} MiB, Q8_0", _load(options, model)))
    return subjects


def run(options: argparse.Namespace) -> BenchResult:
    """Measure all rounds. Raises ProgramError where a program fails, OSError for no such model."""
    said = {name: value for name, value in vars(options).items() if value is not None}
    said["model"] = [model.name for model in options.model]
    result = BenchResult(
        describe_machine(),
        describe_versions(),
        {name: said[name] for name in sorted(said) if name not in _OUTPUTS},
    )
    subjects = plan(options)
    result.tables = [ResultTable(title) for title, _ in subjects]
    with begin("measuring", options.rounds * len(subjects) * len(SERVERS)) as task:
        for number in range(options.rounds):
            # Neither always comes second.
            order = SERVERS if number % 2 == 0 else SERVERS[::-1]
            for table, (title, measure) in zip(result.tables, subjects, strict=True):
                for server in order:
                    task.step(f"round {number + 1} of {options.rounds}: {title}, {server}")
                    table.add(server, measure(server))
    return result


_OUTPUTS = ("json", "picture", "markdown", "show")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = command_line("tools.bench", __doc__)
    add = made.add_argument_group("with a model").add_argument
    add(
        *("-m", "--model"),
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="GGUF file, may be repeated",
    )
    add(
        *("-p", "--prompt"),
        type=int,
        default=128,
        metavar="N",
        help="tokens of the prompt (%(default)s)",
    )
    add(
        *("-n", "--generate"),
        type=int,
        default=32,
        metavar="N",
        help="tokens to generate (%(default)s)",
    )
    add(
        *("-d", "--depth"),
        type=numbers,
        default=(0,),
        metavar="N[,N]",
        help="tokens in the KV cache before, commas between several (0)",
    )
    add(
        "--slots",
        type=numbers,
        default=(),
        metavar="N[,N]",
        help="also llama-server with so many users at once, such as 4,8",
    )
    add("--flash", action="store_true", help="flash attention")
    add("--cold", action="store_true", help="also the first token without compiled kernels")
    add = made.add_argument_group("without one").add_argument
    add(
        "--upload",
        type=int,
        default=1000,
        metavar="MiB",
        help="uploaded when a server is measured by itself (%(default)s); 0 leaves that out",
    )
    add(
        "--load",
        type=int,
        default=0,
        metavar="MiB",
        help="also load a random model of this size by llama.cpp (1000 takes 1 GB of disk)",
    )
    add = made.add_argument_group("how").add_argument
    add(
        *("-t", "--threads"),
        type=int,
        default=2,
        metavar="N",
        help="threads of the server (%(default)s)",
    )
    add(
        *("-r", "--repetitions"),
        type=int,
        default=2,
        metavar="N",
        help="of llama-bench a round (%(default)s)",
    )
    add("--rounds", type=int, default=3, metavar="N", help="starts of each server (%(default)s)")
    add = made.add_argument_group("results").add_argument
    add("--show", type=Path, metavar="FILE", help="measure nothing: show what --json wrote")
    add("--json", type=Path, metavar="FILE", help="write all samples to this file")
    add("--picture", type=Path, metavar="FILE", help="draw the ratios in this SVG file")
    add("--markdown", action="store_true", help="print tables in Markdown")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    try:
        with shown():
            result = BenchResult.load(options.show) if options.show else run(options)
    except (ProgramError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.markdown(result) if options.markdown else report.text(result))
    if options.json:
        result.save(options.json)
    if options.picture:
        options.picture.write_text(picture.svg(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
