"""The servers that a check needs: this project's on the card, a reference, and upstream's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.bench.servers import answers
from tools.serving.ports import free_port
from tools.serving.processes import (
    HOST,
    Process,
    ProgramError,
    emulation_command,
    own_command,
)

# Opening a card compiles a kernel and loads cuBLAS.
_START_SECONDS = 120.0
# A device in either server's banner.
_DEVICE = re.compile(r"^ +(\w+): (.*) \((\d+) MiB, (\d+) MiB free\)$", re.MULTILINE)


# The emulation checks no access, unless the environment asks for it (EMULATION=checked).
EMULATED_FAST = {"EMULATION": os.environ.get("EMULATION", "fast")}


@dataclass(frozen=True)
class BannerDevice:
    """A device as a server says it when it starts; memory in MiB."""

    name: str
    description: str
    total: int
    free: int


@dataclass(frozen=True)
class ServersToCheck:
    """Commands that start servers; ``{port}`` in them stands for theirs.

    ``upstream`` is a folder with ggml-rpc-server, if there is one. With ``emulated`` the card is
    one that tests/cuda emulates.
    """

    device: str = "CUDA0"
    upstream: Path | None = None
    emulated: bool = False

    def card(self, *options: str) -> list[str]:
        """Return what starts this project's server on the card."""
        command = emulation_command if self.emulated else own_command
        return command("{port}", "-d", self.device, *options)

    def on_upstream(self, *options: str) -> list[str]:
        """Return what starts upstream's server."""
        assert self.upstream is not None
        program = str(self.upstream / "ggml-rpc-server")
        return [program, "-H", HOST, "-p", "{port}", *options]

    def reference(self, threads: int) -> list[str]:
        """Return what computes what is right: upstream's server or ours, by the processor."""
        options = ["-d", "CPU", "-t", str(threads)]
        if self.upstream is not None:
            return self.on_upstream(*options)
        return own_command("{port}", *options)

    def describe_reference(self) -> str:
        """Say which server the reference is."""
        whose = "this server" if self.upstream is None else "llama.cpp's ggml-rpc-server"
        return f"{whose} on the processor"

    def check(self) -> None:
        """Raise ProgramError if there is no such program."""
        if self.upstream is not None and not (self.upstream / "ggml-rpc-server").is_file():
            raise ProgramError(f"no ggml-rpc-server in {self.upstream}")
        if self.emulated:
            emulation_command("{port}")


@contextmanager
def started(command: list[str]) -> Iterator[tuple[Process, int]]:
    """Start a server; yield it and its port, which ``{port}`` in the command stands for.

    Raises ProgramError if it doesn't answer.
    """
    port = free_port()
    words = [word.replace("{port}", str(port)) for word in command]
    with Process(words, env=EMULATED_FAST) as process:
        process.wait_until(lambda: answers(port), _START_SECONDS, "an answer to HELLO", pause=0.1)
        yield process, port


def devices(log: str) -> list[BannerDevice]:
    """Return the devices in a server's banner."""
    return [
        BannerDevice(name, description, int(total), int(free))
        for name, description, total, free in _DEVICE.findall(log)
    ]
