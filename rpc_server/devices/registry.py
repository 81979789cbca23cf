"""The devices of this machine by name, and the choice among them."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rpc_server.devices.base import Device
from rpc_server.devices.cuda.toolkit import INSTALL, CardError, card_count

log = logging.getLogger(__name__)


class UnknownDeviceError(ValueError):
    """A device was asked for that this machine doesn't have; the message lists those it has."""


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """The options that devices are made with.

    ``threads`` None means all cores the process may use; ``allow_host_ops`` lets ops without a
    kernel for the GPU run on the host; ``baseline`` is the CPU's.
    """

    threads: int | None = None
    allow_host_ops: bool = False
    baseline: bool = False


Factory = Callable[[DeviceOptions], Device]


def _cpu(options: DeviceOptions) -> Device:
    from rpc_server.devices.cpu.device import CpuDevice

    return CpuDevice(options.threads, baseline=options.baseline)


def _cuda(index: int, options: DeviceOptions) -> Device:
    from rpc_server.devices.cpu.streaming.direct import DirectTransfers
    from rpc_server.devices.cuda.device import CudaDevice

    return CudaDevice(index, allow_host_ops=options.allow_host_ops, transfers=DirectTransfers)


@functools.cache
def _gpus() -> tuple[int, str]:
    """Return how many GPUs there are; and if none, why."""
    # CuPy takes a second to import; most machines without a GPU don't have it.
    if not _has_cupy():
        return 0, f"CuPy is not installed: {INSTALL}"
    try:
        return card_count(), ""
    except CardError as error:
        return 0, str(error)


def _has_cupy() -> bool:
    return "cupy" in sys.modules or importlib.util.find_spec("cupy") is not None


def _has_nvidia_driver() -> bool:
    """Return whether this machine seems to have a GPU, with CuPy or without."""
    return Path("/dev/nvidiactl").exists()


def _factories() -> dict[str, Factory]:
    """In the order of preference."""
    cards = {f"CUDA{i}": functools.partial(_cuda, i) for i in range(_gpus()[0])}
    return {**cards, "CPU": _cpu}


def warn_of_idle_cards() -> None:
    """Tell who splits over ``local``, this machine's processors, that it has GPUs as well."""
    count, _ = _gpus()
    if count:
        log.warning(
            "'local' is this machine's processors; its %s computes nothing here. A GPU is a part "
            "of its own: --split cuda0,...",
            "GPU" if count == 1 else f"{count} GPUs",
            extra={"event": "no_gpu"},
        )


def available() -> list[str]:
    """Return the names of the devices of this machine, the preferred first."""
    return list(_factories())


def open_devices(names: list[str], options: DeviceOptions) -> list[Device]:
    """Open the named devices (any case); for an empty list all GPUs, or the CPU where none is.

    ``cuda`` names all GPUs. A GPU that isn't named by its number and can't be used is left out,
    with a warning. Raises UnknownDeviceError.
    """
    factories = _factories()
    cards = [name for name in factories if name != "CPU"]
    if not names and not cards and (_has_cupy() or _has_nvidia_driver()):
        # Whoever installed it, or has the card, expects the GPU to be used.
        log.warning("no GPU is used, but the CPU: %s", _gpus()[1], extra={"event": "no_gpu"})
    named: list[str] = []
    for name in names:
        known = name.upper()
        if known in factories:
            named.append(known)
        elif not (known == "CUDA" and cards):
            reason = f" ({_gpus()[1]})" if known.startswith("CUDA") and not cards else ""
            have = ", ".join(factories)
            raise UnknownDeviceError(f"unknown device '{name}'{reason}; this machine has: {have}")
    devices: list[Device] = []
    try:
        for name in names or ["CUDA" if cards else "CPU"]:
            if name.upper() == "CUDA":
                devices += _open_cards([card for card in cards if card not in named], options)
            else:
                devices.append(factories[name.upper()](options))
    except CardError as error:
        for device in devices:
            device.close()
        raise UnknownDeviceError(str(error)) from None
    return devices


def _open_cards(cards: list[str], options: DeviceOptions) -> list[Device]:
    """Open those of the cards that can be used. Raises CardError if none can."""
    devices: list[Device] = []
    errors: list[str] = []
    for name in cards:
        try:
            devices.append(_factories()[name](options))
        except CardError as error:
            errors.append(f"{name}: {error}")
    if errors and not devices:
        raise CardError("; ".join(errors))
    for told in errors:
        log.warning("%s; the other GPUs are used", told, extra={"event": "no_gpu"})
    return devices
