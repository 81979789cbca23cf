"""A client's buffers: opaque handles and addresses on the wire, storage of a device behind them.

Nothing off the wire is ever a real pointer. A buffer has a handle (``remote_ptr``) and a range of
opaque 64-bit addresses; both are handed out once per server process and looked up in the client's
own table, so a client can neither guess its way into another's buffer nor reach a freed one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpc_server.devices.base import Device, Storage

# Buffers of one client; llama.cpp has some dozens.
_MAX_BUFFERS = 4096
# Mappings of a process where the system doesn't say how many it lets have: Linux's default.
_MAPPINGS = 65530

# Far from any mapping of a process, so that a confused address is recognised in a log.
_FIRST_ADDRESS = 1 << 44
_ADDRESS_LIMIT = 1 << 62
# Ranges begin on a multiple of what any client may ask for as alignment, with a hole between them.
_ALIGN = 1 << 16
_FIRST_HANDLE = 0x1001


class BadAddressError(Exception):
    """A handle or a range off the wire is not the client's; the message says which."""


class OutOfMemoryError(Exception):
    """The device, or the limit given to it, has no room for a buffer."""


class LimitedError(OutOfMemoryError):
    """It is a limit that has no room; ``option`` is the option that sets it."""

    def __init__(self, option: str, what: str) -> None:
        super().__init__(f"{what} ({option})")
        self.option = option


@dataclass(slots=True, eq=False)
class Buffer:
    """``size`` bytes on ``device``; clients know them as addresses from ``base``."""

    handle: int
    base: int
    size: int
    device: int
    storage: Storage
    # The address of the client that it is counted against.
    owner: str = ""

    @property
    def address(self) -> int:
        """The address at which the device has it."""
        return self.storage.address

    def locate(self, data: int, offset: int, size: int) -> int:
        """Return the offset in the buffer of ``size`` bytes at address ``data + offset``.

        Raises BadAddressError if they are not all inside. Python integers: nothing wraps.
        """
        start = data + offset - self.base
        if start < 0 or data < self.base or start + size > self.size:
            raise BadAddressError(
                f"bytes [{start}, {start + size}) are outside the buffer of {self.size}"
            )
        return start


def _mappings() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return _MAPPINGS


class AddressSpace:
    """Hands out handles and address ranges; one for the whole server.

    Each buffer is a mapping of the process, of which the system lets it have so many. Half of them
    are for buffers, the rest for kernels, threads and scratch; and half of that half is the most
    for clients of one address, so that there are some for those of others.
    """

    def __init__(self, mappings: int | None = None) -> None:
        """``mappings`` is how many the process may have (default: what the system says)."""
        self._handles = itertools.count(_FIRST_HANDLE)
        self._next = _FIRST_ADDRESS
        self._most = (mappings or _mappings()) // 2
        self._held: Counter[str] = Counter()

    def reserve(self, size: int, owner: str = "") -> tuple[int, int]:
        """Return (handle, base) for a new buffer of a client at address ``owner``.

        Raises OutOfMemoryError for a size beyond all addresses, or if there are too many buffers.
        """
        if size > _ADDRESS_LIMIT - self._next - 2 * _ALIGN:
            raise OutOfMemoryError(f"no addresses left for {size} bytes")
        if self._held[owner] >= self._most // 2:
            raise OutOfMemoryError(f"clients of one address have {self._most // 2} buffers at most")
        if self._held.total() >= self._most:
            raise OutOfMemoryError(f"all clients together have {self._most} buffers at most")
        base = self._next
        self._next += (size // _ALIGN + 2) * _ALIGN
        self._held[owner] += 1
        return next(self._handles), base

    def give_back(self, owner: str = "") -> None:
        """Take back what a buffer of a client at this address had."""
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]


class Budget:
    """The memory that clients may take of one device, in all.

    ``limit`` is bytes, None for all it has.
    """

    def __init__(self, device: Device, limit: int | None = None) -> None:
        self.device = device
        self.limit = limit
        self.used = 0

    def memory(self) -> tuple[int, int]:
        """Free and total bytes as clients are told."""
        free, total = self.device.memory()
        if self.limit is None:
            return free, total
        return max(0, min(free, self.limit - self.used)), min(total, self.limit)

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> Storage:
        """Allocate storage, counted against the limit; ``proportions`` as of Device.allocate.

        Raises OutOfMemoryError.
        """
        if self.limit is not None and self.used + size > self.limit:
            left = self.limit - self.used
            raise LimitedError(
                "--mem", f"{size} bytes asked for, {left} left of {self.limit} for all clients"
            )
        if self.limit is None and self.used + size > (total := self.device.capacity()):
            raise OutOfMemoryError(f"{size} bytes asked for, clients hold {self.used} of {total}")
        try:
            storage = self.device.allocate(size, proportions)
        except MemoryError as error:
            raise OutOfMemoryError(str(error) or "the system has none left") from None
        self.used += size
        return storage

    def release(self, storage: Storage) -> None:
        """Give storage back."""
        self.used -= storage.size
        storage.close()


class Buffers:
    """The buffers of one client at address ``owner``; together ``limit`` bytes at most."""

    def __init__(
        self,
        space: AddressSpace,
        budgets: list[Budget],
        limit: int | None = None,
        owner: str = "",
    ) -> None:
        self._owner = owner
        self._space = space
        self._budgets = budgets
        self._limit = limit
        # Bytes of all buffers.
        self.nbytes = 0
        self._by_handle: dict[int, Buffer] = {}

    def __len__(self) -> int:
        return len(self._by_handle)

    def memory(self, device: int) -> tuple[int, int]:
        """Free and total bytes of a device as this client is told."""
        free, total = self._budgets[device].memory()
        if self._limit is None:
            return free, total
        return max(0, min(free, self._limit - self.nbytes)), min(total, self._limit)

    def allocate(self, device: int, size: int, proportions: Sequence[float] = ()) -> Buffer:
        """Allocate a buffer; ``proportions`` as of Device.allocate. Raises OutOfMemoryError."""
        if self._limit is not None and self.nbytes + size > self._limit:
            left = self._limit - self.nbytes
            raise LimitedError(
                "--mem-per-client", f"{size} bytes asked for, {left} left of {self._limit}"
            )
        if len(self._by_handle) >= _MAX_BUFFERS:
            raise OutOfMemoryError(f"a client has {_MAX_BUFFERS} buffers at most")
        handle, base = self._space.reserve(size, self._owner)
        try:
            storage = self._budgets[device].allocate(size, proportions)
        except BaseException:
            self._space.give_back(self._owner)
            raise
        buffer = Buffer(handle, base, size, device, storage, self._owner)
        self._by_handle[handle] = buffer
        self.nbytes += size
        return buffer

    def on(self, device: int) -> list[Buffer]:
        """Return the buffers that this client has on a device."""
        return [b for b in list(self._by_handle.values()) if b.device == device]

    def find(self, handle: int) -> Buffer | None:
        """Return the buffer with this handle, None if this client has no such."""
        return self._by_handle.get(handle)

    def get(self, handle: int) -> Buffer:
        """Return the buffer with this handle. Raises BadAddressError."""
        buffer = self._by_handle.get(handle)
        if buffer is None:
            raise BadAddressError(f"{handle:#x} is no buffer of this client")
        return buffer

    def take(self, handle: int) -> Buffer:
        """Forget a buffer, whose storage is to be released then. Raises BadAddressError."""
        buffer = self.get(handle)
        del self._by_handle[handle]
        self.nbytes -= buffer.size
        return buffer

    def take_all(self) -> list[Buffer]:
        """Forget all buffers, whose storage is to be released then."""
        return [self.take(handle) for handle in list(self._by_handle)]
