"""What bench says of machines in a network: the relay between them, tables and the picture."""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.bench import relay
from tools.bench.link_picture import Bar, svg
from tools.bench.split import Measured, NetworkLink, Row, link_table, predicted, table
from tools.serving import ports
from tools.serving.ports import free_port


async def test_the_relay_passes_all_bytes_and_their_end_both_ways() -> None:
    got = bytearray()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.extend(await reader.read(-1))
        writer.write(bytes(got[::-1]))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = free_port()
    to = ("127.0.0.1", server.sockets[0].getsockname()[1])
    threading.Thread(target=relay.serve, args=(port, to, 0.001, 1e9), daemon=True).start()
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            break
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
    sent = bytes(range(256)) * 4096
    writer.write(sent)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(-1), 120) == sent[::-1]
    assert got == sent
    writer.close()
    server.close()


def test_a_free_port_is_given_once_and_is_none_of_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "range"
    system.write_text("30000\t60999\n")
    monkeypatch.setattr(ports, "_OF_THE_SYSTEM", system)
    given = [free_port() for _ in range(300)]
    assert len(set(given)) == len(given)
    assert max(given) < 30000
    # One that leaves none: then it is the system's choice.
    for told in ("1024\t65535\n", None):
        system.unlink() if told is None else system.write_text(told)
        with socket.create_server(("127.0.0.1", free_port())):
            pass


def test_networks_are_given_by_delay_and_rate() -> None:
    link = NetworkLink.of("0.25:1")
    assert (link.delay, link.rate) == (0.00025, 125e6)
    assert link.name == "0.25 ms, 1 Gbit/s"
    assert NetworkLink(0.0, 1e9).name == "the relay alone"
    for text in ("", "1", "1:2:3", "a:b"):
        with pytest.raises(argparse.ArgumentTypeError, match="DELAY:RATE"):
            NetworkLink.of(text)


def test_a_token_takes_what_it_took_and_what_the_network_adds() -> None:
    assert predicted(0.1, 60, 2e6, 0.0005, 100e6) == pytest.approx(0.1 + 0.03 + 0.02)


def test_the_tables_have_medians_and_ratios() -> None:
    rows = {
        "one worker": Measured([10.0, 12.0, 11.0], [100.0], []),
        "two workers, row": Measured([22.0], [150.0], [3 << 20, 5 << 20]),
    }
    lines = table(rows).splitlines()
    assert lines[2] == "| one worker | 11.0 | 1.00 | 100 | 1.00 |  |"
    assert lines[3] == "| two workers, row | 22.0 | 2.00 | 150 | 1.50 | 5 MiB |"
    row = Row("0.25 ms, 1 Gbit/s", "row", 0.001, 60.0, 0.0, 2e6, 0.2, 0.1)
    assert "0.25 ms, 1 Gbit/s" in link_table([row])


def test_the_picture_of_networks_is_well_formed_and_shows_each() -> None:
    bars = [
        Bar("row", "1 ms, 1 Gbit/s", 0.2, 0.19),
        Bar("row", "0.1 ms, 10 Gbit/s", 0.05, 0.06),
        Bar("tensor", "1 ms, 1 Gbit/s", 9.0, 9.0),
    ]
    picture = ElementTree.fromstring(svg("A network", bars, alone=0.1))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("--split-mode row", "--split-mode tensor", "1 ms, 1 Gbit/s"):
        assert name in texts
    assert "200 ms, 0.50\N{MULTIPLICATION SIGN}" in texts
    boxes = picture.iter("{http://www.w3.org/2000/svg}rect")
    kinds = [box.get("class") for box in boxes if box.get("class") != "page"]
    assert kinds == ["behind", "ahead", "behind"]
