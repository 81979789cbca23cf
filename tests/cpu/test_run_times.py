"""RunTimes: all threads or half of them, by how long runs take; no clock but the test's."""

from __future__ import annotations

from rpc_server.devices.cpu.run_times import RunTimes

# Seconds of a run of all threads, and those of them that these wait for one another.
QUIET = (0.006, 0.0003)
BUSY = (0.020, 0.014)


class Runs:
    """Runs of one program on a machine on which these take their time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.times = RunTimes()

    def do(self, seconds: float, both: tuple[float, float], half: float) -> list[bool]:
        """Run for so long; which of the runs half of the threads did."""
        end, ways = self.now + seconds, list[bool]()
        while self.now < end:
            way = self.times.half(self.now)
            took, waited = (half, 0.0) if way else both
            self.now += took
            self.times.note(way, took, waited, self.now)
            ways.append(way)
        return ways


def test_nothing_is_tried_where_threads_hardly_wait() -> None:
    assert not any(Runs().do(10.0, QUIET, half=0.001))


def test_one_interruption_is_none() -> None:
    runs = Runs()
    runs.do(1.0, QUIET, half=0.010)
    runs.times.note(False, 0.010, 0.004, runs.now)
    assert not any(runs.do(1.0, QUIET, half=0.010))


def test_half_where_that_is_faster_and_all_again_once_it_is_quiet() -> None:
    runs = Runs()
    runs.do(1.0, QUIET, half=0.010)
    ways = runs.do(10.0, BUSY, half=0.010)
    assert sum(ways) > 0.9 * len(ways)
    # Within the longest time between two tries.
    runs.do(2.1, QUIET, half=0.010)
    assert not any(runs.do(5.0, QUIET, half=0.010))


def test_all_where_half_are_no_faster() -> None:
    ways = Runs().do(20.0, BUSY, half=0.021)
    assert 2 <= sum(ways) < 0.1 * len(ways)


def test_long_runs_are_rarely_tried() -> None:
    """Parts of work may be unequal by themselves, and threads wait for the longest."""
    ways = Runs().do(200.0, (0.4, 0.2), half=0.5)
    assert 2 <= sum(ways) < 0.1 * len(ways)


def test_a_change_of_what_is_faster_is_noticed() -> None:
    runs = Runs()
    assert not runs.do(5.0, BUSY, half=0.030)[-1]
    runs.do(2.1, BUSY, half=0.010)
    ways = runs.do(5.0, BUSY, half=0.010)
    assert sum(ways) > 0.9 * len(ways)


def test_what_is_over_in_no_time_is_not_judged() -> None:
    assert not any(Runs().do(0.5, (0.0004, 0.0003), half=0.0001))
