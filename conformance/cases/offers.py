"""4.110 to 4.118: SET_TENSOR_HASH: content that the server may have."""

from __future__ import annotations

import os

from conformance.cases.groups import TENSORS
from conformance.suite import Context, Peer, tensor
from conformance.suite.filled import check_content, filled
from conformance.suite.probe import CACHED_FROM, cacheable, fnv_of_zeros
from conformance.suite.refusals import Refusal, declare
from protocol.commands import Command
from protocol.ggml.types import GgmlType

_SERVER = "ggml-rpc.cpp rpc_server::"


def _cached(c: Context, peer: Peer) -> tuple[bytes, int]:
    """Content that is in the server's cache from here on, and its hash."""
    content, digest = cacheable(c.dialect, os.urandom(64))
    buffer = peer.alloc(len(content))
    peer.set(buffer.leaf(1, (len(content),), type=GgmlType.I8), content, cache_flag=1)
    peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    # Neither request need have an answer: what is asked next has one, and comes after them.
    peer.ping()
    return content, digest


@TENSORS.case(110, source=f"{_SERVER}set_tensor_hash (get_cached_file), since 1.0")
def hash_that_is_not_known(c: Context) -> None:
    """The client then uploads the data.

    Sends: SET_TENSOR_HASH of content that the server never had
    Expects: result 0, and the tensor is as before
    """
    peer, buffer, content = filled(c)
    digest = int.from_bytes(os.urandom(8), "little")
    result = peer.call(Command.SET_TENSOR_HASH, tensor=buffer.whole(), hash=digest).result
    c.equal(result, 0, "the result")
    check_content(c, peer, buffer, content)


@TENSORS.case(111, source=f"{_SERVER}set_tensor_hash, since 1.0", cache=True, deadline=60.0)
def hash_that_is_known(c: Context) -> None:
    """The result 1 is a promise: the client won't send the data.

    Sends: SET_TENSOR of content to be cached, then SET_TENSOR_HASH for another tensor
    Expects: result 1, and the other tensor has the content
    """
    peer = c.connect()
    content, digest = _cached(c, peer)
    buffer = peer.alloc(len(content) + 64)
    peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=0x11)
    leaf = buffer.leaf(1, (len(content),), at=32, type=GgmlType.I8)
    c.equal(peer.call(Command.SET_TENSOR_HASH, tensor=leaf, hash=digest).result, 1, "the result")
    found = peer.get(buffer.whole(), len(content) + 64)
    c.equal(found[32:-32], content, "the tensor")
    c.equal(found[:32] + found[-32:], b"\x11" * 64, "what lies around it")


@TENSORS.case(
    112, source=f"{_SERVER}set_tensor: the cache is files, since 1.0", cache=True, deadline=60.0
)
def hash_known_from_another_connection(c: Context) -> None:
    """A model that is loaded again is not uploaded again; that is what the cache is for.

    Sends: content to be cached on one connection, SET_TENSOR_HASH on the next
    Expects: result 1, and the tensor has the content
    """
    first = c.connect()
    content, digest = _cached(c, first)
    first.close()
    peer = c.connect()
    buffer = peer.alloc(len(content))
    leaf = buffer.leaf(1, (len(content),), type=GgmlType.I8)
    c.equal(peer.call(Command.SET_TENSOR_HASH, tensor=leaf, hash=digest).result, 1, "the result")
    c.equal(peer.get(leaf, len(content)), content, "the tensor")


@TENSORS.case(
    113,
    source=f"{_SERVER}set_tensor_hash ('out of buffer bounds'), since 1.0",
    cache=True,
    hostile=True,
    deadline=60.0,
)
def hash_of_content_that_does_not_fit(c: Context) -> None:
    """How long the content is only the server knows: it has to look before it writes.

    Sends: SET_TENSOR_HASH of cached content for a buffer that is one byte shorter
    Expects: result 0 or the connection is closed; nothing is written
    """
    peer = c.connect()
    content, digest = _cached(c, peer)
    buffer = peer.alloc(len(content) - 1)
    leaf = buffer.leaf(1, (len(content) - 1,), type=GgmlType.I8)
    offset = buffer.size - (len(content) - 1)
    peer.send(Command.SET_TENSOR_HASH, tensor={**leaf, "data": buffer.base + offset}, hash=digest)
    outcome = peer.outcome(Command.SET_TENSOR_HASH)
    if not outcome.closed:
        c.equal(outcome.answer.result, 0, "the result")


@TENSORS.case(115, source=f"{_SERVER}set_tensor (cache_dir && cache_flag), since 7.0", cache=True)
def content_that_is_not_to_be_kept(c: Context) -> None:
    """Activations and prompts must not end up in files.

    Sends: SET_TENSOR with cache_flag 0, then SET_TENSOR_HASH of the same content
    Expects: result 0
    """
    request = c.dialect.commands[Command.SET_TENSOR].request
    if "cache_flag" not in {field.name for field in request.subcons}:
        c.skip("protocols before 7.0 have no cache_flag")
    peer = c.connect()
    content, digest = cacheable(c.dialect, os.urandom(64))
    buffer = peer.alloc(len(content))
    leaf = buffer.leaf(1, (len(content),), type=GgmlType.I8)
    peer.set(leaf, content, cache_flag=0)
    c.equal(peer.call(Command.SET_TENSOR_HASH, tensor=leaf, hash=digest).result, 0, "the result")


@TENSORS.case(
    118,
    source=f"{_SERVER}set_tensor_hash, fnv_hash over all bytes, since 1.0",
    cache=True,
    deadline=60.0,
)
def hash_of_large_content(c: Context) -> None:
    """The weights that are offered by hash have over 10 MiB: all of their bytes count.

    Sends: content of 10 MiB and some bytes to be cached, then SET_TENSOR_HASH of it, and of content
        that differs in its last byte only
    Expects: result 1 and the content; result 0
    """
    peer = c.connect()
    tail = os.urandom(64)
    content = bytes(CACHED_FROM + 1) + tail
    buffer = peer.alloc(len(content))
    leaf = buffer.leaf(1, (len(content),), type=GgmlType.I8)
    peer.set(leaf, content, cache_flag=1)
    for last, known in ((tail[-1], 1), (tail[-1] ^ 1, 0)):
        digest = fnv_of_zeros(CACHED_FROM + 1, tail[:-1] + bytes([last]))
        peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=0x11)
        result = peer.call(Command.SET_TENSOR_HASH, tensor=leaf, hash=digest).result
        c.equal(result, known, f"the result for {'its' if known else 'another'} hash")
        if known:
            c.equal(peer.get(leaf, len(content)), content, "the tensor")


def _none_or_closed(c: Context, peer: Peer, row: Refusal) -> None:
    """Judge: nothing was put there, or the connection has ended."""
    outcome = peer.outcome(Command.SET_TENSOR_HASH)
    if not outcome.closed:
        c.equal(outcome.answer.result, 0, "the result")


declare(
    TENSORS,
    [
        Refusal(
            116, "hash-behind-its-buffer",
            "SET_TENSOR_HASH that would start behind the end of its buffer",
            lambda c, peer: peer.send(
                Command.SET_TENSOR_HASH, tensor=peer.alloc(64).whole(), offset=1 << 40, hash=1
            ),
            why="Where the content is not known, nothing is to be written either.",
            source=f"{_SERVER}set_tensor_hash ('out of buffer bounds'), since 1.0",
        ),
        Refusal(
            117, "hash-for-no-buffer", "SET_TENSOR_HASH for a tensor without a buffer",
            lambda c, peer: peer.send(Command.SET_TENSOR_HASH, tensor=tensor(1, (64,)), hash=1),
            why="There is nowhere to put the content.",
            source=f"{_SERVER}set_tensor_hash, since 1.0",
        ),
    ],
    expects="result 0 or the connection is closed",
    judge=_none_or_closed,
)  # fmt: skip
