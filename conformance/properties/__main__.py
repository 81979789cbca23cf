"""Searches a live server for what breaks a property, and shrinks it to the smallest example.

    python -m conformance.properties --endpoint localhost:50052
    python -m conformance.properties --endpoint localhost:50052 --profile nightly --save found/
    python -m conformance.properties --endpoint localhost:50052 --replay found/sessions-7.0.0-0.json

Every protocol version that the server speaks gets its share; --protocol names one. What is damaged
is sent to a server that is started here by a command ({port} is put in), or with --hostile.

Exit codes: 0 everything held, 1 something did not (each is printed, and written to --save), 2 wrong
options or no server.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conformance.arguments import command_line, endpoint
from conformance.differential.endpoint import Endpoint
from conformance.properties.findings import Finding, explore, run_replay, spoken
from conformance.properties.graphs import Reference
from conformance.properties.properties import PROPERTIES, Property, PropertyTarget
from conformance.suite.errors import Failed
from conformance.suite.probe import NotUnderstood
from conformance.suite.runner import NOT_TO_OTHERS
from conformance.suite.target import ServerGone
from conformance.suite.target import Target as Server
from protocol.dialects import DIALECTS, find_dialects

PROFILES = ("quick", "nightly")


def _parser() -> argparse.ArgumentParser:
    parser = command_line("conformance.properties", __doc__)
    add = parser.add_argument
    add("--endpoint", type=endpoint, metavar="HOST:PORT", help="the server under test")
    add("--restart-command", metavar="COMMAND", default="", help="starts it, again if it dies")
    add("--hostile", action="store_true", help="send a server that runs already what it may die of")
    add("--reference-command", metavar="COMMAND", help="starts a server to hold graphs against")
    add("--protocol", metavar="X.Y", help="version to speak (all that the server speaks)")
    add("--profile", choices=PROFILES, default="quick", help="how much is tried (%(default)s)")
    add("--only", metavar="NAME[,NAME]", help=f"of {', '.join(PROPERTIES)}")
    add("--seed", type=int, default=0, help="of the random values (%(default)s)")
    add("--save", type=Path, metavar="FOLDER", help="write what is found here, for --replay")
    add("--replay", type=Path, metavar="FILE", help="try this one once more")
    return parser


def _explore(
    server: Server,
    targets: Sequence[PropertyTarget],
    chosen: Sequence[Property],
    options: argparse.Namespace,
) -> list[Finding]:
    found: list[Finding] = []
    for property_ in chosen:
        print(f"{property_.name}: {property_.title}", flush=True)
        total = property_.quick if options.profile == "quick" else property_.nightly
        tried, started = 0, time.perf_counter()
        fitting = [t for t in targets if property_.fits(t)]
        for i, target in enumerate(fitting):
            server.ensure(0.0)
            share = total * (i + 1) // len(fitting) - total * i // len(fitting)
            done, finding = explore(target, property_, max(share, 1), options.seed)
            tried += done.examples
            print(f"  protocol {target.dialect.name}: {done.examples} in {done.seconds:.1f} s")
            if finding is not None:
                found.append(finding)
                print(finding.text())
                if options.save:
                    print(f"written to {finding.save(options.save)}")
        print(f"  {tried} in {time.perf_counter() - started:.0f} s", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(PROPERTIES)
    if not options.endpoint and not options.restart_command:
        parser.error("which server? give --endpoint or --restart-command")
    unknown = [name for name in names if name not in PROPERTIES]
    if unknown:
        parser.error(f"no property '{unknown[0]}': there are {', '.join(PROPERTIES)}")
    server = Server(options.endpoint, options.restart_command)
    endpoint = None
    reference = None
    try:
        server.ensure(0.0)
        chosen = [PROPERTIES[name] for name in names]
        if not (options.hostile or server.is_own):
            for left_out in (p for p in chosen if p.hostile):
                print(f"{left_out.name}: left out ({NOT_TO_OTHERS})")
            chosen = [p for p in chosen if not p.hostile]
        if options.replay:
            return run_replay(options.replay, server)
        wanted = find_dialects(options.protocol) if options.protocol else list(DIALECTS)
        targets = list(spoken(server, wanted, 20.0))
        if not targets:
            raise ServerGone("the server speaks no version that is known here")
        if options.reference_command:
            endpoint = Endpoint(command=options.reference_command)
            reference = Reference(endpoint)
            targets = [replace(target, reference=reference) for target in targets]
        found = _explore(server, targets, chosen, options)
    except (ServerGone, NotUnderstood, Failed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if reference is not None:
            reference.close()
        if endpoint is not None:
            endpoint.close()
        server.close()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
