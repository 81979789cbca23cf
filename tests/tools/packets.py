"""Captures for tests: packets of connections, and what happens to packets on their way."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from protocol.observe.conversation import Side
from tests.protocol.turns import Turn
from tools.capture.files import CaptureWriter, Frame
from tools.record.frames import Address, TcpFrames

ETHERNET, NULL, LOOP, RAW, SLL, SLL2 = 1, 0, 108, 101, 113, 276
CLIENT, SERVER = Address("10.0.0.2", 40000), Address("10.0.0.1", 50052)
CLIENT6, SERVER6 = Address("fd00::2", 40000), Address("fd00::1", 50052)


def connection_frames(
    turns: Sequence[Turn],
    *,
    mss: int = 1448,
    client: Address = CLIENT,
    server: Address = SERVER,
    start: float = 1000.0,
    opened: bool = True,
    ended: bool = True,
) -> list[Frame]:
    """The packets of a connection on Ethernet, 10 us one after the other."""
    maker = TcpFrames(client, server)
    made: list[Iterable[tuple[bytes | memoryview, ...]]] = [list(maker.opened())]
    if not opened:
        made = []
    for side, data in turns:
        made += [list(maker.data(side, data[at : at + mss])) for at in range(0, len(data), mss)]
    if ended:
        made += [list(maker.ended(Side.CLIENT)), list(maker.ended(Side.SERVER))]
    packets = [b"".join(map(bytes, pieces)) for group in made for pieces in group]
    return [
        Frame(start + i * 1e-5, ETHERNET, packet, len(packet)) for i, packet in enumerate(packets)
    ]


def on_link(frame: Frame, link: int) -> Frame:
    """An Ethernet frame as it would be captured on another link layer."""
    kind, packet = frame.data[12:14], frame.data[14:]
    family = 2 if kind == b"\x08\x00" else 10
    head = {
        NULL: struct.pack("<I", family),
        LOOP: struct.pack(">I", family),
        RAW: b"",
        SLL: struct.pack(">HHH8s", 0, 1, 6, bytes(8)) + kind,
        SLL2: kind + struct.pack(">HIHBB8s", 0, 1, 1, 0, 6, bytes(8)),
    }[link]
    return Frame(frame.time, link, head + packet, len(head) + len(packet))


def tagged(frame: Frame, *tags: int) -> Frame:
    """With VLAN tags, the outermost first."""
    kinds = [0x88A8] * (len(tags) - 1) + [0x8100]
    data = frame.data[:12] + b"".join(
        struct.pack(">HH", kind, tag) for kind, tag in zip(kinds, tags, strict=True)
    )
    data += frame.data[12:]
    return Frame(frame.time, frame.link, data, len(data))


def cut(frame: Frame, snaplen: int) -> Frame:
    return frame._replace(data=frame.data[:snaplen])


def write_pcapng(path: Path, frames: Iterable[Frame]) -> Path:
    with path.open("wb") as file:
        writer = CaptureWriter(file)
        for frame in frames:
            writer.write(frame)
    return path


def pcap_bytes(frames: Sequence[Frame], *, order: str = "<", nano: bool = False) -> bytes:
    """A pcap file of frames of one link type."""
    magic = 0xA1B23C4D if nano else 0xA1B2C3D4
    link = frames[0].link if frames else ETHERNET
    parts = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 262144, link)]
    scale = 1_000_000_000 if nano else 1_000_000
    for frame in frames:
        ticks = round(frame.time * scale)
        head = (ticks // scale, ticks % scale, len(frame.data), frame.length)
        parts += [struct.pack(order + "IIII", *head), frame.data]
    return b"".join(parts)
