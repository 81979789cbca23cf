"""Measures what llama-server gives to several users at once, who ask on as they get answers.

Prompts have 5 to 120 words and answers 10 to 60 tokens, so that hardly a graph is like the one
before. They are made up, the same for every server and in each round.
"""

from __future__ import annotations

import concurrent.futures
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.results import Sample
from tools.serving.llama_server import LlamaServer
from tools.serving.processes import HOST, PATIENCE, ProgramError

# Tokens that a slot has room for: the longest prompt and answer, and some more.
_CONTEXT = 512
_EACH = 5
_TEXT = (
    "the river turns slowly past old houses and a small boat carries letters from one side to "
    "the other while children count birds under grey clouds that bring rain"
)


@dataclass(frozen=True)
class Question:
    """One question of a user: a prompt, and how many tokens the answer has."""

    prompt: str
    tokens: int


def questions(slots: int) -> list[Question]:
    """Return what so many users ask, the same each time."""
    made, words = random.Random(slots), _TEXT.split()
    return [
        Question(" ".join(made.choices(words, k=made.randint(5, 120))), made.randint(10, 60))
        for _ in range(_EACH * slots)
    ]


def measure(port: int, model: Path, slots: Sequence[int]) -> list[Sample]:
    """Return tokens per second, of prompts and answers together, for each number of slots."""
    return [_measure(port, model, n) for n in slots]


def _measure(port: int, model: Path, slots: int) -> Sample:
    words = ("-c", str(_CONTEXT * slots), "-np", str(slots), "-t", "1")
    with LlamaServer(model, f"{HOST}:{port}", words) as server:
        server.wait_until(server.ready, PATIENCE, "loaded model")
        asked = questions(slots)
        started = time.perf_counter()
        try:
            with concurrent.futures.ThreadPoolExecutor(slots) as users:
                answers = list(users.map(lambda q: server.complete(q.prompt, q.tokens), asked))
        except OSError as error:
            raise ProgramError(f"llama-server gave no answer: {error}") from None
        seconds = time.perf_counter() - started
    tokens = sum(a["tokens_evaluated"] + a["tokens_predicted"] for a in answers)
    return Sample(f"{slots} slots", "tokens/s", True, tokens / seconds)
