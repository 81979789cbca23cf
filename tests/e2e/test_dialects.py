"""Clients of every protocol version since 4.0 generate text through one server."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import llama
from tests.e2e.conftest import Serve, needs_own_server
from tests.e2e.test_generation import PLAIN_PROMPTS
from tools import upstream
from tools.serving.processes import ProgramError

PROMPT = PLAIN_PROMPTS[0]
TOKENS = 24
# Where the server has to guess the version, a client is refused until the guess is right.
TRIES = 4

pytestmark = needs_own_server


@pytest.fixture(scope="module")
def reference(log_folder: Path) -> Iterator[list[llama.Token]]:
    """What the newest build says on this machine's CPU."""
    local = llama.LlamaServer(log_folder, llama.smollm2(llama.SMOLLM2_TYPE))
    yield local.generate(PROMPT, TOKENS)
    local.stop()


def generate(build: int, server: llama.RpcServer) -> str | None:
    """The text a client got from the server; None if it was refused.

    A client that is refused ends with an error, or computes on its own, by its version.
    """
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    before = computations(server)
    try:
        text = llama.completion(model, PROMPT, TOKENS, rpc=server.address, build=build)
    except ProgramError:
        assert server.alive, server.log
        return None
    with contextlib.suppress(ProgramError):
        server.wait_until(lambda: computations(server) > before, 5, "graphs of the client")
        return text
    return None


def computations(server: llama.RpcServer) -> int:
    """How many connections have computed graphs and ended, by the server's log."""
    return len(re.findall(r"disconnected; .* [1-9]\d* graphs in", server.log))


def check(text: str, reference: list[llama.Token]) -> None:
    gap = llama.gap_where_text_differs(reference, text.encode())
    assert gap is None or gap < llama.NEAR_TIE, f"{text!r} isn't {llama.text_of(reference)!r}"


def check_log(log: str, version: str) -> None:
    """The log names a protocol that this version's clients accept, and how it was recognised."""
    major, minor, _patch = map(int, version.split("."))
    lines = re.findall(r"speaks protocol (\d+)\.(\d+)(.*)", log)
    assert lines, log
    spoken_major, spoken_minor, reason = lines[-1]
    assert int(spoken_major) == major
    assert int(spoken_minor) <= minor
    assert "HELLO is 24 bytes" in reason


@pytest.fixture(params=upstream.DIALECT_BUILDS)
def version(request: pytest.FixtureRequest) -> str:
    """A protocol version whose client has been built; others are skipped."""
    version: str = request.param
    build = upstream.DIALECT_BUILDS[version]
    if upstream.find_program("llama-completion", build) is None:
        pytest.skip(
            f"no client of build {build}; "
            f"python -m tools.upstream --build {build} --only llama-completion"
        )
    return version


def test_a_client_of_any_version_is_recognised(
    version: str, serve: Serve, reference: list[llama.Token]
) -> None:
    build = upstream.DIALECT_BUILDS[version]
    server = serve("--protocol", "auto")
    text = None
    for _attempt in range(TRIES):
        text = generate(build, server)
        if text is not None:
            break
    assert text is not None, f"refused {TRIES} times:\n{server.log}"
    check(text, reference)
    check_log(server.log, version)
    # Once it is known, this machine's next client isn't refused.
    assert generate(build, server) == text


def test_a_pinned_version_is_accepted_at_once(
    version: str, serve: Serve, reference: list[llama.Token]
) -> None:
    server = serve("--protocol", version)
    text = generate(upstream.DIALECT_BUILDS[version], server)
    assert text is not None, f"refused:\n{server.log}"
    check(text, reference)
