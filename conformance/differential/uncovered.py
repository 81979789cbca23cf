"""Ops that no family draws, and why: together with the families these are all ops of ggml."""

from __future__ import annotations

from protocol.ggml.ops import Op

_FUNCTION = "a function of the client's own process, which no server can call"

UNCOVERED: dict[Op, str] = {
    Op.NONE: "not a node: a leaf, of which every case has some",
    Op.MAP_CUSTOM1: _FUNCTION,
    Op.MAP_CUSTOM2: _FUNCTION,
    Op.MAP_CUSTOM3: _FUNCTION,
    Op.CUSTOM: _FUNCTION,
}
