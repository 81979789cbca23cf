"""A coordinator that chooses by itself (--split auto): what it takes and leaves out, and why."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.backend import Backend
from client.discovery import FoundServer
from client.model_header import ModelShape
from client.split import survey as survey_module
from client.split.address import ServerAddress
from client.split.advice import Box, advise
from client.split.model_speed import ModelSample, ModelSpeed, time_sample, time_together
from client.split.survey import measure_boxes, survey_all
from protocol.announcement import Announcement
from protocol.ggml.types import GgmlType
from rpc_server.__main__ import _chosen_devices
from rpc_server.devices.base import DeviceError
from rpc_server.devices.split import choice as choice_module
from rpc_server.devices.split.candidates import AutoSplit
from rpc_server.devices.split.choice import Chooser, candidates
from rpc_server.devices.split.mode import TYPICAL, Mode
from rpc_server.options import parse_options
from tests.server.process import REPOSITORY, ServerProcess
from tests.split.cluster import Coordinator, WorkerProcess, backend, status
from tests.split.weights import NAME, values
from tools.models import write_model
from tools.serving.ports import free_port
from tools.serving.processes import Process, own_command

HOST = "127.0.0.1"
GB = 1e9
BOTH: tuple[Mode, ...] = ("row", "tensor")
HERE = Box("local", 64 << 30, 20 * GB, 400 * GB, 0.0, float("inf"))
A, B = ServerAddress("a", 1), ServerAddress("b", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers: its products take no time to measure."""
    return write_model(tmp_path_factory.mktemp("model"), "llama-gqa", "Q8_0")


@pytest.fixture(scope="module")
def workers() -> Iterator[list[WorkerProcess]]:
    with WorkerProcess() as a, WorkerProcess() as b:
        yield [a, b]


# -- the choice itself


def boxes(decode: float = 20 * GB, round_trip: float = 0.1e-3) -> list[Box]:
    other = replace(HERE, decode=decode, round_trip=round_trip, link=1 * GB)
    return [HERE, replace(other, endpoint="a:1"), replace(other, endpoint="b:1")]


def chooser(measured: list[Box], auto: AutoSplit | None = None, modes: Any = BOTH) -> Chooser:
    return Chooser(auto or AutoSplit(), None, modes, measured, [A, B])


def test_a_fast_network_splits_over_all() -> None:
    choice = chooser(boxes()).choose()
    assert set(choice.parts) == {None, A, B}
    assert choice.mode == "tensor"
    assert sum(choice.shares) == pytest.approx(1)


def test_a_slow_network_leaves_it_to_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choice = chooser(boxes(round_trip=20e-3)).choose()
    assert choice.parts == ()
    assert "this machine alone: " in caplog.messages[0]
    assert "limited by bandwidth" in caplog.messages[0]
    assert "as no model was named" in caplog.messages[0]
    # And what it was held against.
    assert any(m.startswith("--split auto: instead of ") for m in caplog.messages[1:])


def test_without_local_the_others_do_all() -> None:
    choice = chooser(boxes(round_trip=20e-3), AutoSplit(local=False)).choose()
    assert choice.parts
    assert None not in choice.parts


def test_a_much_faster_box_does_all_by_itself() -> None:
    measured = boxes()[:2]
    measured[1] = replace(measured[1], decode=4000 * GB)
    assert chooser(measured).choose().parts == (A,)


@pytest.mark.parametrize("mode", BOTH)
def test_the_mode_may_be_given(mode: Mode) -> None:
    assert chooser(boxes(), modes=[mode]).choose().mode == mode


def test_too_little_memory_on_each_takes_all(caplog: pytest.LogCaptureFixture) -> None:
    measured = [replace(b, free=3 << 30) for b in boxes(round_trip=20e-3)]
    assert len(chooser(measured).choose().parts) >= 2
    shape = replace(TYPICAL, weight_bytes=100 << 30)
    poor = Chooser(AutoSplit(), shape, BOTH, measured, [A, B])
    assert len(poor.choose().parts) == 3
    assert any("nothing fits" in m for m in caplog.messages)


def test_nobody_left_and_no_share_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    left = chooser(boxes()[:2], AutoSplit(local=False))
    left.leave_out("a:1", "gone")
    assert caplog.messages == ["--split auto: a:1 is left out: gone"]
    with pytest.raises(DeviceError, match="no server can be used"):
        left.choose()


async def test_announced_servers_are_asked_if_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that are named always; each address once."""
    said = Announcement()
    found = [FoundServer("x", ("10.0.0.1", "a"), 1, said), FoundServer("y", ("b",), 1, said)]

    async def find(seconds: float) -> list[FoundServer]:
        return found

    def wanted(target: ServerAddress) -> bool:
        return target.host != "10.0.0.1"

    monkeypatch.setattr(choice_module, "find_servers", find)
    asked = await candidates(AutoSplit((B,)), wanted)
    assert [(t.host, t.port) for t in asked][:2] == [("b", 1), ("a", 1)]
    assert "10.0.0.1" not in {t.host for t in asked}
    assert await candidates(AutoSplit((B,), announced=False), wanted) == [B]


# -- the command line


@pytest.mark.parametrize(
    ("text", "auto"),
    [
        ("auto", AutoSplit()),
        ("auto:a:1,local", AutoSplit((A,), announced=False, local=True)),
        ("auto:a:1,tls://b:1", AutoSplit((A, replace(B, tls=True)), announced=False, local=False)),
        ("auto:announced", AutoSplit((), announced=True, local=False)),
        ("auto:announced,b:1,local", AutoSplit((B,), announced=True, local=True)),
    ],
)
def test_spellings(text: str, auto: AutoSplit) -> None:
    assert parse_options(["--split", text]).split == auto


@pytest.mark.parametrize(
    "words",
    [
        ["--split", "auto:"],
        ["--split", "auto:a:1,a:1"],
        ["--split", "auto:http://x"],
        ["--split", "auto", "--tensor-split", "1,1"],
        ["--split", "a:1", "--split-mode", "row", "--split-model", "m.gguf"],
        ["--split-model", "m.gguf"],
    ],
)
def test_what_it_is_told_wrong(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(words)


# -- with servers


def coordinator(names: list[str], model: Path, *options: str) -> ServerProcess:
    words = ("--split", f"auto:{','.join(names)}", "--split-model", str(model), "-t", "1")
    return ServerProcess(*words, *options)


async def multiplies(port: int) -> None:
    """A weight that the server would cut is multiplied with as it should be."""
    w, x = values(512, 256), values(3, 256, seed=1)
    async with Backend.connect(HOST, port) as b:
        weight = await b.tensor(GgmlType.F32, (256, 512), w, name=NAME)
        y = b.graph.mul_mat(weight, await b.tensor(GgmlType.F32, (256, 3), x))
        np.testing.assert_allclose((await b.compute(y)).reshape(3, 512), x @ w.T, atol=1e-3)


async def test_the_best_of_named_servers_is_taken_and_told(
    workers: list[WorkerProcess], model: Path
) -> None:
    names = [w.address for w in workers]
    with coordinator(names, model, "--split-mode", "row") as c:
        assert f"tokens/s predicted for {model.name}, limited by" in c.log
        taken = [name for name in names if f"worker {name}: protocol" in c.log]
        async with backend(c.port) as b:
            assert (await status(b)).n_parts == len(taken) > 0
        await multiplies(c.port)


def test_nobody_answers_and_this_machine_has_no_share(model: Path) -> None:
    command = own_command(0, "--split", f"auto:{HOST}:{free_port()}", "--split-model", str(model))
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "is left out: Connection refused" in done.stderr
    assert "error: --split auto: no server can be used" in done.stderr


async def test_nobody_answers_and_this_machine_serves_alone(model: Path) -> None:
    with coordinator([f"{HOST}:{free_port()}", "local"], model) as c:
        assert "is left out: Connection refused" in c.log
        assert "--split auto: this machine alone: " in c.log
        assert "  CPU: " in c.log
        await multiplies(c.port)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("recompute-does-nothing", "does not compute what it is asked"),
        ("products-left-out", "does not compute what it is asked"),
    ],
)
async def test_a_server_that_only_says_it_computes_is_left_out(
    fault: str, said: str, workers: list[WorkerProcess], model: Path
) -> None:
    """It would be the fastest of all."""
    words = [sys.executable, "-m", "tests.conformance.faulty", "--fault", fault, "--port", "0"]
    with Process([*words, "-t", "1"]) as liar:
        port = int(liar.wait_for(r"endpoint +: \S+:(\d+)")[1])
        with coordinator([f"{HOST}:{port}", workers[0].address], model) as c:
            assert f"--split auto: {HOST}:{port} is left out: {said}" in c.log
            assert f"worker {HOST}:{port}" not in c.log
            await multiplies(c.port)


@pytest.mark.slow
async def test_a_server_that_computes_something_else_is_left_out(
    workers: list[WorkerProcess], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against what this machine computes."""
    timed = []

    async def changed(sample: ModelSample, shape: ModelShape) -> ModelSpeed:
        speed = await time_sample(sample, shape)
        timed.append(speed)
        return replace(speed, answer=speed.answer * 1.5) if len(timed) == 2 else speed

    monkeypatch.setattr(survey_module, "time_sample", changed)
    found = await measured(workers, model)
    assert found.names == ["local", workers[1].address]
    assert " is right" in found.unusable[workers[0].address]


@dataclass
class Measured:
    """What a chooser has measured: names of boxes, and why others are none."""

    names: list[str]
    unusable: dict[str, str]


async def measured(workers: list[WorkerProcess], model: Path) -> Measured:
    """Measure this machine and workers; of those that are left out, why."""
    said: dict[str, str] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is left out" in record.msg:
                endpoint, reason = map(str, record.args)  # type: ignore[arg-type]
                said[endpoint] = reason

    handler = Keep()
    choice_module.log.addHandler(handler)
    try:
        targets = [ServerAddress.parse(w.address) for w in workers]
        shape = ModelShape.read(model)
        made = await Chooser.measure(
            AutoSplit(), targets, shape, BOTH, 1, survey_module.NO_CREDENTIALS
        )
    finally:
        choice_module.log.removeHandler(handler)
    return Measured([box.endpoint for box in made._boxes], said)


@pytest.mark.slow
async def test_a_server_that_goes_away_while_it_is_measured(
    workers: list[WorkerProcess], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    with WorkerProcess() as mortal:

        async def kills(sample: ModelSample, shape: ModelShape) -> ModelSpeed:
            timed.append(sample)
            if len(timed) == 2:
                mortal.kill()
            return await time_sample(sample, shape)

        monkeypatch.setattr(survey_module, "time_sample", kills)
        found = await measured([mortal, workers[0]], model)
        assert found.names == ["local", workers[0].address]
        assert found.unusable[mortal.address]


async def test_one_of_a_pair_goes_away(
    workers: list[WorkerProcess], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While two are timed together: the one that is left is used."""
    shape = ModelShape.read(model)
    with WorkerProcess() as mortal:

        async def kills(samples: Any) -> list[float]:
            mortal.kill()
            return await time_together(samples)

        monkeypatch.setattr(survey_module, "time_together", kills)
        targets = [ServerAddress.parse(w.address) for w in (workers[0], mortal)]
        found = await measure_boxes(await survey_all(targets, measured=False), shape)
        assert [b.endpoint for b in found.boxes] == [workers[0].address]
        assert list(found.unusable) == [mortal.address]


@pytest.mark.slow
async def test_a_server_that_goes_away_before_it_is_used(
    workers: list[WorkerProcess], model: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The next best is taken, without the one that is gone."""
    measure = Chooser.measure
    with WorkerProcess() as mortal:

        async def kills(*arguments: Any, **how: Any) -> Chooser:
            made = await measure(*arguments, **how)
            mortal.kill()
            return made

        monkeypatch.setattr(Chooser, "measure", kills)
        words = ["--split", f"auto:{mortal.address},{workers[0].address}", "--threads", "1"]
        options: argparse.Namespace = parse_options([*words, "--split-model", str(model)])
        # The one that dies is the faster, so that it is chosen first.
        monkeypatch.setattr(choice_module, "advise", _prefers(mortal.address))
        (device,) = await _chosen_devices(options, options.split, 1)
        try:
            assert f"{mortal.address} is left out: worker {mortal.address}" in caplog.text
            assert workers[0].address in device.description
            assert mortal.address not in device.description
        finally:
            device.close()


def _prefers(endpoint: str) -> Any:
    def preferring(shape: ModelShape, measured: list[Box], **how: Any) -> Any:
        found = advise(shape, measured, **how)
        number = next((i for i, b in enumerate(measured) if b.endpoint == endpoint), -1)
        return sorted(found, key=lambda p: number not in p.arrangement.parts)

    return preferring


@pytest.mark.slow
async def test_coordinators_are_left_out(workers: list[WorkerProcess], model: Path) -> None:
    with Coordinator(workers[:1]) as over:
        found = await measured([over, workers[1]], model)
    assert found.names == ["local", workers[1].address]
    assert found.unusable[over.address] == "splits over others itself"


async def test_this_server_is_no_candidate(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    words = ["--split", f"auto:{HOST}:{port},local", "--port", str(port), "--threads", "1"]
    options = parse_options([*words, "--split-model", str(model)])
    (device,) = await _chosen_devices(options, options.split, 1)
    device.close()
    assert device.name == "CPU"
    assert "left out" not in caplog.text


@pytest.mark.slow
def test_announced_servers_are_found(model: Path) -> None:
    """Multicast is lost now and then, so it may take several starts."""
    pytest.importorskip("zeroconf", reason="needs zeroconf: pip install '.[announce]'")
    with WorkerProcess("--announce") as worker:
        worker.wait_for("announced as")
        end = time.monotonic() + 180
        while True:
            words = ("--split", "auto", "--split-model", str(model), "-t", "1")
            with ServerProcess(*words, "--allow", HOST) as c:
                if f"--split auto: {worker.address}: " in c.log:
                    assert "--split auto: looking for servers on the network" in c.log
                    break
            assert time.monotonic() < end
