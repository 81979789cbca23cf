"""tools.bench.instant: clients of all versions get their answers, and nothing in them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from client.backend import Backend
from client.errors import ConnectionLost
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect
from protocol.ggml.types import GgmlType
from tools.bench import instant
from tools.serving.processes import HOST


@contextmanager
def serving(dialect: Dialect) -> Iterator[int]:
    """The server on a thread of its own; its port."""
    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=instant.serve, args=(listener, dialect))
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
async def test_it_has_every_weight_and_computes_zeros(dialect: Dialect) -> None:
    with serving(dialect) as port:
        async with Backend.connect(HOST, port, version=dialect) as b:
            # More than is taken of an upload in one go.
            w = await b.tensor(GgmlType.F32, (512, 1024))
            assert await b.connection.set_tensor_hash(w, 1)
            await b.upload(w, np.ones((1024, 512), np.float32))
            x = await b.tensor(GgmlType.F32, (512, 2), np.ones((2, 512), np.float32))
            # They lie apart.
            assert x.address >= w.address + w.nbytes or w.address >= x.address + x.nbytes
            y = await b.compute(b.graph.mul_mat(w, x))
            assert y.shape[-2:] == (2, 1024)
            assert not y.any()


async def test_more_than_a_tensor_has_is_not_sent(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(DIALECTS[0]) as port:
        async with Backend.connect(HOST, port) as b:
            w = await b.tensor(GgmlType.F32, (4,))
            with pytest.raises(ConnectionLost):
                await b.connection.get_tensor(w, size=17)
    assert "closing a connection: 17 bytes asked for" in capfd.readouterr().err


async def test_a_type_without_a_size_ends_the_connection(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with serving(DIALECTS[0]) as port:
        async with Backend.connect(HOST, port) as b:
            w = await b.tensor(GgmlType.F32, (4,))
            fields = {**b.connection.wire_tensor(w), "type": 998}
            with pytest.raises(ConnectionLost):
                await b.connection.request(
                    Command.GET_ALLOC_SIZE,
                    device=0,
                    tensor=fields,
                    srcs=[fields] * 10,
                )
    assert "closing a connection: a tensor of type 998" in capfd.readouterr().err
