"""Holds a server of the ggml RPC wire format against the protocol, rule by rule.

    python -m conformance --endpoint localhost:50052
    python -m conformance --restart-command "ggml-rpc-server -p {port}" --html report.html
    python -m conformance --endpoint localhost:50052 --only 3.4,framing
    python -m conformance --list
    python -m conformance --explain 3.4
    python -m conformance --endpoint localhost:50052 --replay found/sessions-7.0.0-0.json
    python -m conformance --serve --help        # checks a client instead

The server's protocol version is found out by HELLO. A server that may die under a test is best
given by a command ({port} is put in), which starts it again each time; with --endpoint too it is
started on that port. Only to a server that was started so is sent what no client sends, or with
--hostile: it may end a server that trusts its clients, and whoever works with it.

Verdicts: pass, fail, differs (the protocol leaves it open, and the server does it otherwise than it
had better), skipped (the server or the protocol version lacks what is tested), not run (the server
is gone).

Exit codes: 0 all passed or differ, 1 a case failed, 2 wrong options, 3 no server there, or none
that can be understood.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from conformance import serve
from conformance.arguments import add_reports, command_line, endpoint
from conformance.properties.findings import run_replay
from conformance.reports.files import write_reports
from conformance.reports.terminal import TerminalReport, make_console, print_explanation, print_list
from conformance.suite.errors import Failed
from conformance.suite.probe import NotUnderstood, probe
from conformance.suite.registry import Case, load, select
from conformance.suite.results import SuiteRun, Verdict
from conformance.suite.runner import SuiteRunner
from conformance.suite.target import ServerGone, Target
from protocol.dialects import Dialect, find_dialects

_EXIT_FAILED = 1
_EXIT_NO_SERVER = 3
_EXIT_INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line("conformance", __doc__)
    add = parser.add_argument_group("the server").add_argument
    add("--endpoint", type=endpoint, metavar="HOST:PORT", help="the server under test")
    add("--restart-command", metavar="COMMAND", default="", help="starts it, again if it dies")
    add("--protocol", metavar="X.Y", help="version to speak (what the server answers HELLO with)")
    add("--hostile", action="store_true", help="send a server that runs already what it may die of")
    add("--timeout", type=float, default=10.0, help="seconds for one answer (%(default)s)")
    add = parser.add_argument_group("which cases").add_argument
    add("--only", metavar="CASE[,CASE]", help="these cases or groups only, by number or name")
    add("--list", action="store_true", help="print the cases")
    add("--explain", metavar="CASE", help="print what a case sends and expects, and why")
    add("--seed", type=int, default=0, help="of generated cases (%(default)s)")
    add("--replay", type=Path, metavar="FILE", help="try a finding of conformance.properties again")
    reports = parser.add_argument_group("reports")
    add_reports(reports, "cases that passed or were skipped", "the exchanges of findings")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--serve" in given:
        given.remove("--serve")
        return serve.main(given)
    parser = make_parser()
    options = parser.parse_args(given)
    console = make_console()
    try:
        cases = load()
        if options.explain:
            for case in select(cases, options.explain):
                print_explanation(console, case)
            return 0
        chosen = select(cases, options.only) if options.only else cases
        dialect = find_dialects(options.protocol)[0] if options.protocol else None
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print_list(console, chosen)
        return 0
    if not options.endpoint and not options.restart_command:
        parser.error("which server? give --endpoint or --restart-command")
    with Target(options.endpoint, options.restart_command) as target:
        if options.replay:
            return _replay(target, options.replay)
        return _run(target, chosen, dialect, options, console)


def _replay(target: Target, path: Path) -> int:
    try:
        target.ensure(seconds=0.0)
        return run_replay(path, target)
    except (ServerGone, NotUnderstood, Failed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_NO_SERVER


def _run(
    target: Target,
    cases: list[Case],
    dialect: Dialect | None,
    options: argparse.Namespace,
    console: Console,
) -> int:
    try:
        target.ensure(seconds=0.0)
        facts = probe(target.address, dialect, options.timeout)
    except (ServerGone, NotUnderstood, Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_NO_SERVER
    run = SuiteRun(options.restart_command or "{}:{}".format(*target.address), facts)
    hostile = options.hostile or target.is_own
    runner = SuiteRunner(
        target, facts, patience=options.timeout, seed=options.seed, hostile=hostile
    )
    with TerminalReport(len(cases), verbose=options.verbose, console=console) as terminal:
        terminal.head(run)
        # Who has seen enough still gets what there is.
        with contextlib.suppress(KeyboardInterrupt):
            runner.run(cases, run, terminal.add)
    terminal.finish(run)
    write_reports(run, options)
    if len(run.results) < len(cases):
        return _EXIT_INTERRUPTED
    return _EXIT_FAILED if run.counts[Verdict.FAIL] or run.gone else 0


if __name__ == "__main__":
    sys.exit(main())
