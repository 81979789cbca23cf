"""Starts `python -m rpc_server` as users do and speaks to it over a plain blocking socket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from protocol.commands import Command
from tools.serving.processes import PROJECT as REPOSITORY
from tools.serving.processes import Process, ProgramError, own_command
from tools.wire import NEWEST, ClosedError, sources, tensor
from tools.wire import Wire as BlockingWire

__all__ = [
    "NEWEST", "REPOSITORY", "ClosedError", "ServerProcess", "Wire", "running", "sources", "tensor",
]  # fmt: skip

# One that measures its parts compiles first what it measures them with.
START_SECONDS = 180.0


class ServerProcess(Process):
    """A running server, on a port that the system chose.

    ``module`` is what is run as the server.
    """

    def __init__(
        self, *options: str, env: Mapping[str, str] | None = None, module: str = "rpc_server"
    ) -> None:
        super().__init__(own_command(0, *options, module=module), env=env)
        try:
            # The end of a line is written by itself.
            found = self.wait_for(r"endpoint +: \S+:(\d+)\n", START_SECONDS)
            self.port = int(found[1])
        except ProgramError:
            self.stop()
            raise


@contextmanager
def running(*options: str, env: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    with ServerProcess(*options, env=env) as server:
        yield server


class Wire(BlockingWire):
    """One connection, and what most tests need of it."""

    def closed_by_server(self) -> bool:
        """Whether the server ends the connection (waits for it)."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    def compute(self, nodes: list[dict[str, Any]], leaves: list[dict[str, Any]]) -> None:
        """Send a graph: tensors are the leaves and then the nodes."""
        self.send(Command.GRAPH_COMPUTE, self.graph(nodes, leaves))
        answer = self.answer(Command.GRAPH_COMPUTE)
        assert answer is None or answer.result == 0, "not GGML_STATUS_SUCCESS"
