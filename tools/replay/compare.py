"""Whether a server's answer is the recorded one, and where it is not, what is different."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protocol.codec import codec
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.observe.events import MessageKind, ObservedMessage
from protocol.split import ProgramPayload

# Chosen by the server: only whether there is one is compared.
_CHOSEN = frozenset({"remote_ptr", "base_ptr"})
# Properties of the machine that a server runs on, and of its backend.
_MACHINE = frozenset(
    {"free_mem", "total_mem", "max_size", "alignment", "remote_size", "alloc_size", "conn_caps"}
)
_NOT_COMPARED = frozenset({Command.HELLO, Command.DEVICE_COUNT, Command.SPLIT_STATUS})
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """``text`` says what is different, empty if nothing is; ``nmse`` of data compared as F32."""

    text: str = ""
    nmse: float | None = None

    @property
    def equal(self) -> bool:
        return not self.text


def nmse(expected: np.ndarray, actual: np.ndarray) -> float:  # type: ignore[type-arg]
    """Return the squared error over the squares of what is expected.

    It is infinite where one isn't finite.
    """
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return float("inf")
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return float("inf")
    wanted = expected[finite].astype(np.float64)
    error = float(np.square(actual[finite] - wanted).sum())
    power = float(np.square(wanted).sum())
    if error == 0:
        return 0.0
    return error / power if power else float("inf")


def compare(
    recorded: ObservedMessage,
    live: bytes,
    tolerance: float = 0.0,
    program: ProgramPayload | None = None,
) -> Comparison:
    """Compare a recorded answer with the bytes of another, without their sizes.

    F32 data may differ by an NMSE of ``tolerance``, other data by nothing. ``program`` is that of
    the outputs of a SPLIT_RUN.
    """
    expected = bytes(recorded.body or b"") if recorded.body_size else b""
    if recorded.kind is MessageKind.OUTPUTS:
        return _compare_data(expected, live, _outputs_are_f32(recorded, program), tolerance)
    if recorded.command is Command.GET_TENSOR:
        request = recorded.request
        f32 = request is not None and request.fields.tensor.type == GgmlType.F32
        return _compare_data(expected, live, f32, tolerance)
    if recorded.command in _NOT_COMPARED:
        return Comparison()
    return _compare_fields(recorded, live)


class Pieces:
    """A stream as it was recorded and as it came, piece by piece, cut anywhere."""

    def __init__(self) -> None:
        self._recorded, self._live = bytearray(), bytearray()

    def add(self, recorded: bytes, live: bytes, f32: bool, tolerance: float) -> Comparison:
        """Compare two pieces of one length, as far as they are whole numbers; as compare() does."""
        self._recorded += recorded
        self._live += live
        n = len(self._recorded) // 4 * 4 if f32 else len(self._recorded)
        found = _compare_data(bytes(self._recorded[:n]), bytes(self._live[:n]), f32, tolerance)
        del self._recorded[:n], self._live[:n]
        return found


def _compare_fields(recorded: ObservedMessage, live: bytes) -> Comparison:
    declaration = recorded.spec.response
    if len(live) != codec(declaration).size:
        return Comparison(f"{len(live)} bytes instead of {codec(declaration).size}")
    other = codec(declaration).parse(live)
    different: list[str] = []
    for field in declaration.subcons:
        if not field.name or field.name in _MACHINE:
            continue
        wanted, found = getattr(recorded.fields, field.name), getattr(other, field.name)
        if field.name in _CHOSEN:
            wanted, found = bool(wanted), bool(found)
        if wanted != found:
            different.append(f"{field.name} is {found}, recorded: {wanted}")
    return Comparison(", ".join(different))


def _compare_data(expected: bytes, live: bytes, f32: bool, tolerance: float) -> Comparison:
    if len(expected) != len(live):
        return Comparison(f"{len(live)} bytes instead of {len(expected)}")
    if not f32 or len(expected) % 4:
        return _compare_bytes(expected, live)
    wanted, found = np.frombuffer(expected, "<f4"), np.frombuffer(live, "<f4")
    if expected == live:
        return Comparison(nmse=0.0)
    error = nmse(wanted, found)
    if error <= tolerance:
        return Comparison(nmse=error)
    at = np.flatnonzero(wanted.view("<u4") != found.view("<u4"))
    shown = ", ".join(f"[{i}] {found[i]:.8g} for {wanted[i]:.8g}" for i in at[:_SHOWN])
    more = ", ..." if len(at) > _SHOWN else ""
    return Comparison(
        f"{len(at)} of {len(wanted)} values differ, NMSE {error:.3g}: {shown}{more}", error
    )


def _compare_bytes(expected: bytes, live: bytes) -> Comparison:
    if expected == live:
        return Comparison()
    wanted, found = np.frombuffer(expected, np.uint8), np.frombuffer(live, np.uint8)
    at = np.flatnonzero(wanted != found)
    shown = ", ".join(f"[{i}] {found[i]:#04x} for {wanted[i]:#04x}" for i in at[:_SHOWN])
    more = ", ..." if len(at) > _SHOWN else ""
    return Comparison(f"{len(at)} of {len(wanted)} bytes differ: {shown}{more}")


def _outputs_are_f32(recorded: ObservedMessage, program: ProgramPayload | None) -> bool:
    if program is None:
        return False
    types = dict(zip(program.tensors["id"].tolist(), program.tensors["type"].tolist(), strict=True))
    step = program.steps[recorded.step - 1]
    return all(types[i] == GgmlType.F32 for i in step.outputs)
