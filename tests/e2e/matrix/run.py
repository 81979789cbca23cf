"""Runs combinations, on servers that stay for as long as they are sound, and tells of each."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.matrix.arrangements import Running, running
from tests.e2e.matrix.combinations import Combination
from tests.e2e.matrix.programs import MismatchError, Programs, command
from tools.serving.processes import ProgramError


@dataclass(frozen=True)
class Outcome:
    """What came of a combination: how its answer compares, or in ``fault`` why it failed."""

    combination: Combination
    words: str
    fault: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.fault

    @property
    def reason(self) -> str:
        """The line of ``fault`` that says most."""
        lines = [line.strip() for line in self.fault.splitlines()]
        telling = [line for line in lines if re.search(r"GGML_ASSERT|RPC|mismatch|ERROR", line)]
        return (telling or lines or [""])[0]


class Bench:
    """Runs combinations one after the other; leaving its context ends the servers.

    The servers of one arrangement serve all combinations that follow one another and need them:
    what a client leaves behind must not change the next one's answer. After a failure they are
    started anew, so that it isn't counted twice.
    """

    def __init__(self, folder: Path) -> None:
        self.programs = Programs(folder)
        self._folder = folder
        self._servers: Running | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, combination: Combination) -> Outcome:
        """Run one combination."""
        start = time.monotonic()
        words, fault = "", ""
        try:
            servers = self._ready(combination.servers)
        except ProgramError as error:
            self._end()
            return Outcome(combination, words, f"no servers: {error}", time.monotonic() - start)
        before = servers.logs()
        try:
            words = self.programs.check(combination, servers)
        except (MismatchError, ProgramError) as error:
            fault = f"{error}\n{self._told(combination, servers)}"
        if faults := servers.faults(before):
            fault = "\n".join([*faults, fault])
        if fault:
            self._end()
        return Outcome(combination, words, fault, time.monotonic() - start)

    def _told(self, combination: Combination, servers: Running) -> str:
        lines = [*servers.commands(), command(self.programs, combination, servers)]
        return "\n".join(f"    {line}" for line in lines)

    def _ready(self, name: str) -> Running:
        if self._servers is None or self._servers.name != name:
            self._end()
            self._servers = self._stack.enter_context(running(name, self._folder))
        return self._servers

    def _end(self) -> None:
        self._servers = None
        self._stack.close()


def run_all(combinations: Sequence[Combination], folder: Path) -> Iterator[Outcome]:
    """Run combinations in their order."""
    with Bench(folder) as bench:
        for combination in combinations:
            yield bench.run(combination)
