from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.server.process import running
from tests.upstream_server import Endpoint, running_upstream


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """llama.cpp's own server with a cache, for all tests of this folder."""
    log = tmp_path_factory.mktemp("upstream") / "server.log"
    with running_upstream(log, "-t", "2", "-c") as endpoint:
        yield endpoint


# Per module: what a module's clients accept or hang up on, the server remembers.
@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """This project's server with a cache, for all tests of a module."""
    folder = tmp_path_factory.mktemp("ours")
    environment = {**os.environ, "LLAMA_CACHE": str(folder)}
    with running("--threads", "2", "--cache", env=environment) as process:
        yield Endpoint("127.0.0.1", process.port)
        assert process.alive, f"the server died:\n{process.log}"


@pytest.fixture(params=[pytest.param("upstream", marks=pytest.mark.upstream), "ours"])
def server(request: pytest.FixtureRequest) -> Endpoint:
    """Each of the two: what one does, the other does."""
    endpoint: Endpoint = request.getfixturevalue(request.param)
    return endpoint
