"""The CUDA sources: where they are, and what they are compiled with.

A source is compiled by NVRTC for the card at its first use, by CuPy, which keeps the result on disk
(``~/.cupy/kernel_cache``). Nothing but this package is needed for it: no CUDA toolkit, no headers.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from rpc_server.devices.cuda.tables import tables_header

# Package data: kernels (.cu) and what they share (.cuh).
SOURCES = Path(__file__).parent / "sources"

OPTIONS = ("--std=c++17",)
# GTX 10 and P40 keep nothing of global memory in the cache of a multiprocessor unless they are told
# to; the columns of products, and what neighbouring lanes read of a row, are read again and again.
_CACHED = "--ptxas-options=-dlcm=ca"
_TOLD_TO_CACHE = (61, 62)
# Attention reads keys and values once, and with that option ptxas gives some of its kernels fewer
# registers than they need.
_READ_ONCE = "attention"

# The compute capabilities that users have, P100 to RTX 50: what kernels must compile for.
ARCHITECTURES = (60, 61, 70, 75, 80, 86, 89, 90, 100, 120)

_INCLUDE = re.compile(r'#include "([^"]+)"')


def options_for(capability: int, source: str) -> tuple[str, ...]:
    """Return what a source is compiled with for a card of this capability (61 for 6.1)."""
    cached = capability in _TOLD_TO_CACHE and not source.startswith(_READ_ONCE)
    return (*OPTIONS, _CACHED) if cached else OPTIONS


def source_names() -> list[str]:
    """Return the names of all sources, without their ending."""
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def joined(path: Path) -> str:
    """Return one text of a source and all that it includes, so that a compiler needs no folder."""
    seen: set[str] = set()

    def read(file: Path) -> str:
        if file.name in seen:
            return ""
        seen.add(file.name)
        text = tables_header() if file.name == "tables.cuh" else file.read_text()
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            if found := _INCLUDE.fullmatch(line):
                # Messages name the file and the line that people can look at.
                lines.append(read(SOURCES / found[1]) + f'#line {number + 1} "{file.name}"')
            elif line != "#pragma once":
                lines.append(line)
        return f'#line 1 "{file.name}"\n' + "\n".join(lines) + "\n"

    return read(path)


@functools.cache
def source_text(name: str) -> str:
    """Return what is compiled of the source with this name."""
    return joined(SOURCES / f"{name}.cu")
