"""A card's own instructions without a card: NVRTC compiles, nvdisasm prints, loops are counted."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rpc_server.devices.cuda.compile import options_for
from rpc_server.devices.cuda.kernels import Unit
from tests.cuda import nvrtc

# What a line of nvdisasm's begins an instruction with; on old cards two may stand in braces.
_INSTRUCTION = re.compile(r"(?:\{\s*)?/\*[0-9a-f]{4,}\*/\s+(.*?)\s*(?:;|\}|\(\*)")
_LABEL = re.compile(r"(\.L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*?(\.L_\w+)")


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: how many instructions there are before it, and what it has of each sort.

    Before it are those of the shortest way there; branches of cards before 7.0 by a stack (SYNC,
    BRK) are taken for none.
    """

    before: int
    instructions: int
    loads: int
    # Products of bytes, or of 16 bits where a card has no others; by tensor cores also of floats.
    products: int


def _programs() -> Iterator[str]:
    """Yield every nvdisasm that is here: newer ones don't know older cards."""
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from map(str, sorted(Path(folder).glob("**/bin/nvdisasm")))
    if found := shutil.which("nvdisasm"):
        yield found


@functools.cache
def programs() -> tuple[str, ...]:
    """Return the disassemblers that are installed."""
    return tuple(_programs())


@functools.cache
def _listing(unit: Unit, arch: int) -> str:
    """Return a unit's instructions as text; empty where no disassembler here knows the card."""
    code = nvrtc.code_for(unit.text, unit.label, arch, options_for(arch, unit.source))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        for program in programs():
            done = subprocess.run([program, "-c", file.name], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout:
                return done.stdout
    return ""


def loops(unit: Unit, kernel: str, arch: int) -> list[Loop] | None:
    """Return a kernel's loops in their order; None where no disassembler here knows the card."""
    listing = _listing(unit, arch)
    if not listing:
        return None
    body = re.search(rf"\n\.text\.{kernel}:\n(.*?)(?=\n\.text\.|\n//-----|\Z)", listing, re.DOTALL)
    assert body is not None, f"no {kernel} in {unit.label}"
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in body[1].splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line.strip()):
            instructions.append(found[1])
    distance = _distances(instructions, labels)
    result = []
    for number, text in enumerate(instructions):
        branch = _BRANCH.search(text)
        if branch and labels.get(branch[1], number + 1) <= number:
            start = labels[branch[1]]
            inside = instructions[start : number + 1]
            result.append(
                Loop(
                    distance.get(start, start),
                    len(inside),
                    sum(bool(re.search(r"\bLDG?\.", x)) for x in inside),
                    sum(bool(re.search(r"\b(IDP|XMAD|IMMA|HMMA)\b", x)) for x in inside),
                )
            )
    return result


def _distances(instructions: list[str], labels: dict[str, int]) -> dict[int, int]:
    """Return how many instructions at least run before each that is reached."""
    distance, waiting = {0: 0}, [0]
    # Every step costs one: those that were reached first are nearest.
    for number in waiting:
        text = instructions[number]
        branch = _BRANCH.search(text)
        always = not text.startswith("@")
        following = [labels[branch[1]]] if branch and branch[1] in labels else []
        if not (always and (following or "EXIT" in text)):
            following.append(number + 1)
        for other in following:
            if other < len(instructions) and other not in distance:
                distance[other] = distance[number] + 1
                waiting.append(other)
    return distance
