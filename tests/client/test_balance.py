"""Shares by time: what the arithmetic promises, for any servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.split.balance import Speed, alike, balanced, shares_by_time
from client.split.partition import partition


def times(
    shares: list[float], speeds: list[float], latencies: list[float], work: float
) -> list[float]:
    """How long each part takes."""
    return [
        late + share * work / speed
        for share, speed, late in zip(shares, speeds, latencies, strict=True)
    ]


def test_by_speed_alone() -> None:
    assert balanced([10e9, 5e9]) == pytest.approx([2 / 3, 1 / 3])
    assert balanced([7.0]) == [1.0]
    assert balanced([0.0, 3.0, 1.0]) == pytest.approx([0, 0.75, 0.25])


def test_machines_that_are_the_same_are_cut_alike() -> None:
    assert alike([20.0, 10.0, 22.0, 11.0]) == [21.0, 10.5, 21.0, 10.5]
    # What is between two groups belongs to the slower one, while that is near.
    assert alike([10.0, 11.9, 14.0]) == pytest.approx([10.95, 10.95, 14.0])
    assert alike([0.0, 3.0]) == [0.0, 3.0]
    assert alike([]) == []


def test_who_answers_late_gets_less() -> None:
    assert balanced([10e9, 10e9], latencies=[0, 1e-3], work=20e6) == pytest.approx([0.75, 0.25])
    # Done by the other before the first byte is there.
    assert balanced([10e9, 10e9], latencies=[0, 1e-3], work=9e6) == [1.0, 0.0]


def test_nobody_gets_more_than_fits() -> None:
    got = balanced([8.0, 1.0, 1.0], limits=[0.5, 5.0, 1.0])
    assert got == pytest.approx([0.5, 0.25, 0.25])
    assert balanced([1.0, 1.0], limits=[0.2, 0.8]) == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(
    ("speeds", "more"),
    [
        ([], {}),
        ([0.0, 0.0], {}),
        ([1.0], {"latencies": [1.0, 2.0]}),
        ([1.0], {"work": 0}),
        ([-1.0, 2.0], {}),
        ([float("nan")], {}),
        ([float("inf")], {}),
        ([1.0, 1.0], {"limits": [0.4, 0.5]}),
    ],
)
def test_figures_that_are_none(speeds: list[float], more: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"speed|may take"):
        balanced(speeds, **more)  # type: ignore[arg-type]


parts = st.lists(
    st.tuples(st.floats(1e6, 1e12), st.floats(0, 0.1), st.floats(0.3, 2.0)),
    min_size=4,
    max_size=16,
)


@given(parts, st.floats(1e3, 1e10))
def test_all_are_done_at_the_same_time(
    figures: list[tuple[float, float, float]], work: float
) -> None:
    speeds, latencies, limits = (list(column) for column in zip(*figures, strict=True))
    shares = balanced(speeds, latencies=latencies, work=work, limits=limits)
    assert sum(shares) == pytest.approx(1)
    taken = times(shares, speeds, latencies, work)
    end = max(t for t, share in zip(taken, shares, strict=True) if share)
    # A float's last digits of a latency may be many bytes of work.
    slack = 1e-6 * end
    for share, limit, took in zip(shares, limits, taken, strict=True):
        assert share <= limit * (1 + 1e-9)
        if not share:
            # Its latency alone takes as long.
            assert took >= end - slack
        elif share < limit * (1 - 1e-6):
            assert took == pytest.approx(end, abs=slack)


@given(parts, st.floats(1e3, 1e10))
def test_never_slower_than_by_speed_alone(
    figures: list[tuple[float, float, float]], work: float
) -> None:
    speeds, latencies, _ = (list(column) for column in zip(*figures, strict=True))
    shares = balanced(speeds, latencies=latencies, work=work)
    taken = times(shares, speeds, latencies, work)
    end = max(t for t, share in zip(taken, shares, strict=True) if share)
    plain = times([s / sum(speeds) for s in speeds], speeds, latencies, work)
    assert end <= max(plain) * (1 + 1e-9)


def test_shares_are_proportions_for_a_cut() -> None:
    fast, slow = Speed(20e9, 1e-4, 1e9), Speed(5e9, 2e-4, 1e8)
    shares = shares_by_time([fast, slow])
    assert shares[0] > shares[1] > 0
    rows = partition(4096, shares)
    assert sum(map(len, rows)) == 4096


def test_a_slow_link_costs() -> None:
    near, far = Speed(10e9, 1e-4, 10e9), Speed(10e9, 1e-4, 1e6)
    assert far.rate() < near.rate() <= 10e9
    assert far.latency() > near.latency() >= 1e-4
