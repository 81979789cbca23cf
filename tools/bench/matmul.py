"""Speed of the CPU device's matrix products, for each weight type, beside the machine's own.

``python -m tools.bench.matmul [TYPE ...]``: GB/s of weights for one column (decoding), GFLOP/s for
many (prompts); the yardsticks are OpenBLAS on float32 and the sum over a large array.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np

import rpc_server.devices.cpu.lower  # noqa: F401  (fills the table of lowerings)
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType, row_size
from protocol.tensor import Tensor, contiguous_strides, padded_sources
from rpc_server.devices.cpu.executor import Executor, RecordProgram
from rpc_server.devices.cpu.instruction_sets import chosen_isa
from rpc_server.devices.cpu.kernels.interface.layout import PRODUCT_TYPES
from rpc_server.devices.cpu.machine import available_cores
from rpc_server.devices.cpu.planner import LOWERINGS, Planner
from rpc_server.devices.cpu.scratch import ScratchArena

_ids = itertools.count(1)


def make_tensor(type_: GgmlType, k: int, rows: int, memory: np.ndarray) -> Tensor:
    """Return a matrix over ``memory``."""
    ne = (k, rows, 1, 1)
    t = Tensor(next(_ids), type_, ne, contiguous_strides(type_, ne), name="matrix")
    t.address = int(memory.ctypes.data)
    return t


def seconds(run: Callable[[], object], budget: float) -> float:
    """Measure the median time of a call, taken over ``budget`` seconds."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Products:
    """Runs products of random weights on one executor."""

    def __init__(self, n_threads: int, budget: float) -> None:
        self._executor = Executor(n_threads)
        self._arena = ScratchArena()
        self._budget = budget
        self._rng = np.random.default_rng(0)

    def _row(self, type_: GgmlType, k: int) -> np.ndarray:
        """A row of weights: values don't matter, but denormal ones would cost time."""
        return self._rng.integers(60, 64, row_size(type_, k), np.uint8)

    def time(self, type_: GgmlType, k: int, rows: int, n: int) -> float:
        """Measure seconds of a product (k x rows weights, n columns), quantizing included."""
        memory = np.tile(self._row(type_, k), rows)
        x = self._rng.standard_normal((n, k), np.float32)
        y = np.empty((n, rows), np.float32)
        w, b = make_tensor(type_, k, rows, memory), make_tensor(GgmlType.F32, k, n, x)
        t = make_tensor(GgmlType.F32, rows, n, y)
        t.op, t.src = Op.MUL_MAT, padded_sources((w, b))
        planner = Planner(self._executor.n_threads, self._arena)
        planner.begin(t)
        if not LOWERINGS[Op.MUL_MAT](t, planner):
            raise RuntimeError(f"no kernel for {type_.name}")
        records = planner.records
        program = RecordProgram([r.kernel.address for r in records], [r.words for r in records])
        return seconds(lambda: self._executor.run(program), self._budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="weight types (default: all with kernels)")
    parser.add_argument("-t", "--threads", type=int, default=available_cores())
    parser.add_argument("-n", "--columns", type=int, default=128)
    parser.add_argument("-k", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the many-column product")
    parser.add_argument("--megabytes", type=int, default=512, help="weights of the matvec")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each number")
    args = parser.parse_args()
    types = [GgmlType[name.upper()] for name in args.types] or sorted(PRODUCT_TYPES)
    k, n = args.k, args.columns
    print(f"{chosen_isa().name}, {args.threads} threads, k {k}, {n} columns")

    ones = np.ones(args.megabytes << 18, np.float32)
    took = seconds(lambda: ones.max(), args.seconds)
    print(f"{'numpy max':10} {ones.nbytes / took / 1e9:8.1f} GB/s (one thread)")
    a, x = ones.reshape(-1, k), np.ones((n, k), np.float32)
    matvec = a.nbytes / seconds(lambda: a @ x[0], args.seconds) / 1e9
    took = seconds(lambda: x @ a[: args.rows].T, args.seconds)
    rate = 2 * k * min(args.rows, len(a)) * n / took / 1e9
    print(f"{'BLAS F32':10} {matvec:8.1f} GB/s {rate:8.1f} GFLOP/s")

    products = Products(args.threads, args.seconds)
    for type_ in types:
        rows = max((args.megabytes << 20) // row_size(type_, k), 16)
        matvec = rows * row_size(type_, k) / products.time(type_, k, rows, 1) / 1e9
        rate = 2 * k * args.rows * n / products.time(type_, k, args.rows, n) / 1e9
        print(f"{type_.name:10} {matvec:8.1f} GB/s {rate:8.1f} GFLOP/s", flush=True)


if __name__ == "__main__":
    main()
