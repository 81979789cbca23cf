"""tools.bench.exchange: exchanges with a card that does nothing go through, by either way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.bench import exchange
from tools.bench.servers import answers
from tools.serving.ports import free_port
from tools.serving.processes import Process, emulation_command


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Process, int]]:
    port = free_port()
    command = emulation_command(port, "--log-level", "debug")
    with Process(command, env=exchange.NO_CARD) as process:
        process.wait_until(lambda: answers(port), 60, "answer to HELLO")
        yield process, port


@pytest.mark.parametrize("programs", [True, False])
async def test_both_ways(
    server: tuple[Process, int], programs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "EXCHANGES", 5)
    process, port = server
    seconds = await exchange.seconds_of_exchanges(port, programs=programs, runs=3)
    assert len(seconds) == 3
    assert all(s > 0 for s in seconds)
    assert ("made 5 exchanges" in process.log) or not programs
    assert "ERROR" not in process.log


def test_the_table() -> None:
    figures = [exchange.Figures("a program", 55.4e-6, 50e-6)]
    assert exchange.exchange_table(figures).splitlines()[-1] == "| a program | 55 | 50 |"
