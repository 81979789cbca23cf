"""Compiled routines by name: loaded from their folder, or compiled first.

Nothing here blocks but :meth:`Library.address` and :meth:`Library.addresses`, which wait for what
they were asked for and nothing else. What nobody has asked for yet is compiled ahead by
:meth:`Library.prepare`, in the background at will: that ends as soon as somebody does ask.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from rpc_server.native.folder import Folder
from rpc_server.native.image import Loaded, load
from rpc_server.native.processes import TIMEOUT, Compilers, Done
from rpc_server.native.routine import (
    CompileError,
    InterruptedCompileError,
    NoMemoryNowError,
    Routine,
)
from rpc_server.observability import progress

R = TypeVar("R", bound=Routine)

log = logging.getLogger(__name__)

# A compiler in the background takes memory, too.
_MOST_IN_BACKGROUND = 4


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
        self._compilers, self._background = (
            Compilers(folder.path, n, background=back, command=command, timeout=timeout)
            for n, back in ((compilers, False), (min(compilers, _MOST_IN_BACKGROUND), True))
        )
        self._lock = threading.Lock()
        self._routines: dict[Routine, Future[Loaded]] = {}
        self._pruned = False
        self._progress = _Progress("compiling kernels")
        self._progress_in_background = _Progress("compiling kernels ahead of need")
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

    def pending(self, routines: Iterable[R], *, urgent: bool) -> list[R]:
        """Return those that one would have to wait for; they are requested.

        What is ``urgent`` comes before what is only requested.
        """
        found = {routine: self._find(routine, urgent=urgent) for routine in routines}
        return [routine for routine, future in found.items() if not future.done()]

    def has(self, routine: Routine) -> bool:
        """Return whether this was asked for, and is there."""
        return self._result(routine) is None

    def failed(self, routine: Routine) -> bool:
        """Return whether this was asked for, and can't be had."""
        return isinstance(self._result(routine), CompileError)

    def _result(self, routine: Routine) -> object:
        """None for what is there, or why it can't be had; a future, or False, for all else."""
        with self._lock:
            known = self._routines.get(routine)
        if known is None:
            return False
        return known.exception() if known.done() else known

    @property
    def folder(self) -> Folder:
        """Return where code is kept."""
        return self._folder

    def missing(self, routines: Iterable[R]) -> list[R]:
        """Return those that have no code on disk."""
        return [routine for routine in routines if not self.file(routine).exists()]

    def prepare(self, routines: Iterable[Routine], *, background: bool) -> list[Future[None]]:
        """Have routines compiled to disk and not loaded; the results are there when each is done.

        They are CompileErrors for what can't be compiled; in the background also, as
        InterruptedCompileErrors, for all that was not done when :meth:`interrupt` was called or
        somebody asked for a routine.
        """
        futures: list[Future[None]] = []
        for routine in routines:
            futures.append(Future())
            self._submit(routine, functools.partial(_settle, futures[-1]), background=background)
        return futures

    def interrupt(self) -> None:
        """End what is compiled in the background."""
        self._background.interrupt()

    def close(self) -> None:
        """End compilers. What is loaded stays loaded."""
        atexit.unregister(self.close)
        self._background.close()
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
            if error is not None:
                self._failed(routine, future, error)
                return
            try:
                future.set_result(load(self._folder.read(self.file(routine).name)))
            except CompileError as problem:
                self._failed(routine, future, problem)
            except Exception as problem:
                self._failed(routine, future, CompileError(str(problem)))

        # Nobody is to wait for what steps back.
        self._background.interrupt()
        self._submit(routine, done, urgent=urgent)

    def _submit(
        self, routine: Routine, done: Done, *, urgent: bool = False, background: bool = False
    ) -> None:
        with self._lock:
            first, self._pruned = not self._pruned, True
        if first:
            # A folder that grows is the time to see to the others.
            self._folder.prune()
            log.info("compiling kernels to %s, once for this machine", self._folder.path)
        task = self._progress_in_background if background else self._progress
        task.expect()

        def told(error: CompileError | None) -> None:
            task.advance(routine.label, done=not isinstance(error, InterruptedCompileError))
            done(error)

        compilers = self._background if background else self._compilers
        compilers.submit(routine, self.file(routine).name, told, urgent=urgent)

    def _failed(self, routine: Routine, future: Future[Loaded], error: CompileError) -> None:
        log.warning("no compiled %s: %s", routine.label, error)
        if isinstance(error, NoMemoryNowError):
            with self._lock:
                del self._routines[routine]
        future.set_exception(error)


class _Progress:
    """The progress with what was asked for, as long as not all of it is done."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._lock = threading.Lock()
        self._task: progress.Task | None = None
        self._left = self._done = 0

    def expect(self) -> None:
        """Note that there is one more to compile."""
        with self._lock:
            self._left += 1
            if self._task is None:
                self._task = progress.begin(self._label)
                self._done = 0
            self._task.expect(1)

    def advance(self, label: str, *, done: bool) -> None:
        """Note that there is one less to wait for; the last one's end is told.

        Not ``done`` is what was interrupted.
        """
        with self._lock:
            task = self._task
            assert task is not None
            self._left -= 1
            self._done += done
            last, n = not self._left, self._done
            if last:
                self._task = None
        task.advance(1, label)
        if last:
            task.end()
            log.info("compiled %d kernels in %.1f s", n, task.seconds)


def _settle(future: Future[None], error: CompileError | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _outcome(future: Future[Loaded]) -> int | CompileError:
    try:
        return future.result().address
    except CompileError as error:
        return error
