"""Builds distributed-llama's ``dllama``, runs it on one or two nodes, and reads what it measured.

One thread a node, activations in Q80 as its Q40 weights need them. What it prints of speed comes
from clocks of its own, over computing and waiting, without loading.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.bench.compare.model_file import Converted
from tools.bench.cores import on_core
from tools.serving.ports import free_port
from tools.serving.processes import HOST, Process, ProgramError, tail

_START_SECONDS = 20.0
_RUN_SECONDS = 600.0
_RATE = re.compile(r"^(Evaluation|Prediction)\n(?:.*\n)*? *tokens/s: *([0-9.]+) ", re.MULTILINE)
_TOKEN = re.compile(r"^🔶 Pred.*? kB \| (.*)$", re.MULTILINE)
# What stands for a token that spells nothing.
_SILENT = "~"


@dataclass(frozen=True)
class TokenRates:
    """Tokens per second of a prompt and of generation."""

    prompt: float
    generate: float


def build(folder: Path) -> Path:
    """Build ``dllama`` in its source folder and return its path. Raises ProgramError."""
    if not (folder / "Makefile").is_file():
        raise ProgramError(f"no distributed-llama in {folder}: no Makefile")
    made = subprocess.run(
        ["make", "-C", str(folder), "dllama"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    program = folder.resolve() / "dllama"
    if made.returncode or not program.is_file():
        raise ProgramError(f"make dllama ended with {made.returncode}:\n{tail(made.stderr)}")
    return program


def version(folder: Path) -> str:
    """Return the commit of the sources, or 'unknown' where they are no git checkout's."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def measure(program: Path, files: Converted, nodes: int, prompt: int, generate: int) -> TokenRates:
    """Return its speed over ``nodes``, each on a core of its own. Raises ProgramError.

    The prompt has ``prompt`` tokens behind BOS.
    """
    # A digit is a token, whatever else the vocabulary has.
    text = "".join(str(n % 10) for n in range(prompt))
    output = _run(program, files, nodes, text, prompt + generate)
    found = {name: float(rate) for name, rate in _RATE.findall(output)}
    if len(found) != 2:
        raise ProgramError(f"dllama doesn't tell its speed:\n{tail(output)}")
    return TokenRates(found["Evaluation"], found["Prediction"])


def text_from_bos(program: Path, files: Converted, tokens: int) -> str:
    """Return what it writes greedily from BOS alone. Raises ProgramError."""
    pieces = _TOKEN.findall(_run(program, files, 1, "", tokens))
    return "".join("" if piece == _SILENT else piece for piece in pieces)


def _run(program: Path, files: Converted, nodes: int, prompt: str, steps: int) -> str:
    """Return what a root with ``nodes`` - 1 workers prints. Raises ProgramError."""
    with contextlib.ExitStack() as stack:
        addresses = []
        for core in range(1, nodes):
            port = free_port()
            words = ["worker", "--host", HOST, "--port", str(port), "--nthreads", "1"]
            with on_core(core):
                worker = stack.enter_context(Process([str(program), *words]))
            worker.wait_until(partial(_is_bound, port), _START_SECONDS, "a worker that listens")
            addresses.append(f"{HOST}:{port}")
        words = ["inference", "--nthreads", "1", "--buffer-float-type", "q80"]
        words += ["--model", str(files.model), "--tokenizer", str(files.vocabulary)]
        words += ["--prompt", prompt, "--steps", str(steps), "--temperature", "0"]
        if addresses:
            words += ["--workers", *addresses]
        with on_core(0):
            done = subprocess.run(
                [str(program), *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                # A token may be any bytes.
                encoding="utf-8",
                errors="replace",
                timeout=_RUN_SECONDS,
                check=False,
            )
    if done.returncode:
        raise ProgramError(f"dllama ended with {done.returncode}:\n{tail(done.stdout)}")
    return done.stdout


def _is_bound(port: int) -> bool:
    """Return whether something listens at a port.

    Nobody connects to it: a worker takes the first connection for its root's.
    """
    # The local end, then the other one, then the state that is LISTEN.
    return f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()
