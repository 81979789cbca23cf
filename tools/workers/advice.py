"""What servers would make of a model, as a table with the commands to type."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from client.model_header import ModelShape
from client.split.advice import Box, Prediction
from protocol.endpoint import parse_endpoint
from tools.workers.report import plain_table, size_text

# Where a coordinator listens that is started beside a server.
_COORDINATOR_PORT = 50060


def describe(prediction: Prediction, boxes: Sequence[Box]) -> str:
    """Return an arrangement in words."""
    arrangement = prediction.arrangement
    names = [boxes[i].endpoint for i in arrangement.parts]
    home = arrangement.coordinator
    if arrangement.kind == "alone":
        return f"{names[0]} alone"
    if home is None:
        return f"layers over {', '.join(names)}"
    parts = ["itself" if i == home else boxes[i].endpoint for i in arrangement.parts]
    return f"{arrangement.kind}: {boxes[home].endpoint} over {', '.join(parts)}"


def commands(
    prediction: Prediction, boxes: Sequence[Box], model: str, context: int, slots: int
) -> list[str]:
    """Return what is to be typed, beside the servers that run already."""
    arrangement, home = prediction.arrangement, prediction.arrangement.coordinator
    size = f"-c {context * slots}" + (f" -np {slots}" if slots > 1 else "")
    llama = f"llama-server -m {model} -ngl 99 {size}"
    if home is None:
        endpoints = ",".join(boxes[i].endpoint for i in arrangement.parts)
        return [f"{llama} --rpc {endpoints}"]
    host, _ = parse_endpoint(boxes[home].endpoint.removeprefix("tls://"))
    names = [boxes[i].own_part if i == home else boxes[i].endpoint for i in arrangement.parts]
    parts, shares = ",".join(names), ",".join(f"{share:.3g}" for share in prediction.shares)
    mode = f"--split-mode {arrangement.kind}"
    flash = " -fa on" if arrangement.kind == "tensor" else ""
    return [
        f"{host}$ python -m rpc_server --host {host} --port {_COORDINATOR_PORT} --split {parts} "
        f"--tensor-split {shares} {mode}",
        f"{llama}{flash} --rpc {host}:{_COORDINATOR_PORT}",
    ]


def advice_table(predictions: Sequence[Prediction], boxes: Sequence[Box]) -> Table:
    """Return a row for each arrangement."""
    table = plain_table(
        [("arrangement", False), ("fits", False), ("tokens/s", True), ("prompt/s", True),
         ("load", True), ("limited by", False)]
    )  # fmt: skip
    for p in predictions:
        fits = "yes" if p.fits else f"no: {size_text(p.missing)} short"
        cells = (
            describe(p, boxes),
            fits,
            f"{p.tokens_per_second:.1f}",
            f"{p.prompt_tokens_per_second:.0f}",
            f"{p.load_seconds:.1f} s",
            p.limit,
        )
        table.add_row(*map(Text, cells))
    return table


def advice_json(
    predictions: Sequence[Prediction],
    boxes: Sequence[Box],
    shape: ModelShape,
    typed: Sequence[Sequence[str]],
) -> str:
    """Return one line: the boxes, and the predictions, the best first, with what is to be typed."""
    told = [
        {
            **asdict(p),
            "fits": p.fits,
            "limit": p.limit,
            "tokens_per_second": p.tokens_per_second,
            "prompt_tokens_per_second": p.prompt_tokens_per_second,
            "commands": list(words),
        }
        for p, words in zip(predictions, typed, strict=True)
    ]
    return json.dumps(
        {"model": shape.name, "boxes": [asdict(b) for b in boxes], "arrangements": told}
    )
