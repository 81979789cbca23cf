"""What each request does: a function for each command, by topic, and the table of all."""

from __future__ import annotations

from rpc_server.session.handlers import buffers, graphs, links, split, tensors
from rpc_server.session.handlers.base import Handler

HANDLERS: dict[int, Handler] = {
    **buffers.HANDLERS,
    **tensors.HANDLERS,
    **graphs.HANDLERS,
    **split.HANDLERS,
    **links.HANDLERS,
}
