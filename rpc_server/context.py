"""What all sessions of a server share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from protocol.ggml_types import GgmlType
from protocol.negotiation import Negotiator
from rpc_server.cache import TensorCache
from rpc_server.limits import ServerLimits
from rpc_server.memory import AddressSpace, Budget
from rpc_server.metrics import Figures

log = logging.getLogger(__name__)

# Smaller uploads are inputs of a graph, not weights.
_WEIGHT_FROM = 64 << 10
_TYPES = {int(t): t for t in GgmlType}


@dataclass(slots=True)
class ServerContext:
    """One per server. ``budgets`` are the devices in the order that clients number them."""

    budgets: list[Budget]
    negotiator: Negotiator
    cache: TensorCache | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)
    figures: Figures = field(default_factory=Figures)
    space: AddressSpace = field(default_factory=AddressSpace)
    _announced: set[tuple[int, int]] = field(default_factory=set)

    def weights_arrive(self, device: int, type_number: int, size: int) -> None:
        """Let the device get ready for weights of a type while they are still uploading."""
        if size < _WEIGHT_FROM or (device, type_number) in self._announced:
            return
        self._announced.add((device, type_number))
        if type_number in _TYPES:
            self.budgets[device].device.expect_weights(_TYPES[type_number])
