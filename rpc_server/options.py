"""The server's command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Literal

from protocol.dialects import DIALECTS, find_dialects
from protocol.split import MAX_PARTS, WIRE_TYPES
from rpc_server import __version__

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50052
LOG_LEVELS = ("debug", "info", "warning", "error")

_UNITS = {"": 1 << 20, "M": 1 << 20, "MB": 1 << 20, "MIB": 1 << 20}
_UNITS |= dict.fromkeys(("G", "GB", "GIB"), 1 << 30)

_EPILOG = """\
On the machine with the model, point any llama.cpp program at this server:

    llama-server -m model.gguf --rpc 192.168.1.10:50052 -ngl 99

Exit codes: 0 stopped by a signal, 1 could not start (the reason is printed), 2 bad options.
"""


def server_version() -> str:
    """This package's version, with the newest protocol it speaks."""
    return f"ggml-rpc-server {__version__} (ggml RPC protocol {DIALECTS[0].name} and older)"


def memory_size(text: str) -> int:
    """Bytes of '4096' (MiB) or '8G'; ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 4096 (MiB) or 8G")
    return int(float(match[1]) * unit)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # A day and more is no limit any more.
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds up to 86400")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port (0 to 65535)")
    return int(text)


def _protocol(text: str) -> str | None:
    if text == "auto":
        return None
    try:
        find_dialects(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _split(text: str) -> tuple[tuple[str, int] | None, ...]:
    parts: list[tuple[str, int] | None] = []
    for name in filter(None, re.split(r"[,;\s]+", text)):
        if name == "local":
            parts.append(None)
            continue
        host, colon, port = name.rpartition(":")
        host, number = (host, port) if colon else (name, str(DEFAULT_PORT))
        if not host or not number.isdecimal() or not 0 < int(number) < 65536:
            raise argparse.ArgumentTypeError(f"'{name}' is neither host:port nor 'local'")
        parts.append((host.strip("[]"), int(number)))
    if parts.count(None) > 1 or len(parts) > MAX_PARTS or not any(parts):
        raise argparse.ArgumentTypeError(
            f"'{text}' must name 1 to {MAX_PARTS} parts, 'local' once at most and not alone"
        )
    return tuple(parts)


def _proportions(text: str) -> tuple[float, ...] | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        shares = tuple(float(n) for n in re.split(r"[,/]+", text))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= n < float("inf") for n in shares) or not sum(shares):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a list of shares such as 2,1 nor auto"
        )
    return shares


def _devices(text: str) -> list[str]:
    return [name for name in re.split(r"[,/]+", text) if name]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m rpc_server",
        description="Serves this machine's memory and processors to llama.cpp (--rpc host:port).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-H", "--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s)")
    add(
        "-p", "--port", type=_port, default=DEFAULT_PORT, help="port (default: %(default)s; 0: any)"
    )
    add(
        "-t", "--threads", type=_positive, metavar="N", help="threads of the CPU device (all cores)"
    )
    add("-d", "--device", type=_devices, default=[], metavar="DEV[,DEV]", help="devices to offer")
    add("-c", "--cache", action="store_true", help="keep large tensors on disk (upstream's folder)")
    add("--mem", type=memory_size, metavar="SIZE", help="most memory for clients: 4096 (MiB), 8G")
    add(
        "--split",
        type=_split,
        metavar="HOST:PORT[,...]",
        help="be one large device whose weights are cut by rows over these servers (upstream's or "
        "ours); 'local' among them is a share of this machine's own",
    )
    add(
        "--tensor-split",
        type=_proportions,
        metavar="N[,N]|auto",
        help="share of each of --split (default: by free memory); auto measures how fast each is",
    )
    add(
        "--split-mode",
        choices=("row", "tensor"),
        default="row",
        help="row: cut every weight by rows; tensor: whole attention heads and feed-forward "
        "columns on each server, two exchanges a layer (default: %(default)s)",
    )
    add(
        "--split-wire",
        choices=tuple(WIRE_TYPES),
        default="f32",
        help="how activations travel to the workers (default: %(default)s)",
    )
    add(
        "--split-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="longest that a worker may take for one exchange (default: %(default)s)",
    )
    add("--protocol", type=_protocol, metavar="auto|X.Y", help="speak this version only (auto)")
    add("--log-level", choices=LOG_LEVELS, default="info", help="(default: %(default)s)")
    add("--version", action="version", version=server_version())
    options = parser.parse_args(arguments)
    shares = options.tensor_split
    if shares and (not options.split or (shares != "auto" and len(shares) != len(options.split))):
        parser.error("--tensor-split needs one share for each part of --split")
    if options.split and options.device:
        parser.error("--split is a device of its own: leave out --device")
    return options
