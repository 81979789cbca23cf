"""The planted faults by name, and how they get into the server's code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.commands import Command
from protocol.requests import Request
from rpc_server.session.handlers import HANDLERS
from rpc_server.session.state import Session

Handler = Callable[[Session, Request], None]
# Where a function is: of a command the handler, or what an owner has under a name.
Place = Command | tuple[Any, str]


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


def put(place: Place, wrong: Callable[..., Any]) -> None:
    """Put a function in a place; its first argument is the right one, which was there."""
    if isinstance(place, Command):
        right: Callable[..., Any] = HANDLERS[place]
    else:
        right = getattr(*place)

    def instead(*args: Any, **more: Any) -> Any:
        return wrong(right, *args, **more)

    if isinstance(place, Command):
        HANDLERS[place] = instead
    else:
        setattr(*place, instead)


def instead_of(*place: Any) -> Callable[[Callable[..., Any]], Callable[[], None]]:
    """Make a function what plants it in a place: a command, or an owner and a name."""
    where: Place = place[0] if len(place) == 1 else (place[0], place[1])

    def planting(wrong: Callable[..., Any]) -> Callable[[], None]:
        @functools.wraps(wrong)
        def plant() -> None:
            put(where, wrong)

        return plant

    return planting
