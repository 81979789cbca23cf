"""One server of several that share weights: how it is reached, and what it keeps ready to run."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from client.backend import Backend, BackendBuffer
from client.connection import Connection, connect_any
from client.errors import AllocationFailed, ConnectionLost, GraphFailed, ServerLost, VersionMismatch
from client.split import steps
from client.split.steps import Envelope, Region, Step
from protocol.commands import Command
from protocol.endpoint import format_endpoint
from protocol.errors import ProtocolError
from protocol.split import MAX_PROGRAMS
from protocol.tensor import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """The part of a product that one server computes, ready to be run there.

    ``number`` is a program's.
    """

    step: Step
    envelope: Envelope
    number: int | None
    region: BackendBuffer


class SplitServer:
    """One of the servers: ``name`` is its host:port."""

    def __init__(self, name: str, backend: Backend, timeout: float | None) -> None:
        self.name = name
        self.backend = backend
        self.free = self.total = 0
        self._timeout = timeout
        self._region = Region(backend)
        self._programs: dict[int, Ready] = {}
        self._programmed = 0
        # From finding a product ready until it is sent nobody may move the region.
        self.preparing = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        connect_timeout: float | None,
        timeout: float | None,
        tls: ssl.SSLContext | None = None,
        token: bytes | None = None,
    ) -> SplitServer:
        """Open a connection to the server. Raises ServerLost."""
        name = format_endpoint(host, port)
        try:
            connection = await connect_any(
                host, port, timeout=connect_timeout, split=True, tls=tls, token=token
            )
        except TimeoutError:
            reason = "accepts but does not answer (does another client hold it?)"
            raise ServerLost(name, reason) from None
        except VersionMismatch as error:
            raise ServerLost(name, str(error)) from None
        except OSError as error:
            raise ServerLost(name, error.strerror or str(error)) from None
        connection.enable_keepalive()
        try:
            server = cls(name, await Backend.open(connection), timeout)
            server.free, server.total = await connection.get_device_memory()
        except BaseException as error:
            connection.abort()
            if isinstance(error, ConnectionLost | ProtocolError):
                raise ServerLost(name, str(error)) from None
            raise
        return server

    @property
    def connection(self) -> Connection:
        return self.backend.connection

    @property
    def extended(self) -> bool:
        """Return whether it keeps programs (protocol.split); else it is sent each product."""
        return self.connection.split_version > 0

    async def attempt(self, job: Callable[[], Awaitable[T]], timed: bool = False) -> T:
        """Do ``job``; what ends the connection becomes a ServerLost.

        With ``timed`` so does a server that takes too long: its stream is out of step by then.
        """
        try:
            async with asyncio.timeout(self._timeout if timed else None):
                return await job()
        except TimeoutError:
            self.connection.abort()
            raise ServerLost(self.name, f"did not answer within {self._timeout:g} s") from None
        except (ConnectionLost, ProtocolError) as error:
            raise ServerLost(self.name, str(error)) from None
        except (AllocationFailed, GraphFailed) as error:
            raise type(error)(f"server {self.name}: {error}") from None

    # -- products

    async def run(
        self,
        find: Callable[[], Awaitable[Ready]],
        inputs: Sequence[memoryview],
        targets: Sequence[memoryview],
    ) -> None:
        """Send the inputs to what ``find`` gives, and wait until the outputs are in ``targets``."""
        async with self.preparing:
            ready = await find()
            envelope = ready.envelope
            parts: list[bytes | memoryview] = []
            for prefix, data in zip(envelope.prefixes, inputs, strict=True):
                parts += (prefix, data)
            parts.append(envelope.suffix)
            command = Command.GET_TENSOR if ready.number is None else Command.SPLIT_RUN
            futures = await self.connection.exchange(
                parts, [(command, t) for t in targets], framed=ready.number is None
            )
        await asyncio.gather(*futures)

    async def up_to_date(self, ready: Ready | None) -> bool:
        """Return whether ``ready`` can be run; a program that lost its number to others is sent
        again.
        """
        if ready is None or ready.region is not self._region.buffer:
            return False
        if ready.number is not None and self._programs.get(ready.number) is not ready:
            await self._send_program(ready, ready.number)
        return True

    async def make_ready(
        self, inputs: Sequence[Tensor], between: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Ready:
        """Give a step memory, and make a program of it if the server keeps programs."""
        old = await self._region.place([*inputs, *between, *outputs])
        if old is not None:
            # The server forgets programs whose memory is freed.
            self._programs.clear()
            await self.backend.free([old])
        assert self._region.buffer is not None
        step = Step(tuple(inputs), self.backend.graph.build(outputs), tuple(outputs))
        region = self._region.buffer
        if not self.extended:
            return Ready(step, steps.command_envelope(self.connection, step), None, region)
        number = self._programmed % MAX_PROGRAMS
        self._programmed += 1
        (envelope,) = steps.program_envelopes(self.connection, number, [step])
        ready = Ready(step, envelope, number, region)
        await self._send_program(ready, number)
        return ready

    async def _send_program(self, ready: Ready, number: int) -> None:
        self._programs.pop(number, None)
        answer = await self.connection.request(
            Command.SPLIT_PROGRAM,
            data=steps.encode_steps(self.connection, [ready.step]),
            device=self.backend.device,
            program=number,
        )
        if answer.result:
            raise GraphFailed("the server refused a program; its log says why")
        self._programs[number] = ready
