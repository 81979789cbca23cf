"""Which devices are opened, and what is said of cards that aren't."""

from __future__ import annotations

import functools
import http.client
import logging
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from client.backend import Backend
from client.connection import connect
from client.errors import ConnectionLost
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices import registry
from rpc_server.devices.cuda.toolkit import CardError
from rpc_server.devices.registry import DeviceOptions, UnknownDeviceError, open_devices
from tests.cuda import emulation, standin
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens

needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)
OPTIONS = DeviceOptions(threads=1)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What GPUs there are is looked for once."""
    registry._gpus.cache_clear()
    yield
    registry._gpus.cache_clear()


def told_of(caplog: pytest.LogCaptureFixture) -> str:
    """What the registry has logged; asyncio, say, may complain of what other tests have left."""
    return "\n".join(r.getMessage() for r in caplog.records if r.name == registry.log.name)


def names(wanted: list[str]) -> list[str]:
    devices = open_devices(wanted, OPTIONS)
    for device in devices:
        device.close()
    return [device.name for device in devices]


@needs_compiler
@pytest.mark.parametrize("wanted", [[], ["cuda"]])
def test_a_card_that_can_not_be_used_is_left_out(
    wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A card that somebody has for himself alone doesn't take the others away."""
    with standin.installed(2):
        standin.make_unusable(1, "cudaErrorDevicesUnavailable: busy")
        assert names(wanted) == ["CUDA0"]
    assert "CUDA1: emulated GPU can't be used" in caplog.text


@needs_compiler
def test_a_card_that_is_named_has_to_be_usable() -> None:
    with standin.installed(2):
        standin.make_unusable(1, "cudaErrorDevicesUnavailable: busy")
        with pytest.raises(UnknownDeviceError, match="DevicesUnavailable"):
            open_devices(["CUDA0", "CUDA1"], OPTIONS)
        standin.make_unusable(0, "cudaErrorDevicesUnavailable: busy")
        with pytest.raises(UnknownDeviceError, match=r"CUDA0: .*CUDA1: "):
            open_devices([], OPTIONS)


def test_who_installed_cupy_is_told_why_the_cpu_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_driver() -> int:
        raise CardError("no CUDA GPU can be used here: cudaErrorInsufficientDriver")

    monkeypatch.setattr(registry, "_has_cupy", lambda: True)
    monkeypatch.setattr(registry, "card_count", no_driver)
    assert names([]) == ["CPU"]
    assert "no GPU is used, but the CPU: no CUDA GPU can be used here" in caplog.text
    caplog.clear()
    assert names(["CPU"]) == ["CPU"]
    assert not told_of(caplog)


@pytest.mark.parametrize("driver", [True, False])
def test_who_has_a_card_is_told_what_to_install(
    driver: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_has_cupy", lambda: False)
    monkeypatch.setattr(registry, "_has_nvidia_driver", lambda: driver)
    with caplog.at_level(logging.WARNING):
        assert names([]) == ["CPU"]
    assert ("ggml-rpc-server[cuda12]" in caplog.text) == driver


@pytest.mark.parametrize(("cards", "told"), [(0, ""), (1, "its GPU"), (2, "its 2 GPUs")])
def test_who_splits_beside_a_card_is_told_that_it_idles(
    cards: int, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_gpus", functools.cache(lambda: (cards, "")))
    registry.warn_of_idle_cards()
    assert bool(told_of(caplog)) == bool(told)
    assert told in told_of(caplog)


@needs_compiler
async def test_a_server_whose_only_card_is_lost_ends() -> None:
    """A service manager starts it anew, which is all that helps."""
    port, metrics = free_port(), free_port()
    command = [sys.executable, "-m", "tests.cuda.serve", "--port", str(port)]
    command += ["--metrics-port", str(metrics), "--drain-seconds", "30"]
    with Process(command, env={**os.environ, "EMULATED_FAILURE": "2"}) as server:
        server.wait_until(lambda: listens(port) and listens(metrics), 60, "its ports")
        assert _health(metrics) == (200, "ok\n")
        async with await connect("127.0.0.1", port) as connection:
            backend = await Backend.open(connection, 0)
            x = await backend.tensor(GgmlType.F32, (64,), np.ones(64, np.float32))
            with pytest.raises(ConnectionLost):
                await _squares(backend, x, 3)
        assert server.child.wait(60) == 1
        server.wait_for("CUDA0 is lost until the server is started anew: cudaErrorIllegalAddress")


async def _squares(backend: Backend, x: Tensor, times: int) -> None:
    for _ in range(times):
        await backend.compute(backend.graph.sqr(x))


@needs_compiler
async def test_a_server_with_another_card_waits_for_its_clients() -> None:
    """Who computes on the card that works goes on; nobody else is let in."""
    port, metrics = free_port(), free_port()
    command = [sys.executable, "-m", "tests.cuda.serve", "--port", str(port)]
    command += ["--metrics-port", str(metrics)]
    env = {**os.environ, "EMULATED_CARDS": "2", "EMULATED_FAILURE": "3"}
    with Process(command, env=env) as server:
        server.wait_until(lambda: listens(port) and listens(metrics), 60, "its ports")
        async with await connect("127.0.0.1", port) as good:
            second = await Backend.open(good, 1)
            x = await second.tensor(GgmlType.F32, (64,), np.full(64, 3, np.float32))
            y = second.graph.sqr(x)
            plan = await second.prepare(y)
            await plan.run()
            async with await connect("127.0.0.1", port) as bad:
                first = await Backend.open(bad, 0)
                z = await first.tensor(GgmlType.F32, (64,), np.ones(64, np.float32))
                with pytest.raises(ConnectionLost):
                    await _squares(first, z, 3)
            server.wait_for("CUDA0 is lost")
            status, text = _health(metrics)
            assert (status, "CUDA0 is lost" in text) == (503, True)
            with pytest.raises(ConnectionLost):
                await connect("127.0.0.1", port)
            await plan.run()
            np.testing.assert_array_equal(np.ravel(await second.download(y)), np.full(64, 9.0))
            assert server.child.poll() is None
        assert server.child.wait(60) == 1


def _health(port: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    told = answer.status, answer.read().decode()
    connection.close()
    return told
