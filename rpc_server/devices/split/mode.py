"""Chooses between rows and whole blocks of a layer (--split-mode auto), and says why.

All parts compute as much in either. What tells the two apart is what a token waits for: exchanges
with this server, sums that linked parts add up among themselves, and the bytes of both. That
follows from the model's shape, the shares, and the round trip and bandwidth of each worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from client.errors import AllocationFailed, ConnectionLost
from client.model_header import ModelShape, WeightProduct
from client.split.address import OwnCard
from client.split.advice import Arrangement, Box, exchanges, is_linked, predict, swaps
from client.split.survey import measure_handling, measure_upload
from client.tensors import ShapeError
from protocol.errors import ProtocolError
from protocol.ggml.types import GgmlType
from rpc_server.devices.split.worker import PREPARE_TIMEOUT, Worker, WorkerLost

log = logging.getLogger(__name__)

Mode = Literal["row", "tensor"]
_MODES: tuple[Mode, ...] = ("row", "tensor")
# Positions in the KV cache that a model is to have room for.
CONTEXT = 4096
# What a box reads in a second, where only the network is looked at: the same in both modes.
_ANY_RATE = 10e9
# The bandwidth of a worker that has no room to measure it, bytes a second.
_SLOW_LINK = 0.12e9

# What is decided by where nobody says which model it is for: 7 billion weights of 4 bits, in 32
# layers, which is what formulas and defaults elsewhere go by.
_PRODUCTS = (
    WeightProduct(GgmlType.Q4_0, 4096, 4096, 4 * 32),
    WeightProduct(GgmlType.Q4_0, 4096, 11008, 2 * 32),
    WeightProduct(GgmlType.Q4_0, 11008, 4096, 32),
    WeightProduct(GgmlType.Q4_0, 4096, 32000, 1),
)
_WEIGHTS = int(sum(p.nbytes * p.count for p in _PRODUCTS))
TYPICAL = ModelShape(
    name="a 7B model at 4 bits", layers=32, width=4096, ffn_width=11008, heads=32,
    kv_heads=32, head_width=128, vocabulary=32000, weight_bytes=_WEIGHTS, token_bytes=_WEIGHTS,
    cache_bytes=2 * 32 * 32 * 256, products=_PRODUCTS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Way:
    """The waits of a token in a mode: ``seconds`` of ``exchanges`` here, and of sums among parts.

    ``missing`` are the bytes by which the model doesn't fit, 0 or less where it does.
    """

    mode: Mode
    exchanges: int
    sums: int
    seconds: float
    missing: int

    @property
    def words(self) -> str:
        """The waits in words, for the log."""
        one = f"{self.exchanges} exchange{'s' * (self.exchanges != 1)}"
        sums = f" and {self.sums} sums among the parts" if self.sums else ""
        return f"{one}{sums}, {self.seconds * 1e3:.2f} ms on the network"


def way(
    shape: ModelShape,
    boxes: Sequence[Box],
    arrangement: Arrangement,
    mode: Mode,
    shares: Sequence[float],
) -> Way:
    """Return what a token waits for where the parts of ``arrangement`` work in a mode."""
    used = [boxes[i] for i in arrangement.parts]
    made = Arrangement(mode, arrangement.parts, arrangement.coordinator)
    found = predict(shape, boxes, made, context=CONTEXT, shares=shares)
    linked = is_linked(mode, used)
    return Way(
        mode,
        exchanges(shape, mode, shares, linked=linked),
        swaps(shape) if linked else 0,
        found.terms["round trips"] + found.terms["network"],
        found.missing,
    )


def told(
    shape: ModelShape, boxes: Sequence[Box], arrangement: Arrangement, shares: Sequence[float]
) -> str:
    """Return why an arrangement is in its mode and not in the other, for the log."""
    made = {mode: way(shape, boxes, arrangement, mode, shares) for mode in _MODES}
    mode: Mode = "row" if arrangement.kind == "row" else "tensor"
    other: Mode = "tensor" if mode == "row" else "row"
    return f"a token takes {made[mode].words}; {other} would take {made[other].words}"


def choose(
    shape: ModelShape | None, home: Box, workers: Sequence[Box | None], shares: Sequence[float]
) -> Mode:
    """Return the mode in which a token waits for less, and log why.

    ``workers`` are by part, None for the share of ``home``; ``shares`` are in proportion. Where no
    model is named, a typical one decides, whose memory tells nothing.
    """
    whole = sum(shares)
    shares = [share / whole if whole else 1 / len(shares) for share in shares]
    boxes = [home, *(box for box in workers if box is not None)]
    if not min(shares) > 0:
        # Parts without a share have nothing to add.
        boxes = [replace(box, links=False) for box in boxes]
    places = iter(range(1, len(boxes)))
    parts = tuple(0 if box is None else next(places) for box in workers)
    arrangement = Arrangement("row", parts, 0)
    found = [way(shape or TYPICAL, boxes, arrangement, mode, shares) for mode in _MODES]
    if shape is None:
        found = [replace(w, missing=0) for w in found]
    best, other = sorted(found, key=lambda w: (max(w.missing, 0), w.seconds))
    lacks = other.missing > max(best.missing, 0)
    log.info(
        "--split-mode auto: %s for %s: a token takes %s; %s would %s",
        best.mode,
        shape.name if shape is not None else f"{TYPICAL.name}, as no model was named",
        best.words,
        other.mode,
        f"lack {other.missing >> 20} MiB" if lacks else f"take {other.words}",
        extra={"event": "split_mode_chosen"},
    )
    if best.mode == "tensor":
        log.info("--split-mode row gives the results of one server to the bit")
    return best.mode


async def measure_network(worker: Worker, *, linked: bool) -> Box:
    """Return a worker as a box of which the network is measured. Raises WorkerLost.

    ``linked`` says whether parts are to add up sums among themselves if they can.
    """
    try:
        async with asyncio.timeout(PREPARE_TIMEOUT):
            handling = await measure_handling(worker.backend.connection)
            try:
                link = await measure_upload(worker.backend)
            except (AllocationFailed, ShapeError):
                link = _SLOW_LINK
    except TimeoutError:
        raise WorkerLost(f"worker {worker.name}: not measured in time") from None
    except (ConnectionLost, ProtocolError) as error:
        raise WorkerLost(f"worker {worker.name}: {error}") from None
    card = OwnCard.parse(worker.name)
    return Box(
        worker.name, worker.free, _ANY_RATE, _ANY_RATE, worker.round_trip, link,
        handling=handling, links=linked and not worker.no_links and card is None,
        card="" if card is None else card.name,
    )  # fmt: skip


def home_box(free: int) -> Box:
    """Return this machine as a box with so many bytes free."""
    return Box("local", free, _ANY_RATE, _ANY_RATE, 0.0, float("inf"), links=True)
