"""``python -m rpc_server``: start, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from client.errors import AllocationFailed, MissingPackageError
from client.split.address import OwnCard, ServerAddress
from client.tunnel import SecretError, client_context, read_token, server_context
from protocol.announcement import Announcement
from protocol.endpoint import format_endpoint
from protocol.negotiation import Negotiator
from protocol.split import WIRE_TYPES
from rpc_server import SOFTWARE
from rpc_server.cache.quota import DEFAULT_LIMIT
from rpc_server.cache.store import CacheError, TensorCache, default_cache_dir
from rpc_server.children import Leash, Told
from rpc_server.devices.base import Device, DeviceError, Splitting
from rpc_server.devices.cpu.catalog import end_compilers
from rpc_server.devices.cpu.hashing import CompiledLanes, compiled_hash
from rpc_server.devices.cpu.preparing import prepare_now, prepare_when_idle
from rpc_server.devices.registry import (
    DeviceOptions,
    UnknownDeviceError,
    open_devices,
    warn_of_idle_cards,
)
from rpc_server.devices.split.candidates import AutoSplit
from rpc_server.models.library import Models
from rpc_server.models.mapping import Mappings
from rpc_server.models.record import Records, default_folder
from rpc_server.net.admission import is_allowed
from rpc_server.net.listener import Server
from rpc_server.net.listening import PortInUseError, is_here, is_loopback, is_name, listen
from rpc_server.observability.console import report
from rpc_server.observability.logs import set_up
from rpc_server.observability.metrics import ServerStats
from rpc_server.options import (
    OWN_CARD_OPTION,
    PROGRAM,
    SPLIT_TOKEN_VARIABLE,
    TOKEN_VARIABLE,
    Parts,
    options_of_card,
    parse_options,
    server_limits,
    server_version,
)
from rpc_server.session.buffers import Budget
from rpc_server.session.context import ServerContext, new_identity

if TYPE_CHECKING:
    from client.model_header import ModelShape
    from rpc_server.devices.split.device import SplitOptions
    from rpc_server.devices.split.worker import Tls
    from rpc_server.net.announcer import Announcer

log = logging.getLogger("rpc_server")

# How long a thread that plans a graph, or does other work in Python, keeps the event loop waiting
# for its turn, seconds. Python's own 5 ms are longer than the whole of most requests.
SWITCH_SECONDS = 0.001

# How often it is looked whether the clients of the other devices are gone once one is lost.
_LOOK_SECONDS = 0.5

_EXPOSED = """\
WARNING: listening on {host}, not only on this machine.
         Whoever reaches this port can use its memory and processors, and nothing on the wire is
         encrypted or authenticated. Keep it on a network you trust."""


_LOOPBACK_NAME = """\
WARNING: {host} is {address} on this machine, so no other machine can connect.
         Give --host this machine's address on the network, or 0.0.0.0 for all of them."""


_OPEN_TLS = """\
WARNING: whoever reaches {endpoint} is let in: TLS alone hides what is said, not from whom it is.
         Ask for a token (--token-file) or client certificates (--tls-ca)."""


class StartError(Exception):
    """The server can't start; the message tells the user why."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of serving: whether all threads have, and the exit status."""

    threads_ended: bool
    status: int


def _event_loop() -> ModuleType | None:
    try:
        import uvloop
    except ImportError:
        # No wheels for Windows: asyncio's own loop serves there.
        return None
    module: ModuleType = uvloop
    return module


def _say(text: str) -> None:
    print(text, flush=True)


def _banner(endpoint: str, tls: str | None, context: ServerContext, protocol: str | None) -> None:
    cache = context.cache
    _say(f"Starting {server_version()}")
    _say(f"  endpoint       : {endpoint}")
    if tls:
        _say(f"  endpoint, TLS  : {tls}")
    told = ["read only"] if cache and cache.read_only else []
    told += [context.kept_elsewhere] if context.kept_elsewhere else []
    elsewhere = f" ({', '.join(told)})" if told else ""
    if context.models is not None:
        _say(f"  models         : {context.models.describe()}")
    _say(f"  local cache    : {cache.folder if cache else 'n/a'}{elsewhere}")
    _say(f"  protocol       : {protocol or 'auto'}")
    _say("Devices:")
    for budget in context.budgets:
        free, total = budget.memory()
        device = budget.device
        _say(f"  {device.name}: {device.description} ({total >> 20} MiB, {free >> 20} MiB free)")


def _split_tls(options: Namespace, parts: Parts) -> Tls:
    """Return how workers named tls:// are spoken to. Raises SecretError."""
    from rpc_server.devices.split.worker import NO_TLS, Tls

    if not any(isinstance(part, ServerAddress) and part.tls for part in parts):
        return NO_TLS
    context = client_context(options.split_ca, options.split_cert, options.split_key)
    return Tls(context, read_token(options.split_token_file, SPLIT_TOKEN_VARIABLE))


async def _start_tls(options: Namespace, server: Server) -> tuple[str | None, list[socket.socket]]:
    """Listen for TLS if that is asked for; the address, and the sockets. Raises StartError."""
    if options.tls_port is None:
        return None, []
    host = options.tls_host or options.host
    try:
        tls = server_context(options.tls_cert, options.tls_key, options.tls_ca)
        token = read_token(options.token_file, TOKEN_VARIABLE)
    except SecretError as error:
        raise StartError(str(error)) from None
    sockets, endpoint = await _listen(host, options.tls_port, "--tls-port")
    server.start_tls(sockets, tls, token)
    if token is None and options.tls_ca is None and not is_loopback(sockets):
        print(_OPEN_TLS.format(endpoint=endpoint), file=sys.stderr, flush=True)
    asked = [w for w, has in (("token", token), ("client certificate", options.tls_ca)) if has]
    return f"{endpoint} ({' and '.join(asked) or 'no token'})", sockets


def _device_options(options: Namespace) -> DeviceOptions:
    return DeviceOptions(options.threads, options.allow_host_ops, baseline=not options.no_prepare)


async def _devices(options: Namespace, identity: int) -> Sequence[Device]:
    if not options.split:
        return open_devices(options.device, _device_options(options))
    if isinstance(options.split, AutoSplit):
        return await _chosen_devices(options, options.split, identity)
    from rpc_server.devices.split.device import SplitDevice

    for part in options.split:
        if not isinstance(part, ServerAddress):
            continue
        if await is_here(part.host, part.port, options.host, options.port):
            raise StartError(
                f"worker {format_endpoint(part.host, part.port)} is this server itself; its own "
                "share is called 'local'"
            )
    shape = None
    if options.split_mode == "auto":
        shape = await asyncio.to_thread(_split_shape_if_any, options)
    split = _split_options(
        options, options.split, options.tensor_split, options.split_mode, identity, shape
    )
    return [await SplitDevice.open(split, options.threads)]


def _split_options(
    options: Namespace,
    parts: Parts,
    shares: tuple[float, ...] | Literal["auto"] | None,
    mode: str,
    identity: int,
    shape: ModelShape | None = None,
) -> SplitOptions:
    """Return what a split device is made with. Raises SecretError."""
    from rpc_server.devices.split.device import SplitOptions

    if None in parts and not any(isinstance(part, OwnCard) for part in parts):
        warn_of_idle_cards()
    return SplitOptions(
        parts,
        shares,
        WIRE_TYPES[options.split_wire],
        None if mode == "auto" else mode == "tensor",
        options.split_timeout,
        options.split_sums == "parts",
        _split_tls(options, parts),
        identity=identity,
        shape=shape,
        card_command=(*options.program, *options.arguments, OWN_CARD_OPTION),
    )


async def _chosen_devices(options: Namespace, auto: AutoSplit, identity: int) -> Sequence[Device]:
    """Open the best of what there is. Raises StartError, DeviceError, SecretError."""
    from client.split.survey import Credentials
    from rpc_server.devices.split.choice import Chooser, candidates
    from rpc_server.devices.split.device import SplitDevice
    from rpc_server.devices.split.worker import PartsMissing

    tls = client_context(options.split_ca, options.split_cert, options.split_key)
    token = read_token(options.split_token_file, SPLIT_TOKEN_VARIABLE)
    modes: tuple[Literal["row", "tensor"], ...] = ("row", "tensor")
    try:
        shape = await asyncio.to_thread(_split_shape, options)
        asked = await candidates(auto, lambda target: is_allowed(target.host, options.allow))
        targets = [
            target
            for target in asked
            if not await is_here(target.host, target.port, options.host, options.port)
        ]
        chooser = await Chooser.measure(
            auto,
            targets,
            shape,
            [mode for mode in modes if options.split_mode in ("auto", mode)],
            options.threads,
            Credentials(tls, token),
            linked=options.split_sums == "parts",
        )
    except (MissingPackageError, AllocationFailed, OSError, ValueError) as error:
        raise StartError(f"--split auto: {error}") from None
    while True:
        choice = chooser.choose()
        if not choice.parts:
            # What was measured is what is served with.
            return open_devices(["CPU"], _device_options(options))
        split = _split_options(options, choice.parts, choice.shares, choice.mode, identity)
        try:
            return [await SplitDevice.open(split, options.threads)]
        except PartsMissing as missing:
            for number, reason in missing.reasons.items():
                lost = choice.parts[number]
                assert lost is not None
                chooser.leave_out(lost.endpoint, reason)


def _split_shape_if_any(options: Namespace) -> ModelShape | None:
    """Return the model that a mode is chosen for.

    None if none is named, or what --models has is none. Raises StartError.
    """
    try:
        return _split_shape(options)
    except (OSError, ValueError) as error:
        if options.split_model is None:
            return None
        raise StartError(f"--split-model: {error}") from None


def _split_shape(options: Namespace) -> ModelShape | None:
    """Return the model that --split auto is for, if one is named. Raises OSError, ValueError."""
    from client.model_header import ModelShape

    if options.split_model is not None:
        return ModelShape.read(options.split_model)
    if len(options.models) == 1 and options.models[0].is_file():
        return ModelShape.read(options.models[0])
    return None


def _cache(options: Namespace) -> TensorCache:
    """Raises CacheError."""
    folder = options.cache_dir or default_cache_dir()
    limit = options.cache_size or DEFAULT_LIMIT
    return TensorCache(folder, compiled_hash(), limit, read_only=options.cache_read_only)


def _models(options: Namespace, stats: ServerStats) -> Models | None:
    if not options.models:
        return None
    return Models(options.models, Records(default_folder()), CompiledLanes, stats.work)


async def _context(options: Namespace) -> ServerContext:
    """Raises StartError."""
    identity = new_identity()
    try:
        devices = await _devices(options, identity)
        cache = _cache(options) if options.cache else None
        kept = [await d.keep_slices(cache) for d in devices if cache and isinstance(d, Splitting)]
    except (UnknownDeviceError, CacheError, DeviceError, SecretError) as error:
        raise StartError(str(error)) from None
    stats = ServerStats()
    models = _models(options, stats)
    for device in devices:
        if models is not None and isinstance(device, Splitting):
            device.use_models(models)
    return ServerContext(
        stats=stats,
        models=models,
        mappings=Mappings() if options.models and not options.no_mmap else None,
        budgets=[Budget(device, options.mem) for device in devices],
        negotiator=Negotiator(options.protocol),
        cache=cache,
        limits=server_limits(options),
        identity=identity,
        kept_elsewhere=", ".join(kept),
    )


def _announcer(
    options: Namespace,
    context: ServerContext,
    sockets: Sequence[socket.socket],
    tls_sockets: Sequence[socket.socket],
) -> Announcer | None:
    """Tell the networks that this server is there, if that is asked for. Raises StartError."""
    if not options.announce:
        return None
    from rpc_server.net.announcer import AnnouncedPort, Announcer

    device = context.budgets[0].device.name
    ports = [AnnouncedPort(sockets, Announcement(SOFTWARE, device))]
    if tls_sockets:
        ports.append(AnnouncedPort(tls_sockets, Announcement(SOFTWARE, device, tls=True)))
    try:
        return Announcer(ports)
    except MissingPackageError as error:
        raise StartError(str(error)) from None


async def _metrics(options: Namespace, context: ServerContext) -> list[asyncio.AbstractServer]:
    """The HTTP side, if there is one. Raises StartError."""
    if options.metrics_port is None:
        return []
    from rpc_server.observability.exporter import serve

    sockets, endpoint = await _listen(options.metrics_host, options.metrics_port, "--metrics-port")
    try:
        listeners = await serve(context, sockets)
    except MissingPackageError as error:
        raise StartError(str(error)) from None
    log.info("metrics at http://%s/metrics", endpoint, extra={"event": "metrics"})
    return listeners


async def _listen(host: str, port: int, option: str) -> tuple[list[socket.socket], str]:
    """Listen; the sockets, and what to call them. Raises StartError."""
    try:
        sockets = await listen(host, port)
    except PortInUseError as error:
        raise StartError(
            f"port {port} of {host} is in use ({error.strerror}); choose another with {option}"
        ) from None
    except OSError as error:
        where = format_endpoint(host, port)
        raise StartError(f"can't listen on {where}: {error.strerror or error}") from None
    bound = sockets[0].getsockname()
    if is_name(host) and host != "localhost" and is_loopback(sockets):
        said = _LOOPBACK_NAME.format(host=host, address=bound[0])
        print(said, file=sys.stderr, flush=True)
    return sockets, format_endpoint(host, bound[1])


async def _serve(options: Namespace, leash: Leash | None) -> Ending:
    """Serve until SIGINT, SIGTERM or the loss of all devices. Raises StartError.

    On a ``leash`` it is told where this listens, and signals are for the one that holds it.
    """
    context = await _context(options)
    server = Server(context, options.allow)
    sockets, endpoint = await _listen(options.host, options.port, "--port")
    await server.start(sockets)
    tls, tls_sockets = await _start_tls(options, server)
    announcer = _announcer(options, context, sockets, tls_sockets)
    metrics = await _metrics(options, context)
    if not is_loopback(sockets) and not options.allow:
        print(_EXPOSED.format(host=options.host), file=sys.stderr, flush=True)
    # Whoever has read where it listens may end it.
    stopped = _signals() if leash is None else asyncio.Semaphore(0)
    if leash is not None:
        leash.tell(Told(port=sockets[0].getsockname()[1]))
    progress = None
    if not options.quiet:
        _banner(endpoint, tls, context, options.protocol)
        progress = asyncio.create_task(report(context.stats))
    if context.models is not None:
        context.models.start()
    preparing = None
    # Cards have kernels and a compiler of their own.
    if not options.no_prepare and any(b.device.runs_kernels for b in context.budgets):
        preparing = asyncio.create_task(prepare_when_idle(context.stats))
    # A service manager starts it anew when it ends so, and with it the devices.
    devices_lost = await _signal_or_loss(stopped, context)
    for task in filter(None, (progress, preparing)):
        await _end(task)
    log.info("stopping", extra={"event": "stopping"})
    if announcer is not None:
        await announcer.close()
    await _until(stopped, server.drain(options.drain_seconds))
    if context.models is not None:
        await asyncio.to_thread(context.models.close)
    end_compilers()
    ended = await server.stop()
    if context.mappings is not None:
        await asyncio.to_thread(context.mappings.close)
    for listener in metrics:
        listener.close()
    return Ending(ended, 1 if devices_lost else 0)


async def _signal_or_loss(signals: asyncio.Semaphore, context: ServerContext) -> bool:
    """Wait for a signal, or for a lost device and the clients that use others.

    Returns whether it was a device.
    """

    async def lost() -> None:
        await context.device_lost.wait()
        while context.stats.clients and not all(b.device.lost for b in context.budgets):
            await asyncio.sleep(_LOOK_SECONDS)

    await _until(signals, loss := asyncio.ensure_future(lost()))
    return loss.done() and not loss.cancelled()


def _signals() -> asyncio.Semaphore:
    """Released by each SIGINT or SIGTERM."""
    signals = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, signals.release)
        except NotImplementedError:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(signals.release))
    return signals


async def _end(task: asyncio.Task[None]) -> None:
    """End a task, and wait until it has."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _until(
    signals: asyncio.Semaphore, work: Coroutine[Any, Any, None] | asyncio.Future[None]
) -> None:
    """Do ``work``, but no longer than until the next signal."""
    tasks = {asyncio.ensure_future(work), asyncio.create_task(signals.acquire())}
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()


def _prepare() -> int:
    """Do --prepare; the exit status."""
    try:
        return prepare_now()
    except KeyboardInterrupt:
        return 130
    finally:
        end_compilers()


def main(arguments: Sequence[str] | None = None, program: Sequence[str] = PROGRAM) -> int:
    """Run the command line; return the exit status.

    ``program`` is what starts this program once more, for a card that is a part of a split.
    """
    options = parse_options(arguments)
    leash = None
    if options.own_card is not None:
        leash = Leash()
        options = options_of_card(options)
    options.program = tuple(program)
    set_up(options.log_level, options.log_format, options.own_card.name if leash else "")
    if options.prepare:
        return _prepare()
    sys.setswitchinterval(SWITCH_SECONDS)
    loop = _event_loop()
    try:
        with asyncio.Runner(loop_factory=loop.new_event_loop if loop else None) as runner:
            ending = runner.run(_serve(options, leash))
            if not ending.threads_ended:
                # A thread is in the middle of a node, and nobody wants its result.
                log.warning("a device is still busy; ending without it")
                logging.shutdown()
                os._exit(ending.status)
    except StartError as error:
        if leash is None:
            print(f"error: {error}", file=sys.stderr)
        else:
            leash.tell(Told(error=str(error)))
        return 1
    except KeyboardInterrupt:
        # Before it served.
        return 0
    return ending.status


if __name__ == "__main__":
    sys.exit(main())
