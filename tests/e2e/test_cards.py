"""llama.cpp with a model over two emulated GPUs of one server: it says what it says alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cuda import emulation
from tests.e2e import llama
from tests.e2e.conftest import needs_own_server
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens

pytestmark = [
    needs_own_server,
    pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER),
]

# The emulated cards take seconds for a token.
PROMPT = "The capital of France is"
COUNT = 3


def test_a_model_over_two_cards(log_folder: Path) -> None:
    """Each card has a part of the layers, and each token goes from one to the other."""
    port = free_port()
    command = [sys.executable, "-m", "tests.cuda.serve", "--port", str(port)]
    cards = {"EMULATION": "fast", "EMULATED_CARDS": "2"}
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    alone = llama.completion(model, PROMPT, COUNT)
    with Process(command, log_folder / f"cards-{port}.log", env=cards) as server:
        server.wait_until(lambda: listens(port), llama.START_SECONDS, "its port")
        assert llama.completion(model, PROMPT, COUNT, rpc=f"127.0.0.1:{port}") == alone
        ran = server.wait_for(r"; (\d+) graphs in")
    assert int(ran[1]) == 2 * COUNT, "graphs on both"
