"""NVRTC without a GPU: compiles for cards that aren't here, and says what kernels need there."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path


class CompileError(RuntimeError):
    """The message is the compiler's log."""


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel, bytes but for registers (per thread)."""

    registers: int
    stack: int
    spills: int
    shared: int


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the nvidia-cuda-nvrtc package, None where it isn't installed."""
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(base).glob("*/lib/libnvrtc.so.*")):
            if "builtins" not in path.name and "alt" not in path.name:
                return ctypes.CDLL(str(path))
    return None


def architectures() -> set[int]:
    """The compute capabilities that this NVRTC compiles for, as 61."""
    nvrtc = library()
    assert nvrtc is not None
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(found)
    return set(found)


def _log(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode()


@functools.lru_cache(maxsize=4)
def _compile(source: str, name: str, arch: int, options: tuple[str, ...]) -> tuple[str, bytes]:
    """Return the compiler's log and the card's own code. Raises CompileError."""
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
    )
    arguments = [f"-arch=sm_{arch}", "--ptxas-options=-v", *options]
    texts = (ctypes.c_char_p * len(arguments))(*(a.encode() for a in arguments))
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(arguments), texts)
        log = _log(nvrtc, program)
        if failed:
            raise CompileError(log)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return log, code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def compile_for(source: str, name: str, arch: int, options: tuple[str, ...]) -> dict[str, Usage]:
    """Compile to a card's own code; what each kernel uses. Raises CompileError."""
    return dict(_usages(_compile(source, name, arch, options)[0]))


def code_for(source: str, name: str, arch: int, options: tuple[str, ...]) -> bytes:
    """Compile to a card's own code, as a file that it would load. Raises CompileError."""
    return _compile(source, name, arch, options)[1]


_KERNEL = re.compile(
    r"Function properties for (\w+)\s+ptxas\s+\.?\s*"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers(.*)"
)


def _usages(log: str) -> list[tuple[str, Usage]]:
    found = []
    for name, stack, stores, loads, registers, rest in _KERNEL.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        usage = Usage(
            int(registers), int(stack), int(stores) + int(loads), int(shared[1] if shared else 0)
        )
        found.append((name, usage))
    return found
