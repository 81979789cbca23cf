"""What clients can do to the log: so many lines, and none that the server did not write."""

from __future__ import annotations

import json
import logging

import pytest

from protocol.commands import Command
from protocol.text import printable
from rpc_server.observability.logs import (
    TEXT,
    ClientLog,
    JsonFormatter,
    LineBudget,
    TextFormatter,
)
from tests.server.clients import Bystander
from tests.server.process import ServerProcess, Wire, sources, tensor


def test_visible_characters_stay_as_they_are() -> None:
    assert printable("blk.0.attn_q.weight (ünïcode, 重み)") == "blk.0.attn_q.weight (ünïcode, 重み)"


@pytest.mark.parametrize("code", [*range(32), 0x7F, 0x85, 0x9B, 0x202E, 0x2028, 0xFEFF])
def test_invisible_characters_are_escaped(code: int) -> None:
    told = printable(f"a{chr(code)}b")
    assert told.isprintable()
    assert told[0] + told[-1] == "ab"
    assert len(told) >= 4


def test_traces_keep_their_lines() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "name %s", "args": ("x\ny",), "exc_info": (ValueError, error, None)}
        )
    first, *rest = TextFormatter(TEXT).format(record).splitlines()
    assert first.endswith(r"name x\ny")
    assert rest


def test_lines_of_a_part_name_it() -> None:
    record = logging.makeLogRecord({"msg": "at %d %%", "args": (5,), "levelname": "WARNING"})
    assert TextFormatter(TEXT, part="cuda0").format(record).endswith(" WARNING cuda0: at 5 %")
    fields = json.loads(JsonFormatter("cuda0").format(record))
    assert (fields["part"], fields["message"]) == ("cuda0", "at 5 %")
    assert "part" not in json.loads(JsonFormatter().format(record))


def test_lines_of_an_address_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    budget = LineBudget(lambda: now)
    noisy = [ClientLog(logging.getLogger("some"), f"client {i}", budget, "a") for i in range(2)]
    quiet = ClientLog(logging.getLogger("some"), "client 9", budget, "b")
    with caplog.at_level(logging.INFO, "some"):
        for i in range(5000):
            noisy[i % 2].info("%d", i)
        assert len(caplog.records) == LineBudget.AT_ONCE
        quiet.info("heard")
        assert caplog.messages[-1] == "client 9: heard"
        now += 1.0 / LineBudget.A_SECOND
        noisy[0].info("again")
    left_out = 5000 - LineBudget.AT_ONCE
    assert caplog.messages[-2:] == [
        f"{left_out} lines about clients at a were left out",
        "client 0: again",
    ]


def test_who_asks_for_debug_lines_gets_them_all(caplog: pytest.LogCaptureFixture) -> None:
    log = ClientLog(logging.getLogger("some"), "client", LineBudget(lambda: 0.0), "a")
    with caplog.at_level(logging.DEBUG, "some"):
        for i in range(1000):
            log.debug("%d", i)
    assert len(caplog.records) == 1000


def test_a_name_forges_no_line(server: ServerProcess) -> None:
    forged = b"x\n12:00:00 ERROR   client 1: \x1b[2J"
    with Bystander(server), Wire(server.port) as wire:
        handle, base = wire.alloc(4096)
        leaf = tensor(1, (8,), handle, base)
        node = tensor(2, (9,), handle, base + 64, op=wire.op("ADD"), src=sources(1, 1))
        wire.send(Command.GRAPH_COMPUTE, wire.graph([node | {"name": forged}], [leaf]))
        assert wire.closed_by_server()
    server.wait_for(r"x\\n12:00:00 ERROR   client 1: \\x1b\[2J")
    assert "\x1b" not in server.log
