"""What a server tells of itself, and what is made of one that tells what can't be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from client.connection import Connection
from client.split.address import ServerAddress
from client.split.survey import ServerReport, survey, survey_all
from rpc_server import SOFTWARE
from tests.server.process import ServerProcess, running

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running("-t", "1", "--mem", "512") as process:
        yield process


async def test_a_server_is_asked_and_measured(server: ServerProcess) -> None:
    report = await survey(ServerAddress(HOST, server.port))
    assert not report.error
    assert report.software == SOFTWARE
    assert report.protocols[0] == "7.0.0"
    assert report.protocols[-1] == "1.0.0"
    (device,) = report.devices
    assert device.name == "CPU"
    assert device.description
    assert 0 < device.free <= device.total == 512 << 20
    assert device.speed is not None
    assert device.speed.compute > 0
    assert report.round_trip is not None
    assert report.upload is not None
    assert report.upload > 0
    # What was measured with is given back.
    again = await survey(ServerAddress(HOST, server.port), measured=False)
    assert again.devices[0].free == device.free
    assert again.upload is None
    assert again.devices[0].speed is None


async def test_a_pinned_server_tells_its_one_protocol() -> None:
    with running("-t", "1", "--protocol", "7") as pinned:
        report = await survey(ServerAddress(HOST, pinned.port), measured=False)
    assert report.protocols == ("7.0.0",)


async def test_a_server_without_the_extension() -> None:
    with running("-t", "1", "--protocol", "5.1") as old:
        report = await survey(ServerAddress(HOST, old.port), measured=False)
    assert not report.error
    assert (report.split, report.software, report.identity) == (0, "", 0)
    assert report.protocols == ("5.1.0",)
    assert report.devices[0].total > 0


async def test_two_addresses_of_a_server_are_one(server: ServerProcess) -> None:
    targets = [ServerAddress(HOST, server.port), ServerAddress("localhost", server.port)]
    (report,) = await survey_all(targets, measured=False)
    assert report.target.host == HOST


async def test_figures_that_can_not_be(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def memory(self: Connection, device: int = 0) -> tuple[int, int]:
        return 5, 4

    monkeypatch.setattr(Connection, "get_device_memory", memory)
    report = await survey(ServerAddress(HOST, server.port), measured=False)
    assert report == replace(
        ServerReport(ServerAddress(HOST, server.port)), error="tells of 5 of 4 bytes free",
        protocols=("7.0.0",), split=report.split,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("box", ServerAddress("box")),
        ("tls://box:50053", ServerAddress("box", 50053, tls=True)),
        ("[::1]:7", ServerAddress("::1", 7)),
    ],
)
def test_names_of_servers(text: str, target: ServerAddress) -> None:
    assert ServerAddress.parse(text) == target
    assert ServerAddress.parse(target.endpoint) == target


@pytest.mark.parametrize("text", ["", "tls://", "http://box", "box:0"])
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|has no|URL"):
        ServerAddress.parse(text)
