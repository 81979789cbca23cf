"""11: generated properties: a case is a search for what breaks one, with a few examples.

``python -m conformance.properties`` searches longer.
"""

from __future__ import annotations

from conformance.cases.groups import PROPERTIES
from conformance.properties.findings import explore
from conformance.properties.properties import DAMAGE, GRAPHS, SESSIONS, Property, PropertyTarget
from conformance.suite import Context

_EXAMPLES = {SESSIONS.name: 100, GRAPHS.name: 20, DAMAGE.name: 40}


def _search(c: Context, property_: Property) -> None:
    target = PropertyTarget(c.address, c.facts, patience=c.patience)
    if not property_.fits(target):
        c.skip("which ops a graph of this version has shows by its patch number only")
    _, finding = explore(target, property_, _EXAMPLES[property_.name], c.seed)
    if finding is not None:
        if finding.transcript is not None:
            c.transcript = finding.transcript
        c.fail(finding.summary())


@PROPERTIES.case(
    1,
    sends=f"{_EXAMPLES['sessions']} random sessions of two clients (one, where one is served at a "
    "time): alloc, upload, fill, copy, graphs, runs again, uploads by hash, free, reconnect",
    source="docs/protocol.md; the model is conformance/properties/memory.py",
    deadline=120.0,
)
def sessions(c: Context) -> None:
    """Answers to the wrong client, stale graphs, wrong ranges: any of them shows in memory.

    Expects: after every request all memory of all clients is what a model says
    """
    _search(c, SESSIONS)


@PROPERTIES.case(
    2,
    sends=f"{_EXAMPLES['graphs']} random graphs of up to 200 nodes, each whole and node by node",
    source="ggml's constructors and ops; conformance/properties/evaluate.py",
    deadline=120.0,
)
def graphs(c: Context) -> None:
    """Long chains, shared sources, views and work in place, as planners meet them.

    Expects: every node is what numpy makes of its sources; nothing else is written
    """
    _search(c, GRAPHS)


@PROPERTIES.case(
    3,
    sends=f"{_EXAMPLES['damage']} streams of requests with flipped, lost, repeated, added bytes",
    source="docs/protocol.md, Framing",
    hostile=True,
    deadline=120.0,
)
def damage(c: Context) -> None:
    """Whatever arrives on a port is input.

    Expects: the server answers or hangs up; it doesn't hang, and no other client notices
    """
    _search(c, DAMAGE)
