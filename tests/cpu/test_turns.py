"""Turns on a device: who has used least is next, and nobody gives way where no one waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from rpc_server.devices.cpu.turns import SLICE, DeviceShare, Turns

_PATIENCE = 60.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Client(threading.Thread):
    """Has its turn on a thread of its own, and does there what it is told, step by step."""

    def __init__(self, turns: Turns, log: list[str], name: str) -> None:
        super().__init__(daemon=True, name=name)
        self.share = turns.share()
        self._turns = turns
        self._log = log
        self._waiting = turns.n_waiting

    def run(self) -> None:
        with self.share.turn():
            self._log.append(self.name)

    def queue(self) -> Client:
        """Start it, and return once it waits."""
        self.start()
        until(lambda: self._turns.n_waiting > self._waiting)
        return self


def until(reached: Callable[[], bool]) -> None:
    """Return once it is so; fail after long."""
    pause = threading.Event()
    for _ in range(int(_PATIENCE / 0.001)):
        if reached():
            return
        pause.wait(0.001)
    pytest.fail("was waited for in vain")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(clock)


def test_one_alone_is_never_told_to_pause(turns: Turns, clock: Clock) -> None:
    share = turns.share()
    with share.turn():
        clock.now += 100 * SLICE
        share.give_way()
        assert not turns.word.is_set
    assert share.used == pytest.approx(100 * SLICE)


def test_who_waits_has_it_after_a_slice_and_it_comes_back(turns: Turns, clock: Clock) -> None:
    log: list[str] = []
    share = turns.share()
    with share.turn():
        other = Client(turns, log, "other").queue()
        # Within the slice nothing happens, whatever it looks at.
        share.give_way()
        assert log == []
        clock.now += SLICE
        until(lambda: turns.word.is_set)
        share.give_way()
        log.append("back")
    other.join()
    assert log == ["other", "back"]


def test_a_long_job_does_not_keep_many_small_ones_waiting(turns: Turns, clock: Clock) -> None:
    """Of those that wait, all that have used less go first."""
    log: list[str] = []
    share = turns.share()
    with share.turn():
        others = [Client(turns, log, f"{i}").queue() for i in range(5)]
        clock.now += SLICE
        until(lambda: turns.word.is_set)
        share.give_way()
        log.append("long")
    for other in others:
        other.join()
    assert log == ["0", "1", "2", "3", "4", "long"]


def test_who_has_used_most_waits_longest(turns: Turns, clock: Clock) -> None:
    log: list[str] = []
    holder = turns.share()
    with holder.turn():
        heavy, light = Client(turns, log, "heavy"), Client(turns, log, "light")
        heavy.share.add(5.0)
        heavy.queue()
        light._waiting = turns.n_waiting
        light.queue()
        clock.now += SLICE
        until(lambda: turns.word.is_set)
        holder.give_way()
        # The heavy one has had more than this one too.
        log.append("holder")
    heavy.join()
    light.join()
    assert log == ["light", "holder", "heavy"]


def test_what_was_not_used_is_not_saved_up(turns: Turns, clock: Clock) -> None:
    """A client that did nothing for a long time begins where the others are, but for a slice."""
    idle, busy = turns.share(), turns.share()
    for _ in range(10):
        with busy.turn():
            clock.now += 1.0
    with busy.turn():
        assert busy.used == pytest.approx(10.0)
    with idle.turn():
        assert idle.order[0] == pytest.approx(10.0 - SLICE)


def test_what_is_waited_for_aside_is_not_used(turns: Turns, clock: Clock) -> None:
    """A plan that waits for a compiler has used what it took to make it."""
    share = turns.share()
    with share.turn():
        with share.aside():
            clock.now += 0.25
            with share.away():
                clock.now += 100.0
                # Whoever looks at its time meanwhile knows.
                assert share.waited(clock.now) == pytest.approx(100.0)
            clock.now += 0.5
        # Behind it a turn's own time counts again.
        clock.now += 0.125
    assert share.used == pytest.approx(0.875)
    assert share.waited(clock.now) == pytest.approx(100.0)


def test_clients_of_one_address_share_what_an_address_has(turns: Turns, clock: Clock) -> None:
    """Five that compute all the time have as much together as one of another address."""
    many, one = [turns.share("10.0.0.1") for _ in range(5)], turns.share("10.0.0.2")
    waiting = [*many, one]
    used = dict.fromkeys(range(6), 0.0)
    for _ in range(60):
        share = min(waiting, key=lambda s: s.order)
        with share.turn():
            clock.now += SLICE
        used[waiting.index(share)] += SLICE
    assert used[5] == pytest.approx(30 * SLICE)
    assert [used[n] for n in range(5)] == pytest.approx([6 * SLICE] * 5)


def test_a_new_client_of_a_busy_address_is_next_there(turns: Turns, clock: Clock) -> None:
    log: list[str] = []
    heavy = turns.share("10.0.0.1")
    with heavy.turn():
        clock.now += 5.0
    with heavy.turn():
        clock.now += SLICE
        other = Client(turns, log, "light")
        other.share = turns.share("10.0.0.1")
        other.queue()
        until(lambda: turns.word.is_set)
        heavy.give_way()
        log.append("heavy")
    other.join()
    assert log == ["light", "heavy"]


def test_who_is_away_lets_others_have_it_and_waits_for_its_turn_again(
    turns: Turns, clock: Clock
) -> None:
    log: list[str] = []
    share = turns.share()
    with share.turn():
        with share.away():
            clock.now += 3.0
            Client(turns, log, "other").run()
        log.append("back")
    assert log == ["other", "back"]
    assert share.used == 0.0
    assert share.waited(clock.now) == pytest.approx(3.0)


def test_who_has_no_turn_has_none_to_leave(turns: Turns) -> None:
    with turns.share().away():
        pass
    with turns.share().turn():
        pass


def test_waiting_is_counted_apart(turns: Turns, clock: Clock) -> None:
    share = turns.share()
    with share.turn():
        other = Client(turns, [], "other").queue()
        clock.now += 2.0
        assert other.share.waited(clock.now) == pytest.approx(2.0)
    other.join()
    assert other.share.waited(clock.now + 50.0) == pytest.approx(2.0)
    assert share.waited(clock.now) == 0.0


def test_turns_are_given_back_when_a_job_fails(turns: Turns) -> None:
    share = turns.share()
    with pytest.raises(ZeroDivisionError), share.turn():
        raise ZeroDivisionError
    with turns.share().turn():
        pass


def test_who_does_not_want_to_wait_has_it_only_if_nobody_else_does(
    turns: Turns, clock: Clock
) -> None:
    share, other = turns.share(), turns.share()
    done: list[str] = []

    def work() -> None:
        clock.now += SLICE / 4
        assert not share.at_once(lambda: done.append("beside it"))
        done.append("work")

    with share.turn():
        assert not other.at_once(work)
    assert other.at_once(work)
    assert done == ["work"]
    assert other.used == pytest.approx(SLICE / 4)
    with share.turn():
        pass


def test_who_took_it_at_once_does_not_wait_within_its_turn(turns: Turns, clock: Clock) -> None:
    log: list[str] = []
    share = turns.share()
    waiting: list[threading.Thread] = []

    def work() -> None:
        clock.now += 2 * SLICE
        waiting.append(Client(turns, log, "other").queue())
        turns.word.set()
        # Would be the other's turn, for as long as that takes.
        share.give_way()
        assert turns.held_by(share)

    assert share.at_once(work)
    waiting[0].join(_PATIENCE)
    assert log == ["other"]
    # Only that one turn was such a one.
    with share.turn():
        clock.now += 2 * SLICE
        last = Client(turns, log, "last").queue()
        turns.word.set()
        share.give_way()
        assert log[-1] == "last"
    last.join(_PATIENCE)


def test_many_clients_at_once_all_get_their_turns(turns: Turns, clock: Clock) -> None:
    """One has it at a time; nobody is forgotten, whoever looks at the clock for all."""
    inside = threading.Lock()
    done: list[DeviceShare] = []

    def work(share: DeviceShare) -> None:
        for _ in range(50):
            with share.turn():
                for _ in range(3):
                    assert inside.acquire(blocking=False)
                    clock.now += 0.4 * SLICE
                    inside.release()
                    share.give_way()
        done.append(share)

    shares = [turns.share() for _ in range(8)]
    threads = [threading.Thread(target=work, args=(s,), daemon=True) for s in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
    assert len(done) == len(shares)
