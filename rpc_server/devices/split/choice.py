"""Chooses what a coordinator splits over by measuring what there is (--split auto).

Candidates are servers that are named and those that announce themselves; each is asked and timed
as ``python -m tools.workers --model`` does it, and so is this machine. The best arrangement that
this server can make is taken, by the formula of docs/split.md. Who does not answer, fails on the
way, or computes something else than this machine does is left out, with a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from client.discovery import find_servers
from client.model_header import ModelShape
from client.split.address import ServerAddress
from client.split.advice import Arrangement, Box, Prediction, advise
from client.split.balance import usable
from client.split.survey import (
    Candidate,
    Credentials,
    measure_boxes,
    survey_all,
    targets_of,
)
from rpc_server.devices.base import DeviceError
from rpc_server.devices.cpu.device import CpuDevice
from rpc_server.devices.split.candidates import AutoSplit
from rpc_server.devices.split.measure import HomeSample
from rpc_server.devices.split.mode import CONTEXT, TYPICAL, Mode, told

log = logging.getLogger(__name__)

_FIND_SECONDS = 3.0
_OTHERS_TOLD = 2
_LOCAL = "local"

# Of the memory of all together, how much an unknown model may take.
_FILLED = 0.75


@dataclass(frozen=True, slots=True)
class SplitChoice:
    """Parts as --split names them (None is this machine), their shares, and the mode.

    No parts: this machine alone is the best.
    """

    parts: tuple[ServerAddress | None, ...]
    shares: tuple[float, ...]
    mode: Mode


async def candidates(
    auto: AutoSplit, wanted: Callable[[ServerAddress], bool]
) -> list[ServerAddress]:
    """Return the addresses to be asked; of those that are announced the ``wanted`` ones.

    Raises MissingPackageError, OSError as Browser does.
    """
    found = []
    if auto.announced:
        log.info("--split auto: looking for servers on the network for %g s", _FIND_SECONDS)
        # Whether two are one server is found out when they are asked.
        found = [t for t in targets_of(await find_servers(_FIND_SECONDS)) if wanted(t)]
    return list(dict.fromkeys([*auto.named, *found]))


class Chooser:
    """Measurements, and what is chosen by them. Made by :meth:`measure`."""

    def __init__(
        self,
        auto: AutoSplit,
        shape: ModelShape | None,
        modes: Iterable[Mode],
        boxes: Sequence[Box],
        targets: Sequence[ServerAddress],
    ) -> None:
        """``boxes`` begin with this machine's; ``targets`` are the addresses of the others."""
        self._auto = auto
        self._shape = shape
        self._modes = tuple(modes)
        self._boxes = list(boxes)
        self._targets = {t.endpoint: t for t in targets}

    @classmethod
    async def measure(
        cls,
        auto: AutoSplit,
        targets: Sequence[ServerAddress],
        shape: ModelShape | None,
        modes: Iterable[Mode],
        threads: int | None,
        credentials: Credentials,
        *,
        linked: bool = True,
    ) -> Chooser:
        """Ask and time all; ``linked`` says whether parts are to add up sums among themselves.

        Raises AllocationFailed where this machine has no room to measure.
        """
        reports = [
            replace(r, error=r.error or ("splits over others itself" if r.parts else ""))
            for r in await survey_all(targets, measured=False, credentials=credentials)
        ]
        log.info(
            "--split auto: measuring this machine and %d servers",
            sum(not report.error for report in reports),
        )
        device = CpuDevice(threads)
        measured_as = shape or TYPICAL
        sample = HomeSample(device, measured_as)
        try:
            free, _ = device.memory()
            home = Candidate(_LOCAL, "", free, sample, float("inf"), links=True)
            measured = await measure_boxes(reports, measured_as, credentials, home)
        finally:
            sample.close()
            device.close()
        for endpoint, reason in measured.unusable.items():
            log.warning("--split auto: %s is left out: %s", endpoint, reason)
        for box in measured.boxes:
            log.info(
                "--split auto: %s: %.1f GB/s of weights, %.0f us away, %.1f GiB free",
                box.endpoint,
                box.decode / 1e9,
                box.round_trip * 1e6,
                box.free / (1 << 30),
            )
        boxes = [replace(box, links=box.links and linked) for box in measured.boxes]
        return cls(auto, shape, modes, boxes, [r.target for r in reports])

    def leave_out(self, endpoint: str, reason: str) -> None:
        """Choose from now on without this server."""
        log.warning("--split auto: %s is left out: %s", endpoint, reason)
        self._boxes = [box for box in self._boxes if box.endpoint != endpoint]

    def choose(self) -> SplitChoice:
        """Return the best arrangement, and log why. Raises DeviceError if there is none."""
        shape = self._shape or _typical_of(self._boxes)
        found = [p for p in advise(shape, self._boxes, context=CONTEXT, at=0) if self._may(p)]
        if not found:
            raise DeviceError("--split auto: no server can be used, and this machine is to have no "
                              "share ('local' is not among the names)")  # fmt: skip
        best = found[0]
        self._explain(shape, found)
        arrangement = best.arrangement
        if arrangement.kind not in ("row", "tensor"):
            return SplitChoice((), (), "row")
        parts = [None if not i else self._targets[self._boxes[i].endpoint]
                 for i in arrangement.parts]  # fmt: skip
        return SplitChoice(tuple(parts), best.shares, arrangement.kind)

    def _may(self, prediction: Prediction) -> bool:
        """Return whether it is among what was asked for."""
        arrangement = prediction.arrangement
        if 0 in arrangement.parts and not self._auto.local:
            return False
        return arrangement.kind == "alone" or arrangement.kind in self._modes

    def _explain(self, shape: ModelShape, found: Sequence[Prediction]) -> None:
        best = found[0]
        whose = shape.name if self._shape is not None else f"{shape.name}, as no model was named"
        log.info(
            "--split auto: %s: %.1f tokens/s predicted for %s, limited by %s",
            self._words(best.arrangement, best.shares),
            best.tokens_per_second,
            whose,
            best.limit,
            extra={"event": "split_chosen"},
        )
        if best.arrangement.kind in ("row", "tensor"):
            log.info("--split auto: %s", told(shape, self._boxes, best.arrangement, best.shares))
        for other in found[1 : 1 + _OTHERS_TOLD]:
            reason = "" if other.fits else f", but {other.missing >> 20} MiB are missing"
            log.info(
                "--split auto: instead of %s: %.1f tokens/s, limited by %s%s",
                self._words(other.arrangement, other.shares),
                other.tokens_per_second,
                other.limit,
                reason,
            )
        if not best.fits:
            log.warning("--split auto: nothing fits; the nearest lacks %d MiB", best.missing >> 20)

    def _words(self, arrangement: Arrangement, shares: Sequence[float]) -> str:
        if arrangement.kind == "alone":
            return "this machine alone"
        names = [
            f"{self._boxes[i].endpoint} ({share:.0%})"
            for i, share in zip(arrangement.parts, shares, strict=True)
        ]
        return f"{arrangement.kind} over {', '.join(names)}"


def _typical_of(boxes: Sequence[Box]) -> ModelShape:
    """Return the typical model, no larger than all boxes together have room for."""
    room = int(_FILLED * sum(usable(box.free) for box in boxes))
    return replace(TYPICAL, weight_bytes=max(1, min(TYPICAL.weight_bytes, room)))
