"""Fixtures for tests with llama.cpp's own programs; each test here carries ``upstream``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e import llama
from tools import upstream
from tools.serving.processes import Process

Serve = Callable[..., llama.RpcServer]
StartLlamaServer = Callable[..., llama.LlamaServer]
StartClient = Callable[..., Process]

# For what upstream's server can't do, when E2E_SERVER_COMMAND names it to check these tests.
needs_own_server = pytest.mark.skipif(
    not llama.IS_OWN_SERVER, reason="another server is tested: one client, one protocol version"
)

NEEDED = (
    "llama-completion",
    "llama-server",
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
    "llama-batched-bench",
    "llama-tokenize",
    "libllama.so",
)


# Whole models take minutes together. These are in a quick run, where there is a llama.cpp.
QUICK = (
    "test_generation.py::test_greedy_text_is_the_local_text[Q4_1-plain]",
    "test_split.py::test_two_coordinators_over_the_same_workers",
    "test_wire_tools.py::test_statistics_equal_the_servers_metrics",
)


def _what_is_missing() -> str | None:
    folder = upstream.bin_dir()
    for name in NEEDED:
        if not (folder / name).is_file():
            return f"{name} is not in {folder}; run python -m tools.upstream"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = _what_is_missing()
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.upstream)
            if not item.nodeid.endswith(QUICK):
                item.add_marker(pytest.mark.slow)
            module = item.getparent(pytest.Module)
            if missing and getattr(module and module.obj, "NEEDS_PROGRAMS", True):
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def server(log_folder: Path) -> Iterator[llama.RpcServer]:
    """One server with default options, shared by all tests that don't harm it."""
    started = llama.RpcServer(log_folder)
    yield started
    started.stop()


@pytest.fixture
def rpc(server: llama.RpcServer) -> str:
    """The shared server's address, after a check that no earlier test has brought it down."""
    assert server.alive, f"the shared server has ended:\n{server.log[-3000:]}"
    return server.address


@pytest.fixture
def serve(log_folder: Path) -> Iterator[Serve]:
    """Starts servers with options of the test's own: ``serve("--protocol", "5.1")``."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> llama.RpcServer:
            started = llama.RpcServer(log_folder, *options)
            stack.callback(started.stop)
            return started

        yield start


@pytest.fixture
def llama_server(log_folder: Path) -> Iterator[StartLlamaServer]:
    """Starts llama-server: ``llama_server(model, *options, rpc=..., slots=...)``."""
    with contextlib.ExitStack() as stack:

        def start(
            model: Path, *options: object, rpc: str | None = None, slots: int = 1
        ) -> llama.LlamaServer:
            started = llama.LlamaServer(log_folder, model, *options, rpc=rpc, slots=slots)
            stack.callback(started.stop)
            return started

        yield start


@pytest.fixture
def start_client(tmp_path: Path) -> Iterator[StartClient]:
    """Starts llama-completion and leaves it running: ``start_client(model, prompt, count, rpc=)``.

    The process's log has the generated text, and nothing else.
    """
    with contextlib.ExitStack() as stack:

        def start(model: Path, prompt: str, count: int, *, rpc: str) -> Process:
            command = [
                str(llama.program("llama-completion")),
                *llama.completion_arguments(model, prompt, count, rpc=rpc),
                *("--log-verbosity", "0"),
            ]
            started = Process(command, tmp_path / "client.log")
            stack.callback(started.stop)
            return started

        yield start
