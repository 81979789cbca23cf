"""Arrangements of servers: what each is made of, and how it is started and ended."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e import llama
from tools.serving.ports import free_port
from tools.serving.processes import (
    HOST,
    Process,
    ProgramError,
    listens,
    upstream_command,
)

LOCAL = "local"
ONE_CORE = ("--threads", "1")


@dataclass(frozen=True)
class Ours:
    """A server of this project; with ``parts`` it is a coordinator that splits over them."""

    options: tuple[str, ...] = ONE_CORE
    devices: int = 1
    parts: tuple[Ours | Upstream | str, ...] = ()


@dataclass(frozen=True)
class Upstream:
    """llama.cpp's own server."""

    devices: int = 1


def _coordinator(mode: str, *parts: Ours | Upstream | str) -> Ours:
    return Ours((*ONE_CORE, "--split-mode", mode), parts=parts)


# What llama.cpp is told of with --rpc, in this order.
ARRANGEMENTS: dict[str, tuple[Ours | Upstream, ...]] = {
    "one": (Ours(()),),
    "two": (Ours(), Ours()),
    "three": (Ours(), Ours(), Ours()),
    "-d CPU,CPU": (Ours(("-d", "CPU,CPU"), devices=2),),
    "row": (_coordinator("row", Ours(), Ours()),),
    # SmolLM2 has three KV heads, the random models two: of those the parts share the attention.
    "tensor of three": (_coordinator("tensor", Ours(), Ours(), Ours()),),
    "tensor of two": (_coordinator("tensor", Ours(), Ours()),),
    "row, local": (_coordinator("row", Ours(), LOCAL),),
    "tensor, local": (_coordinator("tensor", LOCAL, Ours(), Ours()),),
    "row over upstream": (_coordinator("row", Upstream(), Ours()),),
    "row beside plain": (_coordinator("row", Ours(), Ours()), Ours()),
    "upstream beside ours": (Ours(), Upstream()),
}


def devices(name: str) -> int:
    """How many devices llama.cpp sees of an arrangement."""
    return sum(server.devices for server in ARRANGEMENTS[name])


@dataclass
class Running:
    """An arrangement that runs: its processes, and the addresses that llama.cpp is told of."""

    name: str
    endpoints: list[str] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)

    @property
    def rpc(self) -> str:
        """What goes behind --rpc."""
        return ",".join(self.endpoints)

    def logs(self) -> list[str]:
        """What each process has printed so far."""
        return [process.log for process in self.processes]

    def commands(self) -> list[str]:
        """Return the command lines that start the same again."""
        return [" ".join(process.command) for process in self.processes]

    def faults(self, since: list[str]) -> list[str]:
        """Return what went wrong in the servers after their logs were ``since``."""
        found = []
        for process, before in zip(self.processes, since, strict=True):
            name = Path(process.command[0]).name if _is_upstream(process) else "server"
            if not process.alive:
                found.append(f"{name} ended with status {process.child.returncode}")
            found += [
                f"{name} logged: {line}"
                for line in process.log[len(before) :].splitlines()
                if re.search(r"\bERROR\b|^Traceback|GGML_ASSERT", line)
            ]
        return found

    def graphs(self) -> int:
        """Return how many connections to this project's servers computed graphs and ended."""
        return sum(
            len(re.findall(r"disconnected; .* [1-9]\d* graphs in", log)) for log in self.logs()
        )


def _is_upstream(process: Process) -> bool:
    return "rpc_server" not in process.command


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[Running]:
    """Start an arrangement and end it afterwards; logs go to ``folder``.

    Raises ProgramError where a server doesn't start.
    """
    made = Running(name)
    with contextlib.ExitStack() as stack:

        def start(server: Ours | Upstream) -> str:
            if isinstance(server, Upstream):
                port = free_port()
                command = upstream_command(port, "-t", "1")
                if command is None:
                    raise ProgramError("no ggml-rpc-server of llama.cpp")
                process = Process(command, folder / f"upstream-{port}.log")
                stack.callback(process.stop)
                process.wait_until(lambda: listens(port), llama.START_SECONDS, "listening socket")
                address = f"{HOST}:{port}"
            else:
                parts = [part if isinstance(part, str) else start(part) for part in server.parts]
                split = ("--split", ",".join(parts)) if parts else ()
                if parts and "--split-mode" not in server.options:
                    split = (*split, "--split-mode", "row")
                process = own = llama.RpcServer(folder, *server.options, *split)
                stack.callback(process.stop)
                address = own.address
            made.processes.append(process)
            return address

        made.endpoints = [start(server) for server in ARRANGEMENTS[name]]
        yield made
