"""What the server counts, over HTTP: a page, ``/metrics`` for Prometheus, ``/healthz`` and more.

The server's statistics (``metrics.py``) are plain integers; a collector turns them into Prometheus'
families when somebody asks. All of it runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

from client.errors import MissingPackageError
from rpc_server import __version__
from rpc_server.devices.cpu.pages import large_bytes
from rpc_server.observability.history import History
from rpc_server.observability.metrics import GRAPH_BUCKETS
from rpc_server.observability.page import HEADERS, render
from rpc_server.session.context import ServerContext

# A request of a scraper is a few hundred bytes, and it comes at once.
_LONGEST_REQUEST = 8 << 10
_PATIENCE = 5.0
_MOST_CONNECTIONS = 16

Response = tuple[str, str, bytes]


async def serve(
    context: ServerContext, sockets: Iterable[socket.socket]
) -> list[asyncio.AbstractServer]:
    """Answer HTTP on ``sockets``, which listen (see listening). Raises MissingPackageError."""
    try:
        import prometheus_client
    except ImportError:
        raise MissingPackageError("--metrics-port", "prometheus-client", "metrics") from None
    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    for collector in (
        Collector(context),
        prometheus_client.ProcessCollector(registry=None),
        prometheus_client.PlatformCollector(registry=None),
    ):
        registry.register(collector)

    def metrics() -> Response:
        return "200 OK", prometheus_client.CONTENT_TYPE_LATEST, prometheus_client.generate_latest(
            registry
        )  # fmt: skip

    def health() -> Response:
        if context.stats.draining:
            return "503 Service Unavailable", "text/plain", b"draining\n"
        if context.stats.lost:
            return "503 Service Unavailable", "text/plain", f"{context.stats.lost}\n".encode()
        return "200 OK", "text/plain", b"ok\n"

    history = History(context.stats)
    history.start()

    def page() -> Response:
        families = Collector(context).collect()
        samples = [sample for family in families for sample in family.samples]
        values = {(s.name, tuple(s.labels.values())): float(s.value) for s in samples}
        html = render(values, context.stats, history, time.monotonic())
        return "200 OK", f"text/html; charset=utf-8\r\n{HEADERS}", html.encode()

    pages = {"/": page, "/metrics": metrics, "/healthz": health, "/readyz": health}
    # Connections that have not had their answer, the oldest first.
    present: dict[asyncio.Timeout, None] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
            try:
                async with asyncio.timeout(_PATIENCE) as patience:
                    present[patience] = None
                    if len(present) > _MOST_CONNECTIONS:
                        # Who asks is answered at once, so the oldest has not asked, or doesn't
                        # take its answer. It must not keep a scraper out.
                        oldest = next(iter(present))
                        del present[oldest]
                        oldest.reschedule(0.0)
                    await _exchange(reader, writer, pages)
            finally:
                present.pop(patience, None)
                writer.close()

    return [await asyncio.start_server(answer, sock=s, limit=_LONGEST_REQUEST) for s in sockets]


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pages: dict[str, Any]
) -> None:
    """One request, one answer; the connection ends after it."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        head = b""
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    method, path = (words[0], words[1].partition("?")[0]) if len(words) == 3 else ("", "")
    if method not in ("GET", "HEAD"):
        status, kind, body = "405 Method Not Allowed", "text/plain", b"GET only\n"
    elif path in pages:
        status, kind, body = pages[path]()
    else:
        status, kind, body = "404 Not Found", "text/plain", b"/, /metrics, /healthz, /readyz\n"
    lines = (
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    )
    writer.write("\r\n".join((*lines, "", "")).encode() + (b"" if method == "HEAD" else body))
    await writer.drain()


class Collector:
    """The server's statistics as Prometheus' families."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def collect(self) -> Iterable[Any]:
        """Yield all families; names begin with ``ggml_rpc_``."""
        yield from self._clients()
        yield from self._work()
        yield from self._memory()
        yield from self._cache()
        yield from self._split()

    def _clients(self) -> Iterator[Any]:
        stats = self._context.stats
        yield _gauge("info", "This server.", [((__version__,), 1)], "version")
        yield _gauge("start_time_seconds", "When it started.", [((), stats.started)])
        yield _gauge("draining", "Whether it is about to stop.", [((), stats.draining)])
        yield _gauge("device_lost", "Whether a device failed for good.", [((), bool(stats.lost))])
        yield _gauge("connected_clients", "Clients that are connected.", [((), len(stats.clients))])
        yield _counter("clients", "Clients that were let in.", [((), stats.clients_total)])
        yield _counter(
            "clients_refused", "Connections that were not let in.", _by(stats.refused), "reason"
        )
        yield _counter(
            "errors",
            "Requests that ended a connection, and buffers there was no room for.",
            _by(stats.errors),
            "kind",
        )
        yield _counter(
            "limits_reached", "Clients that were at a limit.", _by(stats.limits), "option"
        )

    def _work(self) -> Iterator[Any]:
        total = self._context.stats.total()
        yield _counter("received_bytes", "Bytes that clients sent.", [((), total.bytes_in)])
        yield _counter("sent_bytes", "Bytes sent to clients.", [((), total.bytes_out)])
        yield _counter("commands", "Requests.", _by(total.by_command()), "command")
        yield _counter("graph_nodes", "Nodes of the graphs computed.", [((), total.nodes)])
        yield _histogram(
            "graph_seconds", "Time that graphs ran.", total.graph_times, total.graph_seconds
        )
        yield _counter("programs_run", "Runs of split programs.", [((), total.programs_run)])
        text = "Graphs whose plan was there already (hit), or was made (miss)."
        yield _lookups("plans", text, total.plan_hits, total.plan_misses)
        yield _counter("plan_seconds", "Time that making plans took.", [((), total.plan_seconds)])
        yield _counter("tokens", "Rows of logits that were read.", [((), total.tokens)])
        yield _counter("uploads", "Tensors that were uploaded.", [((), total.uploads)])
        yield _counter("uploaded_bytes", "Bytes of them.", [((), total.upload_bytes)])
        text = "Tensors offered by hash."
        yield _lookups("cache_lookups", text, total.cache_hits, total.cache_misses)
        yield _counter(
            "cache_served_bytes",
            "Bytes of those that were found, in the cache or in --models.",
            [((), total.cache_hit_bytes)],
        )
        yield _counter(
            "models_served", "Tensors of them that were in --models.", [((), total.model_hits)]
        )
        yield _counter("models_served_bytes", "Bytes of them.", [((), total.model_hit_bytes)])
        yield _counter("cache_stored", "Tensors written to the cache.", [((), total.cache_stored)])
        yield _counter("cache_stored_bytes", "Bytes of them.", [((), total.cache_stored_bytes)])

    def _memory(self) -> Iterator[Any]:
        used, limit, free = [], [], []
        for number, budget in enumerate(self._context.budgets):
            labels = (str(number), budget.device.name)
            left, total = budget.memory()
            used.append((labels, budget.used))
            free.append((labels, left))
            limit.append((labels, total))
        graphs = self._context.graph_memory
        yield _gauge("graph_memory_bytes", "Messages, plans, programs.", [((), graphs.used)])
        yield _gauge("graph_memory_limit_bytes", "Memory for them.", [((), graphs.limit)])
        names = ("device", "name")
        yield _gauge("memory_used_bytes", "Memory that clients hold.", used, *names)
        yield _gauge("memory_free_bytes", "Memory that is left for them.", free, *names)
        yield _gauge("memory_limit_bytes", "Memory that there is for them.", limit, *names)
        large = [((), large_bytes())]
        yield _gauge("large_page_bytes", "Memory last seen in large pages.", large)

    def _cache(self) -> Iterator[Any]:
        cache = self._context.cache
        usage = cache.usage if cache is not None else None
        if cache is not None and usage is not None:
            in_all = usage.nbytes + usage.unfinished
            yield _gauge("cache_bytes", "Bytes in the folder of the cache.", [((), in_all)])
            most = [((), cache.most_of_one_user)]
            yield _gauge("cache_most_bytes_of_an_address", "Of what its clients used last.", most)
            yield _gauge("cache_small_files", "Files below 1 MiB there.", [((), usage.small)])

    def _split(self) -> Iterator[Any]:
        """Yield what SPLIT_STATUS tells, of devices that split."""
        parts: list[tuple[tuple[str, str], Any]] = []
        whole: list[tuple[tuple[str, str], Any]] = []
        for number, budget in enumerate(self._context.budgets):
            if not budget.device.n_parts:
                continue
            status = budget.device.split_status()
            whole.append(((str(number), budget.device.name), status))
            for part in status["parts"][: status["n_parts"]]:
                name = bytes(part["name"]).split(b"\0", 1)[0].decode("utf-8", "replace")
                parts.append(((str(number), name), part))
        if not parts:
            return
        names = ("device", "worker")
        for field, name, help_ in (
            ("tokens", "split_tokens", "Tokens that parts computed together."),
            ("graph_seconds", "split_graph_seconds", "Time that such graphs ran."),
        ):
            values = [(labels, status[field]) for labels, status in whole]
            yield _counter(name, help_, values, "device", "name")
        for field, name, help_ in (
            ("exchanges", "split_exchanges", "Exchanges with a worker."),
            ("bytes_sent", "split_sent_bytes", "Bytes sent to a worker."),
            ("bytes_received", "split_received_bytes", "Bytes received from a worker."),
            ("wait_seconds", "split_wait_seconds", "Time that a worker was waited for."),
        ):
            yield _counter(name, help_, [(labels, part[field]) for labels, part in parts], *names)
        for field, name, help_ in (
            ("bytes", "split_weights_bytes", "Weights that a worker holds."),
            ("round_trip_seconds", "split_round_trip_seconds", "Round trip at the start."),
        ):
            yield _gauge(name, help_, [(labels, part[field]) for labels, part in parts], *names)


Values = Iterable[tuple[tuple[str, ...], float]]


def _by(counts: dict[str, int]) -> Values:
    return [((name,), n) for name, n in counts.items()]


def _counter(name: str, help_: str, values: Values, *labels: str) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(f"ggml_rpc_{name}", help_, labels=labels), values)


def _lookups(name: str, help_: str, hits: int, misses: int) -> Any:
    return _counter(name, help_, [(("hit",), hits), (("miss",), misses)], "result")


def _gauge(name: str, help_: str, values: Values, *labels: str) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(f"ggml_rpc_{name}", help_, labels=labels), values)


def _filled(family: Any, values: Values) -> Any:
    for labels, value in values:
        family.add_metric(labels, float(value))
    return family


def _histogram(name: str, help_: str, counts: list[int], total: float) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    bounds = [*map(str, GRAPH_BUCKETS), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
    family = HistogramMetricFamily(f"ggml_rpc_{name}", help_)
    family.add_metric((), buckets, total)
    return family
