"""``python -m tests.cuda.serve``: the server with an emulated GPU, for clients to try the device.

Options are the server's. In the environment: with ``EMULATION=fast`` accesses are not checked, with
``EMULATION=none`` kernels do nothing, which shows what the host does; ``EMULATED_CARDS=2`` makes it
two cards, which with ``EMULATED_PEERS=0`` can't reach each other; ``EMULATED_CAPABILITY=8.0`` is
what they can do.
"""

from __future__ import annotations

import os
import sys

from tests.cuda import standin

if __name__ == "__main__":
    how = os.environ.get("EMULATION", "")
    standin.CHECKED = how != "fast"
    standin.COMPUTES = how != "none"
    standin.install()
    from rpc_server.__main__ import main

    sys.exit(main(program=(sys.executable, "-m", "tests.cuda.serve")))
