from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.process import running
from tests.upstream_server import Endpoint, running_upstream


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """llama.cpp's own server."""
    log = tmp_path_factory.mktemp("upstream") / "server.log"
    with running_upstream(log, "-t", "2") as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def ours() -> Iterator[Endpoint]:
    """This project's server, which has to live through all that is asked of it."""
    with running("--threads", "2") as process:
        yield Endpoint("127.0.0.1", process.port)
        assert process.alive, f"the server died:\n{process.log}"
