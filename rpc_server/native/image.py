"""Files of compiled code: their format, and how one gets into the memory of a process.

A file holds either an *image*, which is position-independent code with its constants laid out as
they will lie in memory, ready to be copied and run, or a whole *object* file, for which LLVM's own
loader is needed (on systems where ``elf`` can't make an image).

A file: CRC-32 of the rest, length of the header (4 bytes each, little endian), header (JSON), code.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import sys
import zlib
from typing import Any

from rpc_server.native.routine import CompileError, NoMemoryNowError

# The symbol of the routine in an object file.
ENTRY = "routine"


class DamagedFileError(Exception):
    """A file is not what was written."""


def pack(header: dict[str, Any], code: bytes) -> bytes:
    """Return the content of a file."""
    text = json.dumps(header).encode()
    body = len(text).to_bytes(4, "little") + text + code
    return zlib.crc32(body).to_bytes(4, "little") + body


def unpack(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the code. Raises DamagedFileError."""
    if len(content) < 8 or zlib.crc32(content[4:]) != int.from_bytes(content[:4], "little"):
        raise DamagedFileError("its checksum is wrong")
    end = 8 + int.from_bytes(content[4:8], "little")
    header: dict[str, Any] = json.loads(content[8:end])
    return header, content[end:]


class Loaded:
    """Code in memory; it stays as long as this does."""

    def __init__(self, address: int, memory: Any) -> None:
        self.address = address
        self._memory = memory


def load(content: bytes) -> Loaded:
    """Bring the code of a file into memory.

    Raises DamagedFileError, CompileError; NoMemoryNowError where another try may go well.
    """
    header, code = unpack(content)
    if header["kind"] == "image":
        return _load_image(header, code)
    if header["kind"] == "object":
        return _load_object(code)
    raise DamagedFileError(f"it holds a {header['kind']}")


# -- images ----------------------------------------------------------------------------------------


def _c_libraries() -> list[ctypes.CDLL]:
    libraries = [ctypes.CDLL(None)]
    # Other C libraries have the mathematical functions in the one that is loaded already.
    with contextlib.suppress(OSError):
        libraries.append(ctypes.CDLL("libm.so.6"))
    return libraries


def _symbol(name: str) -> int:
    """Address of a function of the C library. Raises CompileError."""
    for library in _c_libraries():
        try:
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        except AttributeError:
            continue
    raise CompileError(f"there is no function '{name}'")


def _load_image(header: dict[str, Any], code: bytes) -> Loaded:
    """Copy to fresh memory, fill in addresses of C functions, make it executable."""
    try:
        memory = mmap.mmap(-1, len(code), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise NoMemoryNowError(f"no mapping of {len(code)} bytes: {error}") from None
    memory[:] = code
    for name, slot in header["imports"].items():
        memory[slot : slot + 8] = _symbol(name).to_bytes(8, "little")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    executable = mmap.PROT_READ | mmap.PROT_EXEC
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(code)), executable):
        number = ctypes.get_errno()
        # Its protection makes a mapping of its own of it, of which a process may have so many.
        kind = NoMemoryNowError if number == errno.ENOMEM else CompileError
        raise kind(f"the system runs no code made here (errno {number})")
    return Loaded(address + header["entry"], memory)


# -- object files ----------------------------------------------------------------------------------


def _load_object(code: bytes) -> Loaded:
    """By LLVM, which costs 40 MiB but knows every system's format."""
    from llvmlite import binding

    if sys.platform != "win32":
        # Functions of the process itself; of libm too where it is not part of it.
        binding.load_library_permanently("")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Loaded(engine.get_function_address(ENTRY), engine)
