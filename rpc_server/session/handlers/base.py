"""What the handlers of several topics need."""

from __future__ import annotations

from collections.abc import Callable

from protocol.requests import Request
from rpc_server.devices.base import RemoteStorage
from rpc_server.graph.tensor import Tensor
from rpc_server.session.buffers import Buffer
from rpc_server.session.state import Session

Handler = Callable[[Session, Request], None]


def device_index(s: Session, request: Request) -> int:
    """The device a request is for. Raises ProtocolError if there is no such."""
    # Before protocol 3.0 there was one device and no field for it.
    return s.existing_device(request.command, getattr(request.fields, "device", 0))


def is_remote(buffer: Buffer, start: int, size: int, tensor: Tensor | None = None) -> bool:
    """Whether these bytes are not in this machine's memory alone."""
    storage = buffer.storage
    return isinstance(storage, RemoteStorage) and storage.is_remote(start, size, tensor)
