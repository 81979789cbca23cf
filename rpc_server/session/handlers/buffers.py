"""Requests about devices and whole buffers."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.commands import Command
from protocol.requests import Request
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import tensor_of_message
from rpc_server.session.buffers import OutOfMemoryError
from rpc_server.session.handlers.base import Handler, device_index
from rpc_server.session.handlers.tensors import fill
from rpc_server.session.state import Session


def _device_count(s: Session, request: Request) -> None:
    s.answer(request.command, {"device_count": len(s.context.budgets)})


def _get_alignment(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    s.answer(request.command, {"alignment": device.alignment})


def _get_max_size(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    s.answer(request.command, {"max_size": device.max_size})


def _get_device_memory(s: Session, request: Request) -> None:
    index = device_index(s, request)
    if s.context.releasing:
        s.wait(_memory_later(s, request, index))
        return
    _answer_memory(s, request, index)


def _answer_memory(s: Session, request: Request, index: int) -> None:
    free, total = s.buffers.memory(index)
    s.answer(request.command, {"free_mem": free, "total_mem": total})


async def _memory_later(s: Session, request: Request, index: int) -> None:
    await s.context.released()
    _answer_memory(s, request, index)


def _get_alloc_size(s: Session, request: Request) -> None:
    device = s.device(device_index(s, request))
    tensor = tensor_of_message(request.fields.tensor, s.dialect)
    size = device.alloc_size(tensor)
    if size >> 64:
        raise GraphError(f"tensor '{tensor.name}' takes {size} bytes, more than the answer can say")
    s.answer(request.command, {"alloc_size": size})


def _alloc_buffer(s: Session, request: Request) -> None:
    allocate(s, request, ())


def allocate(
    s: Session, request: Request, proportions: Sequence[float], *, patient: bool = True
) -> None:
    """Answer with a new buffer, or that there is no room for it.

    ``patient``: first wait for memory that is on its way back, if there is none else.
    """
    index = device_index(s, request)
    size: int = request.fields.size
    try:
        buffer = s.buffers.allocate(index, size, proportions)
    except OutOfMemoryError as error:
        if patient and s.context.releasing:
            # Of a client that has left, say: soon there may be room.
            s.wait(_allocate_later(s, request, proportions))
            return
        s.allocation_failed(size, error)
        s.answer(request.command, {"remote_ptr": 0, "remote_size": 0})
        return
    s.log.debug("buffer %#x of %d bytes", buffer.handle, size)
    s.update_buffer_stats()
    s.answer(request.command, {"remote_ptr": buffer.handle, "remote_size": size})


async def _allocate_later(s: Session, request: Request, proportions: Sequence[float]) -> None:
    await s.context.released()
    allocate(s, request, proportions, patient=False)


def _buffer_get_base(s: Session, request: Request) -> None:
    buffer = s.buffers.get(request.fields.remote_ptr)
    s.answer(request.command, {"base_ptr": buffer.base})


def _free_buffer(s: Session, request: Request) -> None:
    buffer = s.buffers.take(request.fields.remote_ptr)
    # Plans hold addresses of the buffer: none of them may be run again.
    for plans in s.plans:
        plans.clear()
    s.programs.buffer_freed(request.fields.remote_ptr)
    s.update_buffer_stats()
    # Who asks for memory waits until that is done; clients that free all and leave don't.
    s.context.release([buffer])
    s.answer_empty(request.command)


def _buffer_clear(s: Session, request: Request) -> None:
    buffer = s.buffers.get(request.fields.remote_ptr)
    fill(s, request.command, buffer, 0, buffer.size, request.fields.value)


HANDLERS: dict[int, Handler] = {
    Command.DEVICE_COUNT: _device_count,
    Command.GET_ALIGNMENT: _get_alignment,
    Command.GET_MAX_SIZE: _get_max_size,
    Command.GET_DEVICE_MEMORY: _get_device_memory,
    Command.GET_ALLOC_SIZE: _get_alloc_size,
    Command.ALLOC_BUFFER: _alloc_buffer,
    Command.BUFFER_GET_BASE: _buffer_get_base,
    Command.FREE_BUFFER: _free_buffer,
    Command.BUFFER_CLEAR: _buffer_clear,
}
