"""Holds the advice of tools.workers against measurements: servers of one core, and networks.

    python -m tools.bench.advice --model small.gguf --model large.gguf \\
        --link 0.1:1 --link 0.25:1 --link 1:1 --json advice.json

Three servers with one thread each are started on this machine's cores in turn, so with two cores
the first and the third share one. All are reached directly, and through relays that behave like a
network (--link DELAY:RATE, milliseconds one way and Gbit/s): llama.cpp's way to each server, and a
coordinator's to its workers. The servers are measured as `python -m tools.workers --model` does it;
then llama-bench runs with each arrangement of the first one, two and three servers.

What else the machine does makes all of this slower. Of llama-bench's repetitions the best counts
over --rounds rounds that do everything once, and the lower quartile of round trips; of what the
servers compute in a second, as they are alike and it does not depend on the network, the median of
all measurements. --json keeps what was measured, and goes on where it was ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from client.model_header import ModelShape
from client.split.address import ServerAddress
from client.split.advice import Arrangement, Box, Prediction, predict
from client.split.survey import measure_boxes, survey_all
from rpc_server.observability.progress import Task, begin, shown
from tools import upstream
from tools.bench import llama
from tools.bench.cores import on_core
from tools.bench.machine import describe_machine, describe_versions
from tools.bench.rest import from_file, waiting
from tools.bench.servers import ALONE, answers
from tools.bench.split import NetworkLink, relay_command
from tools.serving.ports import free_port
from tools.serving.processes import HOST, Process, ProgramError, own_command

_START_SECONDS = 120.0
_SERVERS = 3
# Of llama-bench: tokens of the prompt, tokens to generate, and how often.
_PROMPT, _GENERATE, _REPETITIONS = 64, 16, 4
# The servers are measured again before every so many arrangements.
_LOOK_EVERY = 4
_CONTEXT = 256
# Measurements that differ by less are equal.
_SAME = 0.03
_CLOSE = 0.20
DIRECT = NetworkLink(0.0, 0.0)

# By number of servers. Servers that are alike are not tried in each other's place: the first is
# the one that is alone and that coordinates.
ARRANGEMENTS = (
    Arrangement("alone", (0,)),
    Arrangement("layers", (0, 1)),
    *(Arrangement(kind, parts, 0) for kind in ("row", "tensor") for parts in ((0, 1), (1,))),
    Arrangement("layers", (0, 1, 2)),
    *(Arrangement(kind, parts, 0) for kind in ("row", "tensor") for parts in ((0, 1, 2), (1, 2))),
)


class AdviceCase(NamedTuple):
    """One model over one network."""

    model: Path
    link: NetworkLink

    @property
    def name(self) -> str:
        return f"{self.model.stem}, {'direct' if self.link == DIRECT else self.link.name}"


def words(arrangement: Arrangement) -> str:
    """Return an arrangement as tables name it."""
    parts = arrangement.parts
    if arrangement.coordinator is None:
        return "alone" if len(parts) == 1 else f"layers, {len(parts)}"
    names = ["local" if i == arrangement.coordinator else str(i + 1) for i in parts]
    return f"{arrangement.kind}, {'+'.join(names)}"


def needs(arrangement: Arrangement) -> int:
    """Return how many servers an arrangement needs."""
    used = {*arrangement.parts, *([] if arrangement.coordinator is None else [0])}
    return max(used) + 1


@contextlib.contextmanager
def _process(core: int, command: list[str], port: int) -> Iterator[None]:
    with on_core(core):
        started = Process(command, env=ALONE)
    with started as process:
        process.wait_until(lambda: answers(port), _START_SECONDS, "answer to HELLO")
        yield


@contextlib.contextmanager
def _reached(core: int, port: int, link: NetworkLink) -> Iterator[int]:
    """Give the port by which a server is reached over a network."""
    if link == DIRECT:
        yield port
        return
    relay = free_port()
    with _process(core, relay_command(relay, port, link), relay):
        yield relay


@contextlib.contextmanager
def serving(case: AdviceCase) -> Iterator[list[int]]:
    """Give the ports of all servers, each on its core and behind its network."""
    with contextlib.ExitStack() as stack:
        ports = []
        for number in range(_SERVERS):
            port = free_port()
            command = own_command(port, "-t", "1", *from_file(case.model))
            stack.enter_context(_process(number, command, port))
            ports.append(stack.enter_context(_reached(number, port, case.link)))
        yield ports


async def _boxes(ports: Sequence[int], shape: ModelShape) -> list[Box]:
    """Measure the servers as tools.workers does; their names are their numbers."""
    names = {f"{HOST}:{port}": str(number) for number, port in enumerate(ports)}
    reports = await survey_all([ServerAddress(HOST, p) for p in ports], measured=False)
    measured = await measure_boxes(reports, shape)
    if measured.unusable:
        raise ProgramError(f"can't be measured: {measured.unusable}")
    return [
        replace(
            box,
            endpoint=names[box.endpoint],
            beside={names[other]: more for other, more in box.beside.items()},
            beside_prompt={names[other]: more for other, more in box.beside_prompt.items()},
        )
        for box in measured.boxes
    ]


@contextlib.contextmanager
def arranged(
    case: AdviceCase, ports: Sequence[int], arrangement: Arrangement, shares: Sequence[float]
) -> Iterator[str]:
    """Give what llama.cpp takes for --rpc."""
    home = arrangement.coordinator
    if home is None:
        yield ",".join(f"{HOST}:{ports[i]}" for i in arrangement.parts)
        return
    parts = ",".join("local" if i == home else f"{HOST}:{ports[i]}" for i in arrangement.parts)
    port = free_port()
    command = own_command(
        port,
        *("-t", "1", *from_file(case.model), "--split", parts),
        *("--tensor-split", ",".join(f"{share:.4f}" for share in shares)),
        *("--split-mode", arrangement.kind),
    )
    with _process(home, command, port), _reached(home, port, case.link) as reached:
        yield f"{HOST}:{reached}"


def measure(
    case: AdviceCase, ports: Sequence[int], arrangement: Arrangement, boxes: list[Box]
) -> Any:
    """Return tokens a second of one arrangement, with the shares that the advice gives it."""
    shape = ModelShape.read(case.model)
    # Each relay is a cable of its own.
    expected = predict(shape, boxes, arrangement, context=_CONTEXT, batch=_PROMPT, one_cable=False)
    options = llama.BenchOptions(_PROMPT, _GENERATE, (0,), _REPETITIONS, 1, True)
    with arranged(case, ports, arrangement, expected.shares) as endpoints:
        rates = llama.best_at(endpoints, case.model, options, waiting(case.model))
    return {**rates, "shares": list(expected.shares)}


class Store:
    """Measurements so far: of each round and case boxes, and rates by arrangement."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rounds: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.rounds = json.loads(path.read_text())["rounds"]

    def entry(self, number: int, case: AdviceCase) -> dict[str, Any]:
        """Return what was measured of a case in a round."""
        while len(self.rounds) <= number:
            self.rounds.append({})
        found: dict[str, Any] = self.rounds[number].setdefault(
            case.name, {"boxes": [], "rates": {}}
        )
        return found

    def save(self) -> None:
        """Write everything to the file, if there is one."""
        if self._path is not None:
            told = {"machine": describe_machine(), "versions": describe_versions()}
            self._path.write_text(json.dumps({**told, "rounds": self.rounds}, indent=1))


def run(cases: Sequence[AdviceCase], rounds: int, store: Store, task: Task) -> None:
    """Measure what isn't there yet."""
    for number in range(rounds):
        for case in cases:
            entry = store.entry(number, case)
            left = [a for a in ARRANGEMENTS if words(a) not in entry["rates"]]
            if entry["boxes"] and not left:
                continue
            shape = ModelShape.read(case.model)
            llama.read_once(case.model)
            with serving(case) as ports:
                look(ports, shape, entry)
                for at, arrangement in enumerate(left):
                    task.step(f"round {number + 1}: {case.name}: {words(arrangement)}")
                    if at and at % _LOOK_EVERY == 0:
                        look(ports, shape, entry)
                    boxes = typical_boxes(entry["boxes"])
                    entry["rates"][words(arrangement)] = measure(case, ports, arrangement, boxes)
                    store.save()
                store.save()


def look(ports: Sequence[int], shape: ModelShape, entry: dict[str, Any]) -> None:
    """Measure the servers once more."""
    entry["boxes"].append([asdict(box) for box in asyncio.run(_boxes(ports, shape))])


Look = Sequence[Mapping[str, Any]]


def typical_boxes(looks: Sequence[Look], elsewhere: Sequence[Look] = ()) -> list[Box]:
    """Return the servers by what was measured in ``looks``, as they are all alike.

    Of rates the best counts. How fast the servers compute was also seen ``elsewhere``, over other
    networks; that is the median, since what else the machine does is there all the while, as it is
    when llama-bench runs. Of round trips and of how much the servers slow one another the lower
    quartile, as the best of llama-bench's repetitions is the one with the least of it.
    """
    near = [server for look in looks for server in look]
    every = near + [server for look in elsewhere for server in look]

    def typical(name: str, seen: Sequence[Mapping[str, Any]] = every) -> Any:
        found = [s[name] for s in seen if s[name] is not None]
        return statistics.median(found) if found else None

    made = []
    for number, server in enumerate(looks[0]):
        same = [look[number] for look in (*looks, *elsewhere)]
        slower: dict[str, dict[str, float]] = {
            kind: {
                name: _lower_quartile([s[kind].get(name, 0.0) for s in same])
                for name in {name for s in same for name in s[kind]}
            }
            for kind in ("beside", "beside_prompt")
        }
        made.append(
            replace(
                Box(**server),
                decode=typical("decode"),
                prompt=typical("prompt"),
                rest=typical("rest"),
                rest_prompt=typical("rest_prompt"),
                round_trip=_lower_quartile([s["round_trip"] for s in near]),
                graph=_lower_quartile([s["graph"] for s in near]),
                cold=typical("cold"),
                link=max(s["link"] for s in near),
                handling=typical("handling", near),
                beside=slower["beside"],
                beside_prompt=slower["beside_prompt"],
            )
        )
    return made


def _lower_quartile(found: Sequence[float]) -> float:
    """Return what a quarter of the values don't exceed."""
    return sorted(found)[(len(found) - 1) // 4]


@dataclass(frozen=True)
class Line:
    """One arrangement of a case: predicted, and measured tokens a second."""

    case: AdviceCase
    arrangement: Arrangement
    prediction: Prediction
    decode: float
    prompt: float

    @property
    def decode_error(self) -> float:
        return self.prediction.tokens_per_second / self.decode - 1

    @property
    def prompt_error(self) -> float:
        return self.prediction.prompt_tokens_per_second / self.prompt - 1


def lines(cases: Sequence[AdviceCase], store: Store) -> list[Line]:
    """Return the prediction and the measurement of each arrangement, the best over the rounds."""
    made = []
    for case in cases:
        entries = [r[case.name] for r in store.rounds if case.name in r]
        looks = [look for entry in entries for look in entry["boxes"]]
        if not looks:
            continue
        others = [
            look
            for entry in store.rounds
            for other in cases
            if other.model == case.model and other != case
            for look in entry.get(other.name, {"boxes": ()})["boxes"]
        ]
        shape, boxes = ModelShape.read(case.model), typical_boxes(looks, others)
        for arrangement in ARRANGEMENTS:
            found = [
                e["rates"][words(arrangement)] for e in entries if words(arrangement) in e["rates"]
            ]
            if not found:
                continue
            best = max(found, key=lambda rates: float(rates["tg"]))
            expected = predict(
                shape,
                boxes,
                arrangement,
                context=_CONTEXT,
                batch=_PROMPT,
                one_cable=False,
                shares=best["shares"] if arrangement.coordinator is not None else None,
            )
            prompt = max(rates["pp"] for rates in found)
            made.append(Line(case, arrangement, expected, best["tg"], prompt))
    return made


@dataclass(frozen=True)
class NamedBest:
    """The best arrangement of the first ``servers``, as predicted and as measured."""

    case: AdviceCase
    servers: int
    named: Line
    best: Line

    @property
    def right(self) -> bool:
        return self.named.decode >= (1 - _SAME) * self.best.decode


def questions(found: Sequence[Line]) -> list[NamedBest]:
    """Return all questions that were answered by measurements."""
    made = []
    for case in dict.fromkeys(line.case for line in found):
        for servers in range(1, _SERVERS + 1):
            able = [x for x in found if x.case == case and needs(x.arrangement) <= servers]
            named = min(
                able, key=lambda x: (x.prediction.seconds_per_token, len(x.arrangement.parts))
            )
            made.append(NamedBest(case, servers, named, max(able, key=lambda x: x.decode)))
    return made


def table(found: Sequence[Line]) -> str:
    """Return predictions and measurements as Markdown: a row for each arrangement and case."""
    text = [
        "| model and network | arrangement | tokens/s | predicted | | prompt/s | predicted | |",
        "|---|---|" + "---:|" * 6,
    ]
    for x in found:
        p = x.prediction
        text.append(
            f"| {x.case.name} | {words(x.arrangement)} | {x.decode:.1f} "
            f"| {p.tokens_per_second:.1f} | {x.decode_error:+.0%} | {x.prompt:.0f} "
            f"| {p.prompt_tokens_per_second:.0f} | {x.prompt_error:+.0%} |"
        )
    return "\n".join(text)


def summary(found: Sequence[Line]) -> str:
    """Return how often the best arrangement was named, and how far off the figures were."""
    asked = [q for q in questions(found) if q.servers > 1]
    text = [
        "| model and network | servers | named | tokens/s | the best | tokens/s |",
        "|---|---|---|---:|---|---:|",
    ]
    for q in asked:
        text.append(
            f"| {q.case.name} | {q.servers} | {words(q.named.arrangement)} | {q.named.decode:.1f} "
            f"| {words(q.best.arrangement)} | {q.best.decode:.1f} |"
        )
    close = sum(abs(x.decode_error) <= _CLOSE for x in found)
    prompts = sum(abs(x.prompt_error) <= _CLOSE for x in found)
    text += [
        "",
        f"best arrangement named: {sum(q.right for q in asked)} of {len(asked)} "
        f"(equal are those within {_SAME:.0%})",
        f"within {_CLOSE:.0%}: generation {close} of {len(found)}, prompts {prompts} of "
        f"{len(found)}",
    ]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and show; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.advice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, action="append", required=True, metavar="FILE", help="GGUF file")
    add("--link", type=NetworkLink.of, action="append", default=[], metavar="DELAY:RATE")
    add("--rounds", type=int, default=2, metavar="N", help="(default: %(default)s; 0: only show)")
    add("--json", type=Path, metavar="FILE", help="keep what is measured in this file")
    options = parser.parse_args(arguments)
    if upstream.find_program("llama-bench") is None:
        print("error: no llama-bench: run python -m tools.upstream", file=sys.stderr)
        return 1
    links = (DIRECT, *options.link)
    cases = [AdviceCase(model, link) for link in links for model in options.model]
    store = Store(options.json)
    steps = options.rounds * len(cases) * len(ARRANGEMENTS)
    try:
        with shown(), begin("measuring", steps) as task:
            run(cases, options.rounds, store, task)
        found = lines(cases, store)
    except (ProgramError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(found))
    print()
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
