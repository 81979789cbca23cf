"""Sends and receives by themselves, for devices whose plans are no records: a call each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import library, stream_receive, stream_send
from rpc_server.devices.cpu.kernels.interface.abi import EXTRA_WORD, RECORD_WORDS
from rpc_server.devices.cpu.kernels.interface.stream import STATUS_TEXT, StreamPeer
from rpc_server.devices.cpu.kernels.interface.sync import AGAIN
from rpc_server.devices.cpu.streaming.transfer import Receive, Send
from rpc_server.devices.cpu.turns import PauseWord
from rpc_server.graph.errors import GraphError
from rpc_server.native.routine import CompileError

# Through ctypes, which lets go of the GIL.
_CALL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)


class DirectTransfer:
    """A send or a receive to be called, as often as one likes.

    Once the word ``pause`` is set, one that would have to wait ends. Waits for the compiled code;
    raises GraphError if there is none.
    """

    def __init__(self, transfer: Send | Receive, pause: PauseWord) -> None:
        kernel = transfer.kernel
        try:
            self._call = _CALL(kernel.address)
        except CompileError as error:
            raise GraphError(f"{transfer.label}: no compiled {kernel.label}: {error}") from None
        words = transfer.words(pause.address)
        self._record = np.zeros(RECORD_WORDS, np.int64)
        self._record[EXTRA_WORD : EXTRA_WORD + len(words)] = words
        self._address = int(self._record.ctypes.data)
        # What the record holds addresses of.
        self._transfer = transfer
        self._pause = pause

    def __call__(self) -> None:
        """Do it on the calling thread. Raises GraphError, which names the peer."""
        status = self._call(self._address, 0, 1)
        if not status:
            return
        if status == AGAIN:
            raise GraphError("was stopped")
        text = STATUS_TEXT.get(status, f"kernel status {status}")
        raise GraphError(f"{self._transfer.label}: {text}")


class DirectTransfers:
    """HostTransfers of one program, whose stream is ``peer``'s."""

    def __init__(self, peer: StreamPeer) -> None:
        self._peer = peer
        self._pause = PauseWord()
        # Compiled beside what its maker does meanwhile.
        library().request((stream_send, stream_receive))

    def receiver(self, t: Tensor, address: int, size: int) -> DirectTransfer:
        """Return what receives ``size`` bytes for ``t`` to ``address``. Raises GraphError."""
        return DirectTransfer(Receive(self._peer, t, address, size, 1, size), self._pause)

    def sender(self, tensors: Sequence[Tensor], address: int, size: int) -> DirectTransfer:
        """Return what sends ``size`` bytes of ``tensors`` from ``address``. Raises GraphError."""
        return DirectTransfer(Send(self._peer, tensors, address, size), self._pause)

    def stop(self) -> None:
        """End what waits for the peer, for good; from any thread."""
        self._pause.set()
