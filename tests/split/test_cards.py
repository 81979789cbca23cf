"""Cards of the coordinator's own as parts: their processes, and what becomes of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from client.backend import Backend
from client.errors import AllocationFailed, ConnectionLost
from client.split.address import OwnCard, ServerAddress
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.children import Told
from rpc_server.devices.split import cards as cards_module
from rpc_server.devices.split.cards import CardServer
from rpc_server.devices.split.worker import WorkerLost
from rpc_server.options import options_of_card, parse_options
from tests.cuda import emulation
from tests.cuda.server import EmulatedServer, is_running
from tests.split.cluster import WorkerProcess, backend, status
from tests.split.weights import content, values, weight
from tools.serving.processes import PROJECT

needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)
PATIENCE = 60.0
F32 = GgmlType.F32

# -- the command line


def test_cards_are_named_like_devices() -> None:
    options = parse_options(["--split", "cuda0,CUDA12,a,cuda1:7,local,cuda:50052"])
    assert options.split == (
        OwnCard(0), OwnCard(12), ServerAddress("a"), ServerAddress("cuda1", 7), None,
        ServerAddress("cuda"),
    )  # fmt: skip
    assert [OwnCard(12).name, OwnCard(12).device] == ["cuda12", "CUDA12"]
    assert parse_options(["--split", "cuda0"]).split == (OwnCard(0),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--split", "cuda1,a,CUDA1"], "names cuda1 twice"),
        (["--split", "cuda"], "one by one (cuda0,cuda1); a host of that name is cuda:50052"),
        (["--split", "cuda0,a", "--device", "CUDA0"], "GPUs of this machine are parts"),
        (["--split", "auto:cuda0,a"], "name cuda0 as a part, without 'auto:'"),
        (["--split", "cuda0,local", "--tensor-split", "1"], "one share for each part"),
        (["--own-card", "3"], "'3' names no card such as cuda0"),
    ],
)
def test_what_is_named_wrong(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(options)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_what_the_process_of_a_card_goes_by() -> None:
    """It serves this machine alone, and nobody but its coordinator."""
    words = "--split cuda0,a --host 0.0.0.0 --port 7 --metrics-port 8 --announce --mem 1G"
    words += " --protocol 6.0 --idle-timeout 5 --max-message 99 --cache-dir here --own-card cuda3"
    made = options_of_card(parse_options(words.split()))
    assert (made.own_card, made.device, made.split) == (OwnCard(3), ["CUDA3"], None)
    assert (made.host, made.port, made.metrics_port) == ("127.0.0.1", 0, None)
    assert (made.mem, made.protocol, made.limit_idle, made.announce) == (None, None, None, False)
    assert (made.limit_message, made.cache, made.cache_dir) == (99 << 20, True, Path("here"))
    assert (made.log_level, made.quiet, made.no_prepare) == ("warning", True, True)


# -- a process, whatever it runs

READY = 'import sys; print(\'{"port": 7, "error": ""}\', flush=True); sys.stdin.read()'


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


Start = Callable[..., CardServer]


@pytest.fixture
def serve(clock: Clock) -> Iterator[Start]:
    """Makes a card's server of the code that is run for it."""
    made: list[CardServer] = []

    def start(code: str, *arguments: str) -> CardServer:
        made.append(CardServer(OwnCard(1), [sys.executable, "-c", code, *arguments], clock))
        return made[-1]

    yield start
    for server in made:
        server.close()


async def reason(server: CardServer, patience: float = PATIENCE) -> str:
    """Why a card can't be had."""
    with pytest.raises(WorkerLost) as caught:
        await server.port(patience)
    return str(caught.value)


def count(file: Path) -> int:
    return len(file.read_text().split()) if file.exists() else 0


COUNTED = "import sys; print(sys.argv[-1], file=open(sys.argv[1], 'a')); "


async def test_it_is_started_once(serve: Start, tmp_path: Path) -> None:
    server = serve(COUNTED + READY, str(tmp_path / "starts"))
    assert list(await asyncio.gather(server.port(), server.port())) == [7, 7]
    assert await server.port() == 7
    # Behind the command comes the name of the card.
    assert (tmp_path / "starts").read_text() == "cuda1\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('print(\'{"port": 0, "error": "no GPU 1"}\')', "cuda1: no GPU 1"),
        ("raise SystemExit(3)", "cuda1: its process ended early (status 3)"),
        ("print('[]')", "cuda1: its process ended early (status 0)"),
        ("import os; os.kill(os.getpid(), 9)", "cuda1: its process ended early (killed by signal"),
    ],
)
async def test_it_says_why_it_can_not_be_had(
    code: str, said: str, serve: Start, clock: Clock, tmp_path: Path
) -> None:
    """It is tried again after longer and longer pauses, and said to be what it is meanwhile."""
    starts = tmp_path / "starts"
    server = serve(COUNTED + code, str(starts))
    for n, pause in enumerate((1, 2, 4, 8, 16, 32, 60, 60), 1):
        assert said in await reason(server)
        assert count(starts) == n
        clock.now += pause - 0.5
        assert said in await reason(server)
        assert count(starts) == n
        clock.now += 1


async def test_one_that_ends_is_started_again(
    serve: Start, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pids = tmp_path / "pids"
    code = "import os, sys; print(os.getpid(), file=open(sys.argv[1], 'a')); " + READY
    server = serve(code, str(pids))
    assert await server.port() == 7
    clock.now += 100
    os.kill(int(pids.read_text()), signal.SIGKILL)
    await asyncio.to_thread(_wait_for_end, int(pids.read_text()))
    assert await server.port() == 7
    assert count(pids) == 2
    assert "cuda1 is started again: its process ended (killed by signal 9)" in caplog.text


def _wait_for_end(pid: int) -> None:
    end = time.monotonic() + PATIENCE
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.02)


async def test_one_that_takes_long_is_waited_for_in_turns(
    serve: Start, clock: Clock, tmp_path: Path
) -> None:
    file = tmp_path / "go"
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
    server = serve(code + READY, str(file))
    assert "is being started" in await reason(server, 0.05)
    file.touch()
    assert await server.port() == 7


async def test_one_that_never_is_ready_is_given_up(serve: Start, clock: Clock) -> None:
    server = serve("import sys; sys.stdin.read()")
    assert "is being started" in await reason(server, 0.05)
    clock.now += cards_module.START_SECONDS
    assert "cuda1: it was not ready within 300 s" in await reason(server, 0.05)


async def test_one_that_does_not_end_is_ended(
    serve: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cards_module, "_END_SECONDS", 0.2)
    code = "import os, sys; print(os.getpid(), file=open(sys.argv[1], 'a')); " + READY
    server = serve(code + "; import time; time.sleep(1000)", str(tmp_path / "pid"))
    await server.port()
    await asyncio.to_thread(server.close)
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert "cuda1: this server stops" in await reason(server)


@pytest.mark.parametrize(
    "line", [b"", b"7\n", b"{}\n", b'{"port": "x", "error": ""}\n', b'{"port": 70000, "error": ""}']
)
def test_what_says_nothing(line: bytes) -> None:
    assert Told.parse(line) == Told()


# -- the server with emulated cards


def refused(*options: str, **env: str) -> str:
    """The line with which a coordinator doesn't start."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.serve", "--port", "0", *options],
        env={**os.environ, "EMULATION": "fast", "EMULATED_CARDS": "2", **env},
        cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@needs_compiler
def test_a_card_that_is_not_there() -> None:
    line = refused("--split", "cuda3,cuda0")
    assert re.search(r"^error: cuda3: unknown device 'CUDA3'; .* has: CUDA0, CUDA1, CPU$", line)


@needs_compiler
def test_a_card_that_fails_its_opening_test() -> None:
    line = refused("--split", "cuda0,cuda1", EMULATED_UNUSABLE="1")
    assert line.startswith("error: cuda1: emulated GPU can't be used: CUDA1 failed: ")


def test_what_to_install_is_said(tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('gone')\n")
    done = subprocess.run(
        [sys.executable, "-m", "rpc_server", "--port", "0", "--split", "cuda0,local"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}"},
        cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: cuda0: unknown device 'CUDA0' (CuPy is not installed" in done.stderr
    assert "pip install 'ggml-rpc-server[cuda12]'" in done.stderr


@pytest.fixture(scope="module")
def two() -> Iterator[EmulatedServer]:
    """A coordinator over two cards of its own."""
    options = ("--split", "cuda0,cuda1", "--threads", "1", "--metrics-port", "0")
    with EmulatedServer(*options, cards=2) as started:
        yield started
        assert "Traceback" not in started.log


SHAPE = (256, 64)


@asynccontextmanager
async def product(server: EmulatedServer) -> AsyncIterator[tuple[Backend, Tensor, Tensor]]:
    """A client, a weight that is cut, and what it is multiplied with."""
    async with backend(server.port, timeout=PATIENCE) as b:
        w = await weight(b, F32, SHAPE, content(F32, SHAPE, seed=3))
        yield b, w, await b.tensor(F32, (SHAPE[0], 2), values(2, SHAPE[0], seed=4))


async def prepared(b: Backend, w: Tensor, x: Tensor) -> Callable[[], Awaitable[None]]:
    """What computes the product, and holds it against numpy's."""
    expected = values(2, SHAPE[0], seed=4) @ values(SHAPE[1], SHAPE[0], seed=3).T
    y = b.graph.mul_mat(w, x)
    plan = await b.prepare(y)

    async def run() -> None:
        await plan.run()
        got = np.reshape(await b.download(y), expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)

    return run


async def check(b: Backend, w: Tensor, x: Tensor) -> None:
    await (await prepared(b, w, x))()


@needs_compiler
async def test_a_weight_over_two_cards(two: EmulatedServer) -> None:
    """Both compute, each has half, and everything calls them what they are named."""
    assert sorted(two.of_cards()) == ["cuda0", "cuda1"]
    # The memory of each is the card's.
    for name in ("cuda0", "cuda1"):
        two.wait_for(rf"worker {name}: protocol 7\S+, .*, 3584 of 4096 MiB free")
    # They add up no sums among themselves.
    two.wait_for(r"--split-mode auto: tensor .*: a token takes 65 exchanges, ")
    async with product(two) as (b, w, x):
        await check(b, w, x)
        parts = (await status(b)).parts
        assert [bytes(p.name).rstrip(b"\0") for p in parts] == [b"cuda0", b"cuda1"]
        assert [p.rows for p in parts] == [32, 32]
        assert all(p.exchanges for p in parts)
        port = two.wait_for(r"metrics at http://(\S+)/metrics")[1]
        for page in ("metrics", ""):
            text = await asyncio.to_thread(_get, f"http://{port}/{page}")
            assert "cuda0" in text
            assert "cuda1" in text


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


@needs_compiler
async def test_a_card_whose_process_ends(two: EmulatedServer) -> None:
    """It is as with a lost worker: the client ends, the next one gets right numbers."""
    before = two.of_cards()
    async with product(two) as (b, w, x):
        run = await prepared(b, w, x)
        await run()
        os.kill(before["cuda1"], signal.SIGKILL)
        with pytest.raises(ConnectionLost):
            await run()
    two.wait_for(r"worker cuda1 was lost.*; trying to reach it again")
    two.wait_for(r"cuda1 is started again: its process ended \(killed by signal 9\)")
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                async with product(two) as (b, w, x):
                    await check(b, w, x)
                break
            except AllocationFailed:
                # Nothing is free as long as it isn't back.
                await asyncio.sleep(0.1)
    after = two.of_cards()
    assert after["cuda0"] == before["cuda0"]
    assert after["cuda1"] != before["cuda1"]


@pytest.mark.slow
@needs_compiler
async def test_a_card_that_falls_silent() -> None:
    """It is ended and started again: nobody else could have it."""
    options = ("--split", "cuda0", "--split-timeout", "1", "--threads", "1")
    with EmulatedServer(*options) as server:
        (pid,) = server.of_cards().values()
        async with product(server) as (b, w, x):
            run = await prepared(b, w, x)
            await run()
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(ConnectionLost):
                await run()
        server.wait_for(r"cuda0 is started again: it did not answer within 10 s")
        assert not is_running(pid)
        server.wait_for(r"(?s)is started again.*worker cuda0: protocol")
        async with product(server) as (b, w, x):
            await check(b, w, x)


@needs_compiler
async def test_signals_are_the_coordinators(two: EmulatedServer) -> None:
    """A terminal and a service manager send them to all: cards go on while clients are drained."""
    async with product(two) as (b, w, x):
        for pid in two.of_cards().values():
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        for _ in range(3):
            await check(b, w, x)


@needs_compiler
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_cards_end_with_the_coordinator(number: signal.Signals) -> None:
    with EmulatedServer("--split", "cuda0", "--threads", "1") as server:
        (pid,) = server.of_cards().values()
        server.child.send_signal(number)
        assert server.wait(20) == (-number if number is signal.SIGKILL else 0)
        _wait_for_end(pid)
        assert "Traceback" not in server.log


@pytest.mark.slow
@needs_compiler
def test_shares_of_a_card_and_processors_go_by_their_speed() -> None:
    """By memory most would go to the processors, which are slower by far."""
    with EmulatedServer("--split", "local,cuda0", "--threads", "1") as server:
        server.wait_for("measuring how fast the parts are")
        assert re.search(r"cuda0: \S+ GB/s of weights, \d+ us away: \S+ % of the rows", server.log)
        assert "computes nothing here" not in server.log


@needs_compiler
async def test_a_card_beside_a_worker() -> None:
    with WorkerProcess() as worker:
        options = ("--split", f"{worker.address},cuda0", "--tensor-split", "1,1", "--threads", "1")
        with EmulatedServer(*options) as server:
            async with product(server) as (b, w, x):
                await check(b, w, x)
                assert [p.rows for p in (await status(b)).parts] == [32, 32]
        assert worker.alive
