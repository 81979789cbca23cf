"""How far long things are: a bar on a terminal, lines elsewhere; in the log if nobody shows it."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest
from rich.console import Console

from rpc_server.observability.progress import BYTES, Task, bars, begin, drawn, shown, under_way

GIB = 1 << 30


class Terminal(io.StringIO):
    """What programs take for one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a task reads."""
    now = [100.0]
    monkeypatch.setattr("rpc_server.observability.progress.time.monotonic", lambda: now[0])
    return now


def test_a_line_says_how_much_how_fast_and_how_long(clock: list[float]) -> None:
    # Others of this process may have something under way.
    before = under_way()
    with begin("indexing models", 4 * GIB, BYTES) as task:
        assert task.describe() == "indexing models: 0.0 of 4.0 GiB"
        clock[0] += 8
        task.advance(GIB, "a.gguf")
        assert task.describe() == "indexing models: 1.0 of 4.0 GiB, 128 MiB/s, 24 s left: a.gguf"
        assert [t for t in under_way() if t not in before] == [task]
    assert task not in under_way()


@pytest.mark.parametrize(
    ("total", "unit", "done", "text"),
    [
        (40, "", 10, "10 of 40, 30 s left"),
        (None, "", 10, "10"),
        (None, BYTES, 5 << 20, "5.0 MiB, 0 MiB/s"),
        (100_000, "", 10, "10 of 100000, 27.8 h left"),
        (400, "", 10, "10 of 400, 6 min left"),
        (10, "", 10, "10 of 10"),
    ],
)
def test_amounts(clock: list[float], total: int | None, unit: str, done: int, text: str) -> None:
    with begin("it", total, unit) as task:
        clock[0] += 10
        task.advance(done)
        assert task.describe() == f"it: {text}"


def test_more_may_be_expected_later() -> None:
    with begin("compiling") as task:
        task.expect(2)
        task.expect(1)
        task.advance(1)
        assert task.numbers() == (1, 3)


def test_where_nobody_shows_it_the_log_has_a_line_now_and_then(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), begin("it", 50) as task:
        for _ in range(50):
            clock[0] += 1
            task.advance()
    assert len(caplog.messages) == 5
    assert caplog.messages[0] == "it: 10 of 50, 40 s left"
    assert {r.__dict__["event"] for r in caplog.records} == {"progress"}


def test_elsewhere_than_on_a_terminal_each_step_is_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shown(), begin("measuring", 2) as task:
        task.step("one")
        task.step("two")
        assert capsys.readouterr().err.splitlines() == [
            "measuring: 1 of 2: one",
            "measuring: 2 of 2: two",
        ]
    with shown(), begin("getting ready", 1) as task:
        task.step("model")
    assert capsys.readouterr().err == "getting ready: model\n"


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with shown(), begin("measuring", 2) as task:
        task.step("one")
        print("said meanwhile", file=sys.stderr)
    drawn_text = terminal.getvalue()
    assert "measuring" in drawn_text
    assert "1 of 2" in drawn_text
    assert "said meanwhile" in drawn_text
    assert "measuring: 1 of 2" not in drawn_text


def test_whoever_draws_bars_hears_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), begin("measuring", 3) as task:
        with drawn():
            task.step("one")
        assert not caplog.messages
        task.step("two")
    assert caplog.messages == ["measuring: 2 of 3: two"]


def test_names_are_text() -> None:
    """A file's name is whatever somebody called it: no markup, no control characters."""
    with begin("indexing", 10) as task:
        task.advance(1, "[red]x[/] \x1b[2J\n")
        out = io.StringIO()
        Console(file=out, width=160).print(bars())
    assert "[red]x[/] \\x1b[2J\\n" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_any_thread_may_tell(caplog: pytest.LogCaptureFixture) -> None:
    def work(task: Task) -> None:
        for _ in range(1000):
            task.advance()

    with begin("it", 4000) as task:
        threads = [threading.Thread(target=work, args=[task]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert task.numbers() == (4000, 4000)
    task.end()
