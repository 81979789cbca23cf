"""Requests about the bytes of tensors, all but the upload itself (``uploads.py``)."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

from protocol.commands import Command
from protocol.requests import Request
from rpc_server.devices.base import Storage
from rpc_server.graph.parse import tensor_of_message
from rpc_server.session import by_hash
from rpc_server.session.buffers import Buffer
from rpc_server.session.handlers.base import Handler
from rpc_server.session.state import Session
from rpc_server.turns import in_pieces

# How llama.cpp names its logits, a row of F32 for each token: for figures alone.
_LOGITS = b"result_output"


def _set_tensor_hash(s: Session, request: Request) -> None:
    by_hash.begin(s, request)


def _init_tensor(s: Session, request: Request) -> None:
    # Our devices keep nothing beside a tensor's data and pad nothing.
    tensor_of_message(request.fields.tensor, s.dialect)
    s.answer_empty(request.command)


def _memset_tensor(s: Session, request: Request) -> None:
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, fields.size)
    fill(s, request.command, buffer, start, fields.size, fields.value)


def fill(s: Session, command: Command, buffer: Buffer, start: int, size: int, value: int) -> None:
    """Set bytes of a buffer, and answer."""
    storage = buffer.storage
    if storage.is_remote(start, size):
        s.wait(_overwrite(s, command, storage, start, size, value))
        return
    if size <= storage.at_once:
        storage.fill(start, size, value)
        s.answer_empty(command)
        return
    work = in_pieces(lambda at, n: storage.fill(start + at, n, value), size, wanted=s.present)
    s.wait(_after(work, s, command, {}))


async def _after(
    work: concurrent.futures.Future[None], s: Session, command: Command, answer: dict[str, Any]
) -> None:
    await asyncio.wrap_future(work)
    s.answer(command, answer)


async def _overwrite(
    s: Session, command: Command, storage: Storage, start: int, size: int, value: int
) -> None:
    await storage.overwrite(start, size, value)
    s.answer_empty(command)


def _get_tensor(s: Session, request: Request) -> None:
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, fields.size)
    if fields.tensor.name.startswith(_LOGITS) and fields.tensor.ne[0]:
        s.stats.tokens += fields.size // (4 * fields.tensor.ne[0])
    if buffer.storage.is_remote(start, fields.size):
        s.wait(_read_back(s, buffer, start, fields.size))
        return
    s.send_bytes(buffer.storage.view(start, fields.size))


async def _read_back(s: Session, buffer: Buffer, start: int, size: int) -> None:
    s.send_bytes(await buffer.storage.read(start, size))
    await s.drained()


def _copy_tensor(s: Session, request: Request) -> None:
    fields = request.fields
    tensor = tensor_of_message(fields.src, s.dialect)
    src, src_start = s.locate(fields.src, 0, tensor.nbytes)
    dst, dst_start = s.locate(fields.dst, 0, tensor.nbytes)
    to, source = dst.storage, src.storage
    if to.can_copy(source):
        s.wait(_copy_there(s, request, to, source, (src_start, dst_start, tensor.nbytes)))
        return
    places = ((source, src_start), (to, dst_start))
    apart = src.device != dst.device
    if apart or any(storage.is_remote(at, tensor.nbytes) for storage, at in places):
        # llama.cpp then copies through itself.
        s.answer(request.command, {"result": 0})
        return
    if tensor.nbytes <= to.at_once:
        to.copy_from(source, src_start, dst_start, tensor.nbytes)
        s.answer(request.command, {"result": 1})
        return
    work = in_pieces(
        lambda at, n: to.copy_from(source, src_start + at, dst_start + at, n),
        tensor.nbytes,
        # Where the two overlap, bytes are read before others are written over them.
        backwards=to is source and src_start < dst_start,
        wanted=s.present,
    )
    s.wait(_after(work, s, request.command, {"result": 1}))


async def _copy_there(
    s: Session, request: Request, to: Storage, source: Storage, span: tuple[int, int, int]
) -> None:
    await to.copy(source, *span)
    s.answer(request.command, {"result": 1})


HANDLERS: dict[int, Handler] = {
    Command.SET_TENSOR_HASH: _set_tensor_hash,
    Command.INIT_TENSOR: _init_tensor,
    Command.MEMSET_TENSOR: _memset_tensor,
    Command.GET_TENSOR: _get_tensor,
    Command.COPY_TENSOR: _copy_tensor,
}
