"""``python -m rpc_server.native.compiler FOLDER [--background]``: compiles routines into files.

Reads a routine a line from stdin (JSON: module, name, constants, file) and answers each with a line
on stdout (JSON: null, or what went wrong). Ends with its input, that is with the process which
started it. Several may work in one folder, those of other servers too: files are moved into place
whole, and each is made by one of them while the others wait for it. In the background it has what
others leave of the processors.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Intel's vector functions are not where the code will run; numba reads this when it is imported.
os.environ["NUMBA_DISABLE_INTEL_SVML"] = "1"

from llvmlite import binding

from rpc_server.native.processor import told_features

if (_told := told_features()) and "NUMBA_CPU_FEATURES" not in os.environ:
    # numba, when it is imported, takes LLVM's word for what the processor has, unless it is told.
    _known = [f"{'+' if has else '-'}{n}" for n, has in binding.get_host_cpu_features().items()]
    os.environ["NUMBA_CPU_FEATURES"] = ",".join((*_known, *(f"+{name}" for name in _told)))

import numba
from numba import types
from numba.core.registry import cpu_target

from rpc_server.native import elf
from rpc_server.native.image import ENTRY, pack
from rpc_server.native.routine import BACKGROUND
from rpc_server.native.source import FASTMATH, features_left_out, is_routine

Function = Callable[..., int]


def find(module: str, name: str, constants: list[int | None]) -> Function:
    """Return the function of a routine. Raises LookupError if there is none."""
    found: Any = getattr(importlib.import_module(module), name, None)
    if found is not None and constants:
        found = found(*constants)
    if not is_routine(found):
        raise LookupError(f"{module} has no routine '{name}'")
    function: Function = found
    return function


def features_but(features: str, left_out: tuple[str, ...]) -> str:
    """Return LLVM's list of features, those switched off whose names begin so."""
    listed = [item for item in features.split(",") if item]
    return ",".join(f"-{f[1:]}" if f[1:].startswith(left_out) else f for f in listed)


def _machine(relocation: str, left_out: tuple[str, ...]) -> binding.TargetMachine:
    """For the processor that numba compiles for, without some of its features."""
    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()[:3]
    if left_out:
        features = features_but(features, left_out)
    target = binding.Target.from_triple(triple)
    return target.create_target_machine(
        cpu=processor, features=features, opt=3, reloc=relocation, codemodel="small"
    )


def object_code(function: Function) -> bytes:
    """Return an object file whose symbol ENTRY is the function, by the C calling convention."""
    count = function.__code__.co_argcount
    signature = types.int64(*[types.int64] * count)
    compiled = numba.cfunc(signature, fastmath=FASTMATH, error_model="numpy")(function)
    module = binding.parse_assembly(compiled.inspect_llvm())
    # What numba gives to C reports exceptions to Python. A routine raises none, and must not need
    # Python: it gets an entry of its own to the function behind.
    native = module.get_function(compiled.native_name.removeprefix("cfunc."))
    words = [f"i64 %a{i}" for i in range(count)]
    call = f'i32 @"{native.name}"'
    module.link_in(
        binding.parse_assembly(
            f"""
            target triple = "{module.triple}"
            target datalayout = "{module.data_layout}"
            declare {call}({", ".join(["ptr", "ptr", *["i64"] * count])})
            define i64 @{ENTRY}({", ".join(words)}) {{
                %result = alloca i64
                %exception = alloca ptr
                store i64 0, ptr %result
                %status = call {call}({", ".join(["ptr %result", "ptr %exception", *words])})
                %value = load i64, ptr %result
                ret i64 %value
            }}
            """
        )
    )
    for item in [*module.functions, *module.global_variables]:
        if item.name == native.name:
            item.add_function_attribute("alwaysinline")
        if item.name != ENTRY and not item.is_declaration:
            item.linkage = "internal"
    machine = _machine("pic", features_left_out(function))
    # The loops are done: only what has become of no use is to go.
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


def content(code: bytes) -> bytes:
    """Return what a file holds for an object file: an image where that can be, else the object."""
    if sys.platform == "linux":
        try:
            image, entry, imports = elf.link(code)
        except elf.UnsupportedError:
            pass
        else:
            return pack({"kind": "image", "entry": entry, "imports": imports}, image)
    return pack({"kind": "object"}, code)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _version(path: Path) -> tuple[int, int] | None:
    """Tell one content of a file from the next."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Keep other compilers of this machine from making the same file; whether one just has.

    What was there before is to be replaced: somebody found it damaged.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    before = _version(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "compiling").open("w") as lock:
        # One byte for each file; two that share one wait for one another, and that is all.
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, zlib.crc32(path.name.encode()))
        yield _version(path) not in (before, None)


def _answer(folder: Path, request: dict[str, Any]) -> str | None:
    path = folder / request["file"]
    try:
        with _alone(path) as made:
            if not made:
                function = find(request["module"], request["name"], request["constants"])
                _write(path, content(object_code(function)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _step_back() -> None:
    """Leave the processors to whoever wants them."""
    if sys.platform != "win32":
        os.nice(19)
    if sys.platform == "linux":
        # Where terminals or containers share a machine, niceness counts within each alone.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(arguments: list[str]) -> int:
    """Serve requests until the input ends; the exit status."""
    # What was imported stays, and what a routine leaves is some megabytes: a tenth of the time
    # went into looking through all of it.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    # Of Ctrl-C the server learns; it ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What numba or a module prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if BACKGROUND in arguments:
        _step_back()
    for line in sys.stdin:
        print(json.dumps(_answer(Path(arguments[0]), json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
