"""A run as one page that needs nothing else: cases by group, findings with their exchanges.

A finding opens to what was sent and expected and why, what came, the server's last words, and each
message as a line that opens to its bytes, colored by field.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path

from conformance.reports.exchange import Shown, merge_zeros, show
from conformance.suite.results import CaseResult, SuiteRun, Verdict
from conformance.suite.transcript import TranscriptMessage
from protocol.observe.annotate import Span

_MARKS = dict(zip(Verdict, "\u2713\u2260\u2717\u2013\u2013", strict=True))
_ROW = 16
# Of one message so many bytes are shown.
_MOST_BYTES = 1024
# Of one case so many messages; those at the end, where it went wrong, are never left out.
_FIRST_MESSAGES = 20
_LAST_MESSAGES = 20
_COLORS = 6


def to_html(run: SuiteRun) -> str:
    """Return the page."""
    return "".join(_page(run))


def write_html(run: SuiteRun, path: Path) -> None:
    path.write_text(to_html(run), encoding="utf-8")


def _asset(name: str) -> str:
    return resources.files("conformance.reports").joinpath(name).read_text(encoding="utf-8")


def _page(run: SuiteRun) -> Iterator[str]:
    counts = run.counts
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>ggml RPC conformance: {counts[Verdict.FAIL]} failed</title>"
    yield f"<style>{_asset('report.css')}</style></head><body>"
    yield from _head(run)
    yield "<main>"
    groups: dict[int, list[CaseResult]] = {}
    for result in run.results:
        groups.setdefault(result.case.group.number, []).append(result)
    for results in groups.values():
        yield from _group(results)
    yield f"</main><script>{_asset('report.js')}</script></body></html>\n"


def _head(run: SuiteRun) -> Iterator[str]:
    facts = run.facts
    yield "<header><h1>ggml RPC conformance</h1>"
    yield f'<p class="server">{escape(run.server)}</p>'
    version = ".".join(map(str, facts.version))
    told = [
        f"protocol {version}"
        + ("" if facts.version == facts.dialect.version else f", spoken as {facts.dialect.name}"),
        f"{facts.devices} device{'s' * (facts.devices != 1)}",
        "several clients at once" if facts.concurrent else "one client at a time",
        "tensor cache" if facts.cache else "no tensor cache",
    ]
    if facts.split:
        told.append("split extension")
    told.append(f"{len(run.results)} cases in {run.seconds:.1f} s")
    yield f"<p>{escape(' - '.join(told))}</p>"
    if run.deaths:
        yield f'<p class="deaths">The server died or hung in {run.deaths} cases.</p>'
    yield '<nav><button data-show="all">all</button>'
    for verdict, n in run.counts.items():
        if n:
            yield f'<button data-show="{_slug(verdict)}" class="{_slug(verdict)}">'
            yield f"{_MARKS[verdict]} {n} {verdict.value}</button>"
    yield "</nav></header>"


def _slug(verdict: Verdict) -> str:
    return verdict.value.replace(" ", "-")


def _group(results: list[CaseResult]) -> Iterator[str]:
    group = results[0].case.group
    passed = sum(1 for result in results if result.verdict is Verdict.PASS)
    failed = sum(1 for result in results if result.verdict is Verdict.FAIL)
    tally = f"{passed} of {len(results)} passed" + (f", {failed} failed" if failed else "")
    yield f"<section><h2>{group.number} {escape(group.title)} <small>{tally}</small></h2>"
    for result in results:
        yield from _case(result)
    yield "</section>"


def _case(result: CaseResult) -> Iterator[str]:
    case, slug = result.case, _slug(result.verdict)
    yield f'<details class="case {slug}" id="case-{case.id}"><summary>'
    yield f'<span class="mark">{_MARKS[result.verdict]}</span>'
    yield f'<span class="id">{case.id}</span> <span class="name">{escape(case.name)}</span>'
    if result.came:
        yield f' <span class="came">{escape(result.came)}</span>'
    yield "</summary><dl>"
    told = [("sent", case.sends), ("expected", case.expects)]
    if result.came:
        told.append(("came", result.came))
    told += [("why", case.why), ("source", case.source)]
    for name, text in told:
        yield f"<dt>{name}</dt><dd>{escape(text)}</dd>"
    yield "</dl>"
    if result.output:
        yield f"<h3>the server's last words</h3><pre>{escape(result.output)}</pre>"
    if result.verdict in (Verdict.FAIL, Verdict.DIFFERS) and result.transcript.messages:
        yield "<h3>exchange</h3>"
        yield from _exchange(result)
    yield "</details>"


def _exchange(result: CaseResult) -> Iterator[str]:
    transcript = result.transcript
    messages = transcript.messages
    last_sent = max((i for i, m in enumerate(messages) if _tells(m)), default=-1)
    hidden = range(_FIRST_MESSAGES, len(messages) - _LAST_MESSAGES)
    several = len({m.peer for m in messages}) > 1
    for i, message in enumerate(messages):
        if i in hidden:
            if i == hidden.start:
                yield f'<p class="gap">{len(hidden)} messages more</p>'
            continue
        shown = show(message, transcript.dialects[message.peer])
        yield from _message(shown, opened=i == last_sent, several=several)
    if transcript.left_out:
        yield f'<p class="gap">{transcript.left_out} messages more</p>'


def _tells(message: TranscriptMessage) -> bool:
    """Return whether a message may be what the case is about, not the question behind it."""
    return message.sent and bool(message.size) and message.command != "GET_ALIGNMENT"


def _message(shown: Shown, *, opened: bool, several: bool) -> Iterator[str]:
    message = shown.message
    side = "sent" if message.sent else "received"
    arrow = "\u2192" if message.sent else "\u2190"
    peer = f'<span class="peer">{escape(message.peer)}</span>' if several else ""
    time = f'<span class="time">{1000 * message.seconds:.1f} ms</span>'
    line = f'<span class="arrow">{arrow}</span>{peer}<span class="line">{escape(shown.line)}</span>'
    if not message.size:
        yield f'<div class="message note {side}">{line}{time}</div>'
        return
    size = f'<span class="size">{message.size} B</span>'
    yield f'<details class="message {side}"{" open" * opened}>'
    yield f'<summary>{line}{size}{time}</summary><div class="bytes">'
    yield from _hex(shown)
    yield from _fields(shown)
    yield "</div></details>"


def _colored(shown: Shown) -> list[Span]:
    return list(merge_zeros(shown.spans))


def _hex(shown: Shown) -> Iterator[str]:
    """Rows of 16 bytes, each run of one field in its color."""
    data = shown.message.data[:_MOST_BYTES]
    owner = [-1] * len(data)
    spans = _colored(shown)
    for i, span in enumerate(spans):
        for at in range(span.start, min(span.end, len(data))):
            owner[at] = i
    yield '<pre class="hex">'
    for row in range(0, len(data), _ROW):
        yield f"<i>{row:04x}</i>  "
        at, end = row, min(row + _ROW, len(data))
        while at < end:
            stop = at
            while stop < end and owner[stop] == owner[at]:
                stop += 1
            text = data[at:stop].hex(" ")
            if owner[at] >= 0:
                span = spans[owner[at]]
                title = escape(f"{span.path} = {span.value}" if span.value else span.path)
                zero = " z" if not any(data[at:stop]) else ""
                yield f'<b class="c{owner[at] % _COLORS}{zero}" title="{title}">{text}</b>'
            else:
                yield text
            at = stop
            yield " " if at < end else ""
        pad = "   " * (row + _ROW - end)
        ascii_text = "".join(chr(b) if 32 <= b < 127 else "\u00b7" for b in data[row:end])
        yield f"{pad}  <i>{escape(ascii_text)}</i>\n"
    left = shown.message.size - len(data)
    if left:
        yield f"<i>... {left} bytes more</i>\n"
    yield "</pre>"


def _fields(shown: Shown) -> Iterator[str]:
    yield '<table class="fields">'
    for i, span in enumerate(_colored(shown)):
        if span.start >= _MOST_BYTES:
            break
        zero = ' class="z"' if span.value in ("0", "0x0", "zeros") else ""
        yield f'<tr{zero}><td class="at">{span.start}</td>'
        yield f'<td><b class="c{i % _COLORS}">{escape(span.path)}</b></td>'
        yield f"<td>{escape(span.value)}</td></tr>"
    yield "</table>"
