"""A job between two threads: stopped while its graph is planned, or while it runs."""

from __future__ import annotations

from typing import Any

import pytest

from rpc_server.limits import LimitReached
from rpc_server.session.job import Job


class Queue:
    """What jobs ask of theirs."""

    def waited(self, now: float) -> float:
        return 0.0


class Plan:
    """Counts what is done with it."""

    shared = False

    def __init__(self) -> None:
        self.done: list[str] = []

    def run(self) -> None:
        self.done.append("run")

    def stop(self) -> None:
        self.done.append("stop")


@pytest.fixture
def job() -> Any:
    queue: Any = Queue()
    return Job(queue, 1)


def test_a_stop_ends_planning_and_what_is_run_after_it(job: Any) -> None:
    error = LimitReached("--graph-timeout", "took too long")
    job.begin()
    assert not job.stop_word[0]
    job.stop(error)
    assert job.stop_word[0]
    assert job.error is error
    plan = Plan()
    job.go(plan)
    assert plan.done == ["stop", "run"]


def test_a_stop_reaches_the_plan_that_runs(job: Any) -> None:
    plan = Plan()
    job.go(plan)
    job.stop()
    assert plan.done == ["run", "stop"]


def test_what_others_share_goes_on_without_its_client(job: Any) -> None:
    plan = Plan()
    plan.shared = True
    job.abandon()
    job.go(plan)
    assert plan.done == ["run"]
