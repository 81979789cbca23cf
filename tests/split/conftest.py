from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.split.cluster import Coordinator, WorkerProcess


@pytest.fixture(scope="session")
def whole() -> Iterator[WorkerProcess]:
    """A server that keeps weights whole: what all others must agree with."""
    with WorkerProcess() as started:
        yield started


@pytest.fixture(scope="session")
def workers() -> Iterator[list[WorkerProcess]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(WorkerProcess()) for _ in range(2)]


@pytest.fixture(scope="session")
def split(workers: list[WorkerProcess]) -> Iterator[Coordinator]:
    """Two workers and a share of its own; activations travel as they are."""
    with Coordinator([*workers, "local"]) as started:
        yield started
        assert started.alive, f"the coordinator died:\n{started.log}"
        assert "internal error" not in started.log
        for worker in workers:
            assert worker.alive, f"a worker died:\n{worker.log}"
            assert "internal error" not in worker.log
