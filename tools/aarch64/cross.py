"""``python -m tools.aarch64.cross PROCESSOR FOLDER``: compiles routines for another processor.

It stands in for ``rpc_server.native.compiler`` of a server in emulation, which would take a minute
for each kernel. numba compiles for the processor that it runs on: here it is told another, and
kept from running what it made.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from llvmlite import binding

from tools.aarch64.processors import PROCESSORS, Processor

TRIPLE = "aarch64-unknown-linux-gnu"


def pretend(processor: Processor) -> None:
    """Have numba, which is not imported yet, compile for a processor."""
    os.environ["NUMBA_CPU_NAME"] = processor.model
    os.environ["NUMBA_CPU_FEATURES"] = ",".join(f"+{name}" for name in processor.features)
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    binding.get_process_triple = binding.get_default_triple = lambda: TRIPLE

    from numba.core import codegen

    def nothing(*_: Any) -> int:
        return 0

    codegen.JitEngine.finalize_object = nothing
    codegen.JitEngine.get_function_address = nothing
    codegen.JITCPUCodegen.set_env = nothing


def main(arguments: list[str]) -> int:
    """Serve requests as the compiler does; the exit status."""
    pretend(PROCESSORS[arguments[0]])
    # Of the pretence, which has to come first.
    from rpc_server.native import compiler

    return compiler.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
