"""From events of a client's stream to what does them."""

from __future__ import annotations

from protocol.commands import Command
from protocol.requests import Event, Hello, Request, UploadChunk, UploadEnd, UploadStart
from rpc_server.limits import UNSENT_BYTES
from rpc_server.session import uploads
from rpc_server.session.handlers import HANDLERS
from rpc_server.session.state import Session

# Offers of weights by their hash are part of a load.
_OFFERS = frozenset({Command.SET_TENSOR_HASH, Command.SPLIT_LOAD})


def dispatch(s: Session, event: Event) -> None:
    """Do one event. Raises what REFUSALS lists; the connection can't go on then."""
    s.handled += 1
    if s.reader.dialect is not s.spoken and not isinstance(event, Hello):
        s.note_names()
    if isinstance(event, Request):
        if not s.handshake.done:
            s.handshake.accepted()
        s.stats.commands[event.command] += 1
        if event.command not in _OFFERS:
            s.meter.other()
        HANDLERS[event.command](s, event)
    elif isinstance(event, UploadStart):
        if not s.handshake.done:
            s.handshake.accepted()
        s.stats.commands[Command.SET_TENSOR] += 1
        uploads.begin(s, event)
    elif isinstance(event, UploadChunk):
        uploads.part(s)
    elif isinstance(event, UploadEnd):
        uploads.end(s)
    elif isinstance(event, Hello):
        s.stats.commands[Command.HELLO] += 1
        s.hello(event)
    if not s.writable and not s.busy and s.unsent > UNSENT_BYTES:
        # It asks and asks, and takes no answers.
        s.wait(s.drained())
