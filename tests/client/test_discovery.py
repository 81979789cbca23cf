"""Finding servers: records that lie do no harm. All of it on this machine's loopback."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from client.discovery import MOST_ADDRESSES, MOST_SERVERS, Browser
from client.split.address import ServerAddress
from client.split.survey import survey
from protocol.announcement import SERVICE_TYPE, Announcement

zeroconf = pytest.importorskip("zeroconf", reason="needs zeroconf: pip install '.[announce]'")

LOOPBACK = ["127.0.0.1"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("zeroconf")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@asynccontextmanager
async def publishing(*services: Any) -> AsyncIterator[None]:
    """Somebody on the network who announces these, whatever they say."""
    from zeroconf.asyncio import AsyncZeroconf

    publisher = AsyncZeroconf(interfaces=LOOPBACK)
    try:
        for service in services:
            publisher.zeroconf.registry.async_add(service)
        yield
    finally:
        publisher.zeroconf.registry.async_remove(list(services))
        await publisher.async_close()


def service(label: str, port: int = 50052, **fields: Any) -> Any:
    given = {"addresses": [socket.inet_aton("127.0.0.1")], "properties": {}} | fields
    name = f"{label}.{SERVICE_TYPE}"
    host = f"{label.replace(' ', '-')}.local."
    return zeroconf.ServiceInfo(SERVICE_TYPE, name, port=port, server=host, **given)


async def found(browser: Browser, *names: str, seconds: float = 60.0) -> list[Any]:
    """The servers of these names, once all are there. Others of this machine may be there too."""
    async with asyncio.timeout(seconds):
        while not set(names) <= (servers := {s.name: s for s in browser.servers}).keys():
            await asyncio.sleep(0.05)
    return [servers[name] for name in names]


async def test_a_sound_record_is_found() -> None:
    said = Announcement("ggml-rpc-server 9", "CPU")
    async with publishing(service("box", properties=said.properties())), Browser(LOOPBACK) as b:
        (server,) = await found(b, "box")
    assert server.addresses == ("127.0.0.1",)
    assert server.port == 50052
    assert server.announcement == said


async def test_records_that_lie_are_left_out_or_made_text() -> None:
    """Names that move a cursor, no address or one of many machines, no port, endless text."""
    lies = (
        service("no port", port=0),
        service("everybody", addresses=[socket.inet_aton("224.0.0.1")]),
        service("nobody", addresses=[socket.inet_aton("0.0.0.0")]),
        service("many", addresses=[socket.inet_aton(f"127.0.1.{i}") for i in range(1, 60)]),
        service("loud", properties={"software": "\x1b]0;x\x07", "device": "d" * 200}),
        service("strange", properties={"software": b"\xff\xfe\x00", "tls": None}),
    )
    honest = service("zz honest")
    async with publishing(*lies, honest), Browser(LOOPBACK) as browser:
        await found(browser, "many", "zz honest")
        servers = {s.name: s for s in browser.servers}
    assert not {"no port", "everybody", "nobody"} & set(servers)
    assert len(servers["many"].addresses) <= MOST_ADDRESSES
    for server in servers.values():
        texts = (server.name, server.announcement.software, server.announcement.device)
        assert all(text.isprintable() and len(text) <= 300 for text in texts), texts


async def test_thousands_of_records_are_bounded() -> None:
    """Pointers to services that nobody has, some with names that a terminal would obey."""
    from zeroconf import const
    from zeroconf._dns import DNSPointer
    from zeroconf._protocol.outgoing import DNSOutgoing
    from zeroconf.asyncio import AsyncZeroconf

    flood = AsyncZeroconf(interfaces=LOOPBACK)
    await flood.zeroconf.async_wait_for_start()
    async with Browser(LOOPBACK) as browser:
        first = 0
        async with asyncio.timeout(60):
            while not browser.ignored:
                out = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
                for i in range(first, first + 50):
                    name = f"flood{i}{'' if i % 4 else chr(27)}.{SERVICE_TYPE}"
                    pointer = DNSPointer(SERVICE_TYPE, const._TYPE_PTR, const._CLASS_IN, 60, name)
                    out.add_answer_at_time(pointer, 0)
                flood.zeroconf.async_send(out)
                first += 50
                await asyncio.sleep(0.002)
        assert len(browser._wanted) <= MOST_SERVERS
        assert len(browser._tasks) <= MOST_SERVERS
        assert len(browser._waiting) <= 1024
        assert not [s for s in browser.servers if s.name.startswith("flood")]
    await flood.async_close()


@pytest.mark.slow
async def test_a_name_that_leads_nowhere_makes_room() -> None:
    async with Browser(LOOPBACK) as browser:
        for i in range(MOST_SERVERS):
            browser._changed(None, "", f"n{i}.{SERVICE_TYPE}", _Added())
        assert len(browser._wanted) == MOST_SERVERS
        async with publishing(service("real")):
            await found(browser, "real")


class _Added:
    name = "Added"


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 64], ids=["none", "http", "ff"]
)
async def test_an_address_where_something_else_listens(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        report = await survey(ServerAddress("127.0.0.1", port))
    assert report.error
    assert not report.devices


async def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        report = await survey(ServerAddress("127.0.0.1", probe.getsockname()[1]))
    assert "refused" in report.error
