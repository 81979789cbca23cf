"""How long the CPU's planner takes for a new graph, and how long it keeps other threads waiting.

    python -m tools.bench.planning

Graphs of a Llama 3 8B in Q4_K_M, a token and a prompt of 512, whose kinds of nodes are known: the
same model at other addresses, from its message on. Beside it a thread wakes up every tenth of a
millisecond and notes how long it had to wait, most of which is for Python's lock. Milliseconds,
least and median of the rounds: whatever else the machine does only adds to both figures.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from protocol.dialects import DIALECTS
from protocol.graph_payload import GraphPayload
from rpc_server.__main__ import SWITCH_SECONDS
from rpc_server.devices.cpu.device import CpuDevice
from tools.arguments import command_line
from tools.bench.launches import model_graph, resolve
from tools.gpu_check.llama import LLAMA_8B, LlamaShape

# How long the thread that notes its waits sleeps, seconds.
_TICK = 1e-4


class Waits:
    """A thread that notes how long it was kept from running, seconds; use it by ``with``."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._longest = 0.0
        # When it ran last.
        self._last = time.perf_counter()
        self._thread = threading.Thread(target=self._tick)

    def __enter__(self) -> Waits:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        self._last = time.perf_counter()
        while not self._ended.is_set():
            time.sleep(_TICK)
            now = time.perf_counter()
            self._longest = max(self._longest, now - self._last - _TICK)
            self._last = now

    def during(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return how long ``work`` took, and the longest wait meanwhile, seconds."""
        self._longest = 0.0
        started = time.perf_counter()
        work()
        ended = time.perf_counter()
        # A wait that has not ended is noted when it has.
        while self._last < ended:
            time.sleep(_TICK)
        return ended - started, self._longest


@dataclass(frozen=True)
class Planning:
    """Of so many nodes: milliseconds of planning and of the longest wait, by round."""

    nodes: int
    planning: list[float]
    waits: list[float]


def measure(shape: LlamaShape, tokens: int, rounds: int) -> Planning:
    """Return what planning so many graphs of ``tokens`` tokens takes, once its kinds are known."""
    before = 512 if tokens == 1 else 0
    payloads = [
        model_graph(shape, tokens, before, at << 20).payload(DIALECTS[0])
        for at in range(1 + rounds)
    ]
    queue = CpuDevice(1).queue()
    # Plans are kept, as a client's are: memory of those that went would be used again.
    plans = [queue.plan_here(payloads[0], DIALECTS[0], resolve)]
    found = Planning(len(payloads[0].nodes), [], [])

    def plan(payload: GraphPayload) -> None:
        plans.append(queue.plan_here(payload, DIALECTS[0], resolve))

    with Waits() as waits:
        for payload in payloads[1:]:
            seconds, longest = waits.during(partial(plan, payload))
            found.planning.append(seconds * 1e3)
            found.waits.append(longest * 1e3)
    queue.leave()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.bench.planning", __doc__)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of each (%(default)s)")
    options = parser.parse_args(arguments)
    # As the server has it.
    sys.setswitchinterval(SWITCH_SECONDS)
    for tokens in (1, 512):
        found = measure(LLAMA_8B, tokens, options.rounds)
        for name, values in (("planning", found.planning), ("longest wait", found.waits)):
            print(
                f"{tokens:4} tokens, {found.nodes} nodes, {name:13}"
                f"{min(values):7.2f}{median(values):7.2f} ms"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
