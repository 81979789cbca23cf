"""llama.cpp through a coordinator whose parts are emulated GPUs: logits are as from one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cuda import emulation
from tests.e2e import llama
from tests.e2e.cards import emulated_card
from tests.e2e.conftest import StartLlamaServer, needs_own_server
from tests.e2e.logits import Request, compute, nmse
from tests.e2e.test_generation import PLAIN_PROMPTS
from tests.e2e.test_split import TEXT, StartSplit, split

__all__ = ["split"]

pytestmark = [
    needs_own_server,
    pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER),
]

# One, two, and one beside a part that is a processor, of ours or upstream's.
PARTS = (("card",), ("card", "card"), ("card", "ours"), ("upstream", "card"))
# The coordinator's own: both, one beside another machine, and one beside its processors.
OWN = (("cuda0", "cuda1"), ("ours", "cuda0"), ("local", "cuda0"))
# Of a text, so many tokens at once and so many one by one.
TOKENS, SINGLE = 24, 3


@pytest.fixture(scope="module")
def card(log_folder: Path) -> Iterator[str]:
    """One server with a card, for llama.cpp itself."""
    with emulated_card(log_folder) as address:
        yield address


def alike(parts: Sequence[str]) -> tuple[str, str]:
    """Have all parts get as much: shares by speed, as of a card and processors, cut no heads."""
    return "--tensor-split", ",".join("1" for _ in parts)


@pytest.mark.parametrize("mode", ["row", "tensor"])
@pytest.mark.parametrize("parts", [*PARTS, *OWN], ids="-".join)
def test_logits_are_those_of_one_card(
    parts: Sequence[str],
    mode: str,
    split: StartSplit,
    card: str,
    model_folder: Path,
    log_folder: Path,
) -> None:
    """With a cache in half precision, and one in blocks."""
    model = llama.random_model(model_folder, "qwen2", "F32")
    coordinator = split(parts, "--split-mode", mode, *alike(parts))
    requests = [
        Request(str(model), TEXT, TOKENS, SINGLE, address, "on", cache, cache)
        for cache in ("f16", "q8_0")
        for address in (card, coordinator.address)
    ]
    found = compute(requests)
    for expected, got in (found[:2], found[2:]):
        assert expected.std() > 1
        assert nmse(got, expected) < 1e-6
    assert "ERROR" not in coordinator.log
    ports = re.findall(r":(\d+)", " ".join(coordinator.command))
    logs = [path for path in (log_folder / f"card-{port}.log" for port in ports) if path.exists()]
    assert len(logs) == parts.count("card")
    for log in logs:
        # One program for the prompt and one for all single tokens, with each cache; nothing else is
        # planned.
        assert len(re.findall(r"made \d+ exchanges", log.read_text())) == 4
        assert "planned" not in log.read_text()
    if mode == "tensor" and len(parts) > 1:
        assert "sums of the parts go through this server" in coordinator.log
        by_card = "a GPU exchanges nothing with other parts: sums" in coordinator.log
        assert by_card == ("upstream" not in parts)


@pytest.mark.parametrize(("slots", "mode"), [(1, "tensor"), (4, "tensor"), (4, "row")])
@pytest.mark.parametrize("parts", [("card", "ours"), *OWN], ids="-".join)
def test_slots(
    parts: Sequence[str],
    slots: int,
    mode: str,
    split: StartSplit,
    card: str,
    llama_server: StartLlamaServer,
    model_folder: Path,
) -> None:
    """Sequences with a cache of their own each, in blocks."""
    model = llama.random_model(model_folder, "qwen2", "F16")
    options = ("-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0")
    coordinator = split(parts, "--split-mode", mode, *alike(parts))

    def texts(address: str) -> list[list[llama.Token]]:
        server = llama_server(model, *options, rpc=address, slots=slots)
        answers = server.generate_at_once((PLAIN_PROMPTS * 2)[:slots], 6)
        server.stop()
        return answers

    expected, got = texts(card), texts(coordinator.address)
    gaps = [llama.gap_where_different(*pair) for pair in zip(expected, got, strict=True)]
    assert all(gap is None or gap < llama.NEAR_TIE for gap in gaps), gaps
    for word in ("ERROR", "comes here", "goes by rows"):
        assert word not in coordinator.log
