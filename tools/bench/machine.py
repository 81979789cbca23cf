"""What a measurement ran on and with."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from rpc_server.devices.cpu.machine import available_cores, processor_name, system_memory
from rpc_server.options import server_version
from tools.upstream import DEFAULT_BUILD


def describe_machine() -> dict[str, Any]:
    """Return processor, cores that may be used, memory and system."""
    _, total = system_memory()
    return {
        "processor": processor_name(),
        "cores": available_cores(),
        "memory": f"{total / (1 << 30):.1f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Return both servers, and what this one is made with."""
    return {
        "ours": server_version(),
        "upstream": f"llama.cpp b{DEFAULT_BUILD}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "numba")},
    }
