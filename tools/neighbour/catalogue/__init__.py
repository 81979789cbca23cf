"""All attacks, a file for each part of a server that they are about."""

from tools.neighbour.catalogue import (  # noqa: F401
    device,
    event_loop,
    files,
    memory,
    names,
    space,
    workers,
)
