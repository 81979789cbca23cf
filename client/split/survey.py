"""Asks servers what they are: versions, memory, round trip, and how fast they are.

    report = await survey(ServerAddress("192.168.1.10", 50052))
    print(report.software, report.devices[0].free, report.devices[0].speed)

Memory and protocols are the wire format's own to tell; the software's and the device's names come
by the split extension (SPLIT_DESCRIBE); speeds are measured. Nothing that a server says is taken
for granted: figures that can't be make it one with an ``error``, text is made fit to be shown.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from client.backend import Backend
from client.connection import Connection, connect_any
from client.errors import AllocationFailed, ConnectionLost, VersionMismatch
from client.model_header import ModelShape
from client.split.advice import Box
from client.split.balance import FILL, Speed, least_seconds, measure
from client.tensors import ShapeError, Tensor
from protocol.commands import Command
from protocol.dialects import version_name
from protocol.endpoint import DEFAULT_PORT, format_endpoint, parse_endpoint
from protocol.errors import ProtocolError
from protocol.ggml.types import GgmlType
from protocol.split import DESCRIBES_SINCE, LEASES_SINCE, MAX_MEMBERS, MAX_PARTS
from protocol.text import c_string

CONNECT_SECONDS = 5.0
# The first kernels of a server are compiled while it is measured.
MEASURE_SECONDS = 120.0
# How many are asked at once what they are; speeds are measured one after the other.
_AT_ONCE = 16
_MOST_DEVICES = 16
# More than any machine has.
_MOST_MEMORY = 1 << 50
# Uploads that are timed: as large as one takes long enough to be told from a round trip.
_FIRST_UPLOAD, _LAST_UPLOAD = 1 << 20, 16 << 20
_UPLOAD_SECONDS = 0.1
# A server that has less than this free is not measured: it has better to do with it.
_LEAST_FREE = 64 << 20
_TLS = "tls://"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A place where a server listens, perhaps inside of TLS.

    ``name`` is what it is announced as.
    """

    host: str
    port: int = DEFAULT_PORT
    tls: bool = False
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """Return what ``host[:port]`` or ``tls://host[:port]`` names. Raises ValueError."""
        address = text.strip()
        host, port = parse_endpoint(address.removeprefix(_TLS))
        return cls(host, port, address.startswith(_TLS))

    @property
    def endpoint(self) -> str:
        """Return the address as it is written for --split."""
        return (_TLS if self.tls else "") + format_endpoint(self.host, self.port)


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device: bytes, and speeds if they were measured."""

    name: str
    description: str
    free: int
    total: int
    speed: Speed | None = None


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The answers of a server about itself; ``error`` says why nothing more is known.

    ``round_trip`` is seconds, ``upload`` bytes a second, both None if not measured. ``split`` is
    the version of the split extension (0: none), ``parts`` over how many servers it splits.
    ``identity`` is the same for all addresses of a server, 0 where it doesn't tell.
    """

    target: ServerAddress
    error: str = ""
    software: str = ""
    protocols: tuple[str, ...] = ()
    split: int = 0
    parts: int = 0
    devices: tuple[DeviceReport, ...] = ()
    round_trip: float | None = None
    upload: float | None = None
    identity: int = 0


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials that servers inside of TLS are shown; see client.tunnel."""

    tls: ssl.SSLContext | None = None
    token: bytes | None = None


NO_CREDENTIALS = Credentials()


async def open_target(
    target: ServerAddress,
    credentials: Credentials = NO_CREDENTIALS,
    seconds: float = CONNECT_SECONDS,
) -> Connection:
    """Connect to a server, with the split extension if it has it. Raises as connect_any does."""
    tls = credentials.tls or ssl.create_default_context() if target.tls else None
    token = credentials.token if target.tls else None
    return await connect_any(
        target.host, target.port, timeout=seconds, split=True, tls=tls, token=token
    )


async def survey(
    target: ServerAddress, *, measured: bool = True, credentials: Credentials = NO_CREDENTIALS
) -> ServerReport:
    """Return what a server is, and with ``measured`` how fast; its ``error`` if it can't be had."""
    try:
        async with asyncio.timeout(2 * CONNECT_SECONDS + MEASURE_SECONDS * measured):
            connection = await open_target(target, credentials)
            try:
                return await _ask(target, connection, measured)
            finally:
                connection.abort()
    except TimeoutError:
        error = "accepts but does not answer (another client may have it)"
    except VersionMismatch as mismatch:
        error = f"speaks another protocol: {mismatch}"
    except ssl.SSLError as failed:
        error = f"TLS: {failed.reason or failed}"
    except (ProtocolError, ConnectionLost) as broken:
        error = f"speaks something else: {broken}"
    except OSError as failed:
        error = os.strerror(failed.errno) if failed.errno and failed.errno > 0 else str(failed)
    return ServerReport(target, error)


async def _ask(target: ServerAddress, connection: Connection, measured: bool) -> ServerReport:
    report = ServerReport(
        target,
        protocols=(version_name(connection.dialect.version),),
        split=connection.split_version,
    )
    count = await connection.device_count()
    if not 0 < count <= _MOST_DEVICES:
        return replace(report, error=f"tells of {count} devices")
    devices = []
    for index in range(count):
        free, total = await connection.get_device_memory(index)
        if not free <= total <= _MOST_MEMORY:
            return replace(report, error=f"tells of {free} of {total} bytes free")
        devices.append(DeviceReport("", "", free, total))
    report = await _extended(connection, replace(report, devices=tuple(devices)))
    if not measured:
        return report
    return await _measured(connection, report)


async def _extended(connection: Connection, report: ServerReport) -> ServerReport:
    """Return what is told by the split extension, as far as the server has it."""
    if not report.split:
        return report
    query = await connection.request(Command.SPLIT_QUERY, device=0)
    report = replace(report, parts=min(query.n_parts, MAX_PARTS))
    if report.split >= LEASES_SINCE:
        members = await connection.request(Command.SPLIT_MEMBERS, device=0)
        if 0 < members.n_members <= MAX_MEMBERS:
            report = replace(report, identity=members.members[0])
    if report.split < DESCRIBES_SINCE:
        return report
    devices = []
    for index, device in enumerate(report.devices):
        said = await connection.request(Command.SPLIT_DESCRIBE, device=index)
        name, about = c_string(said.device_name), c_string(said.device_description)
        devices.append(replace(device, name=name, description=about))
        protocols = tuple(c_string(said.protocols).split())
        report = replace(report, software=c_string(said.software), protocols=protocols)
    return replace(report, devices=tuple(devices))


async def _measured(connection: Connection, report: ServerReport) -> ServerReport:
    devices, upload = [], None
    for index, device in enumerate(report.devices):
        speed = None
        if device.free >= _LEAST_FREE:
            backend = await Backend.open(connection, index)
            try:
                speed = await measure(backend)
                upload = upload or await measure_upload(backend)
            except (AllocationFailed, ShapeError):
                # It has less than it says, or gives none of it: nothing to be told of its speed.
                speed = None
        devices.append(replace(device, speed=speed))
    trips = [d.speed.round_trip for d in devices if d.speed is not None]
    return replace(
        report,
        devices=tuple(devices),
        round_trip=min(trips) if trips else await _round_trip(connection),
        upload=upload,
    )


async def _round_trip(connection: Connection) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        await connection.get_alignment()
        times.append(time.perf_counter() - started)
    return min(times)


async def measure_upload(backend: Backend) -> float:
    """Return bytes a second of uploads to the server. Raises AllocationFailed, ConnectionLost."""
    connection, size = backend.connection, _FIRST_UPLOAD
    while True:
        block = backend.graph.new_tensor_1d(GgmlType.I8, size)
        buffers = await backend.allocate([block])
        try:
            started = time.perf_counter()
            await connection.set_tensor(block, bytes(size))
            # An upload has no answer; what comes after it has.
            await connection.get_alignment()
            seconds = time.perf_counter() - started
        finally:
            if not connection.closed:
                await backend.free(buffers, [block])
        if seconds >= _UPLOAD_SECONDS or size >= _LAST_UPLOAD:
            return size / seconds
        size *= 4


async def survey_all(
    targets: Iterable[ServerAddress],
    *,
    measured: bool = True,
    credentials: Credentials = NO_CREDENTIALS,
) -> list[ServerReport]:
    """Return the reports of several servers, in order; one that has two addresses comes once.

    Whether they are there is asked of all at once, speeds are measured one after the other: they
    may be on one machine, or behind one cable.
    """
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(target: ServerAddress) -> ServerReport:
        async with slots:
            return await survey(target, measured=False, credentials=credentials)

    found = await asyncio.gather(*map(one, dict.fromkeys(targets)))
    reports = _each_once(found)
    if not measured:
        return reports
    return [r if r.error else await survey(r.target, credentials=credentials) for r in reports]


def _each_once(reports: Sequence[ServerReport]) -> list[ServerReport]:
    """Leave out other addresses of a server that is there already, and those of it that fail."""
    kept: list[ServerReport] = []
    known: set[int] = set()
    reached = {r.target.name for r in reports if not r.error and r.target.name}
    for report in reports:
        if report.identity and report.identity in known:
            continue
        if report.error and report.target.name in reached:
            continue
        known.add(report.identity)
        kept.append(report)
    return kept


# Bytes of a model's weights that are timed, and columns that stand for a prompt.
_SAMPLE_BYTES = 96 << 20
_PROMPT_COLUMNS = 32


async def measure_model(backend: Backend, shape: ModelShape) -> tuple[float, float]:
    """Measure products of a model's own kinds; nothing of the model itself is sent.

    Returns bytes of weights a second with one column, and with many the same times columns. What
    was allocated there is freed. Raises AllocationFailed, ConnectionLost.
    """
    free, _ = await backend.connection.get_device_memory(backend.device)
    left = min(_SAMPLE_BYTES, free // 4)
    weights, wanted = [], sorted(shape.products, key=lambda p: -p.nbytes * p.count)
    # As many of each kind as there are in a layer, the largest kinds first.
    for product in wanted * max(1, shape.layers):
        if product.nbytes <= left and product.columns:
            left -= product.nbytes
            weights.append(backend.graph.new_tensor_2d(product.type, product.columns, product.rows))
    if not weights:
        raise AllocationFailed("no room to measure in")
    buffers = await backend.allocate(weights)
    try:
        for buffer in buffers:
            await backend.connection.buffer_clear(buffer.handle, FILL)
        size = sum(w.nbytes for w in weights)
        one = await _seconds_of(backend, weights, 1)
        many = await _seconds_of(backend, weights, _PROMPT_COLUMNS)
    finally:
        if not backend.connection.closed:
            await backend.free(buffers, weights)
    return size / one, size * _PROMPT_COLUMNS / many


async def _seconds_of(backend: Backend, weights: Sequence[Tensor], columns: int) -> float:
    """The least time of products of all weights with so many columns, without the round trip."""
    connection, g = backend.connection, backend.graph
    inputs = {n: g.new_tensor_2d(GgmlType.F32, n, columns) for n in {w.ne[0] for w in weights}}
    buffers = await backend.allocate(inputs.values())
    products = [g.mul_mat(w, inputs[w.ne[0]]) for w in weights]
    plan = await backend.prepare(products)
    try:
        for buffer in buffers:
            await connection.buffer_clear(buffer.handle, FILL)
        trip = await least_seconds(connection.get_alignment)

        async def run() -> None:
            await plan.run()
            await connection.get_tensor(products[-1], 0, 4)

        return max(await least_seconds(run) - trip, 1e-9)
    finally:
        if not connection.closed:
            await plan.free()
            await backend.free(buffers, inputs.values())


async def measure_boxes(
    reports: Iterable[ServerReport],
    shape: ModelShape,
    credentials: Credentials = NO_CREDENTIALS,
) -> list[Box]:
    """Return the servers that answered as boxes, measured with products of the model's kinds."""
    boxes = []
    for report in reports:
        if report.error:
            continue
        connection = await open_target(report.target, credentials)
        try:
            async with asyncio.timeout(MEASURE_SECONDS):
                backend = await Backend.open(connection, 0)
                decode, prompt = await measure_model(backend, shape)
                link = await measure_upload(backend)
                trip = await _round_trip(connection)
        finally:
            connection.abort()
        free = sum(d.free for d in report.devices[:1])
        splits = report.split > 0 and not report.parts
        endpoint = report.target.endpoint
        boxes.append(Box(endpoint, free, decode, prompt, trip, link, splits))
    return boxes
