"""Weights from the disks of all parts: who has a model's file takes its slice from there.

A client offers a weight by the hash of all of it. Every worker is asked by that hash for its slice
(SPLIT_LOAD), and this server looks into its own files, for its share and for those of workers that
have none. What is left comes over the network: the client sends the weight, and only the parts that
lack something are sent theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from client.split.partition import Extent
from rpc_server.devices.base import DeviceError
from rpc_server.devices.split.sharded import Bytes, ShardedWeight
from rpc_server.models.library import Content, Models, Stripes

View = Callable[[], Bytes]

# What is read in one go on its way to a worker.
_PIECE = 16 << 20


class DeceivedError(DeviceError):
    """A client offered one content by its hash, and sent another."""


@dataclass(frozen=True, slots=True)
class OfferedWeight:
    """The offer of a weight, and the parts that have their slices of that content."""

    digest: int
    parts: frozenset[int]


@dataclass(frozen=True, slots=True)
class Disks:
    """The disks of a coordinator's parts; ``models`` are this server's own files."""

    models: Models | None = None

    async def load(self, digest: int, weight: ShardedWeight, view: View) -> frozenset[int]:
        """Fill in what parts have of a content on their disks; return the parts that have theirs.

        ``view`` is the weight's memory here, for this server's share. Raises WorkerLost.
        """
        extents: dict[int, list[Extent]] = {}
        for extent in weight.runs(0, weight.tensor.nbytes):
            extents.setdefault(extent.part, []).append(extent)
        loaded = {part for part in range(len(weight.cuts)) if part not in extents}

        async def ask(number: int, wanted: list[Extent]) -> None:
            part = weight.parts[number]
            if part is None or not part.worker.loads:
                return
            for extent in wanted:
                if not await part.worker.load(part.tensor, extent, digest, weight.tensor.nbytes):
                    return
            loaded.add(number)

        await asyncio.gather(*(ask(number, wanted) for number, wanted in extents.items()))
        missing = {n: wanted for n, wanted in extents.items() if n not in loaded}
        if missing and self.models is not None:
            with self.models.open(digest, weight.tensor.nbytes) as content:
                if content is not None:
                    await self._hand_out(content, weight, missing, view, loaded)
        return frozenset(loaded)

    async def _hand_out(
        self,
        content: Content,
        weight: ShardedWeight,
        missing: dict[int, list[Extent]],
        view: View,
        loaded: set[int],
    ) -> None:
        """Give parts their slices out of this server's file."""

        async def hand_out(number: int, wanted: list[Extent]) -> None:
            for extent in (piece for whole in wanted for piece in pieces_of(whole)):
                data = await asyncio.to_thread(_read, content, extent)
                if data is None:
                    return
                await _put(weight, number, extent, data, view)
            loaded.add(number)

        await asyncio.gather(*(hand_out(n, wanted) for n, wanted in missing.items()))


async def _put(weight: ShardedWeight, number: int, extent: Extent, data: Bytes, view: View) -> None:
    """Put bytes of a whole weight where a part has them. Raises WorkerLost."""
    part = weight.parts[number]
    if part is None:
        weight.here(extent, view(), 0)[...] = data.reshape(extent.count, extent.size)
    else:
        await part.worker.write(part.tensor, data.data, extent.at)


def _read(content: Content, extent: Extent) -> Bytes | None:
    data = np.empty(extent.count * extent.size, np.uint8)
    stripes = Stripes(extent.start, extent.size, extent.distance, extent.count)
    return data if content.read_slice(stripes, 0, data.data) else None


def pieces_of(extent: Extent) -> Iterator[Extent]:
    """Yield an extent in pieces that fit into memory."""
    if extent.count == 1:
        for at in range(0, extent.size, _PIECE):
            size = min(_PIECE, extent.size - at)
            yield replace(
                extent, at=extent.at + at, start=extent.start + at, size=size, distance=size
            )
        return
    step = max(_PIECE // extent.size, 1)
    for first in range(0, extent.count, step):
        yield replace(
            extent,
            at=extent.at + first * extent.size,
            start=extent.start + first * extent.distance,
            count=min(step, extent.count - first),
        )
