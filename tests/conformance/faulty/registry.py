"""The planted faults by name, and how they get into the server's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.commands import Command
from protocol.requests import Request
from rpc_server.session.handlers import HANDLERS
from rpc_server.session.state import Session

Handler = Callable[[Session, Request], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a server, and which case of the suite has to find it.

    ``cases`` are names of cases that must all fail, or differ. ``probe`` is said instead of
    a server that no case can be run on. ``options`` are the server's, without which the fault
    stays hidden.
    """

    name: str
    wrong: str
    plant: Callable[[], None]
    cases: tuple[str, ...]
    options: tuple[str, ...] = ()
    probe: str = ""


FAULTS: dict[str, Fault] = {}


def fault(
    wrong: str, *cases: str, options: tuple[str, ...] = (), probe: str = ""
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that plants a fault; its name is the fault's."""

    def register(plant: Callable[[], None]) -> Callable[[], None]:
        name = plant.__name__.replace("_", "-")
        assert name not in FAULTS
        FAULTS[name] = Fault(name, wrong, plant, cases, options, probe)
        return plant

    return register


def handle(command: Command, make: Callable[[Handler], Handler]) -> None:
    """Put another handler in the place of a command's; ``make`` is given the right one."""
    HANDLERS[command] = make(HANDLERS[command])


def replace_method(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put another function in the place of a method; ``make`` is given the right one."""
    setattr(owner, name, make(getattr(owner, name)))
