"""Runs llama.cpp's programs on a model that lies on a server, and reads what they measured.

llama-bench gives tokens per second of prompts and of generation; llama-completion, asked for one
token, how long a user waits for it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import models, upstream
from tools.bench.results import Sample
from tools.serving.processes import HOST, ProgramError, tail

# What llama-completion's log lines begin with: minutes, seconds, milliseconds, microseconds since
# its start.
_LOADED = re.compile(r"^(\d+)\.(\d+)\.(\d+)\.(\d+) \w generate: n_ctx", re.MULTILINE)


@dataclass(frozen=True)
class BenchOptions:
    """llama-bench's: tokens of the prompt, tokens to generate, tokens in the KV cache before."""

    prompt: int
    generate: int
    depths: tuple[int, ...]
    repetitions: int
    threads: int
    flash: bool


# One test of llama-bench, as its JSON has it.
BenchTest = dict[str, Any]
# Is told of each test when it is over.
Heard = Callable[[BenchTest], None]


def nobody(test: BenchTest) -> None:
    """Do nothing."""


def _words(name: str, endpoints: str, arguments: Sequence[str]) -> list[str]:
    """Return what runs a program with all layers on servers, or without any.

    Raises ProgramError.
    """
    program = upstream.find_program(name)
    if program is None:
        raise ProgramError(f"no {name}: run python -m tools.upstream")
    return [str(program), *arguments, *(("--rpc", endpoints) if endpoints else ()), "-ngl", "99"]


def _run(name: str, endpoints: str, *arguments: str) -> tuple[str, str]:
    """Run a program as :func:`_words` has it; return stdout and stderr. Raises ProgramError."""
    done = subprocess.run(
        _words(name, endpoints, arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        # A token of a random model may be any bytes.
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise ProgramError(f"{name} ended with {done.returncode}:\n{tail(done.stderr)}")
    return done.stdout, done.stderr


def text(*arguments: str) -> str:
    """Return what llama-completion prints without a server. Raises ProgramError."""
    return _run("llama-completion", "", *arguments)[0]


def bench(port: int, model: Path, options: BenchOptions) -> list[Sample]:
    """Return tokens per second of each test that llama-bench makes of the options."""
    return bench_at(f"{HOST}:{port}", model, options)


def bench_at(
    endpoints: str,
    model: Path,
    options: BenchOptions,
    arguments: Sequence[str] = (),
    heard: Heard = nobody,
) -> list[Sample]:
    """Return the same on servers as --rpc takes them (none if empty), with more arguments.

    Each test goes to ``heard`` when it is over, while the next one begins.
    """
    return bench_samples(_tests(endpoints, model, options, arguments, heard))


def _tests(
    endpoints: str,
    model: Path,
    options: BenchOptions,
    arguments: Sequence[str],
    heard: Heard = nobody,
) -> list[BenchTest]:
    """Run llama-bench; return its tests. Raises ProgramError."""
    words = (
        *arguments,
        *("-m", str(model), "-t", str(options.threads), "-r", str(options.repetitions)),
        *("-p", str(options.prompt), "-n", str(options.generate)),
        *("-d", ",".join(map(str, options.depths)), "-fa", "on" if options.flash else "off"),
        # A line when a test is over.
        *("-o", "jsonl"),
    )
    tests: list[BenchTest] = []
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            _words("llama-bench", endpoints, words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            tests.append(json.loads(line))
            heard(tests[-1])
        if child.wait():
            log.seek(0)
            ended = f"llama-bench ended with {child.returncode}"
            raise ProgramError(f"{ended}:\n{tail(log.read().decode(errors='replace'))}")
    return tests


def best_at(
    endpoints: str, model: Path, options: BenchOptions, arguments: Sequence[str] = ()
) -> dict[str, float]:
    """Return the best repetition of each test, tokens a second; as of bench_at."""
    best = {}
    for test in _tests(endpoints, model, options, arguments):
        best["pp" if test["n_prompt"] else "tg"] = float(max(test["samples_ts"]))
    return best


def bench_samples(tests: Sequence[BenchTest]) -> list[Sample]:
    """Return the samples in llama-bench's JSON."""
    samples = []
    for test in tests:
        prompt, generate, depth = test["n_prompt"], test["n_gen"], test["n_depth"]
        name = f"pp{prompt}" if prompt else f"tg{generate}"
        name += f" at depth {depth}" if depth else ""
        samples.append(Sample(name, "tokens/s", True, test["avg_ts"]))
    return samples


def first_token(port: int, model: Path, threads: int) -> list[Sample]:
    """Measure seconds until llama-completion has loaded, and given one token and ended.

    Its end is what counts, since its log isn't always complete by then.
    """
    started = time.perf_counter()
    _, log = _run(
        "llama-completion",
        f"{HOST}:{port}",
        *("-m", str(model), "-p", "Once upon a time, there was", "-n", "1", "-c", "512"),
        *("-t", str(threads), "--temp", "0", "--no-conversation", "--no-warmup", "-fit", "off"),
    )
    seconds = time.perf_counter() - started
    return [
        Sample("load", "s", False, load_seconds(log)),
        Sample("first token", "s", False, seconds),
    ]


def load_seconds(log: str) -> float:
    """Return when llama-completion began to generate.

    Raises ProgramError where its log lacks that.
    """
    found = _LOADED.search(log)
    if found is None:
        raise ProgramError(f"llama-completion's log doesn't tell its time:\n{tail(log)}")
    minutes, seconds, millis, micros = map(int, found.groups())
    return minutes * 60 + seconds + millis / 1e3 + micros / 1e6


def read_once(model: Path) -> None:
    """Read a file to its end, so that the disk falls on neither server."""
    buffer = bytearray(16 << 20)
    with model.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def large_model(megabytes: int) -> Path:
    """Return a random model of this size in Q8_0, made unless the cache has it."""
    folder = upstream.cache_root() / "models"
    path = folder / f"random-llama-layers-{megabytes}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        models.write_large_model(path, megabytes << 20)
    return path
