"""Where requests begin in a stream that is joined in its middle."""

from __future__ import annotations

import random

import pytest

from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect
from protocol.observe.resync import finder, guess_dialect
from tests.protocol.turns import request, tensor_fields

NEWEST = DIALECTS[0]


def upload(dialect: Dialect, size: int = 64, ne: int = 16) -> bytes:
    """A SET_TENSOR of ``size`` bytes to a tensor of ``ne`` F32."""
    fields = {
        "tensor": tensor_fields(dialect, "blk.0.attn_q.weight", (ne, 1, 1, 1)),
        "offset": 0,
        "cache_flag": 0,
    }
    return request(dialect, Command.SET_TENSOR, fields, bytes(size))[1]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_a_request_is_found_behind_the_rest_of_another(dialect: Dialect) -> None:
    rest = bytes(range(1, 200))
    assert finder(dialect).find(rest + upload(dialect)) == (len(rest), True)


def test_a_beginning_that_is_cut_is_kept_for_more_bytes() -> None:
    rest, whole = bytes(range(1, 200)), upload(NEWEST)
    for cut in (9, 40, 200):
        at, sure = finder(NEWEST).find(rest + whole[:cut])
        assert at <= len(rest)
        assert not sure


def test_nothing_begins_in_noise(seed: int) -> None:
    noise = random.Random(seed).randbytes(1 << 16)
    at, sure = finder(NEWEST).find(noise)
    assert not sure
    assert at > len(noise) - 1024


def test_a_tensor_that_the_upload_does_not_fit_is_no_beginning() -> None:
    at, sure = finder(NEWEST).find(upload(NEWEST, size=64, ne=8))
    assert (at, sure) != (0, True)


def test_the_dialect_is_one_in_which_something_begins() -> None:
    for dialect in DIALECTS:
        guessed = guess_dialect(bytes(77) + upload(dialect))
        assert guessed is not None
        assert guessed.tensor_size == dialect.tensor_size
    assert guess_dialect(bytes(1000)) is None


def test_a_finder_is_made_once_for_each_dialect() -> None:
    assert finder(NEWEST) is finder(NEWEST)
    assert finder(NEWEST).dialect is NEWEST
