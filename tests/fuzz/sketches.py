"""Graphs of nodes that are nearly alike, for planning that remembers what it has decided."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protocol.dialects import DIALECTS
from protocol.ggml.ops import GluOp, Op, TensorFlag, UnaryOp
from protocol.ggml.types import GgmlType, row_size
from protocol.graph_payload import GraphPayload
from protocol.messages import RPC_TENSOR_DTYPE

F32, F16, I32, Q8_0, Q4_0 = (
    GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.Q8_0, GgmlType.Q4_0,
)  # fmt: skip

BASE, _SIZE, _AT = 1 << 20, 1 << 30, 1 << 40


@dataclass(frozen=True)
class Nowhere:
    """A buffer without memory, in which all tensors of a sketch lie."""

    base: int = BASE
    size: int = _SIZE
    address: int = _AT


def resolve(handle: int) -> Nowhere:
    """Return where the buffer of any handle lies."""
    return Nowhere()


@dataclass
class Sketch:
    """A graph of few shapes, strides, parameters and places, so that nodes are nearly alike."""

    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choose = random.Random(self.seed)

    def tensor(
        self,
        type_: GgmlType,
        ne: tuple[int, ...],
        op: Op = Op.NONE,
        src: tuple[int, ...] = (),
        params: tuple[int, ...] = (),
        data: int | None = None,
    ) -> int:
        """Append a tensor; its id."""
        pick, ne = self.choose.choice, (*ne, 1, 1, 1)[:4]
        row = row_size(type_, ne[0])
        nb1 = row * pick((1, 1, 2, 3))
        nb2 = nb1 * ne[1]
        nb3 = nb2 * ne[2]
        if pick((True, False)):
            # Of dimensions of one element they may be anything; they differ in one alone.
            nb2 = 3 * row * ne[1] * pick((1, 2))
            nb3 = 6 * row * ne[1] * ne[2] * pick((1, 2))
        size = row_size(type_, 1) if type_ in (F32, F16, I32) else row_size(type_, 32)
        self.rows.append(
            {
                "id": len(self.rows) + 1,
                "type": int(type_),
                "buffer": 1,
                "ne": ne,
                "nb": (size, nb1, nb2, nb3),
                "op": DIALECTS[0].numbering.numbers[op],
                "op_params": (*params, *[0] * (16 - len(params))),
                "flags": TensorFlag.COMPUTE if op is not Op.NONE else 0,
                "src": (*src, *[0] * (10 - len(src))),
                # Few places: results lie over sources, and over what was made of them.
                "data": BASE + 4096 * self.choose.randrange(40) if data is None else data,
                "name": f"t{len(self.rows)}".encode(),
            }
        )
        return len(self.rows)

    def node(self) -> None:
        """Append a node with sources of its own."""
        pick = self.choose.choice
        width, n = pick((32, 64)), pick((1, 2, 3))
        kind = pick(("add", "scale", "norm", "product", "copy", "rows", "rope", "glu", "unary"))
        if kind == "add":
            x = self.tensor(F32, (width, n))
            y = x if pick((True, False)) else self.tensor(F32, (width, pick((1, n))))
            place = self.rows[x - 1]["data"] if pick((True, False)) else None
            self.tensor(F32, (width, n), pick((Op.ADD, Op.MUL)), (x, y), data=place)
        elif kind in ("scale", "norm", "unary"):
            op, params = {
                "scale": (Op.SCALE, (pick((1, 2)),)),
                "norm": (Op.RMS_NORM, (pick((0, 1)),)),
                "unary": (Op.UNARY, (int(pick((UnaryOp.SILU, UnaryOp.GELU, UnaryOp.ROUND))),)),
            }[kind]
            self.tensor(F32, (width, n), op, (self.tensor(F32, (width, n)),), params)
        elif kind == "product":
            # Few activations: their rows are converted once for several weights.
            x = pick(self.inputs())
            ne = self.rows[x - 1]["ne"]
            weights = self.tensor(pick((F32, F16, Q8_0, Q4_0)), (ne[0], pick((4, 8))))
            result = (self.rows[weights - 1]["ne"][1], ne[1])
            self.tensor(F32, result, Op.MUL_MAT, (weights, x))
        elif kind == "copy":
            x = self.tensor(pick((F32, F16)), (width, n))
            self.tensor(pick((F32, F16)), (width, n), Op.CPY, (x,))
        elif kind == "rows":
            table, ids = self.tensor(pick((F32, Q8_0)), (width, 9)), self.tensor(I32, (n,))
            self.tensor(F32, (width, n), Op.GET_ROWS, (table, ids))
        elif kind == "rope":
            x, at = self.tensor(F32, (32, 2, n)), pick(self.positions(n))
            base = int(np.float32(pick((1e4, 1e6))).view(np.int32))
            turning = (0, 32, pick((0, 2)), 0, 0, base, int(np.float32(1).view(np.int32)))
            self.tensor(F32, (32, 2, n), Op.ROPE, (x, at), turning)
        else:
            x = self.tensor(F32, (width, n))
            self.tensor(F32, (width // 2, n), Op.GLU, (x,), (int(pick(tuple(GluOp))), pick((0, 1))))

    def inputs(self) -> list[int]:
        """Activations that products share."""
        found = [r["id"] for r in self.rows if r["type"] == F32 and r["data"] >= BASE + (1 << 24)]
        if len(found) < 3:
            width, n = self.choose.choice((32, 64)), self.choose.choice((1, 3))
            at = BASE + (1 << 24) + len(found) * 4096
            found.append(self.tensor(F32, (width, n), data=at))
        return found

    def positions(self, n: int) -> list[int]:
        """Positions that rotations share."""
        at = BASE + (1 << 25) + n * 4096
        found = [r["id"] for r in self.rows if r["data"] == at]
        return found or [self.tensor(I32, (n,), data=at)]

    def payload(self, nodes: int) -> GraphPayload:
        """The graph of so many nodes."""
        for _ in range(nodes):
            self.node()
        wire = np.zeros(len(self.rows), RPC_TENSOR_DTYPE)
        for i, row in enumerate(self.rows):
            for name, value in row.items():
                wire[name][i] = value
        ids = wire["id"][wire["flags"] != 0]
        return GraphPayload(0, ids.astype("<u8"), wire)
