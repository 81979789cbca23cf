"""Compares this server with upstream's and with distributed-llama, on one node and on two.

    python -m tools.bench.compare --distributed-llama ../distributed-llama
    python -m tools.bench.compare --model llama-q4_0.gguf --rounds 5 --json compare.json

Every node has one thread and a core of its own; llama-bench and coordinators share those two. All
setups run in turn, `--rounds` times: figures are medians over the rounds, ratios are taken within
a round, to upstream's server alone. `other work` is how many cores the machine gave to anything
else meanwhile: two nodes wait for each other at every exchange, so where a core is taken away the
rows of two nodes say little.

distributed-llama is built by `make dllama` in the folder of its sources (by a C++ compiler) and
reads a copy of the model in its own format; without `--distributed-llama` its rows are left out.
Without `--model` a random llama of TinyLlama's shape is made, all of whose matrices are Q4_0. Any
other GGUF llama does, but only where its matrices are Q4_0 does each program multiply the same
weights: llama-quantize --pure makes such a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rpc_server.observability.progress import begin, shown
from tools import models, upstream
from tools.bench import llama, split
from tools.bench.compare import dllama
from tools.bench.compare.dllama import TokenRates
from tools.bench.compare.model_file import Converted, convert
from tools.bench.cores import OtherWork, on_core
from tools.bench.machine import describe_machine, describe_versions
from tools.bench.report import number, ratio
from tools.bench.split import Setup
from tools.serving.processes import ProgramError

BASE = "upstream's server"
# Whether both programs write the same is looked at for so many tokens.
_SAME_TOKENS = 24

ONE_NODE = (Setup("this server, one worker", 1), Setup(BASE, 1, upstream=True))
TWO_NODES = (
    Setup("this server, two workers, `tensor`", 2, split=("0", "1"), mode="tensor"),
    Setup("this server, `local` and a worker, `tensor`", 2, split=("local", "1"), mode="tensor"),
    Setup("this server, two workers, `row`", 2, split=("0", "1")),
    Setup("this server, `local` and a worker, `row`", 2, split=("local", "1")),
    Setup("this server over two of upstream's, `tensor`", 2, True, ("0", "1"), "tensor"),
    Setup("upstream, `-sm tensor` over two servers", 2, True, arguments=("-sm", "tensor")),
    Setup("upstream, layers over two servers (the default)", 2, True),
)


@dataclass(frozen=True)
class ComparisonRow:
    """A row of the tables: its name, on how many nodes it is, and how it is measured."""

    name: str
    nodes: int
    measure: Callable[[], TokenRates]


@dataclass
class RowValues:
    """Values of one row over the rounds: tokens/s, and cores that did other work."""

    generate: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)


def _served(setup: Setup, options: argparse.Namespace) -> TokenRates:
    """Measure llama-bench on servers."""
    with split.running(setup, options.model) as servers:
        rates = split.tokens_per_second(servers.ports, options, setup)
    return TokenRates(rates["pp"], rates["tg"])


def _alone(options: argparse.Namespace) -> TokenRates:
    """Measure llama-bench without a server, on one core."""
    with on_core(0):
        rates = split.tokens_per_second([], options, Setup("", 0))
    return TokenRates(rates["pp"], rates["tg"])


def plan(
    options: argparse.Namespace, program: Path | None, files: Converted | None
) -> list[ComparisonRow]:
    """Return the rows in the order of the tables. ``program``: dllama, with its ``files``."""
    rows = []
    for nodes, setups in ((1, ONE_NODE), (2, TWO_NODES)):
        if nodes not in options.nodes:
            continue
        rows += [
            ComparisonRow(setup.name, nodes, partial(_served, setup, options)) for setup in setups
        ]
        if program and files:
            name = "distributed-llama, " + ("one node" if nodes == 1 else "root and one worker")
            lengths = options.prompt, options.generate
            rows.append(
                ComparisonRow(name, nodes, partial(dllama.measure, program, files, nodes, *lengths))
            )
    if 1 in options.nodes:
        rows.append(ComparisonRow("llama.cpp alone, no server", 1, partial(_alone, options)))
    return rows


def run(
    rows: Sequence[ComparisonRow], rounds: int, keep: Callable[[dict[str, RowValues]], None]
) -> dict[str, RowValues]:
    """Measure all rows in turn; ``keep`` gets what there is after each row.

    Raises: ProgramError.
    """
    measured = {row.name: RowValues() for row in rows}
    # Whoever is first in one round is last in the next.
    steps = [
        (turn, row) for turn in range(rounds) for row in (rows if turn % 2 == 0 else rows[::-1])
    ]
    with begin("comparing", len(steps)) as task:
        for turn, row in steps:
            task.step(f"round {turn + 1} of {rounds}: {row.name}")
            with OtherWork() as other:
                rates = row.measure()
            values = measured[row.name]
            values.generate.append(rates.generate)
            values.prompt.append(rates.prompt)
            values.other.append(other.cores)
            keep(measured)
    return measured


def table(rows: Sequence[ComparisonRow], measured: dict[str, RowValues]) -> str:
    """Return the tables in Markdown, one for each number of nodes."""
    parts = []
    for nodes, title in ((1, "One node"), (2, "Two nodes")):
        chosen = [row.name for row in rows if row.nodes == nodes]
        if not chosen:
            continue
        lines = [
            f"| {title} | generation, tokens/s | lowest to highest | to upstream's server alone "
            "| prompt, tokens/s | other work, cores |",
            "|" + "---|" * 6,
        ]
        base = measured.get(BASE)
        for name in chosen:
            m = measured[name]
            cells = (
                name,
                number(statistics.median(m.generate)),
                f"{number(min(m.generate))} to {number(max(m.generate))}",
                ratio(m.generate, base.generate) if base is not None else "-",
                number(statistics.median(m.prompt)),
                f"{statistics.median(m.other):.1f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def same_text(model: Path, program: Path, files: Converted) -> tuple[int, int]:
    """Return how many characters from BOS on llama.cpp and dllama agree in, and of how many.

    From BOS alone: behind a prompt, dllama doesn't begin with the prompt's last token.
    """
    words = ["-m", str(model), "-p", files.bos, "-n", str(_SAME_TOKENS), "-c", "512", "-t", "1"]
    words += ["--temp", "0", "--no-conversation", "--no-warmup", "--no-display-prompt"]
    words += ["--override-kv", "tokenizer.ggml.add_bos_token=bool:false", "--ignore-eos"]
    ours = llama.text(*words)
    theirs = dllama.text_from_bos(program, files, _SAME_TOKENS)
    same = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        same += 1
    return same, len(theirs)


def default_model() -> Path:
    """Return the random model of TinyLlama's shape in Q4_0, made unless the cache has it."""
    folder = upstream.cache_root() / "models"
    path = folder / "random-tinyllama-Q4_0.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {path}", file=sys.stderr, flush=True)
        models.write_large_model(path, models.TINYLLAMA_BYTES, "Q4_0", models.TINYLLAMA)
    return path


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m tools.bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--distributed-llama", type=Path, metavar="FOLDER", help="its sources; built there")
    add("--model", type=Path, metavar="FILE", help="a GGUF llama (a random one of 630 MB)")
    add("--nodes", type=int, nargs="+", choices=(1, 2), default=(1, 2), help="one, two (both)")
    add("-p", "--prompt", type=int, default=64, metavar="N", help="its tokens (%(default)s)")
    add("-n", "--generate", type=int, default=64, metavar="N", help="tokens (%(default)s)")
    add("-ub", "--ubatch", type=int, default=512, metavar="N", help="llama.cpp's (%(default)s)")
    add("-r", "--repetitions", type=int, default=1, metavar="N", help="of llama-bench a round")
    add("--rounds", type=int, default=3, metavar="N", help="of all setups (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="all values, kept as they come")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    folder = options.distributed_llama
    machine, versions = describe_machine(), describe_versions()

    def keep(measured: dict[str, RowValues]) -> None:
        if options.json:
            rows = {name: asdict(values) for name, values in measured.items()}
            result = {"machine": machine, "versions": versions, "rows": rows}
            options.json.write_text(json.dumps(result, indent=1))

    try:
        program = dllama.build(folder) if folder else None
        options.model = options.model or default_model()
        with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
            files = convert(options.model, Path(scratch)) if program else None
            versions["model"] = options.model.name
            if program and files:
                versions["distributed-llama"] = dllama.version(folder)
                if files.requantized:
                    print(f"{files.requantized} matrices were quantized anew for distributed-llama")
                same, characters = same_text(options.model, program, files)
                print(f"llama.cpp and distributed-llama write the same {same} of {characters}")
            llama.read_once(options.model)
            rows = plan(options, program, files)
            with shown():
                measured = run(rows, options.rounds, keep)
    except (ProgramError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("; ".join(f"{key}: {value}" for key, value in {**machine, **versions}.items()))
    print(table(rows, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
