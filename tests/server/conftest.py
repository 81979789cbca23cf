from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.process import ServerProcess, running


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One server for all tests of a module: what one test does must not hurt the next."""
    with running("--threads", "2") as started:
        yield started
        assert started.alive, f"the server died:\n{started.log}"
