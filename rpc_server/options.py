"""The server's command line."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from client.split.address import OwnCard, ServerAddress
from protocol.dialects import DIALECTS, find_dialects
from protocol.endpoint import DEFAULT_PORT, format_endpoint
from protocol.split import MAX_PARTS, WIRE_TYPES
from rpc_server import SOFTWARE
from rpc_server.devices.split.candidates import AutoSplit
from rpc_server.limits import ServerLimits
from rpc_server.net.admission import Network

DEFAULT_HOST = "127.0.0.1"
TOKEN_VARIABLE = "GGML_RPC_TOKEN"
SPLIT_TOKEN_VARIABLE = "GGML_RPC_SPLIT_TOKEN"
NO_PREPARE_VARIABLE = "GGML_RPC_NO_PREPARE"
OWN_CARD_OPTION = "--own-card"
# What starts this program.
PROGRAM = (sys.executable, "-m", "rpc_server")
LOG_LEVELS = ("debug", "info", "warning", "error")

# None is this machine's processors.
Parts = tuple[ServerAddress | OwnCard | None, ...]

_UNITS = {"": 1 << 20, "M": 1 << 20, "MB": 1 << 20, "MIB": 1 << 20}
_UNITS |= dict.fromkeys(("G", "GB", "GIB"), 1 << 30)

_EPILOG = """\
On the machine with the model, point any llama.cpp program at this server:

    llama-server -m model.gguf --rpc 192.168.1.10:50052 -ngl 99

Exit codes: 0 stopped by a signal, 1 could not start (the reason is printed), 2 bad options; of
--prepare 0 if all is compiled, else 1.
"""


def server_version() -> str:
    """Return this package's version, with the newest protocol it speaks."""
    return f"{SOFTWARE} (ggml RPC protocol {DIALECTS[0].name} and older)"


def memory_size(text: str) -> int:
    """Return the bytes of '4096' (MiB) or '8G'; ArgumentTypeError for anything else."""
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


def _limit(text: str) -> float | None:
    """Seconds; 0 is no limit."""
    return None if text.strip() == "0" else _seconds(text)


def _drain(text: str) -> float:
    return 0.0 if text.strip() == "0" else _seconds(text)


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part) for part in re.split(r"[,\s]+", text) if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no list of addresses or networks such as 192.168.1.0/24: {error}"
        ) from None


def port(text: str) -> int:
    """Return a port number, 0 for any; ArgumentTypeError for anything else."""
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


def _split(text: str) -> Parts | AutoSplit:
    """Return what --split names: parts, or what they are to be chosen from."""
    auto, colon, names = text.partition(":")
    if auto.strip() == "auto":
        return _candidates(names) if colon else AutoSplit()
    return _parts(text)


def _candidates(text: str) -> AutoSplit:
    names = [name for name in re.split(r"[,;\s]+", text) if name]
    if not names:
        raise argparse.ArgumentTypeError("'auto:' names nothing to choose from")
    words = {"announced", "local"}
    named = ",".join(name for name in names if name not in words)
    addresses = []
    for part in _parts(named) if named else ():
        if isinstance(part, OwnCard):
            raise argparse.ArgumentTypeError(
                "'auto:' chooses among servers and this machine's processors; name "
                f"{part.name} as a part, without 'auto:'"
            )
        if part is not None:
            addresses.append(part)
    return AutoSplit(tuple(addresses), "announced" in names, "local" in names)


def _parts(text: str) -> Parts:
    parts = tuple(_part(name) for name in re.split(r"[,;\s]+", text) if name)
    # Whether inside of TLS or not, one server is one part.
    names = [
        format_endpoint(p.host, p.port) if isinstance(p, ServerAddress) else p.name
        for p in parts
        if p is not None
    ]
    for name in names:
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"names {name} twice")
    if parts.count(None) > 1 or len(parts) > MAX_PARTS or not any(parts):
        raise argparse.ArgumentTypeError(
            f"'{text}' must name 1 to {MAX_PARTS} parts, 'local' once at most and not alone"
        )
    return parts


def _part(name: str) -> ServerAddress | OwnCard | None:
    """Return what one name of --split names; None is this machine's processors."""
    if name == "local":
        return None
    if name.lower() == "cuda":
        raise argparse.ArgumentTypeError(
            "name this machine's GPUs one by one (cuda0,cuda1); a host of that name is "
            f"{name}:{DEFAULT_PORT}"
        )
    try:
        return OwnCard.parse(name) or ServerAddress.parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; or 'local', 'cuda0', or tls://host:port"
        ) from None


def _own_card(text: str) -> OwnCard:
    card = OwnCard.parse(text)
    if card is None:
        raise argparse.ArgumentTypeError(f"'{text}' names no card such as cuda0")
    return card


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


def _paths(text: str) -> tuple[Path, ...]:
    paths = tuple(Path(part).expanduser() for part in text.split(",") if part)
    for path in paths:
        if not path.exists():
            raise argparse.ArgumentTypeError(f"there is no file or folder {path}")
    if not paths:
        raise argparse.ArgumentTypeError("names no file and no folder")
    return paths


def _devices(text: str) -> list[str]:
    return [name for name in re.split(r"[,/]+", text) if name]


_DEFAULTS = ServerLimits()

# Of each limit: its field of ServerLimits, what its option takes, and what is said of it.
Limits = dict[str, tuple[str, Callable[[str], object], str, str]]
_MEMORY_LIMITS: Limits = {
    "--mem-per-client": (
        "memory_per_client", memory_size, "SIZE", "most memory for one client (default: --mem)"
    ),
    "--mem-graphs": (
        "graph_memory", memory_size, "SIZE",
        "most for messages, plans and programs of all clients (default: 2G, or an eighth)",
    ),
}  # fmt: skip
_LIMITS: Limits = {
    "--max-message": (
        "message", memory_size, "SIZE", "largest graph or program, MiB (default: 64)"
    ),
    "--max-graph-nodes": (
        "graph_nodes", _positive, "N", "most nodes of a graph (default: %(default)s)"
    ),
    "--max-graph-tensors": (
        "graph_tensors", _positive, "N", "most tensors of a graph (default: %(default)s)"
    ),
    "--max-clients": ("clients", _positive, "N", "most connections (default: %(default)s)"),
    "--max-clients-per-address": (
        "clients_per_address", _positive, "N", "most from one address (default: %(default)s)"
    ),
    "--handshake-timeout": (
        "handshake", _seconds, "SECONDS", "for a client's HELLO (default: %(default)g)"
    ),
    "--stall-timeout": (
        "stall", _limit, "SECONDS",
        "for 64 KiB of a message that has begun, or of answers (default: %(default)g)",
    ),
    "--idle-timeout": ("idle", _limit, "SECONDS", "for a client that asks nothing (default: none)"),
    "--graph-timeout": ("graph", _limit, "SECONDS", "for one graph (default: %(default)g)"),
    "--peer-timeout": (
        "peer", _seconds, "SECONDS",
        "for the coordinator of a split, within a program (default: %(default)g)",
    ),
}  # fmt: skip


def _add_listening(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-H", "--host", default=DEFAULT_HOST, metavar="ADDRESS",
        help="address to listen on (default: %(default)s)")  # fmt: skip
    add("-p", "--port", type=port, default=DEFAULT_PORT, metavar="N",
        help="port (default: %(default)s; 0: any)")  # fmt: skip
    add("--protocol", type=_protocol, metavar="auto|X.Y[.Z][-OPS]",
        help="speak this version only (auto)")  # fmt: skip
    add("--announce", action="store_true",
        help="let programs on the networks that this server listens on find it (mDNS)")  # fmt: skip
    add(
        "--drain-seconds",
        type=_drain,
        default=_DEFAULTS.drain,
        metavar="SECONDS",
        help="when stopped, wait so long for what is under way; 0: not (default: %(default)g)",
    )


def _add_devices(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-d", "--device", type=_devices, default=[], metavar="DEV[,DEV]", help="devices to offer")
    add(
        "-t", "--threads", type=_positive, metavar="N", help="threads of the CPU device (all cores)"
    )
    add("--prepare", action="store_true",
        help="compile what common models need, once for this machine, and end")  # fmt: skip
    add("--no-prepare", action="store_true", default=bool(os.environ.get(NO_PREPARE_VARIABLE)),
        help="compile nothing ahead, and let graphs wait for all of their kernels (or set the "
        f"variable {NO_PREPARE_VARIABLE})")  # fmt: skip
    add("--allow-host-ops", action="store_true",
        help="run ops that have no kernel for the GPU on the host, which is slow")  # fmt: skip
    # What a coordinator starts its own processes with; nobody types it.
    add(OWN_CARD_OPTION, type=_own_card, dest="own_card", help=argparse.SUPPRESS)


def _add_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mem", type=memory_size, metavar="SIZE", help="most memory for clients: 4096 (MiB), 8G"
    )
    _add_limits(group, _MEMORY_LIMITS)


def _add_splitting(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--split", type=_split, metavar="HOST:PORT[,...]|auto",
        help="be one large device whose weights are cut by rows over these servers (upstream's or "
        "ours); 'local' among them is a share of this machine's own processors, 'cuda0' its first "
        "GPU. auto: find servers that "
        "announce themselves, measure them, and take the best arrangement; auto:HOST[,HOST]: of "
        "these, 'local' and 'announced' ones where they are among the names")  # fmt: skip
    add("--split-model", type=Path, metavar="FILE",
        help="the model that --split auto and --split-mode auto choose for, a GGUF file; only its "
        "header is read (default: that of --models, if it is one file)")  # fmt: skip
    add(
        "--tensor-split",
        type=_proportions,
        metavar="N[,N]|auto",
        help="share of each of --split (default: by free memory); auto measures how fast each is",
    )
    add("--split-mode", choices=("auto", "row", "tensor"), default="auto",
        help="row: cut every weight by rows, with results of one server to the bit; tensor: whole "
        "attention heads and feed-forward columns on each server; auto: the one in which a token "
        "waits for less (default: %(default)s)")  # fmt: skip
    add("--split-sums", choices=("parts", "here"), default="parts",
        help="who adds up what parts give in tensor mode: the parts among themselves, where they "
        "can reach one another, or this server (default: %(default)s)")  # fmt: skip
    add("--split-wire", choices=tuple(WIRE_TYPES), default="f32",
        help="how activations travel to the workers (default: %(default)s)")  # fmt: skip
    add("--split-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="longest that a worker may take for one exchange (default: %(default)s)")  # fmt: skip
    add("--split-ca", type=Path, metavar="FILE",
        help="what vouches for workers named tls://host:port (default: the system's)")  # fmt: skip
    add("--split-cert", type=Path, metavar="FILE", help="certificate to show these workers")
    add("--split-key", type=Path, metavar="FILE", help="its key, if not in --split-cert")
    token_help = f"token to show these workers (or in the variable {SPLIT_TOKEN_VARIABLE})"
    add("--split-token-file", type=Path, metavar="FILE", help=token_help)


def _add_cache(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--models",
        type=_paths,
        default=(),
        metavar="PATH[,PATH]",
        help="GGUF files, or folders of them, on this machine: their weights need not be sent",
    )
    add("--no-mmap", action="store_true",
        help="copy weights of --models to memory of each client's own, in large pages, instead of "
        "mapping the file: faster to compute with, and takes the memory")  # fmt: skip
    add("-c", "--cache", action="store_true", help="keep large tensors on disk (upstream's folder)")
    add("--cache-dir", type=Path, metavar="DIR", help="the folder of --cache, which it implies")
    add("--cache-size", type=memory_size, metavar="SIZE",
        help="most that --cache keeps, which it implies (default: 100G)")  # fmt: skip
    add("--cache-read-only", action="store_true",
        help="serve what is in the folder of --cache, which it implies, and keep nothing that "
        "clients upload: for clients that don't trust each other")  # fmt: skip


def _add_access(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--allow", type=_networks, default=(), metavar="CIDR[,CIDR]",
        help="let in only clients from these networks (default: any)")  # fmt: skip
    add("--tls-port", type=port, metavar="N", help="serve inside of TLS too, on this port (0: any)")
    add("--tls-host", metavar="ADDRESS", help="address of --tls-port (default: that of --host)")
    add("--tls-cert", type=Path, metavar="FILE", help="certificate (and chain) of --tls-port, PEM")
    add("--tls-key", type=Path, metavar="FILE", help="its key, if not in --tls-cert")
    add("--tls-ca", type=Path, metavar="FILE",
        help="clients of --tls-port need a certificate that this one vouches for")  # fmt: skip
    add("--token-file", type=Path, metavar="FILE",
        help="clients of --tls-port have to show the token in this file (or in the variable "
        f"{TOKEN_VARIABLE})")  # fmt: skip


def _add_limits(group: argparse._ArgumentGroup, limits: Limits = _LIMITS) -> None:
    for option, (field, type_, metavar, help_) in limits.items():
        default = getattr(_DEFAULTS, field)
        group.add_argument(
            option, type=type_, default=default, metavar=metavar, dest=f"limit_{field}", help=help_
        )


def _add_logs_and_metrics(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--log-level", choices=LOG_LEVELS, help="(default: info; with --quiet warning)")
    add("-q", "--quiet", action="store_true", help="print nothing unless something is wrong")
    add("--log-format", choices=("text", "json"), default="text",
        help="json: one object a line (default: %(default)s)")  # fmt: skip
    add(
        "--metrics-port",
        type=port,
        metavar="N",
        help="serve /metrics (Prometheus), /healthz and /readyz over HTTP (default: not; 0: any)",
    )
    add("--metrics-host", default=DEFAULT_HOST, metavar="ADDRESS",
        help="address of --metrics-port (default: %(default)s)")  # fmt: skip


# In the order of --help.
_GROUPS: dict[str, Callable[[argparse._ArgumentGroup], None]] = {
    "listening": _add_listening,
    "devices": _add_devices,
    "memory": _add_memory,
    "splitting one model over several servers": _add_splitting,
    "weights on this machine's disk": _add_cache,
    "access and TLS": _add_access,
    "limits of a client (in seconds 0 is none where a default is)": _add_limits,
    "logs and metrics": _add_logs_and_metrics,
}


def server_limits(options: argparse.Namespace) -> ServerLimits:
    """Return the limits that were chosen."""
    chosen = {
        field: getattr(options, f"limit_{field}")
        for field, *_ in (_MEMORY_LIMITS | _LIMITS).values()
    }
    return dataclasses.replace(_DEFAULTS, **chosen, drain=options.drain_seconds)


# Of a coordinator's options those that the process of one of its cards goes by: the rest is about
# its clients, and the card has one client.
_OF_CARDS = (
    "allow_host_ops", "threads", "cache", "cache_dir", "cache_size", "cache_read_only",
    "log_format", "limit_message", "limit_graph_nodes", "limit_graph_tensors",
    "limit_graph_memory", "limit_stall", "limit_graph", "limit_peer",
)  # fmt: skip


def options_of_card(options: argparse.Namespace) -> argparse.Namespace:
    """Return how to serve ``options.own_card``, of a coordinator's own options with that one."""
    made = parse_options([])
    for name in _OF_CARDS:
        setattr(made, name, getattr(options, name))
    made.own_card, made.device = options.own_card, [options.own_card.device]
    made.port = 0
    made.quiet = made.no_prepare = True
    # The coordinator tells what its clients do, and ends when it has drained.
    made.log_level = "debug" if options.log_level == "debug" else "warning"
    made.drain_seconds = 0.0
    return made


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all options, grouped as --help shows them."""
    parser = argparse.ArgumentParser(
        prog="python -m rpc_server",
        usage="%(prog)s [OPTIONS]",
        description="Serves this machine's memory and processors to llama.cpp (--rpc host:port).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=server_version())
    for title, add_options in _GROUPS.items():
        add_options(parser.add_argument_group(title))
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is wrong."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.program = PROGRAM
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.log_level = options.log_level or ("warning" if options.quiet else "info")
    options.cache = bool(
        options.cache or options.cache_dir or options.cache_size or options.cache_read_only
    )
    auto = isinstance(options.split, AutoSplit)
    if auto and options.tensor_split:
        parser.error("--split auto chooses the shares, too: leave out --tensor-split")
    if options.split_model and not (auto or (options.split and options.split_mode == "auto")):
        parser.error("--split-model is for --split auto and --split-mode auto")
    shares = options.tensor_split
    if shares and (not options.split or (shares != "auto" and len(shares) != len(options.split))):
        parser.error("--tensor-split needs one share for each part of --split")
    if (options.tls_port is None) != (options.tls_cert is None):
        parser.error("--tls-port and --tls-cert need each other")
    if options.tls_port is None and (options.tls_ca or options.token_file or options.tls_key):
        parser.error("--tls-ca, --tls-key and --token-file are for --tls-port")
    secure = auto or any(isinstance(p, ServerAddress) and p.tls for p in options.split or ())
    if not secure and (options.split_ca or options.split_cert or options.split_token_file):
        parser.error("--split-ca, --split-cert, --split-token-file are for tls:// in --split")
    if options.no_mmap and not options.models:
        parser.error("--no-mmap is for --models")
    if options.cache_read_only and options.cache_size:
        parser.error("--cache-read-only keeps nothing, so it has no --cache-size")
    if options.split and options.device:
        parser.error(
            "--split is a device of its own: leave out --device (GPUs of this machine are parts: "
            "--split cuda0,...)"
        )
    return options
