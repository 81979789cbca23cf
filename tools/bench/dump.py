"""How fast tools.dump reads a large capture, and in how much memory.

    python -m tools.bench.dump                          # 1 GiB, a file in the temporary folder
    python -m tools.bench.dump --size 4G --folder /data
    python -m tools.bench.dump --profile                # and where the time goes

Makes captures of uploads (SET_TENSOR of many MiB) in packets as on a network (1448 bytes of data)
and as on loopback (65475), each as pcap and pcapng, and has them read by a process of its own. The
files are removed. They are read from the page cache: it is the program that is measured. The speed
is per second on a processor.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.types import GgmlType
from protocol.messages import RPC_TENSOR_SIZE, RpcTensor
from protocol.observe.events import Side
from protocol.requests import encode_frame, encode_request
from protocol.responses import encode_answer
from tools import arguments
from tools.record.frames import Address, TcpFrames
from tools.record.pcapng import PcapngWriter

_SEGMENTS = {"network": 1448, "loopback": 65475}
_UPLOAD = 32 << 20
_PIECE = 4 << 20


def _stream(size: int) -> Iterator[tuple[Side, bytes]]:
    """A client that uploads ``size`` bytes, in what it would write to its socket at once."""
    commands = DIALECTS[0].commands
    major, minor, patch = DIALECTS[0].version
    caps = bytes(DIALECTS[0].hello_size)
    yield Side.CLIENT, encode_frame(Command.HELLO, len(caps)) + caps
    version = {"major": major, "minor": minor, "patch": patch, "conn_caps": caps}
    yield Side.SERVER, encode_answer(commands[Command.HELLO], version)
    random = os.urandom(_PIECE)
    tensor = vars(codec(RpcTensor).parse(bytes(RPC_TENSOR_SIZE)))
    for i in range(max(1, size // _UPLOAD)):
        fields = {
            **tensor, "id": i + 1, "type": GgmlType.F32, "name": f"blk.{i}.weight".encode(),
            "ne": (_UPLOAD // 4, 1, 1, 1), "nb": (4, _UPLOAD, _UPLOAD, _UPLOAD),
        }  # fmt: skip
        request = {"tensor": fields, "cache_flag": 0, "offset": 0}
        spec = commands[Command.SET_TENSOR]
        yield Side.CLIENT, encode_request(Command.SET_TENSOR, spec, request, _UPLOAD)
        for _ in range(0, _UPLOAD, _PIECE):
            yield Side.CLIENT, random


def write_pcapng(path: Path, size: int, segment: int) -> None:
    """Write a capture of about ``size`` bytes in segments of ``segment``."""
    writer = PcapngWriter(path)
    frames = TcpFrames(Address("10.0.0.2", 40000), Address("10.0.0.1", arguments.DEFAULT_PORT))
    now = time.time_ns()

    def write(pieces: tuple[bytes | memoryview, ...]) -> None:
        nonlocal now
        now += 1000
        writer.packet(now, *pieces)
        if writer.pending > _PIECE:
            writer.flush()

    for pieces in frames.opened():
        write(pieces)
    for side, data in _stream(size):
        for at in range(0, len(data), segment):
            for pieces in frames.data(side, data[at : at + segment]):
                write(pieces)
    for side in Side:
        for pieces in frames.ended(side):
            write(pieces)
    writer.flush()
    writer.close()


def convert_to_pcap(source: Path, target: Path) -> None:
    """Write the same packets as a pcap file."""
    from tools.capture.files import read_capture

    with target.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1))
        for frame in read_capture(source):
            seconds, rest = divmod(frame.time, 1)
            head = int(seconds), int(rest * 1e6), len(frame.data), frame.length
            file.write(struct.pack("<IIII", *head))
            file.write(frame.data)


def measure(path: Path) -> tuple[float, float, int]:
    """Measure ``tools.dump --stats``: seconds, those on a processor, and the most memory (bytes).

    The first two differ where other programs run at the same time.
    """
    # The child says itself what it used: a parent only learns the maximum over all its children.
    program = (
        "import resource, sys; from tools.dump.__main__ import main; code = main(sys.argv[1:]);"
        "u = resource.getrusage(resource.RUSAGE_SELF);"
        "print(u.ru_utime + u.ru_stime, u.ru_maxrss, file=sys.stderr);"
        "sys.exit(code)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), "--stats"], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode or "SET_TENSOR" not in done.stdout:
        raise RuntimeError(f"tools.dump failed:\n{done.stdout}{done.stderr}")
    *_, busy, memory = done.stderr.split()
    return seconds, float(busy), int(memory) * 1024


def _profile(path: Path) -> None:
    from tools.dump.__main__ import main as dump

    profile = cProfile.Profile()
    profile.runcall(dump, [str(path), "--stats"])
    pstats.Stats(profile).sort_stats("tottime").print_stats(15)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments.command_line("tools.bench.dump", __doc__)
    parser.add_argument("--size", type=arguments.size, default=1 << 30, help="of a capture (1G)")
    parser.add_argument("--folder", type=Path, help="where captures are made for the time of a run")
    parser.add_argument("--profile", action="store_true", help="profile the network capture")
    options = parser.parse_args(argv)
    print("packets   format       size  seconds  on CPU      speed    memory")
    for name, segment in _SEGMENTS.items():
        with tempfile.TemporaryDirectory(prefix="dump-", dir=options.folder) as folder:
            pcapng = Path(folder) / "capture.pcapng"
            pcap = pcapng.with_suffix(".pcap")
            write_pcapng(pcapng, options.size, segment)
            for path in (pcapng, pcap):
                if path is pcap:
                    convert_to_pcap(pcapng, pcap)
                    pcapng.unlink()
                size = path.stat().st_size
                seconds, busy, memory = measure(path)
                print(
                    f"{name:9} {path.suffix[1:]:7} {size / 1e6:6.0f} MB {seconds:8.2f} "
                    f"{busy:7.2f} {size / busy / 1e6:5.0f} MB/s {memory / (1 << 20):5.0f} MiB",
                    flush=True,
                )
            if options.profile and name == "network":
                _profile(pcap)
    return 0


if __name__ == "__main__":
    sys.exit(main())
