"""Compilers at work: processes beside the server, as many as there is work for.

Each is fed by a thread of its own, which waits for an answer most of the time. Both end when there
has been nothing to compile for a while: a compiler holds some 200 MiB.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rpc_server.children import environment
from rpc_server.native.routine import (
    BACKGROUND,
    CompileError,
    InterruptedCompileError,
    Routine,
)

# One routine takes seconds; what takes this long hangs.
TIMEOUT = 300.0
_IDLE = 3.0
# A process may have been ended for reasons that have nothing to do with the routine.
_ATTEMPTS = 2

Done = Callable[[CompileError | None], None]


class _Process:
    """One compiler."""

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        # Where there is nothing to compile it isn't needed.
        import tempfile

        self._timeout = timeout
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(),
        )

    def compile(self, request: dict[str, Any]) -> None:
        """Raises CompileError if it says no, OSError if it is gone."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(self._timeout, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not answer:
            raise OSError(f"the compiler ended (status {process.wait()}){self._last_words()}")
        refusal = json.loads(answer)
        if refusal is not None:
            raise CompileError(refusal)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def kill(self) -> None:
        """From any thread: who waits for an answer learns that it is gone."""
        self._process.kill()

    def close(self) -> None:
        """End it, by the thread that feeds it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                # What it didn't read any more can't be flushed.
                with contextlib.suppress(OSError):
                    stream.close()


class Compilers:
    """Compiles routines into files of ``folder``, at most ``limit`` at a time.

    ``background`` leaves the processors to whoever wants them. ``command`` starts a compiler, for
    tests.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        *,
        background: bool = False,
        command: Sequence[str] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        module = "rpc_server.native.compiler"
        self._command = [*(command or (sys.executable, "-m", module)), str(folder)]
        if background:
            self._command.append(BACKGROUND)
        self._limit = limit
        self._timeout = timeout
        # By file; what is waited for comes before what was asked for ahead of need.
        self._urgent: dict[str, tuple[dict[str, Any], Done]] = {}
        self._ahead: dict[str, tuple[dict[str, Any], Done]] = {}
        self._changed = threading.Condition()
        self._waiting = 0
        self._threads = 0
        self._processes: set[_Process] = set()
        # How often what was asked for was given up because something else comes first.
        self._interruptions = 0
        self._closed = False

    def submit(self, routine: Routine, file: str, done: Done, *, urgent: bool = True) -> None:
        """Compile ``routine`` into ``file``; then ``done`` is called, on another thread."""
        request = {
            "module": routine.module,
            "name": routine.name,
            "constants": routine.constants,
            "file": file,
        }
        with self._changed:
            (self._urgent if urgent else self._ahead)[file] = (request, done)
            # Threads that wait will see it, unless there is more to do than there are of them.
            n_pending = len(self._urgent) + len(self._ahead)
            start = n_pending > self._waiting and self._threads < self._limit
            self._threads += start
            self._changed.notify()
        if start:
            threading.Thread(target=self._run, name="compiler", daemon=True).start()

    def hurry(self, file: str) -> None:
        """Compile this file first: somebody waits for it."""
        with self._changed:
            if file in self._ahead:
                self._urgent[file] = self._ahead.pop(file)

    def interrupt(self) -> None:
        """End what is under way and forget what was asked for: all of that fails."""
        with self._changed:
            dropped = [*self._urgent.values(), *self._ahead.values()]
            self._urgent.clear()
            self._ahead.clear()
            self._interruptions += 1
            processes = list(self._processes)
        for process in processes:
            process.kill()
        for _, done in dropped:
            done(InterruptedCompileError("interrupted"))

    def _run(self) -> None:
        process: _Process | None = None
        while (item := self._take()) is not None:
            process = self._compile(process, *item)
        if process is not None:
            self._end(process)

    def _take(self) -> tuple[dict[str, Any], Done, int] | None:
        """The next to compile, and how many interruptions came before; None ends the thread."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._urgent or self._ahead, _IDLE)
            self._waiting -= 1
            for pending in (self._urgent, self._ahead):
                if pending:
                    return *pending.pop(next(iter(pending))), self._interruptions
            # Whoever submits from here on starts another thread.
            self._threads -= 1
            return None

    def _compile(
        self, process: _Process | None, request: dict[str, Any], done: Done, interruptions: int
    ) -> _Process | None:
        """Compile with ``process`` or a new one; the process that is left.

        It is given up when there are more than so many ``interruptions``. (A process may also have
        been ended by one that came before, while it had nothing to do.)
        """
        result: CompileError | None = None
        for _ in range(_ATTEMPTS):
            try:
                process = process or self._start(interruptions)
                process.compile(request)
                result = None
                break
            except CompileError as error:
                result = error
                break
            except OSError as error:
                result = CompileError(str(error))
                if process is not None:
                    self._end(process)
                    process = None
                if self._interruptions > interruptions:
                    result = InterruptedCompileError("interrupted")
                    break
        done(result)
        return process

    def _start(self, interruptions: int) -> _Process:
        """Raises OSError when the server is stopping, InterruptedCompileError."""
        with self._changed:
            if self._closed:
                raise OSError("the server is stopping")
            if self._interruptions > interruptions:
                raise InterruptedCompileError("interrupted")
            process = _Process(self._command, self._timeout)
            self._processes.add(process)
            return process

    def _end(self, process: _Process) -> None:
        with self._changed:
            self._processes.discard(process)
        process.close()

    def close(self) -> None:
        """End the processes; what they were asked for fails."""
        with self._changed:
            self._closed = True
            processes = list(self._processes)
        for process in processes:
            process.kill()
