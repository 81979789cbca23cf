"""llama.cpp with a model over two emulated GPUs of one server: it says what it says alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda import emulation
from tests.cuda.server import EmulatedServer
from tests.e2e import llama
from tests.e2e.conftest import needs_own_server

pytestmark = [
    needs_own_server,
    pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER),
]

# The emulated cards take seconds for a token.
PROMPT = "The capital of France is"
COUNT = 3


def test_a_model_over_two_cards(log_folder: Path) -> None:
    """Each card has a part of the layers, and each token goes from one to the other."""
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    alone = llama.completion(model, PROMPT, COUNT)
    with EmulatedServer(cards=2, log=log_folder / "two-cards.log") as server:
        assert llama.completion(model, PROMPT, COUNT, rpc=server.address) == alone
        ran = server.wait_for(r"; (\d+) graphs in")
    assert int(ran[1]) == 2 * COUNT, "graphs on both"
