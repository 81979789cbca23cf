"""Writes the tables of docs/split.md about cards, by the formula of the advice.

    python -m tools.card_tables            # rewrite the tables
    python -m tools.card_tables --check    # fail if they are out of date

No card has been measured: what goes into the formula is from data sheets and from the counts of
instructions in docs/gpu.md. Who has measured one puts its figures here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from client.model_header import ModelShape
from client.split.advice import BATCH, Arrangement, Box, Prediction, predict
from tools.documents import keep, with_tables

DOCUMENT = Path(__file__).parents[1] / "docs" / "split.md"
PROGRAM = "tools.card_tables"

_CONTEXT = 4096
# Of what memory gives, what products of one column get.
_READ = 0.8
# A token is so many launches a layer, each so many seconds (docs/gpu.md, "On paper: decoding").
_LAUNCHES, _LAUNCH_SECONDS = 436 / 32, 2e-6
# What clients don't get of a card.
_RESERVED = 512 << 20


@dataclass(frozen=True, slots=True)
class DataSheet:
    """A card, or the processors of a box, on paper.

    ``memory`` bytes, ``reads`` of weights a second for one column, ``multiplies`` a second for
    many.
    """

    name: str
    memory: int
    reads: float
    multiplies: float
    is_card: bool = True


# P100's instructions read 550 GB/s of Q4_K, less than its memory gives. Products of prompts are by
# tensor cores where there are any (docs/gpu.md, "On paper: reading a prompt").
CARDS = (
    DataSheet("P100", 16 << 30, _READ * 550e9, 0.7 * 5e12),
    DataSheet("RTX 3060", 12 << 30, _READ * 360e9, 0.7 * 22e12),
    DataSheet("RTX 3090", 24 << 30, _READ * 936e9, 0.7 * 62e12),
    DataSheet("RTX 4090", 24 << 30, _READ * 1008e9, 0.7 * 144e12),
)
# Two channels of DDR5, eight cores.
CPU = DataSheet("CPU", 64 << 30, _READ * 76e9, 1e12, is_card=False)


@dataclass(frozen=True, slots=True)
class Network:
    """A way between two parts: seconds of a round trip, bytes a second of one connection."""

    name: str
    round_trip: float
    rate: float


# By TCP, from program to program; of 100 GbE one connection uses what a core can copy.
ONE_BOX = Network("one box", 20e-6, 5e9)
NETWORKS = (
    Network("1 GbE", 150e-6, 0.118e9),
    Network("10 GbE", 50e-6, 1.18e9),
    Network("25 GbE", 40e-6, 2.9e9),
    Network("100 GbE", 30e-6, 5e9),
)
_USUAL = NETWORKS[1]


def _model(
    name: str, layers: int, width: int, ffn_width: int, vocabulary: int, gigabytes: float
) -> ModelShape:
    """A model whose heads are 128 wide, 8 of keys and values in F16, without its embedding."""
    size = int(gigabytes * 1e9)
    # The output is of Q6_K.
    return ModelShape(
        name=name, layers=layers, width=width, ffn_width=ffn_width, heads=width // 128,
        kv_heads=8, head_width=128, vocabulary=vocabulary, weight_bytes=size, token_bytes=size,
        cache_bytes=2 * 2 * layers * 8 * 128, products=(),
        output_bytes=vocabulary * width * 210 // 256,
    )  # fmt: skip


# Of Llama 3 8B, Qwen 2.5 32B and Llama 3 70B in Q4_K_M.
MODELS = (
    _model("8B", 32, 4096, 14336, 128256, 4.6),
    _model("32B", 64, 5120, 27648, 152064, 19.4),
    _model("70B", 80, 8192, 28672, 128256, 41.9),
)


def _box(name: str, made_of: DataSheet, model: ModelShape, network: Network) -> Box:
    # Bits of a weight go into how many bytes are multiplied in a second.
    prompt = made_of.multiplies * model.token_bytes / _weights(model)
    rest = _LAUNCHES * _LAUNCH_SECONDS * model.layers if made_of.is_card else None
    return Box(
        name,
        made_of.memory - (_RESERVED if made_of.is_card else 0),
        made_of.reads,
        prompt,
        network.round_trip,
        network.rate,
        rest=rest,
        rest_prompt=None if rest is None else rest / BATCH,
        links=not made_of.is_card,
        card="cuda0" if made_of.is_card else "",
    )


def _weights(model: ModelShape) -> float:
    """Return how many weights a token is multiplied with."""
    heads = model.kv_heads * model.head_width
    layer = 2 * model.width * (model.width + heads) + 3 * model.width * model.ffn_width
    return model.layers * layer + model.vocabulary * model.width


def predictions(
    model: ModelShape, one: DataSheet, other: DataSheet, network: Network
) -> dict[str, Prediction]:
    """Return what a pair would do in each way, by its name: the better one alone, layers, splits.

    The coordinator runs on the first's box; its processors have a share if they are the first.
    """
    boxes = [_box("a", one, model, network), _box("b", other, model, network)]
    alone = [predict(model, [box], Arrangement("alone", (0,)), context=_CONTEXT) for box in boxes]
    found = {
        "alone": min(alone, key=lambda p: (not p.fits, p.seconds_per_token)),
        "layers": predict(model, boxes, Arrangement("layers", (0, 1)), context=_CONTEXT),
    }
    # The coordinator's own work is a twentieth of one server's, as the formula has it.
    home = replace(boxes[0], endpoint="home", free=CPU.memory, card="", rest=None, rest_prompt=None)
    # A card on the coordinator's box is reached without the network.
    used = [home, replace(boxes[0], link=ONE_BOX.rate), boxes[1]]
    parts = (1, 2) if one.is_card else (0, 2)
    found["row"] = predict(model, used, Arrangement("row", parts, 0), context=_CONTEXT)
    found["tensor"] = predict(model, used, Arrangement("tensor", parts, 0), context=_CONTEXT)
    return found


Speed = Callable[[Prediction], float]


def generation(p: Prediction) -> float:
    """Return tokens a second, one after the other."""
    return p.tokens_per_second


def prompts(p: Prediction) -> float:
    """Return tokens a second of a prompt."""
    return p.prompt_tokens_per_second


def _number(speed: float) -> str:
    return f"{speed:.1f}" if speed < 20 else f"{speed:.0f}"


def _rows(speed: Speed) -> Iterator[str]:
    """Yield a row for each model and pair of cards; what pays is bold."""
    names = (ONE_BOX.name, *(network.name for network in NETWORKS))
    yield f"| model | two | one of them | layers | {' | '.join(f'tensor, {n}' for n in names)} |"
    yield "|---" * (4 + len(names)) + "|"
    for model in MODELS:
        for card in CARDS:
            usual = predictions(model, card, card, _USUAL)
            if not any(usual[way].fits for way in ("layers", "tensor")):
                continue
            others = [usual[way] for way in ("alone", "layers")]
            most = max(speed(p) for p in others if p.fits)
            cells = [_number(speed(p)) if p.fits else "-" for p in others]
            for network in (ONE_BOX, *NETWORKS):
                split = speed(predictions(model, card, card, network)["tensor"])
                cells.append(f"**{_number(split)}**" if split > most else _number(split))
            yield f"| {model.name} | {card.name} | {' | '.join(cells)} |"


# What there may be at home: of a pair the first is the coordinator's.
_PAIRS = {
    "two cards (P100)": (CARDS[0], CARDS[0]),
    "two cards (RTX 3090)": (CARDS[2], CARDS[2]),
    "processors and processors": (CPU, CPU),
}


def _best() -> Iterator[str]:
    """Yield what generates fastest, and how fast, of each pair of boxes."""
    names = (ONE_BOX.name, *(network.name for network in NETWORKS))
    yield f"| boxes | model | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for title, (one, other) in _PAIRS.items():
        for model in MODELS:
            cells = []
            for network in (ONE_BOX, *NETWORKS):
                fits = {w: p for w, p in predictions(model, one, other, network).items() if p.fits}
                best = max(fits, key=lambda way: fits[way].tokens_per_second, default="")
                cells.append(
                    f"{best} {_number(fits[best].tokens_per_second)}" if best else "does not fit"
                )
            yield f"| {title} | {model.name} | {' | '.join(cells)} |"


def tables() -> str:
    """Return what stands between the marks."""
    return "\n".join(
        [
            "Tokens/s that are generated, on paper:",
            "",
            *_rows(generation),
            "",
            "Tokens/s of a prompt, on paper:",
            "",
            *_rows(prompts),
            "",
            "The fastest way to generate, on paper:",
            "",
            *_best(),
        ]
    )


def document() -> str:
    """Return the whole text, its tables made anew."""
    return with_tables(DOCUMENT, PROGRAM, tables())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return keep(DOCUMENT, PROGRAM, document, arguments)


if __name__ == "__main__":
    sys.exit(main())
