"""Tensors that were uploaded, into files: the bytes as they were sent, and an index of them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol.commands import Command
from protocol.observe.annotate import tensor_bytes, text_of, type_text
from protocol.observe.conversation import Event, MessageKind, ObservedMessage
from tools.capture.connections import CapturedConnection
from tools.capture.errors import CaptureError
from tools.dump.filters import Filters

INDEX = "index.json"
_LONGEST = 150
# Bytes of a tensor that are believed.
_LARGEST = 1 << 44
# Copies that llama.cpp makes of inputs for a device: DEVICE#TENSOR#NUMBER.
_INPUT = re.compile(r"#.+#\d+$")


@dataclass(slots=True)
class Extracted:
    """A tensor that was uploaded: ``pieces`` are the ranges of bytes that were seen of it."""

    name: str
    type: str
    ne: list[int]
    nb: list[int]
    nbytes: int
    file: str | None
    connection: int
    pieces: list[tuple[int, int]] = field(default_factory=list)
    hash: str | None = None

    @property
    def complete(self) -> bool:
        at = 0
        for start, end in sorted(self.pieces):
            if start > at:
                return False
            at = max(at, end)
        return at >= self.nbytes

    def as_object(self) -> dict[str, Any]:
        shown = {name: getattr(self, name) for name in ("name", "type", "ne", "nb")}
        shown |= {"bytes": self.nbytes, "file": self.file, "complete": self.complete}
        return {**shown, "connection": self.connection, "hash": self.hash}


class Extractor:
    """Writes the weights: what a client uploads before the first graph of its connection, and by
    its name is no input of graphs.

    ``sink`` is for the decoder. A tensor that the server had in its cache has no bytes on the wire;
    the index has its hash. Raises CaptureError where nothing can be written.
    """

    def __init__(self, folder: Path, filters: Filters) -> None:
        self._folder = folder
        self._filters = filters
        self.tensors: dict[tuple[str, str, tuple[int, ...]], Extracted] = {}
        self.bytes = 0
        self._names: set[str] = {INDEX}
        # How many have a name, as far as files may have it.
        self._numbers: dict[str, int] = {}
        self._computing: set[int] = set()
        self._open: tuple[Path, int] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CaptureError(f"{folder}: {error.strerror}") from None

    # -- what the decoder says ------------------------------------------------------------------

    def opened(self, connection: CapturedConnection) -> None:
        pass

    def closed(self, connection: CapturedConnection) -> None:
        self._computing.discard(connection.number)

    def event(self, connection: CapturedConnection, event: Event) -> None:
        if not isinstance(event, ObservedMessage) or not self._filters.wants(connection):
            return
        if event.command in (Command.GRAPH_COMPUTE, Command.SPLIT_RUN):
            self._computing.add(connection.number)
        elif event.command is Command.SET_TENSOR_HASH and event.kind is MessageKind.ANSWER:
            request = event.request
            known = event.fields is not None and event.fields.result
            if known and request is not None and self._filters.shows(request):
                entry = self._entry(connection.number, request.fields.tensor)
                if entry is not None:
                    entry.hash = f"{request.fields.hash:016x}"

    def sink(
        self,
        connection: CapturedConnection,
        message: ObservedMessage,
        at: int,
        data: bytes | bytearray | memoryview,
    ) -> None:
        """Take bytes of the data of a message, at ``at`` in it."""
        if (
            message.command is not Command.SET_TENSOR
            or connection.number in self._computing
            or not self._filters.wants(connection)
            or not self._filters.shows(message)
        ):
            return
        fields = message.fields
        entry = self._entry(connection.number, fields.tensor)
        if entry is None or fields.offset + message.body_size > entry.nbytes:
            return
        start = fields.offset + at
        self._write(entry, start, data)
        end = start + len(data)
        if entry.pieces and entry.pieces[-1][1] == start:
            entry.pieces[-1] = entry.pieces[-1][0], end
        else:
            entry.pieces.append((start, end))
        self.bytes += len(data)

    # -- files ----------------------------------------------------------------------------------

    def finish(self) -> Path:
        """Write the index; where it is."""
        self._close()
        path = self._folder / INDEX
        objects = [entry.as_object() for entry in self.tensors.values()]
        path.write_text(json.dumps({"tensors": objects}, indent=1) + "\n")
        return path

    def _entry(self, connection: int, tensor: Any) -> Extracted | None:
        size = tensor_bytes(tensor)
        # Strides may say anything; offsets in files have 63 bits, and disks fewer.
        if size is None or size > _LARGEST:
            return None
        name = text_of(tensor.name)
        if not self._filters.tensors and _INPUT.search(name):
            return None
        key = name, type_text(tensor.type), tuple(tensor.ne)
        entry = self.tensors.get(key)
        if entry is None:
            entry = self.tensors[key] = Extracted(
                name, key[1], list(tensor.ne), list(tensor.nb), size, None, connection
            )
        return entry

    def _write(self, entry: Extracted, at: int, data: bytes | bytearray | memoryview) -> None:
        if entry.file is None:
            entry.file = self._file_name(entry.name)
            (self._folder / entry.file).write_bytes(b"")
        path = self._folder / entry.file
        try:
            if self._open is None or self._open[0] != path:
                self._close()
                self._open = path, os.open(path, os.O_WRONLY)
            os.pwrite(self._open[1], data, at)
        except OSError as error:
            raise CaptureError(f"{path}: {error.strerror}") from None

    def _file_name(self, name: str) -> str:
        """A name that no path can be made of, and that nothing else has."""
        plain = re.sub(r"[^A-Za-z0-9._#-]", "_", name).lstrip(".")[:_LONGEST] or "tensor"
        # Of thousands that are alike each would try all the numbers before it.
        n = self._numbers.get(plain, 0) + 1
        found = f"{plain}.bin" if n == 1 else f"{plain}~{n}.bin"
        while found in self._names:
            n += 1
            found = f"{plain}~{n}.bin"
        self._numbers[plain] = n
        self._names.add(found)
        return found

    def _close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None
