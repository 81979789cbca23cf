"""Child processes: what they are started with, how they end, and what they have printed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tools.serving.processes import PROJECT, Process, ProgramError, end_of, filled

_FOREVER = "import time\nwhile True: time.sleep(60)"


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_cut_into_words_before_the_port_goes_in() -> None:
    assert filled("serve -p {port} --name 'a b' --at=:{port}", 7) == [
        "serve", "-p", "7", "--name", "a b", "--at=:7",
    ]  # fmt: skip


def test_what_it_prints_and_how_it_ends() -> None:
    with Process(
        program("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)")
    ) as p:
        assert p.wait(60) == 3
        assert p.log == "one\ntwo\n"
        path = p.log_path
    assert not path.exists()


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"0123456789")
    assert end_of(log, 4) == "6789"
    assert end_of(log, 100) == "0123456789"
    assert end_of(log, 4, since=8) == "89"
    assert end_of(log, 100, since=10) == ""


def test_a_log_is_begun_anew_or_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for appended, expected in ((False, "x\n"), (True, "x\nx\n"), (False, "x\n")):
        with Process(program("print('x')"), log, appended=appended) as p:
            assert p.wait(60) == 0
        assert log.read_text() == expected


def test_one_that_goes_on_is_ended_by_its_context() -> None:
    with Process(program(_FOREVER)) as p:
        assert p.wait(0.01) is None
        assert p.alive
    assert p.wait(0) == -signal.SIGTERM
    with Process(program(_FOREVER)) as p:
        p.kill()
        assert p.wait(0) == -signal.SIGKILL
        # Whoever asks again gets the same.
        p.kill()
        assert p.stop() == -signal.SIGKILL


def test_only_a_detached_one_has_a_terminal_of_its_own() -> None:
    code = "import os; print(os.getsid(0) == os.getpid())"
    for detached in (False, True):
        with Process(program(code), detached=detached) as p:
            p.wait(60)
            assert p.log == f"{detached}\n"


def test_where_it_runs_and_with_what(tmp_path: Path) -> None:
    code = "import os; print(os.getcwd()); print(os.environ['WORD'], os.environ['HERE'])"
    os.environ["HERE"] = "kept"
    try:
        for folder in (tmp_path, PROJECT):
            with Process(program(code), env={"WORD": "new"}, folder=folder) as p:
                p.wait(60)
                assert p.log == f"{folder.resolve()}\nnew kept\n"
    finally:
        del os.environ["HERE"]


def test_one_that_ends_too_early_is_told_with_its_last_lines() -> None:
    with (
        Process(program("print('no model')")) as p,
        pytest.raises(ProgramError, match=r"ended before 'ready':\nno model"),
    ):
        p.wait_for("ready", 60)
