"""The mode that a coordinator takes by itself: which, and what it says of why."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from client.split.advice import Arrangement, Box
from rpc_server.devices.split import mode
from rpc_server.devices.split.mode import TYPICAL, choose, home_box, told, way
from rpc_server.options import parse_options
from tests.server.process import ServerProcess
from tests.split.cluster import WorkerProcess
from tools.models import write_model

GB = 1e9
SHAPE = replace(TYPICAL, name="m.gguf")
HOME = home_box(64 << 30)
BOX = Box("a:1", 64 << 30, 10 * GB, 10 * GB, 0.3e-3, 0.12 * GB, links=True)
OTHER = replace(BOX, endpoint="b:1")


def test_a_token_of_linked_parts_is_one_exchange(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose(SHAPE, HOME, [None, BOX], (2, 2)) == "tensor"
    said, exact = caplog.messages
    assert re.match(
        r"--split-mode auto: tensor for m\.gguf: a token takes 1 exchange and 64 sums among the "
        r"parts, [\d.]+ ms on the network; row would take 129 exchanges, [\d.]+ ms on the network$",
        said,
    )
    assert exact == "--split-mode row gives the results of one server to the bit"


@pytest.mark.parametrize(
    ("shares", "boxes"),
    [
        ((0.5, 0.5), [replace(BOX, links=False), OTHER]),
        ((0.5, 0.5, 0.0), [BOX, OTHER, None]),
    ],
    ids=["no-links", "no-share"],
)
def test_without_links_there_are_two_exchanges_a_layer(
    shares: tuple[float, ...], boxes: list[Box | None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose(None, HOME, boxes, shares) == "tensor"
    said = "a 7B model at 4 bits, as no model was named: a token takes 65 exchanges, "
    assert said in caplog.messages[0]


def test_what_does_not_fit_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    """In tensor mode the cache goes to the workers, who have no room for it."""
    weights = SHAPE.weight_bytes // 2
    small = replace(BOX, free=int(weights * 1.2) + (600 << 20))
    pair = [small, replace(small, endpoint="b:1")]
    shape = replace(SHAPE, cache_bytes=(2 << 30) // mode.CONTEXT)
    with caplog.at_level(logging.INFO):
        assert choose(shape, HOME, pair, (0.5, 0.5)) == "row"
    assert re.search(r": row for .*; tensor would lack \d+ MiB$", caplog.messages[0])
    assert len(caplog.messages) == 1


def test_sums_are_on_the_cables_of_the_parts() -> None:
    """Each part sends its own to all others; that of others is not on its cable."""
    two = way(SHAPE, [HOME, BOX], Arrangement("row", (0, 1), 0), "tensor", (0.5, 0.5))
    boxes = [HOME, BOX, OTHER, replace(BOX, endpoint="c:1")]
    four = way(SHAPE, boxes, Arrangement("row", (0, 1, 2, 3), 0), "tensor", (0.25,) * 4)
    sums = 4 * 64 * SHAPE.width / BOX.link
    # Two more sums each; of inputs and logits three shares come instead of one.
    inputs = 4 * (2 * SHAPE.width + 0.25 * SHAPE.vocabulary) / BOX.link
    assert four.seconds - two.seconds == pytest.approx(2 * sums + inputs)


def test_both_modes_are_told_of_what_was_chosen() -> None:
    arrangement = Arrangement("row", (0, 1), 0)
    assert told(SHAPE, [HOME, BOX], arrangement, (0.5, 0.5)).startswith(
        "a token takes 129 exchanges, "
    )


def test_the_options() -> None:
    assert parse_options(["--split", "a:1"]).split_mode == "auto"
    assert parse_options(["--split", "a:1", "--split-mode", "row"]).split_mode == "row"
    named = parse_options(["--split", "a:1", "--split-model", "m.gguf"])
    assert named.split_model == Path("m.gguf")


def test_a_coordinator_says_what_it_took(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama-gqa", "Q8_0")
    # One has no room for what would be uploaded to measure its network.
    with WorkerProcess() as worker, WorkerProcess("--mem", "1") as small:
        parts = ("--split", f"{worker.address},local", "--tensor-split", "1,1", "-t", "1")
        with ServerProcess(*parts, "--split-model", str(model)) as coordinator:
            assert f"--split-mode auto: tensor for {model.name}: a token takes " in coordinator.log
        with ServerProcess(*parts, "--models", str(model)) as coordinator:
            assert f"--split-mode auto: tensor for {model.name}: " in coordinator.log
        both = ("--split", f"{worker.address},{small.address}", "--tensor-split", "1,1")
        with ServerProcess(*both, "-t", "1", "--models", __file__) as coordinator:
            assert "as no model was named" in coordinator.log
