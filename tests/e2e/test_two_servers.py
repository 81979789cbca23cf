"""llama.cpp over two servers, by what its users type first; and old releases beside new ones."""

from __future__ import annotations

import re

import pytest

from tests.e2e import llama
from tests.e2e.conftest import Serve, needs_own_server
from tests.e2e.test_dialects import TRIES, generate
from tools import upstream
from tools.wire import Wire

MODEL_TYPE = llama.SMOLLM2_TYPE
PROMPT = "The capital of France is"
STARTS = 3

pytestmark = needs_own_server

# Releases that are old enough to speak something else, the first that has been built.
_OLD = [build for version, build in upstream.DIALECT_BUILDS.items() if version < "6"][::-1]


def complete(endpoints: str, *options: object) -> str:
    """What llama-completion prints with these options and all others as they are."""
    return llama.told(
        llama.whole_text,
        "llama-completion",
        *("-m", llama.smollm2(MODEL_TYPE), "-p", PROMPT, "-n", 8, "--temp", 0),
        *("-no-cnv", "-t", llama.THREADS, "--rpc", endpoints, *options),
    )


@pytest.mark.parametrize(
    "options", [(), ("-ngl", 99), ("-ngl", 99, "-ts", "1,0")], ids=["defaults", "ngl", "ts"]
)
def test_it_starts_every_time(serve: Serve, options: tuple[object, ...]) -> None:
    servers = [serve("--threads", "1", "--log-level", "debug") for _ in range(2)]
    endpoints = ",".join(server.address for server in servers)
    for _ in range(STARTS):
        assert "Paris" in complete(endpoints, *options)
    for server in servers:
        # The case is met: connections that say HELLO and close, and no word of them to worry over.
        assert re.search(r"DEBUG .* hung up right after HELLO", server.log)
        assert not re.search(r"(WARNING|ERROR|INFO) .* hung up", server.log)


def test_an_old_release_is_found_and_stays(serve: Serve) -> None:
    build = next((b for b in _OLD if upstream.find_program("llama-completion", b)), None)
    if build is None:
        pytest.skip("no client of an older protocol; python -m tools.upstream --dialects")
    server = serve("--threads", "1")
    starts = 1
    while generate(build, server) is None:
        assert re.search("WARNING .* hung up right after HELLO; .* --protocol", server.log)
        starts += 1
        assert starts <= TRIES, server.log
    # Neither a monitor nor a client of another release changes what it is offered.
    for _ in range(STARTS):
        for _ in range(10):
            probe(server.port)
        assert generate(build, server) is not None, server.log


def probe(port: int) -> None:
    """Say HELLO and hang up."""
    with Wire(port) as wire:
        assert wire.version
