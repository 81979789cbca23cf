"""The server with emulated cards as a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tools.serving.processes import Process, ProgramError

HOST = "127.0.0.1"
# Kernels may have to be compiled first.
_START_SECONDS = 180.0


class EmulatedServer(Process):
    """A server with ``cards`` of the stand-in, on a port that the system chose.

    What its kernels touch is not checked: that is done elsewhere, and takes many times as long.
    """

    def __init__(
        self,
        *options: str,
        cards: int = 1,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "tests.cuda.serve", "--port", "0", *options]
        emulated = {"EMULATION": "fast", "EMULATED_CARDS": str(cards), **(env or {})}
        super().__init__(command, log, env=emulated)
        try:
            found = self.wait_for(r"endpoint +: \S+:(\d+)\n", _START_SECONDS)
            self.port = int(found[1])
        except ProgramError:
            self.stop()
            raise

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def of_cards(self) -> dict[str, int]:
        """The processes that it has started for its cards, by the names of these as parts."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                # It has ended meanwhile.
                continue
            if parent == self.child.pid and "--own-card" in words:
                found[words[words.index("--own-card") + 1]] = int(folder.name)
        return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what is left of it for its parent."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
