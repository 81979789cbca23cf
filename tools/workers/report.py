"""What was found out about servers, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.split.survey import DeviceReport, ServerReport

# Tables that go to a file or a pipe are as wide as they are.
_WIDE = 240


def console() -> Console:
    """Return where tables go: as wide as the terminal, elsewhere as wide as they need to be."""
    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDE)


def plain_table(columns: Sequence[tuple[str, bool]]) -> Table:
    """Return an empty table; of each column its head, and whether it has figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, figures in columns:
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    return table


_COLUMNS = (
    ("server", False),
    ("software", False),
    ("device", False),
    ("free", True),
    ("total", True),
    ("protocols", False),
    ("split", False),
    ("round trip", True),
    ("upload", True),
    ("kernels", True),
)


def servers_table(reports: Sequence[ServerReport]) -> Table:
    """Return a row for each device of each server; what can't be asked says why."""
    table = plain_table(_COLUMNS)
    for report in reports:
        name = report.target.endpoint
        if report.target.name:
            name += f"\n({report.target.name})"
        if report.error:
            # Text, never markup: names and errors may be anybody's.
            table.add_row(Text(name), Text(report.error))
            continue
        for number, device in enumerate(report.devices):
            head = (name, report.software or "?") if not number else ("", "")
            cells = (*head, *_device_cells(report, device))
            table.add_row(*map(Text, cells))
    return table


def _device_cells(report: ServerReport, device: DeviceReport) -> tuple[str, ...]:
    protocols = report.protocols
    spoken = protocols[0] if len(protocols) == 1 else f"{protocols[0]} to {protocols[-1]}"
    split = f"version {report.split}" if report.split else "no"
    if report.parts:
        split = f"over {report.parts}"
    speed = device.speed
    return (
        " ".join(filter(None, (device.name, device.description))) or "?",
        size_text(device.free),
        size_text(device.total),
        spoken,
        split,
        "-" if report.round_trip is None else f"{report.round_trip * 1e6:.0f} us",
        "-" if report.upload is None else f"{report.upload / (1 << 20):.0f} MiB/s",
        "-" if speed is None else f"{speed.compute / 1e9:.1f} GB/s",
    )


def size_text(size: float) -> str:
    """Return bytes as MiB, from 10 GiB on as GiB."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 10 << 30 else f"{size / (1 << 20):.0f} MiB"


def servers_json(reports: Sequence[ServerReport]) -> str:
    """Return one line: a list of servers as ServerReport has them, sizes in bytes, times in s."""
    return json.dumps([_plain(report) for report in reports])


def _plain(report: ServerReport) -> dict[str, Any]:
    fields = asdict(report)
    fields["endpoint"] = report.target.endpoint
    del fields["identity"]
    return fields
