"""Runs the same random graphs on a server and on upstream's ggml-rpc-server, and compares.

    python -m conformance.differential --endpoint localhost:50052 \\
        --reference-command "ggml-rpc-server -p {port} -t 2"
    python -m conformance.differential --profile short --only MUL_MAT,CPY ...
    python -m conformance.differential --replay finding.json ...

Either server is given by its address or by a command that starts it ({port} is put in): one that is
started is started again when it dies. Upstream's serves one client at a time and ends when an
assertion fails, so give it as a command, of which each of several --jobs starts its own.

Exit codes: 0 no difference, 1 differences (each printed, and written to --save), 2 bad options or
no server.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.arguments import command_line, endpoint
from conformance.differential.campaign import PROFILES, DifferentialCampaign, Servers, select
from conformance.differential.case import GraphCase
from conformance.differential.endpoint import ServerUnavailable
from conformance.differential.explore import Judge, Mismatch
from conformance.differential.report import Report
from conformance.differential.sketch import FAMILIES


def _parser() -> argparse.ArgumentParser:
    parser = command_line("conformance.differential", __doc__)
    add = parser.add_argument
    tested = parser.add_mutually_exclusive_group(required=True)
    tested.add_argument("--endpoint", type=endpoint, metavar="HOST:PORT", help="server under test")
    tested.add_argument("--command", metavar="COMMAND", help="starts the server under test")
    reference = parser.add_mutually_exclusive_group(required=True)
    reference.add_argument("--reference", type=endpoint, metavar="HOST:PORT", help="upstream's")
    reference.add_argument("--reference-command", metavar="COMMAND", help="starts upstream's")
    add("--protocol", default="7", metavar="X.Y", help="version to speak (%(default)s)")
    add("--profile", choices=PROFILES, default="full", help="how many cases (%(default)s)")
    add("--only", metavar="OP[,OP]", help="these families only")
    add("--variant", metavar="NAME", help="this variant only (as findings name it)")
    add("--seed", type=int, default=0, help="of the random cases (%(default)s)")
    add("--jobs", type=int, default=1, help="families at once, each its own process (%(default)s)")
    add("--save", type=Path, metavar="FOLDER", help="write findings here, for --replay")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON")
    add(
        "--flush",
        action="store_true",
        help="the server under test takes numbers below the normal ones for 0, as cards do",
    )
    add("--replay", type=Path, metavar="FILE", help="run this one case")
    add("--list", action="store_true", help="print families and their variants")
    return parser


def _replay(path: Path, servers: Servers) -> int:
    case = GraphCase.from_json(json.loads(path.read_text()))
    print(case.describe())
    tested, reference = servers.tested(), servers.reference()
    judge = Judge(tested, reference, flushes=servers.flushes)
    try:
        refusal = judge.judge(case)
        print(f"the reference refuses it: {refusal}" if refusal else "no difference")
        return 0
    except Mismatch as error:
        print(error)
        return 1
    finally:
        judge.close()
        tested.close()
        reference.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    servers = Servers(
        options.endpoint,
        options.command or "",
        options.reference,
        options.reference_command or "",
        options.protocol,
        flushes=options.flush,
    )
    try:
        chosen = select(options.only, options.variant)
        if options.list:
            for name, variants in chosen.items():
                print(f"{name}: {', '.join(variants)}")
            return 0
        if options.replay:
            return _replay(options.replay, servers)
        campaign = DifferentialCampaign(servers, options.profile, options.seed, chosen)
        report = Report(sorted(chosen, key=list(FAMILIES).index))
        for name, tally in campaign.run(options.jobs):
            report.add(name, tally)
    except (ServerUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.finish(options.save, options.json)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
