"""Asks servers what they are: versions, memory, round trip, and how fast they are.

    report = await survey(ServerAddress("192.168.1.10", 50052))
    print(report.software, report.devices[0].free, report.devices[0].speed)

Memory and protocols are the wire format's own to tell; the software's and the device's names come
by the split extension (SPLIT_DESCRIBE); speeds are measured. Nothing that a server says is taken
for granted: figures that can't be make it one with an ``error``, text is made fit to be shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from client.backend import Backend
from client.connection import Connection, connect_any
from client.discovery import FoundServer
from client.errors import AllocationFailed, ConnectionLost, VersionMismatch
from client.model_header import ModelShape
from client.split.address import OwnCard, ServerAddress
from client.split.advice import Box
from client.split.balance import Speed, measure, median_seconds
from client.split.model_speed import (
    ModelSample,
    ModelSpeed,
    SampleJob,
    ServerSample,
    time_sample,
    time_together,
)
from client.tensors import ShapeError
from protocol.commands import Command
from protocol.dialects import version_name
from protocol.errors import ProtocolError
from protocol.ggml.types import GgmlType
from protocol.split import DESCRIBES_SINCE, LEASES_SINCE, MAX_MEMBERS, MAX_PARTS, SWAPS_SINCE
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
# How many requests are on their way at once when it is timed what one of them costs.
_REQUESTS = 17
# A server that has less than this free is not measured: it has better to do with it.
_LEAST_FREE = 64 << 20


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


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is that of the machine itself."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def targets_of(found: Iterable[FoundServer]) -> list[ServerAddress]:
    """Return every address of announced servers; a server with several comes once in a survey."""
    return [
        ServerAddress(address, server.port, server.announcement.tls, server.name)
        for server in found
        for address in server.addresses
    ]


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
    except FAILURES as failed:
        return ServerReport(target, failure(failed))


# What a server that is asked, or the way to it, may come to.
FAILURES = (OSError, ProtocolError, ConnectionLost, VersionMismatch, AllocationFailed, ShapeError)


def failure(error: BaseException) -> str:
    """Return in words why a server can't be had; ``error`` is one of FAILURES."""
    if isinstance(error, TimeoutError):
        return "accepts but does not answer (another client may have it)"
    if isinstance(error, VersionMismatch):
        return f"speaks another protocol: {error}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, AllocationFailed | ShapeError):
        return f"can't be measured: {error}"
    if isinstance(error, ProtocolError | ConnectionLost):
        return f"speaks something else: {error}"
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number and number > 0 else str(error)


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


async def measure_handling(connection: Connection) -> float:
    """Return the seconds that programs at both ends take of a request, in turn for several."""

    async def some() -> None:
        await asyncio.gather(*(connection.get_alignment() for _ in range(_REQUESTS)))

    alone = await median_seconds(connection.get_alignment)
    return max(await median_seconds(some) - alone, 0.0) / (_REQUESTS - 1)


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


@dataclass(frozen=True, slots=True)
class MeasuredBoxes:
    """Servers as boxes for :func:`advise`, and by endpoint why others can't be used."""

    boxes: tuple[Box, ...]
    unusable: dict[str, str]


@dataclass(slots=True)
class Candidate:
    """A server that is being measured. ``machine`` is the same for those that share one."""

    endpoint: str
    machine: str
    free: int
    sample: ModelSample
    link: float
    splits: bool = True
    handling: float = 0.0
    round_trip: float = 0.0
    speed: ModelSpeed | None = None
    beside: dict[str, float] = field(default_factory=dict)
    beside_prompt: dict[str, float] = field(default_factory=dict)
    links: bool = False
    card: str = ""

    def box(self) -> Box:
        """Return what was measured."""
        speed = self.speed
        assert speed is not None
        return Box(
            self.endpoint, self.free, speed.decode, speed.prompt, self.round_trip, self.link,
            self.splits, speed.rest, speed.rest_prompt, speed.graph,
            self.handling, self.beside, self.beside_prompt, self.links, speed.cold, self.card,
        )  # fmt: skip


async def measure_boxes(
    reports: Iterable[ServerReport],
    shape: ModelShape,
    credentials: Credentials = NO_CREDENTIALS,
    home: Candidate | None = None,
) -> MeasuredBoxes:
    """Measure the servers that answered with products of the model's kinds.

    ``home`` is this machine's own share, which becomes the first box. Left out is who fails on the
    way, computes nothing, or something else than ``home`` does.
    """
    unusable: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        measured = [home] if home is not None else []
        for report in reports:
            endpoint, reason = report.target.endpoint, report.error
            if not reason:
                try:
                    measured.append(await _candidate(report, shape, credentials, stack))
                except FAILURES as error:
                    reason = failure(error)
            if reason:
                unusable[endpoint] = reason
        for candidate in list(measured):
            reason = await _time(candidate, shape, home)
            if reason:
                measured.remove(candidate)
                unusable[candidate.endpoint] = reason
        await _time_neighbours(measured, unusable)
    return MeasuredBoxes(tuple(c.box() for c in measured), unusable)


async def _candidate(
    report: ServerReport,
    shape: ModelShape,
    credentials: Credentials,
    stack: contextlib.AsyncExitStack,
) -> Candidate:
    connection = await open_target(report.target, credentials)
    stack.callback(connection.abort)
    async with asyncio.timeout(MEASURE_SECONDS):
        backend = await Backend.open(connection, 0)
        handling = await measure_handling(connection)
        link = await measure_upload(backend)
        sample = await ServerSample.make(backend, shape)
    # A server that splits over others itself is no part of another's.
    splits = report.split > 0 and not report.parts
    host = report.target.host
    machine = "" if is_loopback(host) else host
    device = report.devices[0]
    card = OwnCard.parse(device.name)
    # Cards add up no sums among themselves.
    links = splits and report.split >= SWAPS_SINCE and not report.target.tls and card is None
    return Candidate(
        report.target.endpoint, machine, device.free, sample, link, splits, handling, links=links,
        card="" if card is None else card.name,
    )  # fmt: skip


async def _time(candidate: Candidate, shape: ModelShape, home: Candidate | None) -> str:
    """Measure how fast one is; return why it can't be used, if so."""
    try:
        async with asyncio.timeout(MEASURE_SECONDS):
            candidate.round_trip = await candidate.sample.round_trip()
            speed = candidate.speed = await time_sample(candidate.sample, shape)
    except FAILURES as error:
        return failure(error)
    if not speed.computes:
        return "does not compute what it is asked"
    right = home.speed if home is not None and home.speed is not None else speed
    if not speed.agrees(right):
        return f"computes {speed.answer:g} where {right.answer:g} is right"
    return ""


async def _time_neighbours(measured: list[Candidate], unusable: dict[str, str]) -> None:
    """Time those that share a machine in pairs; one that fails is taken out."""
    for a, b in itertools.combinations(list(measured), 2):
        if a.machine != b.machine or a not in measured or b not in measured:
            continue
        try:
            async with asyncio.timeout(MEASURE_SECONDS):
                slower = await time_together([a.sample, b.sample])
                prompt = await time_together([a.sample, b.sample], SampleJob.PROMPT)
        except FAILURES as error:
            for c in (a, b):
                if not await _answers(c):
                    measured.remove(c)
                    unusable[c.endpoint] = failure(error)
            continue
        for i, one, other in ((0, a, b), (1, b, a)):
            one.beside[other.endpoint] = slower[i]
            one.beside_prompt[other.endpoint] = prompt[i]


async def _answers(candidate: Candidate) -> bool:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await candidate.sample.round_trip()
    except FAILURES:
        return False
    return True
