"""Microseconds per op of the CPU device's kernels, at the shapes of a small llama model.

    python -m tools.bench.ops [--threads N] [--n-kv 256,1024] [--tokens 1] [--only WORD]

Each line is the best of some runs of a program that repeats one node, so it holds the barrier and
the dispatch of a record as well.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np

import rpc_server.devices.cpu.lower  # noqa: F401  (fills the table of lowerings)
from client.tensors import dims, encode_params
from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor, contiguous_strides, padded_sources
from rpc_server.devices.cpu.executor import Executor, RecordProgram
from rpc_server.devices.cpu.planner import LOWERINGS, Planner
from rpc_server.devices.cpu.scratch import ScratchArena

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64

# SmolLM2-135M.
WIDTH, HEADS, KV_HEADS, HEAD, FFN, VOCABULARY = 576, 9, 3, 64, 1536, 49152

_ids = itertools.count(1)
_memory: list[np.ndarray] = []


def tensor(type_: GgmlType, *ne: int, values: np.ndarray | None = None) -> Tensor:
    """Return a dense tensor of small random numbers, or of ``values``."""
    shape = dims(ne)
    t = Tensor(next(_ids), type_, shape, contiguous_strides(type_, shape), name="bench")
    memory = np.zeros(t.nbytes + 64, np.uint8)
    _memory.append(memory)
    t.address = -(-int(memory.ctypes.data) // 64) * 64
    start = t.address - int(memory.ctypes.data)
    if values is None and type_ in (F32, F16):
        values = np.random.default_rng(0).normal(0, 1, t.nelements)
        values = values.astype(np.float32 if type_ is F32 else np.float16)
    if values is not None:
        memory[start : start + t.nbytes] = values.reshape(-1).view(np.uint8)
    return t


def node(op: Op, t: Tensor, sources: Sequence[Tensor | None], *words: float) -> Tensor:
    """Make ``t`` the result of ``op``; floats among ``words`` go by their bits."""
    t.op, t.src, t.op_params = op, padded_sources(sources), encode_params(words)
    return t


def heads_first(t: Tensor) -> Tensor:
    """Return (width, heads, rows) seen as (width, rows, heads)."""
    view = Tensor(next(_ids), t.type, t.ne, t.nb, Op.PERMUTE, name="view", address=t.address)
    view.ne = (t.ne[0], t.ne[2], t.ne[1], t.ne[3])
    view.nb = (t.nb[0], t.nb[2], t.nb[1], t.nb[3])
    return view


def cases(n: int, contexts: Sequence[int]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (name, nodes) for ``n`` tokens."""
    x, y = tensor(F32, WIDTH, n), tensor(F32, WIDTH, n)
    weights = tensor(F32, WIDTH)
    norm = node(Op.RMS_NORM, tensor(F32, WIDTH, n), [x], 1e-5)
    scaled = node(Op.MUL, tensor(F32, WIDTH, n), [norm, weights])
    yield "RMS_NORM", [norm]
    yield "MUL by weights", [scaled]
    yield "ADD", [node(Op.ADD, tensor(F32, WIDTH, n), [x, y])]
    yield "SCALE", [node(Op.SCALE, tensor(F32, WIDTH, n), [x], 2.0, 0.0)]
    gate, up = tensor(F32, FFN, n), tensor(F32, FFN, n)
    yield "GLU swiglu", [node(Op.GLU, tensor(F32, FFN, n), [gate, up], int(GluOp.SWIGLU))]
    for kind in (UnaryOp.SILU, UnaryOp.GELU, UnaryOp.GELU_ERF, UnaryOp.RELU):
        yield f"UNARY {kind.name.lower()}", [node(Op.UNARY, tensor(F32, FFN, n), [gate], int(kind))]
    at = tensor(I32, n, values=np.arange(n, dtype=np.int32))
    for mode, name in ((0, "normal"), (2, "neox")):
        for heads in (HEADS, KV_HEADS):
            words = (0, HEAD, mode, 0, 8192, 1e5, 1.0, 0.0, 1.0, 32.0, 1.0)
            source = tensor(F32, HEAD, heads, n)
            rope = node(Op.ROPE, tensor(F32, HEAD, heads, n), [source, at], *words)
            yield f"ROPE {name} {heads} heads", [rope]
    ids = tensor(I64, n, values=np.arange(n, dtype=np.int64))
    row = tensor(F32, HEAD * KV_HEADS, n)
    for type_ in (F16, GgmlType.Q8_0, GgmlType.Q4_0):
        cells = tensor(type_, HEAD * KV_HEADS, 4096)
        yield f"SET_ROWS {type_.name}", [node(Op.SET_ROWS, cells, [row, ids])]
    for type_ in (F16, GgmlType.Q8_0, GgmlType.Q4_1, GgmlType.Q6_K):
        if WIDTH % TYPE_INFO[type_].block_size:
            continue
        table = tensor(type_, WIDTH, 1000)
        got = node(Op.GET_ROWS, tensor(F32, WIDTH, n), [table, at])
        yield f"GET_ROWS {type_.name}", [got]
    for n_kv in contexts:
        mask_values = np.where(np.arange(n_kv) > np.arange(n)[:, None] + n_kv - n, -np.inf, 0)
        mask = tensor(F16, n_kv, n, values=mask_values.astype(np.float16))
        scores = tensor(F32, n_kv, n, HEADS)
        soft = node(Op.SOFT_MAX, tensor(F32, n_kv, n, HEADS), [scores, mask], 0.125, 0.0)
        yield f"SOFT_MAX {n_kv}", [soft]
        q = heads_first(tensor(F32, HEAD, HEADS, n))
        for type_ in (F16, GgmlType.Q8_0):
            k, v = (heads_first(tensor(type_, HEAD, KV_HEADS, n_kv)) for _ in range(2))
            out = tensor(F32, HEAD, HEADS, n)
            attention = node(Op.FLASH_ATTN_EXT, out, [q, k, v, mask], 0.125, 0.0, 0.0)
            yield f"FLASH_ATTN_EXT {type_.name} {n_kv}", [attention]
    yield "CPY F32 to F16", [node(Op.CPY, tensor(F16, WIDTH, n), [x])]
    turned = heads_first(tensor(F32, HEAD, n, HEADS))
    yield "CONT of heads", [node(Op.CONT, tensor(F32, HEAD, HEADS, n), [turned])]
    logits = tensor(F32, VOCABULARY, 1)
    yield "ARGMAX of the vocabulary", [node(Op.ARGMAX, tensor(I32, 1), [logits])]
    yield "TOP_K 40 of the vocabulary", [node(Op.TOP_K, tensor(I32, 40), [logits])]


def measure(nodes: list[Tensor], executor: Executor, arena: ScratchArena, runs: int) -> float:
    """Measure microseconds for ``nodes``, the best of ``runs``."""
    repeats = 50
    planner = Planner(executor.n_threads, arena)
    for t in nodes * repeats:
        planner.begin(t)
        if not LOWERINGS[t.op](t, planner):
            raise SystemExit(f"no kernel for {t.label}")
        planner.finish(t)
    records = planner.records
    program = RecordProgram([r.kernel.address for r in records], [r.words for r in records])
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        executor.run(program)
        best = min(best, time.perf_counter() - start)
    return best / repeats * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--n-kv", default="256,1024,4096")
    parser.add_argument("--only", default="", help="only ops whose line contains this")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    executor, arena = Executor(args.threads), ScratchArena()
    print(f"{args.threads} threads, {args.tokens} tokens")
    for name, nodes in cases(args.tokens, [int(n) for n in args.n_kv.split(",")]):
        if args.only in name:
            print(f"{name:32s} {measure(nodes, executor, arena, args.runs):10.2f} us")


if __name__ == "__main__":
    main()
