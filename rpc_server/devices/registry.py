"""The devices of this machine by name, and the choice among them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

from rpc_server.devices.base import Device
from rpc_server.devices.cuda.card import CardError, card_count


class UnknownDeviceError(ValueError):
    """A device was asked for that this machine doesn't have; the message lists those it has."""


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """What devices are made with.

    ``threads`` None means all cores the process may use; ``allow_host_ops`` lets ops without a
    kernel for the GPU run on the host.
    """

    threads: int | None = None
    allow_host_ops: bool = False


Factory = Callable[[DeviceOptions], Device]


def _cpu(options: DeviceOptions) -> Device:
    from rpc_server.devices.cpu.device import CpuDevice

    return CpuDevice(options.threads)


def _cuda(index: int, options: DeviceOptions) -> Device:
    from rpc_server.devices.cuda.device import CudaDevice

    return CudaDevice(index, allow_host_ops=options.allow_host_ops)


@functools.cache
def _gpus() -> tuple[int, str]:
    """How many GPUs there are; and if none, why."""
    # CuPy takes a second to import; most machines without a GPU don't have it.
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        return 0, "CuPy is not installed: pip install 'ggml-rpc-server[cuda12]', or [cuda13]"
    try:
        return card_count(), ""
    except CardError as error:
        return 0, str(error)


def _factories() -> dict[str, Factory]:
    """In the order of preference."""
    cards = {f"CUDA{i}": functools.partial(_cuda, i) for i in range(_gpus()[0])}
    return {**cards, "CPU": _cpu}


def available() -> list[str]:
    """Names of the devices of this machine, the preferred first."""
    return list(_factories())


def open_devices(names: list[str], options: DeviceOptions) -> list[Device]:
    """The named devices (any case); for an empty list all GPUs, or the CPU where there is none.

    ``cuda`` names all GPUs. Raises UnknownDeviceError.
    """
    factories = _factories()
    cards = [name for name in factories if name != "CPU"]
    if not names:
        names = cards or ["CPU"]
    chosen: list[str] = []
    for name in names:
        known = name.upper()
        if known == "CUDA" and cards:
            chosen += cards
        elif known in factories:
            chosen.append(known)
        else:
            reason = f" ({_gpus()[1]})" if known.startswith("CUDA") and not cards else ""
            have = ", ".join(factories)
            raise UnknownDeviceError(f"unknown device '{name}'{reason}; this machine has: {have}")
    try:
        return [factories[name](options) for name in chosen]
    except CardError as error:
        raise UnknownDeviceError(str(error)) from None
