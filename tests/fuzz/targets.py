"""The targets by name: what takes the bytes, valid inputs to start from, how to damage them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import damage, graphs, inputs, seeds, streams

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True, slots=True)
class Target:
    """``run`` gives False for an input that isn't worth keeping, and raises for a finding.

    ``also`` is a target whose inputs are as good for this one; ``unseen`` are modules that don't
    guide the search.
    """

    name: str
    about: str
    run: Callable[[bytes], bool]
    seeds: seeds.Seeds
    damage: damage.Damage
    largest: int
    also: str = ""
    unseen: tuple[str, ...] = ()

    @property
    def corpus(self) -> Path:
        """The archive of its kept inputs."""
        return CORPUS / f"{self.name}{inputs.SUFFIX}"


TARGETS = {
    t.name: t
    for t in (
        Target(
            "requests",
            "a client's stream, in all dialects, in one piece and in segments",
            streams.requests,
            seeds.request_inputs,
            damage.request_damage,
            16 << 10,
        ),
        Target(
            "answers",
            "a server's stream, likewise",
            streams.answers,
            seeds.answer_inputs,
            damage.answer_damage,
            8 << 10,
        ),
        Target(
            "graph",
            "the payload of GRAPH_COMPUTE decoded and linked",
            graphs.graph,
            seeds.graph_inputs,
            damage.graph_damage,
            8 << 10,
        ),
        Target(
            "plan",
            "graphs held against contracts and lowered, nothing run",
            graphs.plan,
            seeds.graph_inputs,
            damage.graph_damage,
            8 << 10,
        ),
        Target(
            "run",
            "graphs run by kernels and by references on buffers that end at a guard page",
            graphs.run,
            seeds.graph_inputs,
            damage.graph_damage,
            8 << 10,
            "plan",
            # atheris keeps the result of each comparison of arrays, megabytes a second.
            ("rpc_server.ops", "rpc_server.types"),
        ),
        Target(
            "program",
            "programs of the split extension decoded, linked and planned",
            graphs.program,
            seeds.program_inputs,
            damage.program_damage,
            8 << 10,
        ),
    )
}
