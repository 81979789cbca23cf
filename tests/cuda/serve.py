"""``python -m tests.cuda.serve``: the server with an emulated GPU, for clients to try the device.

Options are the server's. With ``EMULATION=fast`` in the environment accesses are not checked.
"""

from __future__ import annotations

import os
import sys

from tests.cuda import standin

if __name__ == "__main__":
    standin.CHECKED = os.environ.get("EMULATION") != "fast"
    standin.install()
    from rpc_server.__main__ import main

    sys.exit(main())
