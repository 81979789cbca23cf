"""Writes docs/ops.md: which ops this server runs, of which types, and how.

    python -m tools.op_table            # rewrite the document
    python -m tools.op_table --check    # fail if it is out of date

What is listed was tried: cases of every op and type are drawn by the strategies of the differential
tester, held against the op's contract and planned for the device. Types are those of an op's first
source; an op that converts is listed by pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

import conformance.differential.families  # noqa: F401  (these fill the tables)
import rpc_server.devices.cpu.lower
import rpc_server.ops  # noqa: F401  (these fill the tables)
from conformance.differential.case import GraphCase
from conformance.differential.sketch import FAMILIES, Family
from conformance.differential.uncovered import UNCOVERED
from protocol.dialects import DIALECTS
from protocol.ggml.ops import VIEWS, Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.planner import LOWERINGS, Planner
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import parse_graph
from rpc_server.ops.table import ContractError, check
from tools.documents import keep

DOCUMENT = Path(__file__).parents[1] / "docs" / "ops.md"

# Cases drawn of each variant. What a contract refuses depends on more than types; that one of them
# passes is what counts.
_EXAMPLES = 6
_MEMORY = 64 << 20
# Ops of which the result's type is the interesting one too.
# Where another source than the first says most: keys of attention.
_TELLING = {Op.FLASH_ATTN_EXT: 1}
_CONVERTS = frozenset({Op.CPY, Op.SET_ROWS})

_INTRO = """\
# Ops and types

Which of ggml's ops this server runs on its CPU device. Written by `python -m tools.op_table` from
the op table and the strategies of the differential tester (`python -m conformance.differential`),
which holds every one of them against upstream's server. **Kernel**: compiled code. **Reference**:
array code, right but slower. Types are those of the first source (of FLASH_ATTN_EXT: of the keys);
the rest of an op's combinations follows ggml's CPU backend.
"""


@dataclass
class Support:
    """The way the combinations of one op that were tried run on the device."""

    kernel: set[str] = field(default_factory=set)
    reference: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)


class _Buffer:
    """The client's one buffer, as parsing sees it; the addresses are never used."""

    base = 1 << 44
    size = _MEMORY
    address = 1 << 40


def _cases(family: Family, variant: object) -> list[GraphCase]:
    found: list[GraphCase] = []
    search = settings(
        max_examples=_EXAMPLES,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )

    def note(case: GraphCase) -> None:
        found.append(case)

    search(given(family.strategy(variant))(note))()
    return found


def _nodes(case: GraphCase) -> Sequence[Tensor]:
    at = 0
    for root in case.graph.roots:
        root.place(1, _Buffer.base + at)
        at += -(-(root.nbytes + 64) // 64) * 64
    payload = case.graph.payload(DIALECTS[0])
    return parse_graph(payload, DIALECTS[0], lambda handle: _Buffer()).nodes


def _name(node: Tensor) -> str:
    source = node.src[_TELLING.get(node.op, 0)]
    type_ = node.type if source is None else source.type
    return f"{type_.name}→{node.type.name}" if node.op in _CONVERTS else type_.name


def tried() -> dict[Op, Support]:
    """Return what each op's cases came to; a combination counts by its best case."""
    found = {op: Support() for op in Op}
    planner = Planner(2, ScratchArena())
    for family in FAMILIES.values():
        for variant in family.variants:
            for case in _cases(family, variant):
                try:
                    nodes = _nodes(case)
                except GraphError:
                    continue
                for node in nodes:
                    if node.op not in VIEWS and not node.empty:
                        _note(found[node.op], node, planner)
    for support in found.values():
        support.reference -= support.kernel
        done = support.kernel | support.reference
        support.refused = {k: v for k, v in support.refused.items() if k not in done}
    return found


def _note(support: Support, node: Tensor, planner: Planner) -> None:
    try:
        spec = check(node)
    except ContractError as error:
        support.refused.setdefault(_name(node), str(error).partition(": ")[2])
        return
    planner.begin(node)
    lowering = LOWERINGS.get(node.op)
    if lowering is not None and lowering(node, planner):
        support.kernel.add(_name(node))
    elif spec.reference is not None:
        support.reference.add(_name(node))
    planner.finish(node)


_ORDER = {t.name: i for i, t in enumerate(GgmlType)}


def _types(names: set[str]) -> str:
    """Types in ggml's order; pairs gathered by their source."""
    if not any("→" in n for n in names):
        return " ".join(sorted(names, key=lambda n: _ORDER[n]))
    by_source: dict[str, list[str]] = {}
    for name in names:
        source, _, target = name.partition("→")
        by_source.setdefault(source, []).append(target)
    lines = [
        f"{source} → {' '.join(sorted(by_source[source], key=lambda n: _ORDER[n]))}"
        for source in sorted(by_source, key=lambda n: _ORDER[n])
    ]
    return "<br>".join(lines)


def document() -> str:
    """Return the whole text."""
    return "\n".join([_INTRO, *_lines(tried())]) + "\n"


def _lines(found: dict[Op, Support]) -> Iterator[str]:
    yield "| op | kernel | reference |"
    yield "|---|---|---|"
    for op, support in found.items():
        if op in VIEWS:
            continue
        if op in UNCOVERED:
            yield f"| {op} | {UNCOVERED[op]} | |"
            continue
        yield f"| {op} | {_types(support.kernel)} | {_types(support.reference)} |"
    yield ""
    yield f"{', '.join(sorted(VIEWS))} only describe memory."
    refused = [
        (op, name, reason)
        for op, support in found.items()
        for name, reason in support.refused.items()
    ]
    if refused:
        yield ""
        yield "## Refused"
        yield ""
        yield "| op | types | reason |"
        yield "|---|---|---|"
        for op, name, reason in refused:
            yield f"| {op} | {name} | {reason} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return keep(DOCUMENT, "tools.op_table", document, arguments)


if __name__ == "__main__":
    sys.exit(main())
