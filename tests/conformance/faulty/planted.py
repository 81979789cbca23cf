"""All planted faults."""

from __future__ import annotations

from tests.conformance.faulty import answers, framing, graphs, groups, memory, split
from tests.conformance.faulty.registry import FAULTS, Fault

__all__ = ["FAULTS", "Fault", "answers", "framing", "graphs", "groups", "memory", "split"]
