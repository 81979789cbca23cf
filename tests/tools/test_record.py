"""The recorder passes everything on, whatever happens, and what it writes is a proper capture."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import dpkt
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from rich.live import Live

from protocol.commands import Command
from protocol.observe.events import Side
from tests.protocol.captures import collect, collected, path_of
from tools.record.__main__ import main
from tools.record.frames import Address, TcpFrames, ones_complement_sum
from tools.record.pcapng import PcapngWriter
from tools.record.proxy import Proxy
from tools.record.recorder import Recorder
from tools.record.screen import (
    LiveTable,
    RateClock,
    rate_line,
    summary,
)
from tools.record.stats import RecordStats
from tools.record.watching import Backlog
from tools.serving.ports import free_port
from tools.serving.processes import PATIENCE, Process

HOST = "127.0.0.1"
CLIENT, SERVER = Address("10.0.0.1", 40000), Address("10.0.0.2", 50052)


# -- frames and files -----------------------------------------------------------------------------


def packets(path: Path) -> list[tuple[float, Any]]:
    """Time and Ethernet frame of each packet."""
    with path.open("rb") as file:
        return [(t, dpkt.ethernet.Ethernet(data)) for t, data in dpkt.pcapng.Reader(file)]


def write(path: Path, *groups: Iterator[Any], limit: int | None = None) -> None:
    writer = PcapngWriter(path, comment="a comment", limit=limit)
    for i, frames in enumerate(groups):
        for frame in frames:
            writer.packet(1_700_000_000_123_456_789 + i, *frame)
    writer.close()


@given(st.binary(max_size=70) | st.binary(min_size=500, max_size=530))
@example(b"\xff\xff" * 2)
@example(b"\xff\xff" * 300)
@example(bytes(600))
def test_the_sum_is_the_internet_checksums(data: bytes) -> None:
    padded = data + bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert ones_complement_sum(data) == total


@pytest.mark.parametrize("hosts", [("10.0.0.1", "10.0.0.2"), ("fe80::1%lo", "::1")])
def test_frames_are_those_of_a_tcp_connection(hosts: tuple[str, str], tmp_path: Path) -> None:
    frames = TcpFrames(Address(hosts[0], 40000), Address(hosts[1], 50052))
    large = np.random.default_rng(0).bytes(3_000_001)
    path = tmp_path / "x.pcapng"
    write(
        path,
        frames.opened(),
        frames.data(Side.CLIENT, b"abc"),
        frames.data(Side.SERVER, b"defg"),
        frames.data(Side.CLIENT, large),
        frames.ended(Side.CLIENT),
        frames.data(Side.SERVER, b"more"),
        frames.ended(Side.SERVER),
        frames.ended(Side.SERVER),
    )
    streams: dict[int, bytes] = defaultdict(bytes)
    following: dict[int, int] = {}
    flags = []
    for _, ethernet in packets(path):
        ip = ethernet.data
        tcp = ip.data
        header = bytes(tcp)[: tcp.off * 4]
        # dpkt computes a checksum anew where it finds none.
        written, tcp.sum = tcp.sum, 0
        if isinstance(ip, dpkt.ip.IP):
            written_ip, ip.sum = ip.sum, 0
            assert dpkt.ip.IP(bytes(ip)).sum == written_ip
            assert ip.len == 20 + len(header) + len(tcp.data)
        else:
            assert ip.plen == len(header) + len(tcp.data)
        pseudo = ip.src + ip.dst + struct.pack(">II", len(header) + len(tcp.data), 6)
        checked = pseudo + bytes(tcp)[:16] + bytes(4) + bytes(tcp)[20:]
        assert written == ones_complement_sum(checked) ^ 0xFFFF
        port, other = tcp.sport, tcp.dport
        assert tcp.seq == following.get(port, tcp.seq)
        if tcp.flags & dpkt.tcp.TH_ACK:
            assert tcp.ack <= following[other]
        bare = tcp.flags & (dpkt.tcp.TH_SYN | dpkt.tcp.TH_FIN)
        following[port] = tcp.seq + len(tcp.data) + (1 if bare else 0)
        streams[port] += bytes(tcp.data)
        flags.append(tcp.flags)
    assert streams == {40000: b"abc" + large, 50052: b"defg" + b"more"}
    assert flags[:3] == [dpkt.tcp.TH_SYN, dpkt.tcp.TH_SYN | dpkt.tcp.TH_ACK, dpkt.tcp.TH_ACK]
    assert sum(f & dpkt.tcp.TH_FIN for f in flags) == 2


def test_sequence_numbers_wrap(tmp_path: Path) -> None:
    frames = TcpFrames(CLIENT, SERVER)
    list(frames.opened())
    frames._ends[Side.CLIENT].sequence = 2**32 - 2
    write(tmp_path / "x", frames.data(Side.CLIENT, b"12345"), frames.data(Side.CLIENT, b"6"))
    sent = [e.data.data for _, e in packets(tmp_path / "x") if e.data.data.data]
    assert [tcp.seq for tcp in sent] == [2**32 - 2, 3]


def test_connections_of_two_families_are_refused() -> None:
    with pytest.raises(ValueError, match="two address families"):
        TcpFrames(Address("10.0.0.1", 1), Address("::1", 2))


def test_the_file_has_comment_times_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    write(path, TcpFrames(CLIENT, SERVER).opened())
    data = path.read_bytes()
    section = dpkt.pcapng.SectionHeaderBlockLE(data[: int.from_bytes(data[4:8], "little")])
    comments = [o.text for o in section.opts if o.code == dpkt.pcapng.PCAPNG_OPT_COMMENT]
    assert comments == ["a comment"]
    (time, _), *rest = packets(path)
    assert time == pytest.approx(1_700_000_000.123456789, abs=1e-6)
    assert len(rest) == 2
    # The last block counts packets: 3 received, none dropped.
    tail = path.read_bytes()[-52:]
    assert struct.unpack_from("<II", tail) == (5, 52)
    assert struct.unpack_from("<HHQ", tail, 20) == (4, 8, 3)


def test_a_limit_is_kept_and_blocks_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    recorder = Recorder(path, limit=5000)
    connection = recorder.opened(CLIENT, SERVER, 1)
    for _ in range(20):
        connection.data(Side.CLIENT, bytes(1000), 2)
    assert "limit of 5000 bytes" in recorder.stopped
    assert not recorder.failed
    recorder.close()
    assert path.stat().st_size <= 5000
    sizes = [len(e.data.data.data) for _, e in packets(path)]
    assert sizes == [0, 0, 0, *[1000] * (len(sizes) - 3)]
    assert len(sizes) > 5
    assert struct.unpack_from("<HHQ", path.read_bytes()[-20:]) == (5, 8, 20 - len(sizes) + 3)


def test_a_block_that_could_not_be_written_whole_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pcapng"
    recorder = Recorder(path)
    connection = recorder.opened(CLIENT, SERVER, 1)
    recorder.flush()
    whole = path.read_bytes()
    real = os.writev

    def full(fd: int, pieces: Sequence[memoryview]) -> int:
        if sum(map(len, pieces)) <= 100:
            raise OSError(28, "No space left on device")
        return real(fd, [b"".join(pieces)[:100]])

    monkeypatch.setattr(os, "writev", full)
    connection.data(Side.CLIENT, bytes(130), 2)
    recorder.flush()
    assert recorder.failed
    assert recorder.stopped == "the disk is full"
    connection.data(Side.CLIENT, bytes(130), 3)
    recorder.close()
    assert path.read_bytes() == whole


# -- passing on -----------------------------------------------------------------------------------


class Ends:
    """The server behind a proxy: what each connection sent, and the streams to answer on."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.streams.put((reader, writer))


@contextlib.asynccontextmanager
async def proxied(path: Path) -> AsyncIterator[tuple[int, Ends, list[str]]]:
    """A proxy with a recorder, its port, its server, and what it reports."""
    ends = Ends()
    reports: list[str] = []
    recorder = Recorder(path)
    stats = RecordStats(reports.append)
    backlog = Backlog(recorder, stats)
    async with await asyncio.start_server(ends.accept, HOST, 0) as server:
        proxy = Proxy((HOST, server.sockets[0].getsockname()[1]), backlog, reports.append)
        port = await proxy.listen(HOST, 0)
        try:
            yield port, ends, reports
        finally:
            await proxy.close()
            backlog.work()
            recorder.close()


async def test_bytes_pass_unchanged_on_several_connections_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    random = np.random.default_rng(0)
    sent = [random.bytes(n) for n in (1, 70_000, 900_000)]
    answers = [random.bytes(n) for n in (800_000, 3, 70_000)]

    async def client(port: int, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(data)
        # Half-closed: the answer still comes.
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    async def serve(ends: Ends) -> bytes:
        reader, writer = await ends.streams.get()
        data = await reader.read()
        writer.write(answers[sent.index(data)])
        await writer.drain()
        writer.close()
        return data

    async with proxied(path) as (port, ends, _):
        serving = asyncio.gather(*(serve(ends) for _ in sent))
        assert await asyncio.gather(*(client(port, data) for data in sent)) == answers
        assert sorted(await serving) == sorted(sent)
    streams: dict[tuple[int, int], bytes] = defaultdict(bytes)
    ended = set()
    for _, ethernet in packets(path):
        tcp = ethernet.data.data
        streams[tcp.sport, tcp.dport] += bytes(tcp.data)
        if tcp.flags & dpkt.tcp.TH_FIN:
            ended.add((tcp.sport, tcp.dport))
    assert sorted(streams.values()) == sorted(sent + answers)
    assert ended == set(streams)


async def test_a_side_that_takes_nothing_stops_the_other(tmp_path: Path) -> None:
    async with proxied(tmp_path / "x") as (port, ends, _):
        reader, writer = await asyncio.open_connection(HOST, port)
        server_reader, server_writer = await ends.streams.get()
        total = 0
        while total < 256 << 20:
            writer.write(bytes(1 << 20))
            total += 1 << 20
            try:
                await asyncio.wait_for(writer.drain(), 0.5)
            except TimeoutError:
                break
        # Buffers of the system, of the proxy, and of this test: not what was meant to be sent.
        assert total < 64 << 20
        writer.write_eof()
        seen = 0
        while data := await server_reader.read(1 << 20):
            seen += len(data)
        assert seen == total
        server_writer.close()
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("side", list(Side))
async def test_a_connection_broken_off_is_broken_off_on_the_other_side(
    side: Side, tmp_path: Path
) -> None:
    path = tmp_path / "x.pcapng"
    async with proxied(path) as (port, ends, _):
        client = await asyncio.open_connection(HOST, port)
        client[1].write(b"x")
        server = await ends.streams.get()
        assert await server[0].read(1) == b"x"
        breaking, other = (client, server) if side is Side.CLIENT else (server, client)
        sock = breaking[1].get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        breaking[1].transport.abort()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(other[0].read(), PATIENCE)
    *_, (_, last) = packets(path)
    assert last.data.data.flags & dpkt.tcp.TH_RST
    assert (last.data.data.dport == port) == (side is Side.CLIENT)


async def test_without_a_server_the_client_is_told_and_the_proxy_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    reports: list[str] = []
    recorder = Recorder(path)
    nowhere = free_port()
    proxy = Proxy((HOST, nowhere), recorder, reports.append)
    port = await proxy.listen(HOST, 0)
    for _ in range(2):
        reader, writer = await asyncio.open_connection(HOST, port)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
    await proxy.close()
    recorder.close()
    assert len(reports) == 2
    assert f"no connection to {HOST}:{nowhere}" in reports[0]
    flags = [e.data.data.flags for _, e in packets(path)]
    assert flags == [dpkt.tcp.TH_SYN, dpkt.tcp.TH_RST | dpkt.tcp.TH_ACK] * 2


# -- figures --------------------------------------------------------------------------------------


def fed(name: str) -> RecordStats:
    """The figures of a golden capture."""
    stats = RecordStats(lambda line: pytest.fail(line))
    found = collected(name)
    connections = {}
    for connection, message in found.messages:
        if connection.number not in connections:
            connections[connection.number] = stats.opened(CLIENT, SERVER, 0)
        time_ns = round((message.ended or 0) * 1e9)
        connections[connection.number].data(message.side, message.data, time_ns)
    for counted in connections.values():
        for side in Side:
            counted.ended(side, 0)
    return stats


def test_figures_of_a_generation(tmp_path: Path) -> None:
    stats = fed("llama-7.0.0")
    assert stats.tokens == 3
    assert stats.graphs == 3
    assert stats.open == 0
    assert stats.dialects == {"7.0.0": stats.connections}
    messages = [m for _, m in collected("llama-7.0.0").messages]
    assert sum(f.size for f in stats.commands.values()) == sum(m.size for m in messages)
    reads = [m for m in messages if m.command is Command.GET_TENSOR and m.latency is not None]
    read = stats.commands[Command.GET_TENSOR]
    assert (read.requests, read.answers) == (3, 3)
    assert read.longest == pytest.approx(max(m.latency or 0 for m in reads), abs=1e-6)
    recorder = Recorder(tmp_path / "x.pcapng")
    text = summary(stats, recorder)
    assert "3 graphs, 3 tokens" in text
    assert "GET_TENSOR" in text
    line = rate_line(stats, RateClock(stats).rates(), recorder)
    assert "0.0 tokens/s" in line
    recorder.close()


def test_the_table_in_a_terminal(tmp_path: Path) -> None:
    stats = fed("llama-7.0.0")
    recorder = Recorder(tmp_path / "x.pcapng")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    with Live(console=console, auto_refresh=False) as live:
        table = LiveTable(stats, recorder, live)
        table.say("[a line] for the user")
        table.update()
    recorder.close()
    shown = screen.getvalue()
    assert "[a line] for the user" in shown
    assert "tokens/s" in shown
    assert "GET_TENSOR" in shown
    assert "longest ms" in shown


def test_bytes_that_are_no_ggml_rpc_are_reported_once_and_pass_uncounted() -> None:
    lines: list[str] = []
    stats = RecordStats(lines.append)
    connection = stats.opened(CLIENT, SERVER, 0)
    for _ in range(3):
        connection.data(Side.CLIENT, b"GET / HTTP/1.1\r\n\r\n", 0)
    assert len(lines) == 1
    assert "instead of HELLO" in lines[0]
    assert stats.sent[Side.CLIENT] == 54


def test_a_fault_in_reading_ends_the_counting_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    stats = RecordStats(lines.append)
    connection = stats.opened(CLIENT, SERVER, 0)
    monkeypatch.setattr(connection._conversation, "feed", lambda *_: 1 // 0)
    for _ in range(3):
        connection.data(Side.CLIENT, b"abc", 0)
    connection.ended(Side.CLIENT, 0)
    (line,) = lines
    assert line.startswith(f"{CLIENT}: not counted any more: ZeroDivisionError")
    assert stats.sent[Side.CLIENT] == 9


# -- the command line -----------------------------------------------------------------------------


def recorder_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "tools.record", "--listen", "0", "--plain", *options]


@contextlib.contextmanager
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets, one connection after the other."""
    program = (
        "import socket\n"
        "s = socket.create_server(('127.0.0.1', 0))\n"
        "print('port', s.getsockname()[1], flush=True)\n"
        "while True:\n"
        "    c, _ = s.accept()\n"
        "    while d := c.recv(65536): c.sendall(d)\n"
        "    c.close()\n"
    )
    with Process([sys.executable, "-c", program]) as server:
        yield f"{HOST}:{server.wait_for('port ([0-9]+)')[1]}"


def exchange(port: int, data: bytes) -> bytes:
    with socket.create_connection((HOST, port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_a_session_from_start_to_end(tmp_path: Path) -> None:
    path = tmp_path / "session.pcapng"
    messages = [m for _, m in collected("own-3.6.1").messages]
    with echo() as address, Process(recorder_command("--to", address, "-o", str(path))) as recorder:
        port = int(recorder.wait_for(r"recording \S+:(\d+) ->")[1])
        hello = messages[0].data
        assert exchange(port, hello) == hello
        recorder.child.send_signal(signal.SIGINT)
        assert recorder.child.wait(PATIENCE) == 0
        assert "1 connections" in recorder.log
        assert "recorded: " in recorder.log
    (message, *_) = [m for _, m in collect(path).messages]
    assert message.command is Command.HELLO


def test_a_full_disk_ends_recording_and_not_the_connections() -> None:
    options = ("-o", "/dev/full", "--overwrite")
    with echo() as address, Process(recorder_command("--to", address, *options)) as recorder:
        port = int(recorder.wait_for(r"recording \S+:(\d+) ->")[1])
        data = np.random.default_rng(0).bytes(2_000_00)
        assert exchange(port, data) == data
        recorder.wait_for("recording stopped: the disk is full; still passing on")
        assert exchange(port, data) == data
        assert recorder.stop() == 3
        assert "(stopped: the disk is full)" in recorder.log


def test_what_keeps_it_from_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.pcapng"
    there.write_bytes(b"precious")
    to = ("--to", f"{HOST}:1")
    assert main(["--listen", "0", *to, "-o", str(there)]) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert there.read_bytes() == b"precious"
    assert main(["--listen", "0", *to, "-o", str(tmp_path / "no" / "where")]) == 1
    assert "can't write" in capsys.readouterr().err
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--listen", str(port), *to, "-o", str(tmp_path / "new")]) == 1
    assert f"can't listen on {HOST}:{port}" in capsys.readouterr().err
    for words in (["--listen", "70000"], ["--to", "x:y"], ["--limit", "much"]):
        with pytest.raises(SystemExit) as raised:
            main(["--listen", "0", *to, "-o", "x", *words])
        assert raised.value.code == 2


def test_help_tells_how_to_begin() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.record", "--help"], capture_output=True, text=True, check=True
    )
    assert "--rpc 127.0.0.1:50060" in done.stdout
    assert "exit status" in done.stdout


def test_a_recording_is_read_as_the_capture_that_it_came_from(tmp_path: Path) -> None:
    """What the golden captures were recorded with, once more, now."""
    source = collected("own-3.6.1")
    path = tmp_path / "x.pcapng"
    recorder = Recorder(path)
    connection = recorder.opened(CLIENT, SERVER, 0)
    for _, message in source.messages:
        connection.data(message.side, message.data, round((message.ended or 0) * 1e9))
    for side in Side:
        connection.ended(side, 0)
    recorder.close()
    again = collect(path)
    assert [m.data for _, m in again.messages] == [m.data for _, m in source.messages]
    assert path_of("own-3.6.1").stat().st_size == pytest.approx(path.stat().st_size, rel=0.05)
