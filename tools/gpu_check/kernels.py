"""Whether the card computes what it should: the differential tester's cases, and whole layers.

Which kernels have run is read from the servers' own logs.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from client.backend import Backend
from conformance.differential.campaign import DifferentialCampaign, Servers, select
from conformance.differential.compare import nmse
from conformance.differential.report import Report
from conformance.differential.sketch import FAMILIES
from protocol.ggml.types import GgmlType
from rpc_server.devices.cuda.compile import source_names, source_text
from tools.gpu_check.llama import LlamaShape, SyntheticLlama, one_layer
from tools.gpu_check.servers import EMULATED_FAST, ServersToCheck, started

# What upstream's own tests allow of a product, by the error's norm against the result's.
LARGEST_ERROR = 5e-4

# Layers of each of these are compared, with so many tokens at once: one column, a few, tiles, and
# as many as a prompt has (cuBLAS on some cards).
LAYER_TYPES = ("Q4_K", "Q6_K", "Q5_K", "Q4_0", "Q8_0", "IQ4_XS")
LAYER_TOKENS = (1, 5, 48, 512)
# Then a token behind so many others: a captured graph goes on while the cache grows. How often each
# runs, so that the first one is captured.
GROWING, _RUNS = (100, 300, 600), 3

_READY = re.compile(r"kernel (\S+) is ready")
_TAKEN_OVER = "took a captured graph over"
_KERNEL = re.compile(r"^KERNEL\((\w+),", re.MULTILINE)


def all_functions() -> set[str]:
    """Return the names of all kernels, as source.function."""
    return {
        f"{source}.{name}"
        for source in source_names()
        for name in _KERNEL.findall(source_text(source))
    }


def ran(log: str) -> set[str]:
    """Return the labels of kernels that a server's log says it has got ready."""
    return set(_READY.findall(log))


def coverage(labels: set[str]) -> dict[str, Any]:
    """Return what of all kernels is among ``labels``, of whatever types of weights."""
    functions = {f"{x.partition('.')[0].partition('-')[0]}.{x.rpartition('.')[2]}" for x in labels}
    known = all_functions()
    return {
        "kernels": len(known),
        "kernels_run": len(functions & known),
        "compiled": len(labels),
        "not_run": sorted(known - functions),
    }


def compare_ops(
    servers: ServersToCheck, profile: str, only: str | None, seed: int, jobs: int, folder: Path
) -> tuple[dict[str, Any], set[str]]:
    """Run the differential tester's cases on the card and the reference.

    Findings are written to ``folder``. Returns what is told of them, and the kernels that ran.
    Raises ServerUnavailable; ValueError for no such family.
    """
    log = folder / "server.log"
    log.unlink(missing_ok=True)
    chosen = select(only)
    both = Servers(
        None,
        shlex.join(servers.card("--log-level", "debug")),
        None,
        shlex.join(servers.reference(1)),
        # The newest that both speak; upstream's may be an older one.
        asyncio.run(_version(servers)),
        log,
        # CuPy has kernels compiled so; upstream's own are as well.
        flushes=True,
    )
    begun = time.monotonic()
    report = Report(sorted(chosen, key=list(FAMILIES).index))
    with mock.patch.dict(os.environ, EMULATED_FAST):
        for name, tally in DifferentialCampaign(both, profile, seed, chosen).run(jobs):
            report.add(name, tally)
    report.finish(folder, None)
    families = report.figures()
    told = {
        "reference": servers.describe_reference(),
        "profile": profile,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "cases": sum(int(str(f["cases"])) for f in families.values()),
        "failed": {name: f["failed"] for name, f in families.items() if f["failed"]},
        "failing": report.failed,
        "families": families,
    }
    return told, ran(log.read_text(errors="replace"))


async def _version(servers: ServersToCheck) -> str:
    with started(servers.reference(1)) as (_, port):
        async with Backend.connect("127.0.0.1", port, version=None) as backend:
            return str(backend.connection.dialect.name)


async def _layer(port: int, shape: LlamaShape, tokens: Sequence[int], seed: int) -> list[Any]:
    """Return what one layer computes of so many tokens each, in turn, and while the cache grows."""
    async with Backend.connect("127.0.0.1", port, version=None, timeout=120) as backend:
        model = SyntheticLlama(backend, shape, max(*tokens, *GROWING))
        await model.load(seed)
        results = []
        for n in tokens:
            step = await model.prepare(n, 0, every=True)
            await step.graph.run()
            results.append(await backend.download(step.logits))
            await step.graph.free()
        await model.reserve(1)
        for before in GROWING:
            step = await model.prepare(1, before)
            for _ in range(_RUNS):
                await step.graph.run()
            results.append(await backend.download(step.logits))
        return results


def compare_layers(
    servers: ServersToCheck,
    shape: LlamaShape,
    types: Sequence[str],
    tokens: Sequence[int],
    seed: int,
) -> tuple[list[dict[str, Any]], set[str], int]:
    """Run a layer of each type on the card and the reference.

    Returns a row for each type and number of tokens, the kernels that ran, and how many captured
    graphs went on behind a grown cache. Raises ProgramError and what a connection raises.
    """
    rows: list[dict[str, Any]] = []
    threads = os.cpu_count() or 1
    with started(servers.card("--log-level", "debug")) as (card, port):
        for name in types:
            layer = one_layer(shape, GgmlType[name])
            actual = asyncio.run(_layer(port, layer, tokens, seed))
            with started(servers.reference(threads)) as (_, reference):
                expected = asyncio.run(_layer(reference, layer, tokens, seed))
            steps = [*((n, 0) for n in tokens), *((1, before) for before in GROWING)]
            for (n, before), want, got in zip(steps, expected, actual, strict=True):
                error = nmse(want, got)
                row = {"weights": name, "tokens": n, "before": before, "error": error}
                rows.append({**row, "right": bool(error <= LARGEST_ERROR)})
        return rows, ran(card.log), card.log.count(_TAKEN_OVER)
