"""The name of a routine: how a process without a compiler speaks of compiled code."""

from __future__ import annotations

import re
from dataclasses import dataclass

Constant = int | None

# The option of a compiler that nobody waits for.
BACKGROUND = "--background"


class CompileError(Exception):
    """A routine could not be compiled or loaded; the message says why."""


class InterruptedCompileError(CompileError):
    """Something else came first; nothing is known against the routine."""


class NoMemoryNowError(CompileError):
    """There was no memory, or no mapping, to load a routine into; there may be, the next time."""


@dataclass(frozen=True)
class Routine:
    """A function of int64 arguments that returns an int64, decorated with ``routine``.

    It is attribute ``name`` of ``module``, or what that returns for ``constants`` if there are any.
    """

    module: str
    name: str
    constants: tuple[Constant, ...] = ()

    @property
    def label(self) -> str:
        """Module and function, short: for messages, and as the name of a file."""
        parts = [self.module.rpartition(".")[2] + "." + self.name, *map(str, self.constants)]
        return re.sub(r"[^\w.-]", "_", "-".join(parts)) if self.constants else parts[0]

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} {self.label}>"
