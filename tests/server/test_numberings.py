"""Clients of releases that number ops differently, against a running server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from client.backend import Backend
from client.connection import connect
from client.errors import ConnectionLost, VersionMismatch
from protocol.dialects import DIALECTS, Dialect, compatible_dialects, find_dialects
from protocol.ggml.types import GgmlType
from tests.parameters import mostly_slow
from tests.server.process import ServerProcess

HOST = "127.0.0.1"
X = np.arange(1, 9, dtype=np.float32)
SEVERAL = [d for d in DIALECTS if len(compatible_dialects(d)) > 1]


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--threads", "1", "-d", "CPU") as started:
        yield started


@contextlib.asynccontextmanager
async def client(server: ServerProcess, dialect: Dialect) -> AsyncIterator[Backend]:
    """A client of a release, started again until it is served."""
    for _ in range(8):
        try:
            connection = await connect(HOST, server.port, version=dialect)
        except VersionMismatch:
            continue
        async with connection:
            yield await Backend.open(connection)
        return
    pytest.fail(f"protocol {dialect.name} was never offered")


async def product(b: Backend) -> list[float]:
    x = await b.tensor(GgmlType.F32, X.shape, X)
    return list((await b.compute(b.graph.mul(x, x)))[0, 0, 0])


async def settle(b: Backend) -> None:
    """Compute what makes sense under the client's numbering alone."""
    x = await b.tensor(GgmlType.F32, X.shape, X)
    assert np.array_equal((await b.compute(b.graph.neg(x)))[0, 0, 0], -X)


@pytest.mark.parametrize("name", ["2.0-82", "2.0-88"])
async def test_a_product_is_a_product_or_is_refused(server: ServerProcess, name: str) -> None:
    (dialect,) = find_dialects(name)
    with pytest.raises(ConnectionLost):
        async with client(server, dialect) as b:
            await product(b)
    line = server.wait_for(r"ERROR .*several releases.*")[0]
    assert f"--protocol {dialect.name}" in line
    async with client(server, dialect) as b:
        await settle(b)
        assert await product(b) == list(X * X)
    # What the address had is believed of its next connection.
    async with client(server, dialect) as b:
        assert await product(b) == list(X * X)


@pytest.mark.parametrize("dialect", mostly_slow(SEVERAL, quick=3), ids=lambda d: d.name)
async def test_pinned_to_a_numbering_nothing_is_open(dialect: Dialect) -> None:
    with ServerProcess("--threads", "1", "-d", "CPU", "--protocol", dialect.name) as server:
        async with client(server, dialect) as b:
            assert await product(b) == list(X * X)
            x = await b.tensor(GgmlType.F32, (4, 2), X.reshape(2, 4))
            padded = (await b.compute(b.graph.pad(x, 1, 2)))[0, 0]
            assert np.array_equal(padded, np.pad(X.reshape(2, 4), ((0, 2), (0, 1))))


async def test_long_names_are_told_once_for_an_address(server: ServerProcess) -> None:
    (dialect,) = find_dialects("7.0")
    for _ in range(2):
        async with client(server, dialect.with_names(128)) as b:
            assert await product(b) == list(X * X)
    server.wait_for(r"sends names of 128 bytes")
    assert server.log.count("names of 128 bytes") == 1
