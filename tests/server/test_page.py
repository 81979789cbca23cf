"""The page at the metrics port: what it shows, whom it trusts, and how a browser takes it."""

from __future__ import annotations

import contextlib
import html.parser
import http.client
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpc_server.observability.history import SECONDS, STEP, History
from rpc_server.observability.metrics import ClientStats, ServerStats
from rpc_server.observability.page import HEADERS, render, text
from tests.server.process import ServerProcess, running
from tests.server.test_metrics import Scraper

HOST = "127.0.0.1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[2J&amp;"


class Shown(html.parser.HTMLParser):
    """The numbers of a page by their metric's name, its elements, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.values: dict[str, float] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag == "data":
            self.values[str(given["title"])] = float(str(given["value"]))

    def handle_data(self, data: str) -> None:
        self.text += data


def by_label_values(scraped: dict[str, float]) -> dict[str, float]:
    """Metrics as the page names them: without the names of labels."""
    return {re.sub(r"([{,])\w+=", r"\1", name): value for name, value in scraped.items()}


def equal(shown: Shown, scraped: dict[str, float]) -> set[str]:
    """Names that both have and that say the same; fails for one that is not the same."""
    known = by_label_values(scraped)
    assert shown.values
    for name, value in shown.values.items():
        # What never happened is not among the metrics.
        assert known.get(name, 0.0) == value, name
    return set(shown.values) & set(known)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ServerProcess, Scraper]]:
    with running("-t", "1", "--metrics-port", "0", "--mem", "64") as process:
        yield process, Scraper(process)


def test_it_is_one_page_that_nothing_else_belongs_to(
    server: tuple[ServerProcess, Scraper],
) -> None:
    connection = http.client.HTTPConnection(HOST, server[1].port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        answer = connection.getresponse()
        policy = str(answer.getheader("Content-Security-Policy"))
        assert answer.getheader("Content-Type") == "text/html; charset=utf-8"
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        page = answer.read().decode()
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "script-src" not in policy
    shown = Shown(page)
    tags = {tag for tag, _ in shown.elements}
    assert not tags & {"script", "img", "link", "iframe", "form", "a", "object"}
    for tag, attributes in shown.elements:
        refused = {"style", "src", "href"} | {a for a in attributes if a.startswith("on")}
        assert not refused & set(attributes), (tag, attributes)
    assert "prefers-color-scheme:dark" in page
    assert shown.values["connected_clients"] == 0
    assert server[1].get("/", "POST")[0] == 405
    assert server[1].get("/", "HEAD") == (200, "")


def test_history_is_bounded() -> None:
    stats = ServerStats()
    history = History(stats)
    for number in range(2000):
        stats.gone.tokens += 3
        history.take(1000.0 + number * STEP)
    rates = list(history.rates())
    assert len(rates) == SECONDS / STEP
    assert {round(r.tokens, 6) for r in rates} == {3 / STEP}
    assert rates[-1].when - rates[0].when < SECONDS
    page = render({}, stats, history, 1000.0 + 2000 * STEP)
    assert len(page) < 20_000


def test_many_clients_make_no_long_page() -> None:
    stats = ServerStats()
    for number in range(5000):
        stats.connected(ClientStats(number=number, name=f"client {number}"))
    page = render({}, stats, History(stats), 0.0)
    assert len(page) < 100_000
    assert "and 4900 more" in page


def hostile_page() -> str:
    stats = ServerStats(lost=HOSTILE)
    client = ClientStats(number=1, name=HOSTILE, protocol=HOSTILE, activity=lambda: HOSTILE)
    client.memory, client.upload_bytes = 64 << 20, 32 << 20
    stats.connected(client)
    history = History(stats)
    history.take(0.0)
    client.upload_bytes += 16 << 20
    history.take(1.0)
    part = ("0", HOSTILE)
    values = {
        ("ggml_rpc_info", (HOSTILE,)): 1.0,
        ("ggml_rpc_memory_used_bytes", part): 1.0,
        ("ggml_rpc_split_weights_bytes", part): 5.0,
        ("ggml_rpc_split_round_trip_seconds", part): 1e-4,
        ("ggml_rpc_split_wait_seconds_total", part): 0.5,
        ("ggml_rpc_split_exchanges_total", part): 1000.0,
        ("ggml_rpc_split_tokens_total", part): 10.0,
        ("ggml_rpc_split_graph_seconds_total", part): 1.0,
    }
    return render(values, stats, history, 2.0)


def test_hostile_names_stay_text() -> None:
    shown = Shown(hostile_page())
    assert not {tag for tag, _ in shown.elements} & {"script", "img"}
    assert not [a for _, attributes in shown.elements for a in attributes if a.startswith("on")]
    assert "<script>alert(1)</script>" in shown.text
    assert "\x1b" not in shown.text
    assert len(text("x" * 10_000)) < 200
    # Neither can a name end a header.
    assert all(c.isprintable() or c in "\r\n" for c in HEADERS)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_and_runs_nothing(tmp_path: Path) -> None:
    """The page of hostile names, with a policy as the server sends it, as a browser reads it."""
    page = hostile_page()
    policy = HEADERS.splitlines()[0].partition(": ")[2].replace("'", "&#39;")
    # A file has no headers; the same policy as an element, but for what only headers may say.
    policy = policy.replace("; frame-ancestors &#39;none&#39;", "")
    meta = f"<meta http-equiv=Content-Security-Policy content='{policy}'>"
    name = tmp_path / "page.html"
    name.write_text(page.replace("<head>", f"<head>{meta}", 1))
    dom = browse(name.as_uri(), tmp_path)
    shown = Shown(dom)
    assert not {tag for tag, _ in shown.elements} & {"script", "img"}
    assert "<script>alert(1)</script>" in shown.text


def browse(address: str, folder: Path, *options: str) -> str:
    """Return what Chromium makes of a page."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=500",
         f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
