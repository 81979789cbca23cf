"""``python -m rpc_server``: start, serve, stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType

from protocol.negotiation import Negotiator
from protocol.split import WIRE_TYPES
from rpc_server.cache import CacheError, TensorCache, default_cache_dir
from rpc_server.context import ServerContext
from rpc_server.devices.base import Device, DeviceError
from rpc_server.devices.cpu.catalog import end_compilers
from rpc_server.devices.cpu.hashing import compiled_hash
from rpc_server.devices.registry import Options, UnknownDeviceError, open_devices
from rpc_server.memory import Budget
from rpc_server.options import parse_options, server_version
from rpc_server.server import Server

log = logging.getLogger("rpc_server")

_EXPOSED = """\
WARNING: listening on {host}, not only on this machine.
         Whoever reaches this port can use its memory and processors, and nothing on the wire is
         encrypted or authenticated. Keep it on a network you trust."""


class StartError(Exception):
    """The server can't start; the message tells the user why."""


def _event_loop() -> ModuleType | None:
    try:
        import uvloop
    except ImportError:
        # No wheels for Windows: asyncio's own loop serves there.
        return None
    module: ModuleType = uvloop
    return module


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str) -> None:
    print(text, flush=True)


def _banner(host: str, port: int, context: ServerContext, protocol: str | None) -> None:
    cache = context.cache
    _say(f"Starting {server_version()}")
    _say(f"  endpoint       : {host}:{port}")
    _say(f"  local cache    : {cache.folder if cache else 'n/a'}")
    _say(f"  protocol       : {protocol or 'auto'}")
    _say("Devices:")
    for budget in context.budgets:
        free, total = budget.memory()
        device = budget.device
        _say(f"  {device.name}: {device.description} ({total >> 20} MiB, {free >> 20} MiB free)")


async def _devices(options: Namespace) -> Sequence[Device]:
    if not options.split:
        return open_devices(options.device, Options(threads=options.threads))
    from rpc_server.split.device import SplitDevice, SplitOptions

    wire, timeout = WIRE_TYPES[options.split_wire], options.split_timeout
    by_columns = options.split_mode == "tensor"
    split = SplitOptions(options.split, options.tensor_split, wire, by_columns, timeout)
    return [await SplitDevice.open(split, options.threads)]


async def _context(options: Namespace) -> ServerContext:
    """Raises StartError."""
    try:
        devices = await _devices(options)
        cache = TensorCache(default_cache_dir(), compiled_hash()) if options.cache else None
    except (UnknownDeviceError, CacheError, DeviceError) as error:
        raise StartError(str(error)) from None
    return ServerContext(
        budgets=[Budget(device, options.mem) for device in devices],
        negotiator=Negotiator(options.protocol),
        cache=cache,
    )


async def _serve(options: Namespace) -> None:
    """Serve until SIGINT or SIGTERM. Raises StartError."""
    context = await _context(options)
    server = Server(context)
    try:
        port = await server.start(options.host, options.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {options.port} of {options.host} is in use; choose another with --port"
            ) from None
        reason = error.strerror or str(error)
        raise StartError(f"can't listen on {options.host}:{options.port}: {reason}") from None
    if not _is_loopback(options.host):
        print(_EXPOSED.format(host=options.host), file=sys.stderr, flush=True)
    _banner(options.host, port, context, options.protocol)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    await stop.wait()
    log.info("stopping")
    end_compilers()
    await server.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse_options(arguments)
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    loop = _event_loop()
    try:
        with asyncio.Runner(loop_factory=loop.new_event_loop if loop else None) as runner:
            runner.run(_serve(options))
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
