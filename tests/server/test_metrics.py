"""What is counted, and how it is shown: to Prometheus, to who asks for health, in the log."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import signal
import socket
import struct
import sys
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protocol.commands import Command
from rpc_server.devices.cpu.pages import large_page
from rpc_server.observability.exporter import Collector
from rpc_server.observability.logs import ClientLog, JsonFormatter
from rpc_server.observability.metrics import GRAPH_BUCKETS
from rpc_server.observability.upload_meter import UploadMeter
from tests.server.clients import Bystander, endless
from tests.server.process import ServerProcess, Wire, running, tensor
from tests.split.cluster import Coordinator, WorkerProcess

HOST = "127.0.0.1"


class Scraper:
    """The HTTP side of a server."""

    def __init__(self, server: ServerProcess) -> None:
        self.port = int(server.wait_for(r"metrics at http://\S+:(\d+)/metrics")[1])

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def values(self) -> dict[str, float]:
        """By name and labels, as in the text."""
        status, text = self.get("/metrics")
        assert status == 200
        found = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            for sample in family.samples:
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                name = f"{sample.name}{{{labels}}}" if labels else sample.name
                assert name not in found
                found[name.removeprefix("ggml_rpc_")] = sample.value
        return found


@pytest.fixture(scope="module")
def scraped() -> Iterator[tuple[ServerProcess, Scraper]]:
    options = ("--threads", "1", "--metrics-port", "0", "--mem", "64", "--mem-per-client", "8")
    with running(*options) as server:
        yield server, Scraper(server)


def test_what_a_client_does_is_counted(scraped: tuple[ServerProcess, Scraper]) -> None:
    server, scraper = scraped
    before = scraper.values()
    with Bystander(server) as client:
        for _ in range(3):
            client.check()
        during = scraper.values()
    server.wait_for(r"disconnected; freed 1 buffers")
    after = scraper.values()

    def grown(name: str, now: dict[str, float] = after) -> float:
        return now.get(name, 0) - before.get(name, 0)

    assert grown("connected_clients", during) == 1
    assert grown("connected_clients") == 0
    assert during["memory_used_bytes{device=0,name=CPU}"] == 1 << 14
    assert after["memory_used_bytes{device=0,name=CPU}"] == 0
    assert after["memory_limit_bytes{device=0,name=CPU}"] == 64 << 20
    assert grown("clients_total") == 1
    # The first check is at the start.
    assert grown("commands_total{command=GRAPH_RECOMPUTE}") == 4
    assert grown("commands_total{command=GRAPH_COMPUTE}") == 1
    assert grown("commands_total{command=GET_TENSOR}") == 8
    assert grown("commands_total{command=SET_TENSOR}") == 1
    assert grown("uploads_total") == 1
    assert grown("uploaded_bytes_total") == 4096
    assert grown("graph_seconds_count") == 5
    assert grown("graph_nodes_total") == 5
    assert 0 < grown("graph_seconds_sum") < 10
    assert grown("graph_seconds_bucket{le=+Inf}") == 5
    assert grown("plans_total{result=miss}") == 1
    assert grown("plans_total{result=hit}") == 4
    assert 4096 < grown("received_bytes_total") < 4096 + 8000
    assert 8 * 4096 < grown("sent_bytes_total") < 8 * 4096 + 500
    # What is gone is still counted.
    for name, value in during.items():
        if name.endswith("_total") and "process" not in name and "python" not in name:
            assert after[name] >= value, name


def test_large_pages_are_whole_ones(scraped: tuple[ServerProcess, Scraper]) -> None:
    assert scraped[1].values()["large_page_bytes"] % (large_page() or 1) == 0


def test_buckets_are_cumulated(scraped: tuple[ServerProcess, Scraper]) -> None:
    values = scraped[1].values()
    buckets = [v for name, v in values.items() if name.startswith("graph_seconds_bucket")]
    assert len(buckets) == len(GRAPH_BUCKETS) + 1
    assert buckets == sorted(buckets)


def test_what_goes_wrong_is_counted_by_kind(scraped: tuple[ServerProcess, Scraper]) -> None:
    server, scraper = scraped
    before = scraper.values()
    with Wire(server.port) as wire:
        wire.send(77, b"")
        assert wire.closed_by_server()
    with Wire(server.port) as wire:
        handle, base = wire.alloc(64)
        wire.send(Command.GRAPH_COMPUTE, wire.graph([], [tensor(1, (8,), handle, base + 64)]))
        assert wire.closed_by_server()
    with Wire(server.port) as wire, pytest.raises(MemoryError):
        wire.alloc(9 << 20)
    after = scraper.values()
    for kind in ("protocol", "graph", "no_room"):
        name = f"errors_total{{kind={kind}}}"
        assert after[name] - before.get(name, 0) == 1, kind
    name = "limits_reached_total{option=--mem-per-client}"
    assert after[name] - before.get(name, 0) == 1


def test_health_and_other_pages(scraped: tuple[ServerProcess, Scraper]) -> None:
    server, scraper = scraped
    assert scraper.get("/healthz") == (200, "ok\n")
    assert scraper.get("/readyz?x=1") == (200, "ok\n")
    assert scraper.get("/healthz", "HEAD") == (200, "")
    assert scraper.get("/")[0] == 200
    assert scraper.get("/favicon.ico")[0] == 404
    assert scraper.get("/metrics", "POST")[0] == 405
    for garbage in (b"\r\n\r\n", b"GET\r\n\r\n", bytes(range(256)) * 64, b"GET / HTTP/1.1\r\n"):
        with socket.create_connection((HOST, scraper.port), 10) as sock:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass
    assert scraper.get("/healthz")[0] == 200
    assert "Traceback" not in server.log


def test_it_is_not_ready_while_it_drains() -> None:
    options = ("--threads", "1", "--metrics-port", "0", "--drain-seconds", "30")
    with running(*options) as server, Wire(server.port) as wire:
        scraper = Scraper(server)
        wire.send(Command.GRAPH_COMPUTE, endless(wire))
        server.wait_until(
            lambda: scraper.values().get("commands_total{command=GRAPH_COMPUTE}") == 1, 60, "graph"
        )
        server.child.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        assert scraper.get("/healthz") == (503, "draining\n")
        assert scraper.values()["draining"] == 1
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(60) == 0


@pytest.mark.slow
def test_a_coordinator_counts_its_workers() -> None:
    with WorkerProcess() as worker, Coordinator([worker], "--metrics-port", "0") as coordinator:
        values = Scraper(coordinator).values()
    labels = f"{{device=0,worker={worker.address}}}"
    assert values[f"split_exchanges_total{labels}"] == 0
    assert values[f"split_round_trip_seconds{labels}"] > 0


def test_without_prometheus_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rpc_server.__main__ import main

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["--port", "0", "--metrics-port", "0"]) == 1
    assert "pip install 'ggml-rpc-server[metrics]'" in capsys.readouterr().err


# -- logs


def test_a_log_of_objects() -> None:
    with running("--threads", "1", "--log-format", "json", "--max-message", "1") as server:
        with Wire(server.port) as wire:
            wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 2 << 20))
            assert wire.closed_by_server()
        server.wait_for("closing the connection")
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line["level"] == "error")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert re.fullmatch(r"client \d+ \(127\.0\.0\.1:\d+\)", line["client"])
    assert line["message"].startswith("GRAPH_COMPUTE of 2097152 bytes, the limit is 1048576")
    assert (line["event"], line["kind"], line["option"]) == ("refused", "limit", "--max-message")


def test_a_load_of_weights_names_its_client(caplog: pytest.LogCaptureFixture) -> None:
    """For people the line begins with the client, for programs that is a field."""
    name = "client 1 (10.0.0.7:5)"
    meter = UploadMeter(ClientLog(logging.getLogger("some"), name))
    with caplog.at_level(logging.INFO):
        meter.upload(3 << 20, cached=False)
        meter.upload(1 << 20, cached=True)
        meter.other()
    (record,) = caplog.records
    text = r"2 tensors, 4\.0 MiB in \d+\.\d s \(\d+ MiB/s\), 1\.0 MiB of it from the cache"
    assert re.fullmatch(re.escape(f"{name}: ") + text, record.getMessage())
    line = json.loads(JsonFormatter().format(record))
    assert line["client"] == name
    assert re.fullmatch(text, line["message"])


def test_traces_and_odd_names_stay_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log = ClientLog(logging.getLogger("some"), "client 1 (fe80::1%eth0:5)")
    with caplog.at_level(logging.DEBUG, "some"):
        log.log(logging.ERROR, "%s", 'a "quoted"\nline', error=ValueError("bad"))
        log.info("%s", "100 % plain")
    first, second = (JsonFormatter().format(record) for record in caplog.records)
    assert "\n" not in first
    parsed = json.loads(first)
    assert parsed["client"] == "client 1 (fe80::1%eth0:5)"
    assert parsed["message"] == 'a "quoted"\nline'
    assert "ValueError: bad" in parsed["trace"]
    assert json.loads(second)["message"] == "100 % plain"
    assert caplog.records[1].getMessage() == "client 1 (fe80::1%eth0:5): 100 % plain"


def test_the_collector_needs_no_server() -> None:
    """Names are what docs/operating.md promises; each occurs once."""
    from protocol.negotiation import Negotiator
    from rpc_server.session.context import ServerContext

    context = ServerContext(budgets=[], negotiator=Negotiator(None))
    names = [family.name for family in Collector(context).collect()]
    assert len(names) == len(set(names))
    assert all(name.startswith("ggml_rpc_") for name in names)


def test_connections_that_say_nothing_keep_no_scraper_out(
    scraped: tuple[ServerProcess, Scraper],
) -> None:
    with contextlib.ExitStack() as held:
        silent = [
            held.enter_context(socket.create_connection((HOST, scraped[1].port), 10))
            for _ in range(64)
        ]
        assert scraped[1].get("/healthz")[0] == 200
        # The oldest of them made room.
        silent[0].settimeout(10)
        assert silent[0].recv(1) == b""
        assert scraped[1].get("/healthz")[0] == 200
