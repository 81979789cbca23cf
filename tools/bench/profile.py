"""Where the time of generating a token goes: one server, each kernel of each node timed by itself.

    python -m tools.bench.profile --model model.gguf

The server runs on one thread. Every other token runs record by record, with a clock around each;
the tokens between run as always, so that what the clocks cost can be told. `GB/s` is of the bytes
that a kernel's records read and write; weights count once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rpc_server import __main__ as server
from rpc_server.devices.cpu.assembly import RecordTable
from rpc_server.devices.cpu.plan import CpuPlanBuilder, StepContext
from tools.arguments import command_line
from tools.bench import llama
from tools.serving.ports import free_port
from tools.serving.processes import HOST, Process, ProgramError, listens

# Microseconds a token below which the clocks tell nothing.
_TELLING = 20.0
# A prompt's graph has fewer runs than this; only graphs that run often are generation.
_SETTLED = 4


@dataclass
class Timed:
    """One kernel's records of all timed runs."""

    records: int = 0
    seconds: float = 0.0
    bytes: int = 0


class Profiler:
    """Stands in for CpuPlanBuilder._program_step in the server process."""

    def __init__(self) -> None:
        self.kernels: dict[str, Timed] = {}
        self.whole: list[float] = []
        self.timed: list[float] = []
        self.n_records = 0

    def program_step(
        self, builder: CpuPlanBuilder, records: RecordTable, common: StepContext
    ) -> Callable[[], None]:
        """Return a step that runs its records in one call, and every other time one by one."""
        whole = _ORIGINAL(builder, records, common)
        parts = [records.part(i, i + 1) for i in range(len(records))]
        single = [_ORIGINAL(builder, part, common) for part in parts]
        runs = 0

        def run() -> None:
            nonlocal runs
            runs += 1
            started = time.perf_counter()
            if runs < _SETTLED or runs % 2:
                whole()
                if runs >= _SETTLED:
                    self.whole.append(time.perf_counter() - started)
                    self.n_records = len(records)
                return
            for part, step in zip(parts, single, strict=True):
                before = time.perf_counter()
                step()
                kernel = part.kernels[int(part.numbers[0])]
                entry = self.kernels.setdefault(kernel.label, Timed())
                entry.records += 1
                entry.seconds += time.perf_counter() - before
                entry.bytes += int((part.spans[:, 1] - part.spans[:, 0]).sum())
            self.timed.append(time.perf_counter() - started)

        return run

    def result(self) -> dict[str, object]:
        """Return all of it as plain data."""
        return {
            "kernels": {k: asdict(v) for k, v in self.kernels.items()},
            "whole": self.whole,
            "timed": self.timed,
            "records": self.n_records,
        }


_ORIGINAL = CpuPlanBuilder._program_step


def _serve(port: int, out: Path) -> int:
    profiler = Profiler()

    def program_step(builder: CpuPlanBuilder, *given: Any) -> Callable[[], None]:
        return profiler.program_step(builder, *given)

    CpuPlanBuilder._program_step = program_step  # type: ignore[method-assign, assignment]
    status = server.main(["--port", str(port), "-t", "1", "--log-level", "warning"])
    out.write_text(json.dumps(profiler.result()))
    return status


def table(result: dict[str, object]) -> str:
    """Return the profile as Markdown, the largest share first."""
    kernels = {k: Timed(**v) for k, v in result["kernels"].items()}  # type: ignore[attr-defined]
    timed, whole = list(result["timed"]), list(result["whole"])  # type: ignore[call-overload]
    tokens = len(timed)
    # The clock and the call around each record, which a whole run doesn't have.
    extra = max(sum(timed) / tokens - sum(whole) / len(whole), 0.0)
    each = extra * tokens / sum(t.records for t in kernels.values())
    total = sum(whole) / len(whole)
    lines = ["| kernel | records | us a token | share | GB/s |", "|---|---|---|---|---|"]
    for name, t in sorted(kernels.items(), key=lambda item: -item[1].seconds):
        seconds = (t.seconds - each * t.records) / tokens
        if seconds * 1e6 < _TELLING:
            continue
        rate = t.bytes / tokens / seconds / 1e9
        lines.append(
            f"| {name} | {t.records // tokens} | {seconds * 1e6:.0f} | {seconds / total:.1%} "
            f"| {rate:.1f} |"
        )
    shown = [(t.seconds - each * t.records) / tokens for t in kernels.values()]
    known = sum(seconds for seconds in shown if seconds * 1e6 >= _TELLING)
    lines.append(
        f"| the rest of the run | | {(total - known) * 1e6:.0f} | {1 - known / total:.1%} | |"
    )
    lines.append(f"| all in one call | {result['records']} | {total * 1e6:.0f} | | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.bench.profile", __doc__)
    add = parser.add_argument
    add("--model", type=Path, help="GGUF file")
    add("-n", "--generate", type=int, default=64, help="tokens to generate (%(default)s)")
    add("-d", "--depth", type=int, default=0, help="tokens in the KV cache before (%(default)s)")
    add("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        return _serve(options.serve, options.out)
    if options.model is None:
        parser.error("--model is missing")
    with tempfile.TemporaryDirectory() as folder:
        out, port = Path(folder) / "profile.json", free_port()
        words = ["-m", "tools.bench.profile", "--serve", str(port), "--out", str(out)]
        try:
            with Process([sys.executable, *words]) as process:
                process.wait_until(lambda: listens(port), 60, "the server")
                bench = llama.BenchOptions(0, options.generate, (options.depth,), 1, 1, True)
                llama.bench_at(f"{HOST}:{port}", options.model, bench)
                process.stop()
        except ProgramError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(table(json.loads(out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
