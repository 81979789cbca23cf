"""``python -m tools.neighbour.attacker``: one attack, in a process that can be ended at any time.

Started by the harness for servers of its own; prints what it found as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from tools.neighbour import catalogue  # noqa: F401  (fills the table)
from tools.neighbour.attack import CATALOGUE, TURNED_AWAY, Attacker, Where


def main(name: str, seconds: str, where: str) -> int:
    """Attack until the time is over; the exit status is 0."""
    chosen = CATALOGUE[name]
    with tempfile.TemporaryDirectory(prefix="neighbour-") as folder:
        attacker = Attacker(Where.decode(where), float(seconds), scratch=Path(folder))
        rounds = 0
        while not attacker.over:
            try:
                with attacker.one_call():
                    chosen.run(attacker)
            except TURNED_AWAY:
                # As a neighbour who doesn't take no for an answer.
                time.sleep(0.01)
            rounds += 1
            if chosen.once:
                break
        print(json.dumps({"rounds": rounds, "findings": attacker.findings}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
