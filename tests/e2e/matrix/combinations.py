"""Which combinations there are: the factors, what excludes what, and a choice that has all pairs.

Most faults show where two factors meet. So each value of a factor is run at least once with each
value of every other one, unless rules say that no llama.cpp program can do both.

The choice is made here rather than by a package: packages that filter while they combine
(allpairspy, with these rules) leave out a tenth of the possible pairs without a word.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tests.e2e.matrix.arrangements import ARRANGEMENTS, devices

COMPLETION = "llama-completion"
SERVER = "llama-server"
BATCHED_BENCH = "llama-batched-bench"
PERPLEXITY = "llama-perplexity"
IMATRIX = "llama-imatrix"
EMBEDDING = "llama-server --embedding"

# Values of `extra` and of others that more than this module knows by name.
NOTHING = "nothing"
DRAFT = "draft model"
SLOT_SAVE = "slot save"
CONTEXT_SHIFT = "context shift"
PROMPT_CACHE = "prompt cache"
BACKEND_SAMPLING = "backend sampling"
TWO_CLIENTS = "two clients"
LORA = "LoRA"
ZERO_SHARE = "-ts with 0"
EXPERTS_HERE = "-ot exps=CPU"
MIXTURE = "qwen3moe"
UNIFIED = "4 -kvu"


class Combination(NamedTuple):
    """One value of each factor."""

    servers: str
    program: str
    slots: str
    placement: str
    cache: str
    extra: str
    model: str

    @property
    def n_slots(self) -> int:
        """How many sequences the program has at a time."""
        return int(self.slots.split()[0])

    def __str__(self) -> str:
        return " | ".join(self)


FACTORS: dict[str, tuple[str, ...]] = {
    "servers": tuple(ARRANGEMENTS),
    "program": (COMPLETION, SERVER, BATCHED_BENCH, PERPLEXITY, IMATRIX, EMBEDDING),
    "slots": ("1", "2", "4", UNIFIED),
    "placement": ("--fit on", "-ngl 99", ZERO_SHARE, EXPERTS_HERE, "-sm none"),
    "cache": ("f16, fa on", "f16, fa off", "q8_0, fa on", "q8_0/f16, fa off", "f16/q8_0, fa on"),
    "extra": (
        NOTHING,
        DRAFT,
        SLOT_SAVE,
        CONTEXT_SHIFT,
        PROMPT_CACHE,
        BACKEND_SAMPLING,
        TWO_CLIENTS,
        LORA,
    ),
    "model": ("SmolLM2", "qwen2", MIXTURE),
}


class Rule(NamedTuple):
    """Combinations that ``excludes`` are left out, for this reason."""

    reason: str
    excludes: Callable[[Combination], bool]


RULES = (
    Rule(
        "llama-completion writes one text",
        lambda c: c.program == COMPLETION and c.slots != "1",
    ),
    Rule(
        "llama-imatrix has no -kvu",
        lambda c: c.program == IMATRIX and c.slots == UNIFIED,
    ),
    Rule(
        "a share of zero needs a second device",
        lambda c: c.placement == ZERO_SHARE and devices(c.servers) == 1,
    ),
    Rule(
        "only a mixture has experts",
        lambda c: c.placement == EXPERTS_HERE and c.model != MIXTURE,
    ),
    Rule(
        "only llama-server drafts, and saves slots",
        lambda c: c.extra in (DRAFT, SLOT_SAVE) and c.program != SERVER,
    ),
    Rule(
        "who generates no text shifts no context, keeps no prompt and samples nothing",
        lambda c: (
            c.extra in (CONTEXT_SHIFT, PROMPT_CACHE, BACKEND_SAMPLING)
            and c.program not in (COMPLETION, SERVER)
        ),
    ),
    Rule(
        "slots that share their room fill it sooner or later by what the others do",
        lambda c: c.extra == CONTEXT_SHIFT and c.slots == UNIFIED,
    ),
)


def possible() -> list[Combination]:
    """All combinations that no rule excludes."""
    every = itertools.starmap(Combination, itertools.product(*FACTORS.values()))
    return [c for c in every if not any(rule.excludes(c) for rule in RULES)]


# What failed once though no two of its values fail by themselves; the first three stand for all.
FAILED_ONCE = (
    Combination("two", COMPLETION, "1", "--fit on", "f16, fa on", NOTHING, "SmolLM2"),
    Combination("tensor of two", BATCHED_BENCH, "4", "-ngl 99", "f16, fa on", NOTHING, "qwen2"),
    Combination("tensor of three", PERPLEXITY, "4", "--fit on", "f16, fa on", NOTHING, "SmolLM2"),
    Combination("tensor of two", SERVER, "2", "-ngl 99", "f16, fa on", NOTHING, "qwen2"),
    Combination("tensor of three", SERVER, "2", "-ngl 99", "q8_0, fa on", NOTHING, "SmolLM2"),
    Combination("two", SERVER, "1", ZERO_SHARE, "f16, fa on", NOTHING, "SmolLM2"),
)


@functools.cache
def pairwise() -> tuple[Combination, ...]:
    """Combinations that have every possible pair of values, ordered by their servers."""
    candidates = possible()
    first = [candidates.index(c) for c in FAILED_ONCE]
    chosen = _cover(_pairs(candidates), _values(candidates), first)
    return _ordered(candidates[i] for i in chosen)


def representative() -> tuple[Combination, ...]:
    """A few of ``pairwise()``, which have every value of every factor."""
    rest = pairwise()
    values = _values(rest)
    first = [rest.index(c) for c in FAILED_ONCE[:3]]
    return _ordered(rest[i] for i in _cover(values, values, first))


def _ordered(combinations: Iterable[Combination]) -> tuple[Combination, ...]:
    return tuple(sorted(combinations, key=lambda c: list(ARRANGEMENTS).index(c.servers)))


def _values(candidates: Sequence[Combination]) -> np.ndarray:
    """Numbers of the values of each: [candidates, factors], each value its own number."""
    names = [(factor, value) for factor, values in FACTORS.items() for value in values]
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([[numbers[name] for name in c._asdict().items()] for c in candidates])


def _pairs(candidates: Sequence[Combination]) -> np.ndarray:
    """Numbers of the pairs of values of each: [candidates, pairs]."""
    values = _values(candidates)
    count = int(values.max()) + 1
    columns = itertools.combinations(range(values.shape[1]), 2)
    return np.stack([values[:, i] * count + values[:, j] for i, j in columns], axis=1)


def _cover(wanted: np.ndarray, values: np.ndarray, first: Sequence[int]) -> list[int]:
    """Rows that together have all the numbers in ``wanted``: those in ``first``, and others.

    Always the row that has the most numbers that none has had before; of equals the one whose
    ``values`` were used least so far, then the first. So the choice is the same every time.
    """
    missing = np.zeros(int(wanted.max()) + 1, bool)
    missing[wanted] = True
    uses = np.zeros(int(values.max()) + 1, int)
    chosen: list[int] = []

    def choose(row: int) -> None:
        chosen.append(row)
        missing[wanted[row]] = False
        uses[values[row]] += 1

    for row in first:
        choose(row)
    while missing.any():
        new = missing[wanted].sum(axis=1)
        equals = np.flatnonzero(new == new.max())
        choose(int(equals[uses[values[equals]].sum(axis=1).argmin()]))
    return chosen
