"""``python -m tests.conformance.faulty``: see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rpc_server.__main__ import main as serve
from tests.conformance.faulty.planted import FAULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant the fault, then serve; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.faulty", allow_abbrev=False, description=__doc__
    )
    parser.add_argument("--fault", choices=[*FAULTS, "none"], help="what to plant")
    parser.add_argument("--worker", metavar="HOST:PORT", help="for faults of a split: one part")
    parser.add_argument("--list", action="store_true", help="print the faults")
    options, rest = parser.parse_known_args(arguments)
    if options.list:
        for fault in FAULTS.values():
            print(f"{fault.name:36} {fault.wrong}")
        return 0
    if options.fault is None:
        parser.error("which --fault?")
    if options.fault != "none":
        fault = FAULTS[options.fault]
        if options.worker is None and any("{worker}" in word for word in fault.options):
            parser.error("which --worker?")
        fault.plant()
        rest += [word.replace("{worker}", str(options.worker)) for word in fault.options]
    return serve(rest)


if __name__ == "__main__":
    sys.exit(main())
