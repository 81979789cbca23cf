"""``python -m conformance.serve`` is ``python -m conformance --serve``."""

import sys

from conformance.serve import main

if __name__ == "__main__":
    sys.exit(main())
