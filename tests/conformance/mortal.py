"""A tiny server for tests of the suite: enough to be probed, and with a way to go wrong.

``python -m tests.conformance.mortal PORT FAULT``, where FAULT is what a second HELLO does: ``die``
ends the process, ``hang`` leaves it unanswered and open, ``ignore`` goes on as if it were right.
It has one buffer a client, and doesn't do what it doesn't answer, but for SET_TENSOR.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer

_FRAME = struct.Struct("<BQ")
_COMMANDS = DIALECTS[0].commands
_BASE = 4096
_VALUES = {
    "major": 7, "minor": 0, "patch": 0, "conn_caps": bytes(24), "device_count": 1,
    "alignment": 32, "max_size": 1 << 30, "remote_ptr": 1, "remote_size": 1 << 20,
    "base_ptr": _BASE, "alloc_size": 1 << 20, "result": 0, "free_mem": 1, "total_mem": 1 << 30,
}  # fmt: skip


def _read(client: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        piece = client.recv(n - len(data))
        if not piece:
            raise ConnectionError
        data += piece
    return data


def _serve(client: socket.socket, fault: str) -> None:
    greeted = False
    buffer = bytearray(1 << 20)
    try:
        while True:
            number, size = _FRAME.unpack(_read(client, _FRAME.size))
            if number not in _COMMANDS or size > 2 << 20:
                return
            payload = _read(client, size)
            if not greeted and (number != Command.HELLO or len(payload) != 24):
                return
            if greeted and number == Command.HELLO:
                if fault == "die":
                    print("fatal error: HELLO twice", flush=True)
                    os._exit(3)
                if fault == "hang":
                    threading.Event().wait()
            greeted = True
            spec = _COMMANDS[Command(number)]
            head = codec(spec.request)
            body = b""
            if number in (Command.SET_TENSOR, Command.GET_TENSOR):
                fields = head.parse(payload)
                start = fields.tensor.data - _BASE + fields.offset
                if number == Command.SET_TENSOR:
                    buffer[start : start + size - head.size] = payload[head.size :]
                else:
                    body = bytes(buffer[start : start + fields.size])
            if spec.answer is Answer.FIXED:
                body = codec(spec.response).build(_VALUES)
            if spec.answer is not Answer.NEVER:
                client.sendall(len(body).to_bytes(8, "little") + body)
    except ConnectionError:
        pass
    finally:
        client.close()


def main(port: int, fault: str) -> None:
    """Serve until killed, a thread a client."""
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            client, _ = server.accept()
            threading.Thread(target=_serve, args=(client, fault), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
