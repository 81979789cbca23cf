"""This project's server, but that who waits for others of a split sleeps at once.

    python -m tools.bench.sleeping --port 50052 -t 1

The server tries again and again for a moment, since the others mostly answer within microseconds.
One that sleeps is slower, and what it uses of a processor is what its work takes and no waiting: by
that tools.bench.split tells what parts that share a core would do on cores of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rpc_server.__main__ import main as serve
from rpc_server.devices.cpu.kernels.interface import stream


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server with these arguments; return its exit status."""
    stream._SPIN_NS = 0
    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
