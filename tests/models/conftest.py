"""Model files that tests index, and an index whose steps the tests take themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from rpc_server.models.library import Models
from rpc_server.models.record import Records
from tests.client.test_gguf_file import write

Indexer = Callable[..., Models]


class PlainLanes:
    """Hashes without compiled kernels, row by row."""

    width = 3

    def __call__(self, rows: npt.NDArray[np.uint8], size: int, values: Sequence[int]) -> list[int]:
        return [fnv1a_64(row[:size].data, value) for row, value in zip(rows, values, strict=False)]


def settle(path: Path) -> Path:
    """Let a file look as if it was changed long ago, as far as a test can."""
    old = time.time() - 100
    os.utime(path, (old, old))
    return path


def write_model(path: Path, *sizes: int, seed: int = 1) -> dict[str, bytes]:
    """Write a file with a tensor of each of these sizes, in bytes; what they hold, by name."""
    random = np.random.default_rng(seed)
    content = {f"t{i}": random.bytes(size) for i, size in enumerate(sizes)}
    write(path, {n: (GgmlType.I8, (len(data),), data) for n, data in content.items()})
    settle(path)
    return content


@pytest.fixture(autouse=True)
def settled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be used as soon as it is written: tests don't wait for clocks."""
    monkeypatch.setattr("rpc_server.models.files.SETTLED_SECONDS", -1.0)


@pytest.fixture
def indexer(tmp_path: Path) -> Indexer:
    """Makes an index of paths, whose records are kept in the test's folder."""

    def make(*paths: Path, look: bool = True) -> Models:
        models = Models(paths, Records(tmp_path / "index" / "models"), PlainLanes)
        if look:
            models.refresh(PlainLanes())
        return models

    return make


def served(models: Models, data: bytes) -> bytes | None:
    """What a client gets that offers the hash of ``data``."""
    with models.open(fnv1a_64(data), len(data)) as content:
        place = bytearray(len(data))
        if content is None or not content.read(0, memoryview(place)):
            return None
        return bytes(place)
