"""CUDA kernels on the host: compiled by g++, run thread by thread, with every access checked.

``cuda_emulation.h`` is what a CUDA source is compiled with, ``runtime.cpp`` what runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

# Why a test that needs this is skipped.
NO_COMPILER = "no g++ to emulate CUDA with: apt-get install g++"

_HERE = Path(__file__).parent
# Of what debuggers are told, only which line is where.
_COMPILE = ("-std=c++20", "-g1", "-fPIC", "-march=native", "-w")
# Loads and stores stay as they are written: merged ones would be checked as one, wider than it is.
_CHECKED = ("-O1", "-fno-store-merging", "-fsanitize=thread,alignment")
# With EMULATION_ARITHMETIC=card products and sums are one instruction where they can be, and what
# is below the normal numbers is 0, as CuPy has kernels compiled; without it they are as in C++.
_AS_A_CARD = os.environ.get("EMULATION_ARITHMETIC") == "card"
_ARITHMETIC = ("-ffp-contract=fast",) if _AS_A_CARD else ()
# What modules know the runtime as: one that has been loaded by another path is it, too.
_RUNTIME = "libemulation.so"
# What sources ask for a card's architecture by, as __CUDA_ARCH__; and what is emulated where nobody
# says what the card can do, as 61 for 6.1.
_ARCHITECTURE = "EMULATED_ARCHITECTURE"
CAPABILITY = 61


class EmulationError(RuntimeError):
    """A kernel did what it must not do, or the launch was wrong: what, and where."""


class CompileError(RuntimeError):
    """A source can't be compiled; the message is the compiler's."""


def compiler() -> str | None:
    """The C++ compiler, None where there is none."""
    return shutil.which("g++")


def _folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ggml-rpc-server" / "emulation"


@contextlib.contextmanager
def _to_be_made(output: Path) -> Iterator[bool]:
    """Keep other processes from making the same file; whether it still has to be made."""
    if output.exists():
        yield False
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(output.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not output.exists()


def _make(output: Path, *arguments: str) -> None:
    """Run the compiler so that ``output`` appears whole or not at all. Raises CompileError."""
    descriptor, temporary = tempfile.mkstemp(dir=output.parent, suffix=output.suffix)
    os.close(descriptor)
    program = compiler()
    assert program is not None
    done = subprocess.run([program, *arguments, "-o", temporary], capture_output=True, text=True)
    if done.returncode:
        os.unlink(temporary)
        raise CompileError(done.stderr[-4000:])
    os.replace(temporary, output)


def _digest(paths: Iterable[Path], *options: str) -> str:
    digest = hashlib.sha256(repr(options).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def _target() -> str:
    """What -march=native comes to here: code for one processor may not run on another."""
    program = compiler()
    assert program is not None
    command = [program, "-march=native", "-Q", "--help=target"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _Launch(ctypes.Structure):
    """As in runtime.cpp."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("argument", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("how", ctypes.c_uint),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("n_regions", ctypes.c_size_t),
        ("constants", ctypes.c_void_p),
        ("n_constants", ctypes.c_size_t),
        ("error", ctypes.c_char * 600),
        ("error_code", ctypes.c_void_p),
    )


def _runtime_file() -> Path:
    source = _HERE / "runtime.cpp"
    words = ("-std=c++20", "-O2", "-g", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs")
    how = (*words, f"-Wl,-soname,{_RUNTIME}")
    output = _folder() / f"runtime-{_digest([source, _HERE / 'cuda_emulation.h'], *how)}.so"
    with _to_be_made(output) as absent:
        if absent:
            _make(output, *how, str(source))
    return output


@functools.cache
def _runtime() -> ctypes.CDLL:
    """What runs the kernels of all modules of the process, loaded before any of them.

    Stacks for a block of 1024 threads are 2048 mappings, of which a process may have 65530.
    """
    return ctypes.CDLL(str(_runtime_file()))


def _header(how: Sequence[str]) -> Path:
    """What every source includes, parsed once for each way to compile: a third of the work."""
    source = _HERE / "cuda_emulation.h"
    folder = _folder() / f"header-{_digest([source], _target(), *how)}"
    header = folder / source.name
    parsed = header.with_suffix(".h.gch")
    with _to_be_made(parsed) as absent:
        if absent:
            # g++ takes the parsed one that lies beside it, if it was made with the same options.
            shutil.copyfile(source, header)
            _make(parsed, *how, "-x", "c++-header", str(header))
    return header


def _way(checked: bool) -> tuple[str, ...]:
    return (*_COMPILE, *_ARITHMETIC, *(_CHECKED if checked else ("-O2",)))


def place(name: str, text: str, *, checked: bool = True) -> Path:
    """Return where :func:`build` keeps what it makes of a source."""
    digest = _digest([_HERE / "cuda_emulation.h"], _target(), *_way(checked), text)
    return _folder() / f"{name}-{digest}.so"


@functools.cache
def build(name: str, text: str, *, checked: bool = True, capability: int = CAPABILITY) -> Module:
    """Compile a CUDA source, all in one text, and load it; known ones come from the cache.

    Without ``checked`` no access is checked, and it runs several times as fast. Sources that ask
    for it are compiled for a card of this ``capability``, as 61 for 6.1. Raises CompileError.
    """
    if _ARCHITECTURE in text:
        text = f"#define {_ARCHITECTURE} {10 * capability}\n{text}"
    how = _way(checked)
    output = place(name, text, checked=checked)
    with _to_be_made(output) as absent:
        if absent:
            with tempfile.TemporaryDirectory() as folder:
                source, kernels = Path(folder) / f"{name}.cu", Path(folder) / f"{name}.o"
                source.write_text(text)
                words = ("-include", str(_header(how)), "-x", "c++", "-c", str(source))
                _make(kernels, *how, *words)
                # Its own symbols first, and all of the runtime's at once: a fiber's stack is small.
                flags = ("-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs,-z,now")
                _make(output, *flags, str(kernels), str(_runtime_file()))
    return Module(output)


class Memory:
    """The memory that kernels may touch: arrays of the host, each with its exact bounds."""

    def __init__(self) -> None:
        self._arrays: dict[int, tuple[int, bool]] = {}

    def add(self, address: int, size: int, *, writable: bool = True) -> None:
        self._arrays[address] = (size, writable)

    def remove(self, address: int) -> None:
        del self._arrays[address]

    def contains(self, address: int, size: int) -> bool:
        """Whether all bytes lie in one of the arrays."""
        # Of a copy, as below: other threads allocate and free meanwhile, and so do finalizers.
        arrays = self._arrays.copy()
        return any(a <= address and address + size <= a + n for a, (n, _) in arrays.items())

    def bounds(self) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        arrays = self._arrays.copy()
        rows = [(a, a + size, writable) for a, (size, writable) in arrays.items() if size]
        return np.array(rows, np.uint64).reshape(-1, 3)


class Module:
    """The kernels of one source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _runtime()
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)
        self._constants = np.array(self._read_only(), np.uint64).reshape(-1, 2)

    def _mappings(self) -> list[tuple[int, int, str, int]]:
        """(start, end, permissions, offset in the file) of what the module is in memory."""
        found = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == str(self.path):
                start, end = (int(part, 16) for part in fields[0].split("-"))
                found.append((start, end, fields[1], int(fields[2], 16)))
        return found

    def _read_only(self) -> list[tuple[int, int]]:
        return [(start, end) for start, end, kind, _ in self._mappings() if "w" not in kind]

    def __contains__(self, kernel: str) -> bool:
        return hasattr(self._library, kernel)

    def launch(
        self,
        kernel: str,
        argument: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
        grid: Sequence[int],
        block: Sequence[int],
        memory: Memory,
        *,
        shared: int = 0,
        races: bool = True,
        interleaved: bool = False,
        seed: int = 1,
    ) -> None:
        """Run a kernel on ``argument``, its parameter block, over ``grid`` blocks of ``block``.

        ``shared`` is bytes of dynamic shared memory; ``races`` also watches global memory, which
        takes time; ``seed`` decides the order in which threads run. ``interleaved`` threads take
        turns also where they don't meet: at accesses of global memory. Raises EmulationError.
        """
        bounds = memory.bounds()
        what = _Launch(
            ctypes.cast(getattr(self._library, kernel), ctypes.c_void_p),
            argument.ctypes.data,
            *((ctypes.c_uint * 3)(*[*size, 1, 1, 1][:3]) for size in (grid, block)),
            shared,
            int(races) + 2 * int(interleaved) + 4 * int(_AS_A_CARD),
            seed,
            bounds.ctypes.data,
            len(bounds),
            self._constants.ctypes.data,
            len(self._constants),
        )
        # One call: another thread may launch something meanwhile, and so may a finalizer in this.
        if _runtime().emulation_launch(ctypes.byref(what)):
            text = what.error.decode()
            where = f" at {self._source_of(what.error_code)}" if what.error_code else ""
            raise EmulationError(f"{kernel}: {text}{where}")

    def _source_of(self, code: int) -> str:
        """File and line of an address in the module's code, as far as they can be found out."""
        first = min((start - offset for start, _, _, offset in self._mappings()), default=0)
        tool = shutil.which("addr2line")
        if tool is None:
            return f"{self.path.name}+{code - first:#x}"
        # The address is where the check returns to: the access is before it.
        command = [tool, "-e", str(self.path), "-i", hex(code - first - 1)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [Path(line).name for line in done.stdout.split("\n") if line and "?" not in line]
        return ", in ".join(lines) or hex(code - first)
