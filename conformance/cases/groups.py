"""The groups that cases belong to, in the order in which they run."""

from __future__ import annotations

from conformance.suite.registry import Group

HANDSHAKE = Group(1, "handshake", "Handshake and versions")
FRAMING = Group(2, "framing", "Framing")
BUFFERS = Group(3, "buffers", "Buffers and addresses")
TENSORS = Group(4, "tensors", "Tensor transfer")
GRAPHS = Group(5, "graphs", "Graphs")
RECOMPUTE = Group(6, "recompute", "Graphs run again")
DEVICES = Group(7, "devices", "Several devices")
CLIENTS = Group(8, "clients", "Several clients")
HOSTILE = Group(9, "hostile", "Limits and hostile input")
SPLIT = Group(10, "split", "Split extension")
PROPERTIES = Group(11, "properties", "Generated properties")
SEQUENCES = Group(12, "sequences", "What real clients send")

GROUPS = (
    HANDSHAKE,
    FRAMING,
    BUFFERS,
    TENSORS,
    GRAPHS,
    RECOMPUTE,
    DEVICES,
    CLIENTS,
    HOSTILE,
    SPLIT,
    PROPERTIES,
    SEQUENCES,
)
