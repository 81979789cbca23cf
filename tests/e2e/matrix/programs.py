"""How each program is run for a combination, and how its answer is held against the local one.

The local answer is that of the same program without --rpc, with plain weights (--no-repack). What
must not change an answer is left out there: a draft model, saved slots, a kept prompt, where
sampling is done. The bounds are those of tests/e2e: texts part at a near-tie or not at all,
perplexity is within 0.5%, other numbers have an NMSE below 1e-4 or, with a quantized cache, one
that is not above what that cache costs here.
"""

from __future__ import annotations

import functools
import json
import shlex
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.gguf_file import read_tensors
from tests.e2e import llama
from tests.e2e.logits import nmse
from tests.e2e.matrix import combinations as c
from tests.e2e.matrix.arrangements import Running, devices
from tests.e2e.matrix.combinations import Combination
from tests.e2e.test_architectures import BOUND, SLACK
from tests.e2e.test_generation import PLAIN_PROMPTS
from tools import models
from tools.serving.processes import ProgramError

# Tokens that a text is made of, and that a window of perplexity has.
COUNT, WINDOW = 24, 256
# A context that is shifted: its size, what of it a prompt takes, and how much is generated.
SMALL_CONTEXT, LONG_PROMPT, LONG_COUNT = 256, 216, 64
PERPLEXITY_BOUND = 0.005
# Programs wait for servers that share two cores with them.
SECONDS = 400
LOCAL = ("-ngl", "0", "--no-repack")
_FLASH = {"fa on": "on", "fa off": "off"}


class MismatchError(AssertionError):
    """A program's answer isn't the local one; the message says by how much."""


@dataclass(frozen=True)
class Text:
    """What a model says to a prompt: tokens where they are known, else what they spell."""

    tokens: tuple[int, ...] = ()
    spelled: bytes = b""


class Programs:
    """Runs combinations; local answers are computed once and kept in memory, models in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._local: dict[tuple[object, ...], Any] = {}
        # Two clients at once need the same local answer; it may need another one.
        self._lock = threading.RLock()

    def check(self, combination: Combination, servers: Running) -> str:
        """Run a combination over its servers; how its answer compares, in a few words.

        Raises MismatchError where it isn't the local one, ProgramError where a program fails.
        """
        program = _PROGRAMS[combination.program]
        where = placement(combination, servers.rpc)
        before = servers.graphs()
        with ThreadPoolExecutor(2) as pool:
            clients = 2 if combination.extra == c.TWO_CLIENTS else 1
            waiting = [pool.submit(program, self, combination, where) for _ in range(clients)]
            words = [one.result() for one in waiting]
        own = [process for process in servers.processes if isinstance(process, llama.RpcServer)]
        own[-1].wait_until(lambda: servers.graphs() > before, 20, "graphs of the client")
        return "; ".join(dict.fromkeys(words))

    def local(self, key: tuple[object, ...], compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed the first time."""
        with self._lock:
            if key not in self._local:
                self._local[key] = compute()
            return self._local[key]

    # -- files -----------------------------------------------------------------------------------

    def model(self, combination: Combination) -> Path:
        if combination.model == "SmolLM2":
            return llama.smollm2("F16")
        return llama.random_model(self.folder, combination.model, "F16")

    def draft(self, combination: Combination) -> Path:
        """A smaller model with the same vocabulary, which mostly says the same."""
        if combination.model == "SmolLM2":
            return llama.smollm2(llama.SMOLLM2_TYPE)
        return llama.random_model(self.folder, combination.model, "Q8_0")

    def adapter(self, combination: Combination) -> Path:
        path = self.folder / f"adapter-{combination.model}.gguf"
        if not path.exists():
            models.write_lora(self.model(combination), path, strength=0.5)
        return path

    def text_file(self) -> Path:
        """Some two thousand tokens of English."""
        path = self.folder / "text.txt"
        if not path.exists():
            harbour = (llama.DATA / "harbour.txt").read_text()
            path.write_text(harbour + "\n" + "\n".join(PLAIN_PROMPTS))
        return path

    def prompts(self, combination: Combination) -> list[str]:
        """A prompt for each slot, long ones where the context is to be shifted."""
        short = PLAIN_PROMPTS[: combination.n_slots]
        if combination.extra != c.CONTEXT_SHIFT:
            return list(short)
        model = self.model(combination)
        return [
            self.local(("long", model, p), functools.partial(_lengthened, model, p)) for p in short
        ]

    # -- options ---------------------------------------------------------------------------------

    def answering(self, combination: Combination) -> list[str]:
        """Options that change the answer: the local run has them too."""
        types, flash = combination.cache.split(", ")
        k, _, v = types.partition("/")
        options = ["-fa", _FLASH[flash], "-ctk", k, "-ctv", v or k]
        if combination.extra == c.LORA:
            options += ["--lora", str(self.adapter(combination))]
        if combination.extra == c.CONTEXT_SHIFT:
            options += ["--context-shift", "-c", str(SMALL_CONTEXT * combination.n_slots)]
        return options

    def key(self, combination: Combination, *others: object) -> tuple[object, ...]:
        """What a local answer depends on."""
        answering = tuple(self.answering(combination))
        return (combination.program, combination.model, answering, *others)


def placement(combination: Combination, rpc: str) -> list[str]:
    """Options that say where a model goes."""
    share = ",".join("10"[i % 2] for i in range(devices(combination.servers)))
    return [
        "--rpc",
        rpc,
        *{
            "--fit on": [],
            "-ngl 99": ["-ngl", "99"],
            c.ZERO_SHARE: ["-ngl", "99", "-ts", share],
            c.EXPERTS_HERE: ["-ngl", "99", "-ot", "exps=CPU"],
            "-sm none": ["-ngl", "99", "-sm", "none"],
        }[combination.placement],
    ]


def command(programs: Programs, combination: Combination, servers: Running) -> str:
    """Return the command line that a combination is about, for a person to start from."""
    model = programs.model(combination)
    options = [
        *("-m", str(model), "-np", str(combination.n_slots)),
        *programs.answering(combination),
        *_unified(combination),
        *placement(combination, servers.rpc),
    ]
    return f"{combination.program} {shlex.join(options)}"


def _unified(combination: Combination) -> list[str]:
    return ["-kvu"] if combination.slots == c.UNIFIED else []


def _lengthened(model: Path, prompt: str) -> str:
    """A prompt repeated until it has about LONG_PROMPT tokens."""
    repeated = "\n".join([prompt] * 20)
    output, _ = llama.run("llama-tokenize", "-m", model, "-p", repeated, "--ids", "--log-disable")
    tokens = output.count(",") + 1
    return repeated[: len(repeated) * LONG_PROMPT // tokens].rstrip()


# --- generated text -----------------------------------------------------------------------------


def _count(combination: Combination) -> int:
    return LONG_COUNT if combination.extra == c.CONTEXT_SHIFT else COUNT


def _local_tokens(programs: Programs, combination: Combination) -> list[list[llama.Token]]:
    """What llama-server says here to each of the prompts, one after the other."""

    def compute() -> list[list[llama.Token]]:
        with llama.LlamaServer(
            programs.folder,
            programs.model(combination),
            *programs.answering(combination),
            slots=combination.n_slots,
        ) as server:
            count = _count(combination)
            said = [server.generate(prompt, count) for prompt in programs.prompts(combination)]
        if any(len(tokens) != count for tokens in said):
            raise ProgramError("llama-server left out what spells no character")
        return said

    answering = tuple(programs.answering(combination))
    key = ("tokens", combination.model, answering, combination.n_slots)
    result: list[list[llama.Token]] = programs.local(key, compute)
    return result


def _judge(gaps: Sequence[float | None]) -> str:
    """Words for where texts part; MismatchError if one does at no near-tie."""
    parted = [gap for gap in gaps if gap is not None]
    if any(gap >= llama.NEAR_TIE for gap in parted):
        raise MismatchError(f"the text parts where the best two logits differ by {max(parted):.3f}")
    return f"parts at a tie of {max(parted):.3f}" if parted else "same text"


def _completion(programs: Programs, combination: Combination, where: Sequence[str]) -> str:
    model, (prompt,) = programs.model(combination), programs.prompts(combination)
    options, count = programs.answering(combination), _count(combination)

    def generate(*more: str, devices: Sequence[str] = where) -> str:
        return llama.completion(
            model, prompt, count, *options, *more, devices=devices, timeout=SECONDS
        )

    expected: str = programs.local(
        programs.key(combination), functools.partial(generate, devices=LOCAL)
    )
    if combination.extra == c.PROMPT_CACHE:
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder, "prompt")
            texts = [generate("--prompt-cache", str(kept))]
            if not kept.stat().st_size:
                raise MismatchError("no prompt was kept")
            texts.append(generate("--prompt-cache", str(kept)))
    elif combination.extra == c.BACKEND_SAMPLING:
        texts = [generate("--backend-sampling")]
    else:
        texts = [generate()]
    if all(text == expected for text in texts):
        return "same text"
    (tokens,) = _local_tokens(programs, combination)
    here = llama.text_of(tokens).decode(errors="replace").rstrip("\n")
    if here != expected:
        raise MismatchError(f"{texts} instead of {expected!r}")
    return _judge([llama.gap_where_text_differs(tokens, text.encode()) for text in texts])


def _server(programs: Programs, combination: Combination, where: Sequence[str]) -> str:
    model, prompts = programs.model(combination), programs.prompts(combination)
    expected = _local_tokens(programs, combination)
    with tempfile.TemporaryDirectory() as saved:
        extras: dict[str, list[str]] = {
            c.DRAFT: [
                *("-md", str(programs.draft(combination)), "-ngld", "99"),
                *("--spec-type", "draft-simple"),
            ],
            c.SLOT_SAVE: ["--slot-save-path", saved],
            c.PROMPT_CACHE: ["--cache-ram", "256"],
            c.BACKEND_SAMPLING: ["--backend-sampling"],
        }
        options = extras.get(combination.extra, [])
        with llama.LlamaServer(
            programs.folder,
            model,
            *programs.answering(combination),
            *_unified(combination),
            *options,
            devices=where,
            slots=combination.n_slots,
        ) as server:
            say = functools.partial(_say, server, _count(combination))
            if combination.extra == c.SLOT_SAVE:
                answers = _over_saved_slots(server, say, prompts)
            elif combination.extra == c.PROMPT_CACHE:
                answers = _from_kept_prompts(say, prompts)
            else:
                with ThreadPoolExecutor(len(prompts)) as pool:
                    answers = list(pool.map(say, prompts))
    if combination.extra == c.CONTEXT_SHIFT and not all(answer["truncated"] for answer in answers):
        raise MismatchError("the context wasn't shifted")
    if combination.extra == c.DRAFT and not any(
        answer["timings"].get("draft_n_accepted") for answer in answers
    ):
        raise MismatchError("nothing that was drafted was accepted")
    return _judge([_gap(*pair) for pair in zip(expected, answers, strict=True)])


def _say(
    server: llama.LlamaServer, count: int, prompt: str, slot: int = -1, keep: bool = False
) -> Any:
    """llama-server's whole answer; with ``keep`` it may use what it kept of earlier prompts."""
    body = {
        **llama.greedy(prompt, count),
        "cache_prompt": keep,
        "return_tokens": True,
        "id_slot": slot,
    }
    return server.post("/completion", body, SECONDS)


def _gap(expected: Sequence[llama.Token], answer: Any) -> float | None:
    """As llama.gap_where_different, of tokens by their numbers."""
    pairs = zip(expected, answer["tokens"], strict=True)
    return next((token.gap for token, other in pairs if token.id != other), None)


Say = Callable[..., Any]


def _over_saved_slots(server: llama.LlamaServer, say: Say, prompts: Sequence[str]) -> list[Any]:
    """Each prompt's answer from a slot that was saved, erased, and restored into another slot."""
    answers = []
    for slot, prompt in enumerate(prompts):
        say(prompt, slot=slot, keep=True)
        other = len(prompts) - 1 - slot
        server.post(f"/slots/{slot}?action=save", {"filename": f"slot{slot}"}, SECONDS)
        server.post(f"/slots/{slot}?action=erase", {}, SECONDS)
        restored = server.post(
            f"/slots/{other}?action=restore", {"filename": f"slot{slot}"}, SECONDS
        )
        if restored["n_restored"] <= 0:
            raise MismatchError(f"nothing was restored: {restored}")
        answers.append(say(prompt, slot=other, keep=True))
        _demand_kept(answers[-1])
    return answers


def _from_kept_prompts(say: Say, prompts: Sequence[str]) -> list[Any]:
    """Each prompt's answer after its slot has had another prompt in between."""
    answers = []
    for slot, prompt in enumerate(prompts):
        say(prompt, slot=slot, keep=True)
        say("Something else, and nothing of it is in the other", slot=slot, keep=True)
        answers.append(say(prompt, slot=slot, keep=True))
        _demand_kept(answers[-1])
    return answers


def _demand_kept(answer: Any) -> None:
    if answer["timings"]["cache_n"] <= 0:
        raise MismatchError("llama-server computed the prompt anew")


# --- numbers ------------------------------------------------------------------------------------


def _windows(combination: Combination) -> list[str]:
    """Options for as many windows at a time as there are slots, four in all."""
    batch = WINDOW * combination.n_slots
    return [
        *("-c", str(WINDOW), "-b", str(batch), "--chunks", "4", "-t", str(llama.THREADS)),
    ]


def _perplexity(programs: Programs, combination: Combination, where: Sequence[str]) -> str:
    def measure(where: Sequence[str] = where) -> float:
        found = llama.told(
            llama.estimate,
            "llama-perplexity",
            *("-m", programs.model(combination), "-f", programs.text_file()),
            *("--no-warmup", *_windows(combination)),
            *programs.answering(combination),
            *_unified(combination),
            *where,
            timeout=SECONDS,
        )
        return float(found[1])

    key = programs.key(combination, combination.slots)
    expected: float = programs.local(key, functools.partial(measure, LOCAL))
    actual = measure()
    words = f"PPL {actual} beside {expected}"
    if not abs(actual - expected) <= PERPLEXITY_BOUND * expected:
        raise MismatchError(words)
    return words


def _imatrix(programs: Programs, combination: Combination, where: Sequence[str]) -> str:
    def measure(*more: str, where: Sequence[str] = where) -> Arrays:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "imatrix.gguf")
            llama.run(
                "llama-imatrix",
                *("-m", programs.model(combination), "-f", programs.text_file(), "-o", made),
                *("--no-ppl", "--process-output"),
                *_windows(combination),
                *programs.answering(combination),
                *more,
                *where,
                timeout=SECONDS,
            )
            return {
                name: tensor.data.view(np.float32).copy()
                for name, tensor in read_tensors(made).items()
                # Made of the sums, with NaN for what can't be told.
                if not name.endswith(".stats")
            }

    return _numbers(programs, combination, measure)


def _embedding(programs: Programs, combination: Combination, where: Sequence[str]) -> str:
    texts = PLAIN_PROMPTS[: combination.n_slots]

    def measure(*more: str, where: Sequence[str] = where) -> Arrays:
        with (
            llama.LlamaServer(
                programs.folder,
                programs.model(combination),
                # A mean would be that of the tokens in a sequence's last batch, and where that
                # begins is a matter of which texts arrive together, without a server too.
                *("--embedding", "--pooling", "last"),
                *programs.answering(combination),
                *more,
                *_unified(combination),
                devices=where,
                slots=combination.n_slots,
            ) as server,
            ThreadPoolExecutor(len(texts)) as pool,
        ):
            vectors = pool.map(server.embed, texts)
            return {f"text {i}": np.array(v, np.float32) for i, v in enumerate(vectors)}

    return _numbers(programs, combination, measure)


def _numbers(programs: Programs, combination: Combination, measure: Callable[..., Arrays]) -> str:
    """Hold arrays that a program gives against those it gives here."""

    def here(*more: str) -> Arrays:
        key = programs.key(combination, combination.slots, *more)
        arrays: Arrays = programs.local(key, lambda: measure(*more, where=LOCAL))
        return arrays

    quantized = "q8_0" in combination.cache
    exact = functools.partial(here, "-ctk", "f32", "-ctv", "f32") if quantized else None
    return _near(measure(), here(), exact)


Arrays = Mapping[str, np.ndarray]


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    """NMSE; also where nothing but zeros is expected, as of an expert that was never chosen."""
    if not expected.any():
        return float("inf") if actual.any() else 0.0
    return nmse(actual, expected)


def _near(actual: Arrays, expected: Arrays, exact: Callable[[], Arrays] | None) -> str:
    """Words for the largest error; MismatchError if it is over the bound.

    With a quantized cache, ``exact`` is what an F32 cache gives: then the error may also be one
    that is no larger than what the cache's type costs here, and is largely the same.
    """
    if actual.keys() != expected.keys():
        raise MismatchError(f"not the same tensors: {sorted(actual.keys() ^ expected.keys())[:4]}")
    if not all(np.isfinite(array).all() for array in actual.values()):
        raise MismatchError("not all numbers are finite")
    worst, name = max((_error(actual[name], expected[name]), name) for name in expected)
    if worst < BOUND:
        return f"NMSE {worst:.0e}"
    words = f"NMSE {worst:.1e} of {name}"
    if exact is None:
        raise MismatchError(words)
    unrounded = exact()

    def mean(some: Arrays, others: Arrays) -> float:
        return float(np.mean([_error(some[name], others[name]) for name in others]))

    here, there = mean(expected, unrounded), mean(actual, unrounded)
    words += f"; the cache costs {there:.1e}, here {here:.1e}"
    if not (there < SLACK * here + BOUND and mean(actual, expected) < here):
        raise MismatchError(words)
    return words


def _batched_bench(programs: Programs, combination: Combination, where: Sequence[str]) -> str:
    """It prints only speeds: what can be asked is that it gets through all its batches."""
    sequences = sorted({1, combination.n_slots})

    def measure(where: Sequence[str] = where) -> list[tuple[int, ...]]:
        return llama.told(
            rows,
            "llama-batched-bench",
            *("-m", programs.model(combination), "-c", 512, "-t", llama.THREADS),
            # One row more than is asked about: the last one it prints may be lost.
            *("-npp", 32, "-ntg", 8, "-npl", ",".join(map(str, [*sequences, 1]))),
            *("--output-format", "jsonl"),
            *programs.answering(combination),
            *_unified(combination),
            *where,
            timeout=SECONDS,
        )

    def rows(output: str, log: str) -> list[tuple[int, ...]] | None:
        """All rows of its table."""
        said = (output + log).splitlines()
        found = [json.loads(line) for line in said if line.startswith("{")]
        if len(found) < len(sequences):
            return None
        return [(row["pp"], row["tg"], row["pl"], row["n_kv"]) for row in found[: len(sequences)]]

    key = programs.key(combination, combination.slots)
    expected: list[tuple[int, ...]] = programs.local(key, functools.partial(measure, LOCAL))
    actual = measure()
    if actual != expected:
        raise MismatchError(f"batches {actual} instead of {expected}")
    return f"{len(actual)} batches done"


_PROGRAMS: dict[str, Callable[[Programs, Combination, Sequence[str]], str]] = {
    c.COMPLETION: _completion,
    c.SERVER: _server,
    c.BATCHED_BENCH: _batched_bench,
    c.PERPLEXITY: _perplexity,
    c.IMATRIX: _imatrix,
    c.EMBEDDING: _embedding,
}
