"""The devices of this machine by name, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rpc_server.devices.base import Device


class UnknownDeviceError(ValueError):
    """A device was asked for that this machine doesn't have; the message lists those it has."""


@dataclass(frozen=True, slots=True)
class Options:
    """What devices are made with; ``threads`` None means all cores the process may use."""

    threads: int | None = None


Factory = Callable[[Options], Device]


def _cpu(options: Options) -> Device:
    from rpc_server.devices.cpu.device import CpuDevice

    return CpuDevice(options.threads)


# In the order of preference: clients get the first unless devices are chosen.
_FACTORIES: dict[str, Factory] = {"CPU": _cpu}


def available() -> list[str]:
    """Names of the devices of this machine, the preferred first."""
    return list(_FACTORIES)


def open_devices(names: list[str], options: Options) -> list[Device]:
    """The named devices (any case), or the preferred one for an empty list.

    Raises UnknownDeviceError.
    """
    by_name = {name.upper(): factory for name, factory in _FACTORIES.items()}
    chosen = names or available()[:1]
    factories = []
    for name in chosen:
        factory = by_name.get(name.upper())
        if factory is None:
            raise UnknownDeviceError(
                f"unknown device '{name}'; this machine has: {', '.join(available())}"
            )
        factories.append(factory)
    return [factory(options) for factory in factories]
