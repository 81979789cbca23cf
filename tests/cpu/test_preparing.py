"""What is compiled ahead: by --prepare, and by a server that has nothing to do."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from rpc_server.children import environment
from rpc_server.devices.cpu import preparing
from rpc_server.devices.cpu.catalog import Kernel, common_kernels
from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.preparing import prepare_now, prepare_when_idle
from rpc_server.native import compiler
from rpc_server.native.folder import Folder
from rpc_server.native.library import Library
from rpc_server.native.routine import InterruptedCompileError
from rpc_server.observability.metrics import ClientStats, ServerStats

ADD = Kernel("tests.native.sources", "add")
TABLE = Kernel("tests.native.sources", "scaled_table", (5,))
ABSENT = Kernel("tests.native.sources", "absent")
ENDLESS = Kernel("tests.native.sources", "takes_long", (600,))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """A folder of its own, where two small routines are all that is wanted."""
    made = Library(Folder(tmp_path, "0"), 1)
    monkeypatch.setattr(preparing, "library", lambda: made)
    want(monkeypatch, ADD, TABLE)
    yield made
    made.close()


def want(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel, first: Sequence[Kernel] = ()) -> None:
    monkeypatch.setattr(preparing, "ALWAYS", first[:1])
    monkeypatch.setattr(preparing, "chosen_isa", lambda: min(Isa))
    monkeypatch.setattr(preparing, "first_kernels", lambda isa: list(first))
    monkeypatch.setattr(preparing, "common_kernels", lambda isa: list(kernels))


def test_there_is_a_routine_for_each_common_kernel() -> None:
    wanted = common_kernels(max(Isa))
    assert len(wanted) == len(set(wanted))
    for kernel in wanted:
        # Raises LookupError.
        compiler.find(kernel.module, kernel.name, list(kernel.constants))


def test_prepare_now(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_now() == 0
    assert library.missing([ADD, TABLE]) == []
    assert capsys.readouterr().out == f"2 of 2 kernels are in {library.folder.path}\n"
    # There is nothing left to do.
    library.close()
    assert prepare_now() == 0


def test_prepare_now_tells_what_failed(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want(monkeypatch, ADD, ABSENT)
    assert prepare_now() == 1
    said = capsys.readouterr()
    assert "error: no compiled sources.absent: " in said.err
    assert said.out.startswith("1 of 2 kernels are in ")


def test_prepare_now_where_nothing_can_be_kept(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    library.folder.unkept = "no space left"
    assert prepare_now() == 1
    assert capsys.readouterr().err == "error: compiled kernels can't be kept: no space left\n"


async def test_an_idle_server_prepares(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    want(monkeypatch, ADD, ABSENT, TABLE)
    stats = ServerStats()
    # One that is there and asks nothing.
    stats.connected(ClientStats(number=1, activity=lambda: "idle"))
    await asyncio.wait_for(prepare_when_idle(stats), 240)
    assert library.missing([ADD, TABLE, ABSENT]) == [ABSENT]


async def test_what_comes_first_is_compiled_whatever_clients_do(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    want(monkeypatch, ADD, ABSENT, TABLE, first=(ADD, ABSENT))
    monkeypatch.setattr(preparing, "_AT_ONCE", 1)
    stats = ServerStats()
    stats.connected(ClientStats(number=1, activity=lambda: "graph"))
    looked, look = asyncio.Event(), preparing._Clients.look

    async def noted(clients: preparing._Clients) -> bool:
        looked.set()
        return await look(clients)

    monkeypatch.setattr(preparing._Clients, "look", noted)
    task = asyncio.create_task(prepare_when_idle(stats))
    # Then it is the turn of what waits until clients do nothing.
    await asyncio.wait_for(looked.wait(), 240)
    assert library.missing([ADD, ABSENT, TABLE]) == [ABSENT, TABLE]
    assert library.failed(ABSENT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_rest_is_begun_beside_the_last_of_what_comes_first(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    want(monkeypatch, ENDLESS, ADD, first=(ENDLESS,))
    begun: asyncio.Queue[list[Kernel]] = asyncio.Queue()

    def prepared(kernels: Iterable[Kernel], *, background: bool) -> list[Future[None]]:
        assert background
        asked = list(kernels)
        begun.put_nowait(asked)
        return [Future() for _ in asked]

    monkeypatch.setattr(library, "prepare", prepared)
    task = asyncio.create_task(prepare_when_idle(ServerStats()))
    # A second compiler would wait for the first one's file.
    assert await asyncio.wait_for(begun.get(), 60) == [ADD]
    assert library.pending([ENDLESS], urgent=False) == [ENDLESS]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.slow
async def test_nothing_is_compiled_while_a_client_computes(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    want(monkeypatch, ADD, ENDLESS)
    stats, doing = ServerStats(), ["graph"]
    stats.connected(ClientStats(number=1, activity=lambda: doing[0]))
    looked = asyncio.Event()
    look = preparing._Clients.look

    async def counted(clients: preparing._Clients) -> bool:
        busy = await look(clients)
        looked.set()
        return busy

    monkeypatch.setattr(preparing._Clients, "look", counted)
    interrupted = asyncio.Event()
    loop, interrupt = asyncio.get_running_loop(), library.interrupt

    def noted() -> None:
        interrupt()
        loop.call_soon_threadsafe(interrupted.set)

    monkeypatch.setattr(library, "interrupt", noted)
    begun: list[Kernel] = []
    prepare = library.prepare

    def prepared(kernels: Iterable[Kernel], *, background: bool) -> list[Future[None]]:
        begun.extend(kernels)
        return prepare(kernels, background=background)

    monkeypatch.setattr(library, "prepare", prepared)
    task = asyncio.create_task(prepare_when_idle(stats))
    await asyncio.wait_for(looked.wait(), 60)
    assert not library.file(ADD).exists()
    doing[0] = "idle"
    while not library.file(ADD).exists():
        await asyncio.sleep(0.05)
    # What is under way when a client begins to compute ends. (Before it has begun, it waits.)
    while ENDLESS not in begun:
        await asyncio.sleep(0.05)
    doing[0] = "graph"
    await asyncio.wait_for(interrupted.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_server_that_stops_meanwhile_says_nothing_of_it(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not compiled is told to whoever waits for it, and nobody does any more."""
    made: list[Future[None]] = []
    begun = asyncio.Event()
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))

    def prepared(kernels: Iterable[Kernel], *, background: bool) -> list[Future[None]]:
        begun.set()
        made.extend(Future() for _ in kernels)
        return list(made)

    monkeypatch.setattr(library, "prepare", prepared)
    task = asyncio.create_task(prepare_when_idle(ServerStats()))
    await asyncio.wait_for(begun.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while made:
        made.pop().set_exception(InterruptedCompileError("interrupted"))
    del task
    for _ in range(3):
        await asyncio.sleep(0)
        gc.collect()
    assert not told


_IMPORTED = """
import sys
from rpc_server.devices.cpu import preparing
later = {f"rpc_server.devices.cpu.{name}" for name in ("plan", "executor", "planner", "baseline")}
assert later.isdisjoint(sys.modules), "a server listens without these"
preparing._import()
assert later <= set(sys.modules)
"""


def test_a_server_at_rest_has_imported_what_a_first_graph_needs() -> None:
    subprocess.run([sys.executable, "-c", _IMPORTED], check=True, env=environment())
