"""Streams of requests with damaged bytes, on a live server.

Whatever comes, a server answers, goes on or hangs up; it does not hang, and other clients don't
notice. What it does with the damaged bytes is its own business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from conformance.properties.codecs import Damage, damages
from conformance.properties.memory import content
from conformance.properties.messages import DrawnRequest, requests
from conformance.suite.context import Context
from conformance.suite.errors import CaseEnded
from conformance.suite.peer import Peer
from conformance.suite.tensors import RemoteBuffer
from protocol.commands import Command
from protocol.dialects import Dialect

_SIZE = 4096
# Graphs that are right would be computed for as long as their random sizes take.
_LEFT_OUT = frozenset({Command.HELLO, Command.ALLOC_BUFFER})


@dataclass(frozen=True, slots=True)
class DamagedStream:
    """Requests and what is done to their bytes; ``placed`` puts tensors into a real buffer."""

    requests: tuple[DrawnRequest, ...]
    damage: tuple[Damage, ...]
    placed: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": [
                {"command": r.command.name, "fields": _jsonable(r.fields), "body": r.body.hex()}
                for r in self.requests
            ],
            "damage": [[d.kind, d.at, d.value] for d in self.damage],
            "placed": self.placed,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DamagedStream:
        made = tuple(
            DrawnRequest(Command[r["command"]], _from_json(r["fields"]), bytes.fromhex(r["body"]))
            for r in data["requests"]
        )
        return cls(made, tuple(Damage(*d) for d in data["damage"]), data["placed"])


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"hex"}:
            return bytes.fromhex(value["hex"])
        return {k: _from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    return value


def streams(dialect: Dialect) -> st.SearchStrategy[DamagedStream]:
    """Return one to five requests, damaged."""
    commands = [c for c in dialect.commands if c not in _LEFT_OUT]
    one = st.sampled_from(commands).flatmap(lambda c: requests(dialect, c))
    return st.builds(
        DamagedStream,
        st.lists(one, min_size=1, max_size=5).map(tuple),
        damages(),
        st.booleans(),
    )


def _placed(fields: Any, buffer: RemoteBuffer) -> dict[str, Any]:
    """The fields with every tensor in the buffer, and every buffer that one."""
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and "view_offs" in value:
            value = {**value, "buffer": buffer.handle, "data": buffer.base + value["data"] % _SIZE}
        elif name == "remote_ptr":
            value = buffer.handle
        elif name in ("offset", "size"):
            value %= _SIZE
        elif name == "device":
            value = 0
        made[name] = value
    return made


def endure(context: Context, stream: DamagedStream) -> None:
    """Send the stream. AssertionError if the server hangs, or another client notices."""
    witness = context.connect("witness") if context.facts.concurrent else None
    kept = content(7, _SIZE)
    mine = None
    try:
        if witness is not None:
            mine = witness.alloc(_SIZE)
            witness.set(mine.whole(), kept[: mine.size])
        peer = context.connect("damaged")
        buffer = peer.alloc(_SIZE)
        data = b"".join(_encoded(peer, buffer, r, stream.placed) for r in stream.requests)
        for one in stream.damage:
            data = one.apply(data)
        peer.send_bytes(data, command="damaged bytes")
        peer.half_close()
        if not peer.closed_by_server():
            raise AssertionError("the client said that nothing more comes, and the server waits on")
        peer.close()
        if witness is not None and mine is not None:
            found = witness.get(mine.whole(), _SIZE)
            if found != kept:
                raise AssertionError("another client's data were changed")
            witness.close()
        context.connect("afterwards").close()
    except CaseEnded as error:
        raise AssertionError(str(error)) from None


def _encoded(peer: Peer, buffer: RemoteBuffer, request: DrawnRequest, placed: bool) -> bytes:
    fields = _placed(request.fields, buffer) if placed else request.fields
    return DrawnRequest(request.command, fields, request.body).encode(peer.dialect)
