"""The page of a coordinator while llama-server runs through it, a worker dies and comes back."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.e2e import llama
from tests.e2e.conftest import StartLlamaServer
from tests.server.process import ServerProcess, running
from tests.server.test_metrics import Scraper
from tests.server.test_page import CHROMIUM, Shown, browse, equal
from tools.serving.ports import free_port
from tools.serving.processes import Process, ProgramError, listens, own_command

pytestmark = pytest.mark.upstream

HOST = "127.0.0.1"
# What changes by itself between two requests: what the system has free.
BY_ITSELF = "memory_free_bytes"


def start_worker(port: int) -> Process:
    worker = Process(own_command(port, "-t", "1", "--mem", "1024"))
    worker.wait_until(lambda: listens(port), 30, "a port")
    return worker


def page_and_metrics(scraper: Scraper) -> tuple[Shown, dict[str, float]]:
    """Both as of one state: taken again where something was counted in between."""
    for _ in range(20):
        before = scraper.values()
        shown = Shown(scraper.get("/")[1])
        after = scraper.values()
        left_out = [n for n in (*before, *after) if n.startswith(("process_", BY_ITSELF))]
        same = {k: v for k, v in before.items() if k not in left_out} == {
            k: v for k, v in after.items() if k not in left_out
        }
        if same:
            shown.values = {k: v for k, v in shown.values.items() if not k.startswith(BY_ITSELF)}
            return shown, after
        time.sleep(0.2)
    raise AssertionError("what is counted never stands still")


def check(scraper: Scraper) -> Shown:
    shown, scraped = page_and_metrics(scraper)
    both = equal(shown, scraped)
    assert any(name.startswith("split_exchanges_total") for name in both)
    assert any(name.startswith("split_wait_seconds_total") for name in both)
    return shown


def test_the_page_is_what_the_metrics_are(tmp_path: Path, llama_server: StartLlamaServer) -> None:
    model, port = llama.smollm2("Q4_0"), free_port()
    name = f"0,{HOST}:{port}"
    with contextlib.ExitStack() as stack:
        worker = start_worker(port)
        stack.callback(lambda: worker.stop())
        coordinator: ServerProcess = stack.enter_context(
            running("-t", "1", "--split", f"local,{HOST}:{port}", "--tensor-split", "1,1",
                    "--split-mode", "row", "--metrics-port", "0")
        )  # fmt: skip
        scraper = Scraper(coordinator)
        first = llama_server(model, rpc=f"{HOST}:{coordinator.port}")
        first.generate("Once upon a time", 8)
        shown = check(scraper)
        assert shown.values[f"split_weights_bytes{{{name}}}"] > 1 << 20
        exchanges = shown.values[f"split_exchanges_total{{{name}}}"]
        assert exchanges > 0
        assert "A token, on average" in shown.text
        if CHROMIUM is not None:
            page = Shown(browse(f"http://{HOST}:{scraper.port}/", tmp_path))
            assert page.values[f"split_weights_bytes{{{name}}}"] > 1 << 20
            assert "local" in page.text

        worker.kill()
        with contextlib.suppress(ProgramError):
            first.post("/completion", llama.greedy("And then", 4), timeout=60)
        first.stop()
        coordinator.wait_for(r"trying to reach it again")
        # That it has gone is noticed after it has.
        coordinator.wait_until(
            lambda: scraper.values()["connected_clients"] == 0, 20, "end of the client's connection"
        )
        assert check(scraper).values["connected_clients"] == 0

        worker = start_worker(port)
        coordinator.wait_for(rf"(?s)trying to reach it again.*worker {HOST}:{port}: protocol")
        second = llama_server(model, rpc=f"{HOST}:{coordinator.port}")
        second.generate("Once upon a time", 8)
        shown = check(scraper)
        assert shown.values[f"split_weights_bytes{{{name}}}"] > 1 << 20
        assert shown.values["connected_clients"] >= 1
        second.stop()
