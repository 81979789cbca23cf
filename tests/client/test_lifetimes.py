"""Places for tensors that are needed one after the other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from client.split.lifetimes import Lifetime, place_lifetimes

lifetimes = st.builds(
    lambda size, first, length: Lifetime(size, first, first + length),
    st.integers(0, 5000),
    st.integers(0, 40),
    st.integers(0, 15),
)


@given(st.lists(lifetimes, max_size=40))
def test_nothing_lies_over_what_is_in_use(wanted: list[Lifetime]) -> None:
    offsets, total = place_lifetimes(wanted)
    for i, one in enumerate(wanted):
        assert offsets[i] % 128 == 0
        assert offsets[i] + one.size <= total
        for j, other in enumerate(wanted[:i]):
            if one.first <= other.last and other.first <= one.last:
                apart = offsets[i] + one.size <= offsets[j] or offsets[j] + other.size <= offsets[i]
                assert apart, (one, other)


def test_what_is_over_makes_room() -> None:
    """A chain of a hundred tensors, each made of the one before, takes room for two."""
    offsets, total = place_lifetimes([Lifetime(1024, i, i + 1) for i in range(100)])
    assert total == 2048
    assert set(offsets) == {0, 1024}
