"""The groups that cases belong to, in the order in which they run."""

from __future__ import annotations

from conformance.suite.registry import Group

_TITLES = """\
handshake   Handshake and versions
framing     Framing
buffers     Buffers and addresses
tensors     Tensor transfer
graphs      Graphs
recompute   Graphs run again
devices     Several devices
clients     Several clients
hostile     Limits and hostile input
split       Split extension
properties  Generated properties
sequences   What real clients send"""
GROUPS = tuple(
    Group(number, name, title)
    for number, line in enumerate(_TITLES.splitlines(), 1)
    for name, title in [line.split(maxsplit=1)]
)
HANDSHAKE, FRAMING, BUFFERS, TENSORS, GRAPHS, RECOMPUTE = GROUPS[:6]
DEVICES, CLIENTS, HOSTILE, SPLIT, PROPERTIES, SEQUENCES = GROUPS[6:]
