"""Errors of a graph: everything that ends it with a message for the log."""

from __future__ import annotations


class GraphError(Exception):
    """A graph can't be run: malformed, against a contract, or failed while running.

    The message names the node; the session that sent the graph closes its connection.
    """


class NodeError(GraphError):
    """A node of a sound graph can't be run here: against its op's contract, or without a kernel."""
