"""Checks a GPU: that every kernel computes what it should on it, and how fast a model would run.

    python -m tools.gpu_check                            # the first GPU, about ten minutes
    python -m tools.gpu_check -d CUDA1 --upstream ~/llama.cpp/build/bin
    python -m tools.gpu_check --emulated                 # without a GPU: a try of the check itself
    python -m tools.gpu_check --show gpu_check/result.json

It starts this project's server on the card and a reference on the processor, and gives both the
differential tester's random graphs, then layers of a model with weights of several types. Then it
times a llama of eight billion random weights, of which nothing is downloaded. With --upstream, a
folder with a ggml-rpc-server built for CUDA, that server's processor is the reference, and its
speed on the same card is measured, too.

Most of the time goes to compiling kernels, the first time. What comes out is a folder with
result.json, summary.txt, the server's log, and a file for each case that differs. All four are
worth sending in; they tell of the machine its processor, card and driver, and nothing else.

Exit codes: 0 all is right, 1 something differs, 2 something could not be done at all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.errors import GraphFailed
from conformance.differential.campaign import PROFILES, select
from conformance.differential.endpoint import ServerUnavailable
from protocol.errors import ProtocolError
from tools.arguments import command_line, positive
from tools.bench.machine import describe_machine, describe_versions
from tools.gpu_check import kernels, speed, summary
from tools.gpu_check.llama import LLAMA_8B, SMALL, LlamaShape
from tools.gpu_check.servers import ServersToCheck, devices, started
from tools.serving.processes import ProgramError

# What a part may fail of; the others go on.
_FAILURES = (
    ProgramError,
    ServerUnavailable,
    ProtocolError,
    GraphFailed,
    OSError,
    MemoryError,
    TimeoutError,
)


@dataclass(frozen=True)
class CheckExtent:
    """The amount of what is checked and timed."""

    profile: str
    shape: LlamaShape
    types: Sequence[str]
    tokens: Sequence[int]
    timing: speed.TimingPlan


_ON_CARD = CheckExtent("short", LLAMA_8B, kernels.LAYER_TYPES, kernels.LAYER_TOKENS, speed.FULL)
# g++ takes half a minute for the kernels of a type.
_EMULATED = CheckExtent("smoke", SMALL, ("Q4_K", "Q6_K"), (1, 5, 48), speed.QUICK)


class GpuCheck:
    """One check: its parts one after the other, and what they found."""

    def __init__(
        self, servers: ServersToCheck, extent: CheckExtent, options: argparse.Namespace
    ) -> None:
        self._servers = servers
        self._extent = extent
        self._options = options
        self._ran: set[str] = set()
        self.result: dict[str, Any] = {
            "emulated": servers.emulated,
            "machine": describe_machine(),
            "versions": describe_versions(),
            "driver": _driver(),
            "errors": {},
            "right": False,
        }

    def run(self) -> None:
        """Run all parts that were asked for; none keeps the others from running."""
        parts = {"ops": self._ops, "layers": self._layers, "speed": self._speed}
        with self._part("card"):
            self._look()
        if "card" in self.result:
            for name in self._options.parts:
                print(f"{name}:", file=sys.stderr, flush=True)
                with self._part(name):
                    parts[name]()
        if self._ran:
            self.result["coverage"] = kernels.coverage(self._ran)
        wrong = [row for row in self.result.get("layers", []) if not row["right"]]
        differs = self.result.get("ops", {}).get("failing", False)
        self.result["right"] = not (self.result["errors"] or wrong or differs)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            self.result["errors"][name] = str(error) or type(error).__name__

    def _look(self) -> None:
        with started(self._servers.card()) as (process, _):
            found = devices(process.log)
        if not found:
            raise ProgramError(f"the server names no device:\n{process.log}")
        self.result["card"] = asdict(found[0])

    def _ops(self) -> None:
        options = self._options
        told, ran = kernels.compare_ops(
            self._servers,
            options.profile or self._extent.profile,
            options.only,
            options.seed,
            options.jobs,
            options.output,
        )
        self.result["ops"] = told
        self._ran |= ran

    def _layers(self) -> None:
        extent = self._extent
        rows, ran, changed = kernels.compare_layers(
            self._servers, extent.shape, extent.types, extent.tokens, self._options.seed
        )
        self.result["layers"] = rows
        # Of so many; where it is none the driver hasn't let them be changed.
        growing = len(extent.types) * (len(kernels.GROWING) - 1)
        self.result["graphs"] = {"growing": growing, "changed": changed}
        self._ran |= ran

    def _speed(self) -> None:
        extent, seed = self._extent, self._options.seed
        with started(self._servers.card()) as (_, port):
            free, total = speed.memory(port)
            shape = speed.fitting(extent.shape, free)
            model = {
                "name": shape.name,
                "layers": shape.layers,
                "layers_of_model": extent.shape.layers,
                "bytes": shape.weight_bytes,
                **extent.timing._asdict(),
            }
            self.result["speed"] = {
                "model": model,
                "ours": speed.measure(port, shape, extent.timing, seed),
            }
        if self._servers.upstream is None:
            return
        with self._part("upstream"), started(self._servers.on_upstream()) as (_, port):
            # Its log is kept from us until it ends; a card is known by its memory.
            _, theirs = speed.memory(port)
            if not 0.9 < theirs / total < 1.1 and not self._servers.emulated:
                raise ProgramError("its first device is not this card: was it built for CUDA?")
            timed = speed.measure(port, shape, extent.timing, seed)
            self.result["speed"]["upstream"] = timed


def _driver() -> str:
    """Return what nvidia-smi says of driver, clocks and power; empty where there is none."""
    fields = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,pcie.link.gen.max"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return "; ".join(done.stdout.split("\n")).strip("; ")
    return ""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = command_line("tools.gpu_check", __doc__)
    add = made.add_argument
    add("-d", "--device", default="CUDA0", metavar="DEV", help="the card (%(default)s)")
    add("--upstream", type=Path, metavar="FOLDER", help="a llama.cpp build with CUDA and RPC")
    add("--emulated", action="store_true", help="no card: g++ emulates one, in small shapes")
    add(
        "--parts",
        type=_parts,
        default=("ops", "layers", "speed"),
        metavar="PART[,PART]",
        help="some of ops, layers, speed (all)",
    )
    add("--profile", choices=PROFILES, help="how many cases of ops (short; emulated: smoke)")
    add("--only", type=_families, metavar="OP[,OP]", help="cases of these ops only")
    add("--seed", type=int, default=0, help="of cases and weights (%(default)s)")
    add(
        "--jobs",
        type=positive,
        default=min(4, max(1, (os.cpu_count() or 1) // 2)),
        help="servers that are checked at once (%(default)s)",
    )
    add(
        *("-o", "--output"),
        type=Path,
        default=Path("gpu_check"),
        metavar="FOLDER",
        help="where results go (%(default)s)",
    )
    add(
        "--show",
        type=Path,
        metavar="FILE",
        help="check nothing: print the summary of a result.json",
    )
    return made


def _parts(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if not set(words) <= {"ops", "layers", "speed"}:
        raise argparse.ArgumentTypeError(f"not some of ops, layers, speed: {text!r}")
    return words


def _families(text: str) -> str:
    try:
        select(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    options = parser().parse_args(arguments)
    if options.show:
        print(summary.text(json.loads(options.show.read_text())))
        return 0
    servers = ServersToCheck(options.device, options.upstream, options.emulated)
    try:
        servers.check()
        options.output.mkdir(parents=True, exist_ok=True)
    except (ProgramError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    check = GpuCheck(servers, _EMULATED if options.emulated else _ON_CARD, options)
    check.run()
    told = summary.text(check.result)
    (options.output / "result.json").write_text(json.dumps(check.result, indent=1) + "\n")
    (options.output / "summary.txt").write_text(told + "\n")
    print(told)
    if check.result["errors"]:
        return 2
    return 0 if check.result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
