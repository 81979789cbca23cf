"""Hashes of several tensors side by side, and the pace at which they are made."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest

from protocol.ggml.hashing import fnv1a_64
from rpc_server.devices.cpu.hashing import CompiledLanes
from rpc_server.models.hashing import HashLanes, Pace, StoppedError, hash_places
from rpc_server.models.header import FilePlace
from tests.models.conftest import PlainLanes

SIZES = (1, 70, 3 << 20, 1 << 20, 5, (1 << 20) + 1, 40_000, 2 << 20, 8, 9, 10, 11, 12)


@pytest.mark.parametrize("lanes", [PlainLanes(), CompiledLanes()], ids=["plain", "compiled"])
def test_hashes_are_those_of_each_alone(lanes: HashLanes) -> None:
    data = np.random.default_rng(11).bytes(sum(SIZES) + 100)
    places, at = [], 100
    for i, size in enumerate(SIZES):
        places.append(FilePlace(f"t{i}", "I8", at, size))
        at += size
    counted: list[int] = []
    found = hash_places(io.BytesIO(data), places, lanes, counted.append)
    assert found == [fnv1a_64(data[p.offset : p.offset + p.size]) for p in places]
    assert sum(counted) == sum(SIZES)


def test_a_file_that_ends_early_is_no_hash() -> None:
    places = [FilePlace("t", "I8", 0, 100)]
    with pytest.raises(EOFError):
        hash_places(io.BytesIO(bytes(99)), places, PlainLanes(), lambda n: None)


def burn() -> float:
    """Use some time of the processor; how much."""
    begun = time.thread_time()
    while time.thread_time() - begun < 0.01:
        pass
    return time.thread_time() - begun


def test_work_is_a_small_share_while_clients_compute() -> None:
    count = 0
    slept: list[float] = []

    def sleep(seconds: float) -> bool:
        slept.append(seconds)
        return False

    pace = Pace(lambda: count, sleep)
    pace.rest()
    burn()
    pace.rest()
    assert slept == [0.0, 0.0], "nobody computes: no pause"
    count += 1
    spent = burn()
    pace.rest()
    # Of the time that this takes as a whole, work is less than 5%.
    assert spent < 0.05 * (spent + slept[-1])


def test_work_ends_when_it_is_no_longer_wanted() -> None:
    pace = Pace(lambda: 0, lambda seconds: True)
    with pytest.raises(StoppedError):
        pace.rest()
