"""The page for people: what ``/metrics`` says, and the clients, as HTML without any script.

All of it is text that was made here: names of clients, devices and parts go through one function
that escapes them. Nothing is loaded from elsewhere, and the headers forbid it. Every number that
``/metrics`` has too stands in a ``data`` element with that metric's name and value.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence

from protocol.text import printable
from rpc_server.observability.history import SECONDS, History, Rate
from rpc_server.observability.metrics import ClientStats, ServerStats

# By name and values of labels, as in /metrics.
Values = Mapping[tuple[str, tuple[str, ...]], float]

_REFRESH_SECONDS = 5
# Clients that are shown; the rest is counted.
_MOST_CLIENTS = 100
_LONGEST_NAME = 120
_WIDE, _HIGH = 600, 90

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6570;--paper:#fff;--line:#d8dee4;
--a:#1a6fb5;--b:#b35900;--c:#8a94a0}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa5b1;--paper:#14181d;
--line:#333c46;--a:#5aa9e6;--b:#e8954a;--c:#66717d}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);
margin:1.5rem auto;max-width:60rem;padding:0 1rem}
h1{font-size:1.3rem;margin:0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
p{margin:.2rem 0;color:var(--soft)}.bad{color:var(--b);font-weight:600}
table{border-collapse:collapse;width:100%}th{font-weight:500;color:var(--soft);text-align:left}
th,td{padding:.2rem .6rem .2rem 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:0}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.15rem}
svg{width:100%;height:auto;display:block}text{fill:var(--soft);font-size:11px}
.a{fill:var(--a)}.b{fill:var(--b)}.c{fill:var(--c)}.l{stroke:var(--a);fill:none;stroke-width:1.5}
.x{stroke:var(--line)}progress{width:8rem;accent-color:var(--a)}
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = "\r\n".join(
    (
        f"Content-Security-Policy: default-src 'none'; style-src 'sha256-{_HASH}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options: nosniff",
        "Referrer-Policy: no-referrer",
    )
)


def render(values: Values, stats: ServerStats, history: History, now: float) -> str:
    """Return the page; ``now`` is monotonic seconds, as clients' times are."""
    rates = list(history.rates())
    parts = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f"<meta http-equiv=refresh content={_REFRESH_SECONDS}>",
        "<meta name=viewport content='width=device-width'><title>ggml-rpc-server</title>",
        f"<style>{_STYLE}</style></head><body>",
        _head(values, stats),
        _figures(values, rates),
        _speed(rates, now),
        _clients(stats, history, now),
        _devices(values),
        _split(values),
        "</body></html>\n",
    )
    return "".join(parts)


def text(value: str) -> str:
    """Return a name as it may stand anywhere in the page, attributes too."""
    return html.escape(printable(value[:_LONGEST_NAME]), quote=True)


def _value(values: Values, name: str, labels: tuple[str, ...] = (), shown: str = "") -> str:
    """A number of /metrics, as ``shown`` (by itself if that is empty)."""
    number = values.get((f"ggml_rpc_{name}", labels), 0.0)
    told = text(f"{name}{{{','.join(labels)}}}" if labels else name)
    return f'<data value="{number!r}" title="{told}">{shown or f"{number:,.0f}"}</data>'


def _get(values: Values, name: str, labels: tuple[str, ...] = ()) -> float:
    return values.get((f"ggml_rpc_{name}", labels), 0.0)


def _bytes(size: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], figures: int = 1) -> str:
    """A table of cells that are HTML already; columns from ``figures`` on are numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        marks = ("" if i < figures else " class=n" for i in range(len(cells)))
        inside = "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True))
        return f"<tr>{inside}</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(r, 'td') for r in rows)}</table>"


def _head(values: Values, stats: ServerStats) -> str:
    version = next((labels[0] for name, labels in values if name == "ggml_rpc_info"), "")
    said = ""
    if stats.lost:
        said = f"<p class=bad>a device is lost: {text(stats.lost)}</p>"
    elif stats.draining:
        said = "<p class=bad>is about to stop</p>"
    return f"<h1>ggml-rpc-server {text(version)}</h1>{said}"


def _figures(values: Values, rates: Sequence[Rate]) -> str:
    graphs = _get(values, "graph_seconds_count")
    seconds = _get(values, "graph_seconds_sum")
    planned = _get(values, "plans_total", ("miss",))
    each = _duration(seconds / graphs) if graphs else "-"
    planning = _get(values, "plan_seconds_total")
    lately = f"{rates[-1].tokens:.1f}" if rates else "-"

    def size(name: str) -> str:
        return _value(values, name, shown=_bytes(_get(values, name)))

    cells = [
        ("clients", _value(values, "connected_clients")),
        ("tokens/s now", lately),
        ("tokens", _value(values, "tokens_total")),
        ("graphs", _value(values, "graph_seconds_count")),
        ("a graph takes", _value(values, "graph_seconds_sum", shown=each)),
        ("plans made", _value(values, "plans_total", ("miss",))),
        (
            "planning one takes",
            _value(
                values,
                "plan_seconds_total",
                shown=_duration(planning / planned) if planned else "-",
            ),
        ),
        ("uploaded", size("uploaded_bytes_total")),
        ("from the cache", size("cache_served_bytes_total")),
        ("found in the cache", _value(values, "cache_lookups_total", ("hit",))),
        ("not found there", _value(values, "cache_lookups_total", ("miss",))),
    ]
    if ("ggml_rpc_cache_bytes", ()) in values:
        cells.append(("cache on disk", size("cache_bytes")))
    inside = "".join(f"<div><dt>{name}</dt><dd>{cell}</dd></div>" for name, cell in cells)
    return f"<h2>Since the start</h2><dl>{inside}</dl>"


def _speed(rates: Sequence[Rate], now: float) -> str:
    most = max((r.tokens for r in rates), default=0.0)

    def at(rate: Rate) -> str:
        x = _WIDE * (1 - min(1.0, (now - rate.when) / SECONDS))
        return f"{x:.1f},{_HIGH - 10 - (_HIGH - 25) * rate.tokens / max(most, 1e-9):.1f}"

    line = " ".join(map(at, rates))
    return (
        "<h2>Tokens a second, the last ten minutes</h2>"
        f"<svg viewBox='0 0 {_WIDE} {_HIGH}' role=img aria-label='tokens a second'>"
        f"<line class=x x1=0 y1={_HIGH - 10} x2={_WIDE} y2={_HIGH - 10} />"
        f"<polyline class=l points='{line}' /><text x=0 y=11>most: {most:.1f}</text></svg>"
    )


def _clients(stats: ServerStats, history: History, now: float) -> str:
    def row(client: ClientStats) -> tuple[str, ...]:
        sent = client.upload_bytes + client.cache_hit_bytes
        rate = history.upload_rate(client.number)
        # How much there will be nobody says: what was allocated bounds it.
        bar = ""
        if rate >= 1 << 20 and client.memory:
            done = min(sent, client.memory)
            bar = f" <progress value={done} max={client.memory}></progress>"
        arriving = f" ({_bytes(rate)}/s)" if rate >= 1 << 20 else ""
        return (
            text(client.name),
            text(client.activity()),
            text(client.protocol),
            _duration(now - client.since),
            _bytes(client.memory),
            f"{_bytes(sent)}{arriving}{bar}",
            str(client.graphs + client.programs_run),
            str(client.tokens),
        )

    shown = list(stats.clients.values())
    head = ("client", "does", "protocol", "for", "memory", "uploaded", "graphs", "tokens")
    more = len(shown) - _MOST_CLIENTS
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    rows = map(row, shown[:_MOST_CLIENTS])
    return f"<h2>Clients</h2>{_table(head, rows, 3)}{rest}"


def _devices(values: Values) -> str:
    names = ("memory_used_bytes", "memory_free_bytes", "memory_limit_bytes")
    devices = [labels for name, labels in values if name == "ggml_rpc_memory_used_bytes"]
    rows = [
        (
            f"{text(labels[0])}: {text(labels[1])}",
            *(_value(values, n, labels, _bytes(_get(values, n, labels))) for n in names),
        )
        for labels in devices
    ]
    return f"<h2>Devices</h2>{_table(('device', 'clients hold', 'free', 'in all'), rows)}"


# -- a coordinator's parts


def _split(values: Values) -> str:
    parts = [labels for name, labels in values if name == "ggml_rpc_split_weights_bytes"]
    if not parts:
        return ""
    held = sum(_get(values, "split_weights_bytes", labels) for labels in parts)

    def row(labels: tuple[str, ...]) -> tuple[str, ...]:
        size = _get(values, "split_weights_bytes", labels)
        trip = _get(values, "split_round_trip_seconds", labels)
        waited = _get(values, "split_wait_seconds_total", labels)
        # This server's own share is neither sent nor waited for.
        return (
            text(labels[1]),
            _value(values, "split_weights_bytes", labels, _bytes(size)),
            f"{100 * size / held:.1f} %" if held else "-",
            _value(
                values, "split_round_trip_seconds", labels, f"{trip * 1e6:.0f} us" if trip else "-"
            ),
            _value(values, "split_exchanges_total", labels),
            _value(values, "split_wait_seconds_total", labels, _duration(waited) if trip else "-"),
        )

    head = ("part", "weights", "share", "round trip", "exchanges", "waited for")
    table = _table(head, map(row, parts))
    return f"<h2>Parts</h2>{table}{''.join(_timeline(values, *d) for d in _by_device(parts))}"


def _by_device(parts: Sequence[tuple[str, ...]]) -> list[tuple[str, list[tuple[str, ...]]]]:
    devices = dict.fromkeys(labels[0] for labels in parts)
    return [(d, [labels for labels in parts if labels[0] == d]) for d in devices]


def _timeline(values: Values, device: str, parts: Sequence[tuple[str, ...]]) -> str:
    """A token on average: of each worker what is waited for, of that what round trips take."""
    whole = next(
        (labels for n, labels in values if n == "ggml_rpc_split_tokens_total"
         and labels[0] == device), None,
    )  # fmt: skip
    tokens = _get(values, "split_tokens_total", whole or ())
    if whole is None or not tokens:
        return ""
    token = _get(values, "split_graph_seconds_total", whole) / tokens
    left, row_height = 150, 22
    lanes: list[tuple[int, str, tuple[tuple[str, float], ...]]] = []
    longest = 0.0
    workers = [p for p in parts if _get(values, "split_round_trip_seconds", p)]
    for number, labels in enumerate(workers):
        trip = _get(values, "split_round_trip_seconds", labels)
        exchanges = _get(values, "split_exchanges_total", labels) / tokens
        waited = min(token, _get(values, "split_wait_seconds_total", labels) / tokens)
        longest = max(longest, waited)
        on_the_way = min(waited, exchanges * trip)
        lanes.append((number, labels[1], (("b", on_the_way), ("a", waited - on_the_way))))
    lanes.append((len(workers), "this server", (("c", max(0.0, token - longest)),)))
    drawn = []
    for number, name, pieces in lanes:
        y = 4 + number * row_height
        # Text in a picture has no width of its own: a long name would run into the bars.
        short = name if len(name) <= 22 else name[:21] + "…"
        drawn.append(f"<text x=0 y={y + 12}>{text(short)}</text>")
        start = 0.0
        for kind, seconds in pieces:
            x, wide = ((_WIDE - left) * min(1.0, share / token) for share in (start, seconds))
            drawn.append(
                f"<rect class={kind} x={left + x:.1f} y={y} width={wide:.1f} height=16>"
                f"<title>{text(name)}: {_duration(seconds)}</title></rect>"
            )
            start += seconds
    high = 8 + len(lanes) * row_height
    return (
        f"<h2>A token, on average: {_duration(token)}</h2><svg viewBox='0 0 {_WIDE} {high}' "
        f"role=img aria-label='a token by part'>{''.join(drawn)}</svg>"
        "<p>Of each worker the time that it is waited for: on the way, then computing; below, what "
        "this server does meanwhile or alone.</p>"
    )
