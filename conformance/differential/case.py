"""One graph with the values of its leaves and what to compare: drawn, described, kept as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from client.builder.graph import Graph, GraphBuilder
from client.tensors import dims, encode_params
from conformance.differential.compare import Check, Equality
from conformance.differential.values import Fill, ValueKind
from protocol.ggml.ops import VIEWS, GluOp, Op, UnaryOp
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, padded_sources


@dataclass(frozen=True, slots=True)
class GraphCase:
    """``outputs`` are compared; ``fills`` say what leaves hold (of all roots that aren't nodes)."""

    outputs: tuple[tuple[Tensor, Check], ...]
    fills: dict[Tensor, Fill]
    graph: Graph

    @classmethod
    def of(cls, outputs: Sequence[tuple[Tensor, Check]], fills: dict[Tensor, Fill]) -> GraphCase:
        graph = GraphBuilder().build([t for t, _ in outputs])
        return cls(tuple(outputs), {t: fills[t] for t in graph.leaves}, graph)

    @property
    def written(self) -> list[Tensor]:
        """Tensors whose elements the graph writes: nodes, and the averages that AdamW keeps."""
        nodes = [t for t in self.graph.nodes if t.op not in VIEWS]
        averages = [s for t in nodes if t.op is Op.OPT_STEP_ADAMW for s in t.src[2:4]]
        return [*nodes, *(s for s in averages if s is not None)]

    def key(self) -> str:
        """Return a key that is equal for cases that differ in the seeds of their values only."""
        rows = [
            (t.type, t.op, t.ne, t.nb, t.view_offs, t.view_src is not None, _count(t), t.op_params)
            for t in self.graph.tensors
        ]
        kinds = [(f.kind, f.low, f.high) for f in self.fills.values()]
        return hashlib.sha1(repr((rows, kinds)).encode()).hexdigest()

    def describe(self) -> str:
        """Return the graph as text, a line per tensor that isn't a dense leaf's view chain."""
        names = {t: f"%{i}" for i, t in enumerate(self.graph.tensors)}
        lines = []
        for t in self.graph.tensors:
            sources = ", ".join(names[s] if s is not None else "-" for s in t.src[: _count(t)])
            line = f"{names[t]} = {_op_name(t)}({sources}) {t.type.name} ne={list(t.ne)}"
            if not t.contiguous or t.view_src is not None:
                line += f" nb={list(t.nb)}"
            if t.view_src is not None:
                line += f" in {names[t.view_src]}+{t.view_offs}"
            if any(t.op_params):
                words = list(t.op_params)
                while words and not words[-1]:
                    words.pop()
                line += f" params={words}"
            if t in self.fills:
                fill = self.fills[t]
                line += f" {fill.kind}({fill.low:g}, {fill.high:g}) seed={fill.seed}"
            lines.append(line)
        outputs = ", ".join(f"{names[t]} by {c.how} {c.bound:g}" for t, c in self.outputs)
        return "\n".join([*lines, f"compared: {outputs}"])

    # -- JSON

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data; tensors by their position."""
        at = {t: i for i, t in enumerate(self.graph.tensors)}
        tensors = []
        for t in self.graph.tensors:
            row: dict[str, Any] = {"type": t.type.name, "op": t.op.value, "ne": list(t.ne)}
            row["nb"] = list(t.nb)
            row["params"] = list(t.op_params)
            row["src"] = [None if s is None else at[s] for s in t.src[: _count(t)]]
            if t.view_src is not None:
                row["view"] = [at[t.view_src], t.view_offs]
            if t in self.fills:
                row["fill"] = asdict(self.fills[t])
            tensors.append(row)
        outputs = [
            {"tensor": at[t], "how": c.how, "bound": c.bound, "of": at[c.of] if c.of else None}
            for t, c in self.outputs
        ]
        return {"tensors": tensors, "outputs": outputs}

    def dumps(self) -> str:
        """Return JSON text with a tensor per line."""
        data = self.to_json()
        tensors = ",\n  ".join(json.dumps(row) for row in data["tensors"])
        outputs = json.dumps(data["outputs"])
        return f'{{"tensors": [\n  {tensors}\n ],\n "outputs": {outputs}}}\n'

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphCase:
        """Return what to_json gave."""
        tensors: list[Tensor] = []
        fills: dict[Tensor, Fill] = {}
        for i, row in enumerate(data["tensors"]):
            view = row.get("view")
            t = Tensor(
                i + 1,
                GgmlType[row["type"]],
                dims(row["ne"]),
                dims(row["nb"]),
                Op(row["op"]),
                encode_params(row["params"]),
                view_src=tensors[view[0]] if view else None,
                view_offs=view[1] if view else 0,
            )
            tensors.append(t)
            # A cast is its own second source, so it must be there before.
            t.src = padded_sources(None if s is None else tensors[s] for s in row["src"])
            if "fill" in row:
                fields = dict(row["fill"])
                fills[t] = Fill(ValueKind(fields.pop("kind")), **fields)
        outputs = [
            (
                tensors[o["tensor"]],
                Check(
                    Equality(o["how"]), o["bound"], None if o["of"] is None else tensors[o["of"]]
                ),
            )
            for o in data["outputs"]
        ]
        return cls.of(outputs, fills)


def _count(t: Tensor) -> int:
    """Return how many sources are written down: all up to the last one."""
    return max((i for i, s in enumerate(t.src, 1) if s is not None), default=0)


def _op_name(t: Tensor) -> str:
    if t.op is Op.UNARY:
        return UnaryOp(t.op_params[0]).name
    if t.op is Op.GLU:
        return GluOp(t.op_params[0]).name
    return t.op.value
