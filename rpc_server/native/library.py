"""Compiled routines by name: loaded from their folder, or compiled first.

Nothing here blocks but :meth:`Library.address` and :meth:`Library.addresses`, which wait for what
they were asked for and nothing else.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from rpc_server.native.folder import Folder
from rpc_server.native.image import Loaded, load
from rpc_server.native.processes import TIMEOUT, Compilers
from rpc_server.native.routine import CompileError, NoMemoryNowError, Routine
from rpc_server.observability import progress

R = TypeVar("R", bound=Routine)

log = logging.getLogger(__name__)


class Library:
    """The routines of one folder. May be used by any thread.

    ``compilers`` is how many processes may compile at once.
    """

    def __init__(
        self,
        folder: Folder,
        compilers: int,
        *,
        command: Sequence[str] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self._folder = folder
        self._compilers = Compilers(folder.path, compilers, command=command, timeout=timeout)
        self._lock = threading.Lock()
        self._routines: dict[Routine, Future[Loaded]] = {}
        self._pruned = False
        # How far it is while something is compiled, and how much that is.
        self._compiling: progress.Task | None = None
        self._left = 0
        atexit.register(self.close)

    def file(self, routine: Routine) -> Path:
        """Return where the code of a routine is kept."""
        return self._folder.path / f"{routine.label}.bin"

    def request(self, routines: Iterable[Routine]) -> None:
        """Load routines, or have them compiled: they will be asked for soon."""
        for routine in routines:
            self._find(routine, urgent=False)

    def address(self, routine: Routine) -> int:
        """Return the address of the compiled function.

        Raises CompileError, each time once it has failed; but what failed for want of memory is
        tried again.
        """
        return self._find(routine).result().address

    def addresses(self, routines: Iterable[R]) -> dict[R, int | CompileError]:
        """Return the addresses of all these, or why there is none.

        They are compiled side by side if need be.
        """
        found = {routine: self._find(routine) for routine in routines}
        return {routine: _outcome(future) for routine, future in found.items()}

    def ready(self, routines: Iterable[Routine]) -> bool:
        """Return whether nobody would have to wait for these; request them otherwise."""
        found = [self._find(routine) for routine in routines]
        return all(future.done() for future in found)

    def close(self) -> None:
        """End compilers. What is loaded stays loaded."""
        atexit.unregister(self.close)
        self._compilers.close()
        self._folder.close()

    def _find(self, routine: Routine, *, urgent: bool = True) -> Future[Loaded]:
        with self._lock:
            known = self._routines.get(routine)
            if known is None:
                future: Future[Loaded] = Future()
                self._routines[routine] = future
        if known is not None:
            if urgent and not known.done():
                self._compilers.hurry(self.file(routine).name)
            return known
        path = self.file(routine)
        try:
            future.set_result(load(self._folder.read(path.name)))
        except FileNotFoundError:
            self._compile(routine, future, urgent)
        except CompileError as error:
            self._failed(routine, future, error)
        except Exception as error:
            # Whatever is wrong with a file, a new one can be made.
            log.warning("%s: %s; compiling it anew", path, error)
            self._compile(routine, future, urgent)
        return future

    def _compile(self, routine: Routine, future: Future[Loaded], urgent: bool) -> None:
        def done(error: CompileError | None) -> None:
            self._compiled(routine)
            if error is not None:
                self._failed(routine, future, error)
                return
            try:
                future.set_result(load(self._folder.read(self.file(routine).name)))
            except CompileError as problem:
                self._failed(routine, future, problem)
            except Exception as problem:
                self._failed(routine, future, CompileError(str(problem)))

        with self._lock:
            first, self._pruned = not self._pruned, True
        if first:
            # A folder that grows is the time to see to the others.
            self._folder.prune()
            log.info("compiling kernels to %s, once for this machine", self._folder.path)
        with self._lock:
            self._left += 1
            if self._compiling is None:
                self._compiling = progress.begin("compiling kernels")
            self._compiling.expect(1)
        self._compilers.submit(routine, self.file(routine).name, done, urgent=urgent)

    def _compiled(self, routine: Routine) -> None:
        """One less to wait for, however it ended; the last one's end is told."""
        with self._lock:
            task = self._compiling
            assert task is not None
            self._left -= 1
            if not self._left:
                self._compiling = None
            last = not self._left
        task.advance(1, routine.label)
        if last:
            task.end()
            log.info("compiled %d kernels in %.1f s", task.numbers()[0], task.seconds)

    def _failed(self, routine: Routine, future: Future[Loaded], error: CompileError) -> None:
        log.warning("no compiled %s: %s", routine.label, error)
        if isinstance(error, NoMemoryNowError):
            with self._lock:
                del self._routines[routine]
        future.set_exception(error)


def _outcome(future: Future[Loaded]) -> int | CompileError:
    try:
        return future.result().address
    except CompileError as error:
        return error
