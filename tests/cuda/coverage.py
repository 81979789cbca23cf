"""Which nodes have no kernel on a GPU: ``python -m tests.cuda.coverage`` prints them as a table.

The nodes are drawn by the differential tester's families, which have a variant for each type and
parameter that ggml's CPU backend supports; nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import conformance.differential.families  # noqa: F401  (fills the table of families)
import rpc_server.devices.cuda.lower
import rpc_server.ops  # noqa: F401  (both fill their tables)
from conformance.differential.case import GraphCase
from conformance.differential.sketch import FAMILIES
from conformance.properties.search import search
from protocol.tensor import Tensor, place_views
from rpc_server.devices.cuda.planner import CudaPlanner, lower_to_launches
from rpc_server.ops.table import ContractError, check

# (op, what of it has no kernel)
Gap = tuple[str, str]

# Roots are put so far from one another; they are never looked at.
_APART = 1 << 40


def nodes_of(case: GraphCase) -> list[Tensor]:
    """The case's nodes, each root at an address of its own."""
    for i, root in enumerate(case.graph.roots, 1):
        root.place(1, i * _APART)
    place_views(case.graph.tensors)
    return list(case.graph.nodes)


def lowered(nodes: list[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each node that computes something, and whether it has a kernel."""
    planner = CudaPlanner(nodes, multiprocessors=4, capability=61)
    for node in nodes:
        planner.begin(node)
        spec = check(node)
        if not spec.is_view and not node.empty:
            yield node, lower_to_launches(node, planner)
        planner.finish(node)


def survey(examples: int = 1) -> set[Gap]:
    """What has no kernel in ``examples`` cases of each variant."""
    found: set[Gap] = set()

    def look(case: GraphCase) -> None:
        try:
            found.update(
                (str(node.op), reason(node))
                for node, has_kernel in lowered(nodes_of(case))
                if not has_kernel
            )
        except ContractError:
            # Upstream's server refuses some cases, too.
            return

    for family in FAMILIES.values():
        for variant in family.variants:
            done = search(family.strategy(variant), look, examples, seed=1, shrink=False)
            assert done.found is None
    return found


def reason(t: Tensor) -> str:
    """Why a node without a kernel has none, as a line of the table."""
    sources = [s for s in t.src if s is not None]
    return f"{', '.join(s.type.name for s in sources)} to {t.type.name}"


def table(without: set[Gap]) -> str:
    """Markdown: an op and a reason a line."""
    return "\n".join(
        [
            "| op | what has no kernel |",
            "|---|---|",
            *(f"| {op} | {why} |" for op, why in sorted(without)),
        ]
    )


if __name__ == "__main__":
    print(table(survey(examples=10)))
