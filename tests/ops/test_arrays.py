"""What references share, by itself."""

from __future__ import annotations

import numpy as np
import pytest

from rpc_server.ops import arrays
from rpc_server.ops.arrays import ArrayContext


@pytest.mark.parametrize("shape", [(1, 1, 3, 7), (1, 1, 1, 1000), (2, 3, 5, 31), (1, 1, 4, 64)])
@pytest.mark.parametrize("at_once", [1, 7, 64, 1 << 19])
@pytest.mark.parametrize("function", [np.add, np.multiply], ids=["add", "multiply"])
def test_pieces_make_what_one_go_makes(
    shape: tuple[int, ...], at_once: int, function: np.ufunc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: each step is rounded once, in the same order."""
    monkeypatch.setattr(arrays, "_ACCUMULATED_AT_ONCE", at_once)
    looks: list[None] = []
    x = np.random.default_rng(1).normal(1, 0.1, shape).astype(np.float32)
    expected = function.accumulate(x, axis=-1, dtype=np.float32)
    actual = ArrayContext(lambda: looks.append(None)).accumulate(function, x)
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == np.float32
    # Others have their turn between pieces.
    assert len(looks) >= x.size // max(at_once, shape[-1]) // 2


def test_nothing_is_accumulated_of_nothing() -> None:
    for shape in ((1, 1, 0, 5), (1, 1, 5, 0)):
        x = np.empty(shape, np.float32)
        assert ArrayContext().accumulate(np.add, x).shape == shape
