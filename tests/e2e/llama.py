"""Runs llama.cpp's programs and the RPC server under test, and finds the models they need.

Nothing here knows pytest: a test's fixtures are in conftest.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tools import models, upstream
from tools import smollm2 as distributed
from tools.serving.llama_server import healthy
from tools.serving.ports import free_port
from tools.serving.processes import (
    Process,
    ProgramError,
    emulation_command,
    listens,
    tail,
)

DATA = Path(__file__).parent / "data"
THREADS = 2
# SmolLM2's type as it is distributed; the others are made from it.
SMOLLM2_TYPE = distributed.WEIGHT_TYPE
# What to start as "the server": a command with {port} in it. By default the server of this
# project; `ggml-rpc-server -t 2 -p {port}` checks the tests themselves.
SERVER_COMMAND = os.environ.get(
    "E2E_SERVER_COMMAND", f"{shlex.quote(sys.executable)} -m rpc_server --port {{port}}"
)
IS_OWN_SERVER = "E2E_SERVER_COMMAND" not in os.environ
# Two logits nearer than this are a tie that the order of a sum may decide.
NEAR_TIE = 0.1
# A program that gives up says why in its last line, not before a debugger's pages.
CLIENT_ENV = {"GGML_NO_BACKTRACE": "1"}
# The first start on a machine compiles kernels.
START_SECONDS = 120.0


def program(name: str, build: int = upstream.DEFAULT_BUILD) -> Path:
    """The path of a llama.cpp program. Raises ProgramError where it hasn't been built."""
    path = upstream.find_program(name, build)
    if path is None:
        raise ProgramError(f"{name} of build {build} is not in {upstream.cache_root()}")
    return path


# --- models -----------------------------------------------------------------------------------


def smollm2(weight_type: str) -> Path:
    """Return SmolLM2 in some type of weights, made from the distributed file and kept in the cache.

    Raises: ModelUnavailableError where it can't be downloaded; the test is skipped then.
    """
    source = distributed.fetch()
    if weight_type == SMOLLM2_TYPE:
        return source
    return quantize(source, upstream.cache_root() / "models", weight_type)


def quantize(source: Path, folder: Path, weight_type: str) -> Path:
    """A model in another type of weights; made by llama-quantize unless the folder has it."""
    target = folder / f"{source.stem}-to-{weight_type}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "model.gguf"
            run("llama-quantize", "--allow-requantize", source, made, weight_type, THREADS)
            made.replace(target)
    return target


def random_model(folder: Path, architecture: str, weight_type: str) -> Path:
    """A model of tools.models in any type of weights, made unless the folder has it."""
    if weight_type in models.WEIGHT_TYPES:
        path = models.model_path(folder, architecture, weight_type)
        return path if path.exists() else models.write_model(folder, architecture, weight_type)
    return quantize(random_model(folder, architecture, "F32"), folder, weight_type)


# --- programs that run to their end -----------------------------------------------------------


def device_options(rpc: str | None) -> list[str]:
    """Options that put a model on a server, or on the CPU of this machine (None)."""
    if rpc is None:
        # Repacked weights take other kernels, which differ from the plain ones about as much as
        # a coarser type of weights does. An RPC device has no repacked weights, upstream's
        # either: plain ones on both sides are computed alike to the last bit.
        return ["-ngl", "0", "--no-repack"]
    # Fitting may leave layers out where memory is short.
    return ["--rpc", rpc, "-ngl", "99", "-fit", "off"]


def run(
    name: str,
    *arguments: object,
    build: int = upstream.DEFAULT_BUILD,
    timeout: float = 200,
) -> tuple[str, str]:
    """Runs a program to its end; (stdout, stderr). Raises ProgramError if it fails."""
    command = [str(program(name, build)), *map(str, arguments)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **CLIENT_ENV},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        log = (expired.stderr or b"").decode(errors="replace")
        raise ProgramError(f"{name} took over {timeout} s:\n{tail(log)}") from None
    output, log = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    if done.returncode:
        raise ProgramError(f"{name} ended with status {done.returncode}:\n{tail(log)}")
    return output, log


_Found = TypeVar("_Found")
# Options that say where a model's layers go; None for those of ``device_options``.
Devices = Sequence[str] | None


def told(
    find: Callable[[str, str], _Found | None],
    name: str,
    *arguments: object,
    build: int = upstream.DEFAULT_BUILD,
    timeout: float = 200,
) -> _Found:
    """What ``find`` makes of a program's output and log, once it finds something.

    Both go through one queue, which the program doesn't always empty before it ends: then it runs
    again. Raises ProgramError where it fails, and where it never says it.
    """
    for _attempt in range(5):
        output, log = run(name, *arguments, build=build, timeout=timeout)
        if (found := find(output, log)) is not None:
            return found
    raise ProgramError(f"{name}'s output is incomplete:\n{tail(log)}")


def whole_text(output: str, log: str) -> str | None:
    """What llama-completion printed, None if its end may be missing.

    The timings come after the text: where they are, all of the text is.
    """
    return output.rstrip("\n") if "total time" in log else None


def completion(
    model: Path,
    prompt: str,
    count: int,
    *options: object,
    rpc: str | None = None,
    devices: Devices = None,
    build: int = upstream.DEFAULT_BUILD,
    timeout: float = 200,
) -> str:
    """The text that llama-completion generates greedily, without the prompt.

    ``devices``: options in place of those of ``device_options(rpc)``.
    """
    arguments = completion_arguments(model, prompt, count, rpc=rpc, devices=devices)
    return told(whole_text, "llama-completion", *arguments, *options, build=build, timeout=timeout)


def completion_arguments(
    model: Path, prompt: str, count: int, *, rpc: str | None = None, devices: Devices = None
) -> list[str]:
    """llama-completion's arguments for greedy text of exactly ``count`` tokens."""
    return [
        *("-m", str(model), "-p", prompt, "-n", str(count), "-c", "512", "-t", str(THREADS)),
        *("--temp", "0", "--ignore-eos", "--no-conversation", "--no-display-prompt"),
        "--no-warmup",
        *(device_options(rpc) if devices is None else devices),
    ]


def perplexity(model: Path, text: Path, *, rpc: str | None = None) -> float:
    """llama-perplexity's estimate over a text, in windows of 256 tokens."""
    found = told(
        estimate,
        "llama-perplexity",
        *("-m", model, "-f", text, "-c", "256", "-b", "256", "-t", THREADS, "--no-warmup"),
        *device_options(rpc),
    )
    return float(found[1])


def estimate(output: str, log: str) -> re.Match[str] | None:
    """Where llama-perplexity says what it found."""
    return re.search(r"Final estimate: PPL = ([0-9.]+)", output + log)


# --- processes that stay ----------------------------------------------------------------------


class RpcServer(Process):
    """The RPC server under test, listening; with so many emulated ``cards`` this project's."""

    def __init__(self, folder: Path, *options: str, cards: int = 0) -> None:
        port = free_port()
        words = [word.format(port=port) for word in shlex.split(SERVER_COMMAND)]
        env: dict[str, str] = {}
        if cards:
            words = emulation_command(port)
            env = {"EMULATION": "fast", "EMULATED_CARDS": str(cards)}
        self.port = port
        super().__init__([*words, *options], folder / f"rpc-{port}.log", env)
        try:
            self.wait_until(lambda: listens(self.port), START_SECONDS, "listening socket")
        except ProgramError:
            self.stop()
            raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Token:
    """One generated token: what it spells, and how far it was ahead of the runner-up.

    ``gap`` is the difference of the two highest logits.
    """

    id: int
    text: bytes
    gap: float


class ChattyServer(Process):
    """A llama-server by its command line, which has it listen on ``port``, with its model loaded.

    ``env`` are variables beside those of this process. Raises ProgramError where it doesn't start.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log_path: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port
        super().__init__(command, log_path, {**CLIENT_ENV, **(env or {})})
        try:
            self.wait_until(lambda: healthy(port), START_SECONDS, "loaded model")
        except ProgramError:
            self.stop()
            raise

    def post(self, path: str, body: dict[str, Any], timeout: float = 200) -> Any:
        """The parsed answer to a JSON request. Raises ProgramError where there is none."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except OSError as error:
            raise ProgramError(f"{path}: {error}\n{tail(self.log)}") from None


class LlamaServer(ChattyServer):
    """llama-server with a model, on this machine's CPU or on an RPC server.

    ``devices``: options in place of those of ``device_options(rpc)``.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *options: object,
        rpc: str | None = None,
        devices: Sequence[str] | None = None,
        slots: int = 1,
    ) -> None:
        port = free_port()
        command = [
            str(program("llama-server")),
            *("-m", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *("-c", str(512 * slots), "-np", str(slots), "-t", str(THREADS)),
            *("--no-webui", "--no-warmup", "--cache-ram", "0", "--offline"),
            *(device_options(rpc) if devices is None else devices),
            *map(str, options),
        ]
        where = "local" if rpc is None else rpc.rpartition(":")[2]
        super().__init__(command, port, folder / f"llama-server-{where}-{port}.log")

    def generate(self, prompt: str, count: int) -> list[Token]:
        """``count`` greedy tokens."""
        answer = self.post("/completion", {**greedy(prompt, count), "n_probs": 2})
        return [_token(entry) for entry in answer["completion_probabilities"]]

    def generate_at_once(self, prompts: Sequence[str], count: int) -> list[list[Token]]:
        """``count`` greedy tokens behind each prompt, all asked for at the same time."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, count), prompts))

    def stream(self, prompt: str, count: int) -> Iterator[str]:
        """The text of ``count`` greedy tokens, piece by piece as they come."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion",
            json.dumps({**greedy(prompt, count), "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=200) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))["content"]

    def embed(self, text: str) -> list[float]:
        """The pooled embedding of a text, for a server started with --embedding."""
        answer = self.post("/embedding", {"content": text})
        vector = answer[0]["embedding"][0]
        return [float(value) for value in vector]


def greedy(prompt: str, count: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "n_predict": count,
        "temperature": 0,
        "ignore_eos": True,
        # What is kept of an earlier prompt would change the shape of this one's batch.
        "cache_prompt": False,
    }


def _token(entry: dict[str, Any]) -> Token:
    first, second = entry["top_logprobs"][:2]
    return Token(entry["id"], bytes(entry["bytes"]), float(first["logprob"] - second["logprob"]))


def text_of(tokens: Sequence[Token]) -> bytes:
    """What tokens spell together."""
    return b"".join(token.text for token in tokens)


def gap_where_different(expected: Sequence[Token], actual: Sequence[Token]) -> float | None:
    """The gap at the first token that another run chose differently; None if all are equal.

    Up to there both runs had the same context, so the gap says how close that decision was.
    """
    pairs = zip(expected, actual, strict=True)
    return next((ours.gap for ours, theirs in pairs if ours.id != theirs.id), None)


def gap_where_text_differs(expected: Sequence[Token], actual: bytes) -> float | None:
    """As ``gap_where_different``, of a run of which only the text is known.

    Where one token's text begins another's, the text parts a token later than the choice. So the
    smaller gap of the two tokens counts.
    """
    start, before = 0, float("inf")
    for token in expected:
        end = start + len(token.text)
        if actual[start:end] != token.text:
            return min(token.gap, before)
        start, before = end, token.gap
    return None
