"""What the handlers of several topics need."""

from __future__ import annotations

from collections.abc import Callable

from protocol.requests import Request
from rpc_server.session.state import Session

Handler = Callable[[Session, Request], None]


def device_index(s: Session, request: Request) -> int:
    """Return the device a request is for. Raises ProtocolError if there is no such."""
    # Before protocol 3.0 there was one device and no field for it.
    return s.existing_device(request.command, getattr(request.fields, "device", 0))
