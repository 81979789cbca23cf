"""Which instruction sets compiled code may use on this machine."""

from __future__ import annotations

import ctypes
import functools
import os

from rpc_server.devices.cpu.catalog import instruction_sets
from rpc_server.devices.cpu.kernels.interface.isa import Isa


@functools.cache
def host_isas() -> tuple[Isa, ...]:
    """Return what code for this processor may use, the best last. Raises CompileError."""
    # Only the compiler knows, so it is asked by way of a routine which says it.
    bits = ctypes.CFUNCTYPE(ctypes.c_int64)(instruction_sets.address)()
    return tuple(isa for isa in Isa if bits >> isa & 1)


def chosen_isa() -> Isa:
    """Return the best of :func:`host_isas`, or what ``GGML_RPC_ISA`` names.

    Raises ValueError if it can't run.
    """
    name = os.environ.get("GGML_RPC_ISA")
    if not name:
        return host_isas()[-1]
    for isa in host_isas():
        if isa.name == name.upper():
            return isa
    raise ValueError(f"GGML_RPC_ISA={name}: this processor runs {', '.join(map(str, host_isas()))}")
