"""How fast a server decodes and reads prompts, by the graphs that llama.cpp would send it."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import replace
from typing import Any, NamedTuple

from client.backend import Backend
from tools.gpu_check.llama import LlamaShape, ModelStep, SyntheticLlama

# Memory that is left for scratch and captured graphs, of what a server says is free.
_LEFT = 1 << 30


class TimingPlan(NamedTuple):
    """A prompt of so many tokens, and single ones behind ``before`` others, to be timed."""

    prompt: int
    before: int
    prompts: int
    steps: int


FULL = TimingPlan(prompt=512, before=512, prompts=8, steps=64)
QUICK = TimingPlan(prompt=48, before=48, prompts=2, steps=3)


async def _seconds(backend: Backend, step: ModelStep) -> float:
    """Return how long a run takes with its logits read, as a client that samples waits."""
    started = time.perf_counter()
    await step.graph.run()
    await backend.download(step.logits)
    return time.perf_counter() - started


def fitting(shape: LlamaShape, free: int) -> LlamaShape:
    """Return a model of the same layers, as many as ``free`` bytes have room for.

    Raises MemoryError where not even one fits.
    """
    layers = shape.layers
    while layers and replace(shape, layers=layers).weight_bytes + _LEFT > free:
        layers -= 1
    if not layers:
        raise MemoryError(f"{free >> 20} MiB are free: not enough for a layer of {shape.name}")
    return replace(shape, layers=layers)


async def _measure(port: int, shape: LlamaShape, timing: TimingPlan, seed: int) -> dict[str, Any]:
    async with Backend.connect("127.0.0.1", port, version=None, timeout=120) as backend:
        # A step further than all that is timed, whose graph is new.
        positions = max(timing.prompt, timing.before + 512)
        model = SyntheticLlama(backend, shape, positions)
        started = time.perf_counter()
        await model.load(seed)
        loaded = time.perf_counter() - started
        prompt = await model.prepare(timing.prompt, 0)
        # The first run compiles kernels, the second captures what can be captured.
        first_prompt = await _seconds(backend, prompt)
        await _seconds(backend, prompt)
        prompts = [await _seconds(backend, prompt) for _ in range(timing.prompts)]
        await prompt.graph.free()
        token = await model.prepare(1, timing.before)
        first_token = await _seconds(backend, token)
        await _seconds(backend, token)
        tokens = [await _seconds(backend, token) for _ in range(timing.steps)]
        await token.graph.free()
        # The same nodes over more positions: all is compiled, and nothing of it is planned.
        other = await model.prepare(1, timing.before + 256)
        new_graph = await _seconds(backend, other)
        await other.graph.free()
    decode, prefill = statistics.median(tokens), statistics.median(prompts)
    return {
        "decode_tokens_per_second": 1 / decode,
        "decode_seconds": sorted(tokens),
        "decode_bytes_per_second": shape.weight_bytes / decode,
        "prompt_tokens_per_second": timing.prompt / prefill,
        "prompt_seconds": sorted(prompts),
        "first_prompt_seconds": first_prompt,
        "first_token_seconds": first_token,
        "new_graph_seconds": new_graph,
        "load_seconds": loaded,
    }


def measure(port: int, shape: LlamaShape, timing: TimingPlan, seed: int) -> dict[str, Any]:
    """Return the figures of the server at ``port``, all in seconds, bytes and tokens."""
    return asyncio.run(_measure(port, shape, timing, seed))


async def _memory(port: int) -> tuple[int, int]:
    async with Backend.connect("127.0.0.1", port, version=None, timeout=120) as backend:
        return await backend.connection.get_device_memory()


def memory(port: int) -> tuple[int, int]:
    """Return free and all bytes of a server's first device."""
    return asyncio.run(_memory(port))
