"""One graph of a capture: as text, for Graphviz, or drawn by it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from protocol.dialects import Dialect
from protocol.ggml.ops import VIEWS
from protocol.graph_payload import GraphPayload
from protocol.observe.annotate import GraphTensor, graph_lines, graph_tensors, shape_text
from protocol.observe.conversation import Event, ObservedMessage
from protocol.split import ProgramPayload
from tools.capture.connections import CapturedConnection
from tools.capture.errors import MissingToolError
from tools.dump.filters import Filters
from tools.dump.screen import printable

_DRAW_SECONDS = 120


class GraphFinder:
    """Finds the graph with a number, counted from 1 through the capture as lines show it."""

    def __init__(self, number: int, filters: Filters) -> None:
        self._number = number
        self._filters = filters
        self.count = 0
        self.found: ObservedMessage | None = None

    def opened(self, connection: CapturedConnection) -> None:
        pass

    def closed(self, connection: CapturedConnection) -> None:
        pass

    def event(self, connection: CapturedConnection, event: Event) -> None:
        if not isinstance(event, ObservedMessage) or event.graph is None:
            return
        self.count += 1
        if self.count == self._number:
            self.found = event

    def render(self, form: str) -> str:
        """Return the graph as ``text``, ``dot`` or ``svg``.

        Raises MissingToolError without Graphviz.
        """
        assert self.found is not None
        assert self.found.graph is not None
        graph, dialect = self.found.graph, self.found.dialect
        if form == "text":
            return "".join(f"{printable(line)}\n" for line in graph_lines(graph, dialect))
        dot = "".join(f"{line}\n" for line in dot_lines(graph, dialect))
        return dot if form == "dot" else draw(dot)


def _quoted(text: str) -> str:
    escaped = printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def dot_lines(graph: GraphPayload | ProgramPayload, dialect: Dialect) -> Iterator[str]:
    """Yield the graph in Graphviz' language.

    Computed nodes are boxes, what is only read ellipses.
    """
    nodes = (
        graph.nodes.tolist()
        if isinstance(graph, GraphPayload)
        else [i for step in graph.steps for i in step.nodes]
    )
    tensors = graph_tensors(graph.tensors, nodes, dialect)
    yield "digraph graph_ {"
    yield '  node [fontname="Helvetica", fontsize=10];'
    for tensor in tensors.values():
        yield f"  {_dot_node(tensor)}"
    for tensor in tensors.values():
        for i, source in enumerate(tensor.sources):
            yield f'  "{source:x}" -> "{tensor.id:x}" [label="{i}", fontsize=8];'
        if tensor.view_of and tensor.view_of not in tensor.sources:
            yield f'  "{tensor.view_of:x}" -> "{tensor.id:x}" [style=dashed];'
    yield "}"


def _dot_node(tensor: GraphTensor) -> str:
    lines = [tensor.label, f"{tensor.type} {shape_text(tensor.ne)}"]
    shape = "ellipse"
    if tensor.node is not None:
        lines.insert(0, f"{tensor.node}: {tensor.op}")
        shape = "box"
    # A line break within a label is its own escape.
    label = "\\n".join(_quoted(line)[1:-1] for line in lines)
    style = ", style=dotted" if tensor.op in VIEWS and tensor.node is not None else ""
    return f'"{tensor.id:x}" [label="{label}", shape={shape}{style}];'


def draw(dot: str) -> str:
    """Draw it as SVG by Graphviz. Raises MissingToolError where that isn't installed."""
    program = shutil.which("dot")
    if program is None:
        raise MissingToolError(
            "drawing a graph needs Graphviz' program dot (apt install graphviz); "
            "--format dot writes what it would be given"
        )
    done = subprocess.run(
        [program, "-Tsvg"], input=dot, capture_output=True, text=True, timeout=_DRAW_SECONDS
    )
    if done.returncode:
        raise MissingToolError(f"dot failed: {done.stderr.strip()}")
    return done.stdout
