"""Finds out what a server is: its version, devices, whether it serves several clients."""

from __future__ import annotations

import os

from conformance.suite.context import Context, Facts
from conformance.suite.errors import Closed, Failed, NoAnswer
from conformance.suite.peer import Peer
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect, Version, compatible_dialects
from protocol.ggml.hashing import FNV_OFFSET, FNV_PRIME, fnv1a_64
from protocol.ggml.ops import Op, UnaryOp
from protocol.ggml.types import GgmlType
from protocol.messages import MAX_PARAM_WORDS
from protocol.split import VERSION

# Up to protocol 6 a server keeps what is larger than this; from 7 on the client says.
CACHED_FROM = 10 << 20
# A second client that got no answer in this time, and none in as long after the first one got
# another, waits for that to leave.
_CONCURRENCY_PATIENCE = 1.0


class NotUnderstood(Exception):  # noqa: N818 - what happened
    """The server speaks no version that is known here, or not the one that was asked for."""


def find_dialect(address: tuple[str, int], patience: float) -> tuple[Dialect, Version]:
    """Find the dialect of the version that the server answers HELLO with, newest HELLO first.

    Raises NotUnderstood, OSError.
    """
    reasons = []
    for size in sorted({d.hello_size for d in DIALECTS}, reverse=True):
        candidates = [d for d in DIALECTS if d.hello_size == size]
        peer = Peer(address, candidates[0], patience=patience)
        try:
            theirs = peer.hello()
            found = next((d for d in candidates if _speaks(d, theirs)), None)
            if found is not None:
                peer.speak(found)
                peer.ping()
                return found, theirs
            reasons.append(f"a HELLO of {size} bytes is answered {_name(theirs)}, not known here")
        except (Closed, NoAnswer, Failed) as error:
            reasons.append(f"a HELLO of {size} bytes: {error}")
        finally:
            peer.close()
    raise NotUnderstood("; ".join(reasons))


def _speaks(dialect: Dialect, theirs: Version) -> bool:
    return theirs[0] == dialect.version[0] and dialect.version <= theirs


def _name(version: Version) -> str:
    return ".".join(map(str, version))


def probe(address: tuple[str, int], dialect: Dialect | None, patience: float) -> Facts:
    """Find out what the server is; ``dialect`` is what to speak, found out if None.

    Raises NotUnderstood, Failed, OSError.
    """
    theirs: Version = (0, 0, 0)
    if dialect is None:
        dialect, theirs = find_dialect(address, patience)
    context = Context(address, Facts(theirs, dialect), seconds=60.0, patience=patience)
    try:
        peer = context.connect()
        devices = 1
        if Command.DEVICE_COUNT in dialect.commands:
            devices = peer.call(Command.DEVICE_COUNT).device_count
        cache = devices > 0 and _has_cache(peer)
        if devices:
            introduce_numbering(peer)
        concurrent = _is_concurrent(address, peer, patience)
        version = peer.version
        split = 0
        if dialect.hello_size:
            asked = context.connect(split=True)
            split = min(asked.split_version, VERSION)
        return Facts(version, dialect, devices, concurrent, cache, split)
    finally:
        context.close()


def introduce_numbering(peer: Peer) -> None:
    """Compute a graph that makes sense by the peer's numbering of ops alone.

    A server of several releases can't know from small graphs which one it has before it, and must
    not guess; one that serves a single release computes it as any other.
    """
    if len(compatible_dialects(peer.dialect)) == 1:
        return
    buffer = peer.alloc(256)
    x = buffer.leaf(1, (32,))
    params = [int(UnaryOp.NEG), *[0] * (MAX_PARAM_WORDS - 1)]
    peer.compute([buffer.node(2, (32,), Op.UNARY, 1, at=128, op_params=params)], [x])
    peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)


def _is_concurrent(address: tuple[str, int], first: Peer, patience: float) -> bool:
    """Return whether a second client is answered while the ``first`` is connected.

    This closes the first.
    """
    second = Peer(address, first.dialect, patience=patience)
    try:
        second.send(Command.HELLO)
        waits = _is_kept_waiting(second, first)
        if waits:
            # Hanging up on a server that is about to answer can be the end of it: its turn comes
            # now.
            first.close()
        second.answer(Command.HELLO)
        second.ping()
        return not waits
    finally:
        first.close()
        second.close()


def _is_kept_waiting(second: Peer, first: Peer) -> bool:
    """Return whether the ``second`` client isn't answered while the ``first`` is."""
    if not second.silent(_CONCURRENCY_PATIENCE):
        return False
    # A server that others keep off the processors lets the first one wait as well.
    first.ping()
    return second.silent(_CONCURRENCY_PATIENCE)


def cacheable(dialect: Dialect, tail: bytes) -> tuple[bytes, int]:
    """Return content that a server with a cache keeps when told to, and its hash.

    ``tail`` (below 256 bytes) makes it unlike other content.
    """
    asks = "cache_flag" in {f.name for f in dialect.commands[Command.SET_TENSOR].request.subcons}
    zeros = 0 if asks else CACHED_FROM + 1
    return bytes(zeros) + tail, fnv_of_zeros(zeros, tail)


def fnv_of_zeros(zeros: int, tail: bytes) -> int:
    """Return FNV-1a 64 of so many zeros and ``tail``."""
    # Of zeros it only multiplies.
    value = FNV_OFFSET * pow(FNV_PRIME, zeros, 1 << 64) & 0xFFFFFFFFFFFFFFFF
    return fnv1a_64(tail, value)


def _has_cache(peer: Peer) -> bool:
    content, digest = cacheable(peer.dialect, os.urandom(64))
    buffer = peer.alloc(len(content))
    whole = buffer.leaf(1, (len(content),), type=GgmlType.I8)
    peer.set(whole, content, cache_flag=1)
    found = peer.call(Command.SET_TENSOR_HASH, tensor=whole, offset=0, hash=digest).result
    peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    return bool(found)
