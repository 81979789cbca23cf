"""The command line of ``python -m conformance --serve``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from conformance.arguments import add_reports, command_line
from conformance.reports.files import write_reports
from conformance.reports.terminal import TerminalReport, make_console
from conformance.serve.campaign import Client, ClientCampaign, ClientVersion, NoClient, planned
from conformance.serve.scenarios import Scenario, scenarios, select
from conformance.serve.server import PATIENCE
from conformance.suite.context import Facts
from conformance.suite.results import SuiteRun, Verdict
from protocol.dialects import DIALECTS, find_dialects
from protocol.endpoint import format_endpoint
from tools.serving.ports import free_port

DESCRIPTION = """Checks a client of the ggml RPC wire format, by serving it in scripted ways.

    python -m conformance --serve --client-command \\
        "llama-completion -m model.gguf --rpc 127.0.0.1:{port} -ngl 99 -p Hello -n 1"
    python -m conformance --serve --port 50052

With --client-command the client is started again for each scenario, and how it ends is part of the
verdict. Without it, each client that connects meets the next scenario. Nothing is computed: a
graph's results are zeros.

Verdicts: pass, fail (a rule of the protocol is broken, or the client hangs or crashes), differs
(safe, but not what a client should do), skipped (the client did nothing that this is about).

Exit codes: 0 no failure, 1 something failed, 2 wrong options, 3 no client came.
"""


def _parser() -> argparse.ArgumentParser:
    parser = command_line("conformance --serve", DESCRIPTION)
    add = parser.add_argument
    add("--client-command", metavar="COMMAND", default="", help="starts the client; has {port}")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=0, help="port to listen on (a free one)")
    add("--protocol", metavar="X.Y|all", help="version to answer with (what the client accepts); "
        "'all' offers every other version too")  # fmt: skip
    add("--scenario", metavar="NAME[,NAME]", help="these scenarios or subjects only")
    add("--list", action="store_true", help="print the scenarios")
    add("--timeout", type=float, default=60.0, help="seconds for one run (%(default)s)")
    add("--patience", type=float, default=PATIENCE,
        help="seconds to leave a connection that can't go on (%(default)s)")  # fmt: skip
    add_reports(parser, "what passed or wasn't seen", "what was found")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = make_console()
    every = options.protocol == "all"
    try:
        pinned = find_dialects(options.protocol)[0] if options.protocol and not every else None
        if options.list:
            _list(console, select(scenarios(pinned or DIALECTS[0]), options.scenario)
                  if options.scenario else scenarios(pinned or DIALECTS[0]))  # fmt: skip
            return 0
    except ValueError as error:
        parser.error(str(error))
    if options.client_command and "{port}" not in options.client_command:
        parser.error("--client-command has no {port}")
    # Clients that come by themselves find all scenarios in one place.
    port = options.port or (0 if options.client_command else free_port())
    client = Client(options.client_command, options.timeout, options.patience, options.host, port)

    def announce(text: str, port: int) -> None:
        where = f" at {format_endpoint(options.host, port)}" if port else ""
        if not options.client_command:
            console.print(f"[dim]{escape(text)}{where}[/]", highlight=False)

    campaign = ClientCampaign(client, announce)
    try:
        found = ClientVersion(pinned.version, pinned) if pinned else campaign.find_version()
        chosen = planned(found, every)
        if options.scenario:
            chosen = select(chosen, options.scenario)
    except NoClient as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except ValueError as error:
        parser.error(str(error))
    return _run(campaign, found, chosen, options, console)


def _list(console: Console, chosen: list[Scenario]) -> None:
    subject = None
    for scenario in chosen:
        if scenario.subject is not subject:
            subject = scenario.subject
            number, name, title = subject.value
            console.print(f"[bold]{number} {title}[/] [dim]({name})[/]")
        console.print(f"  {scenario.name:28} {escape(scenario.does)}", highlight=False)


def _run(
    campaign: ClientCampaign,
    found: ClientVersion,
    chosen: list[Scenario],
    options: argparse.Namespace,
    console: Console,
) -> int:
    started = time.monotonic()
    facts = Facts(found.version, found.dialect)
    run = SuiteRun(options.client_command or "a client", facts)
    version = ".".join(map(str, found.version))
    console.print(f"[bold]{escape(run.server)}[/]: protocol {version}", highlight=False)
    with TerminalReport(len(chosen), verbose=options.verbose, console=console) as terminal:
        try:
            for scenario in chosen:
                result = campaign.run(scenario, found)
                run.results.append(result)
                terminal.add(result)
        except KeyboardInterrupt:
            console.print("ended; the report is of what was seen")
        for result in campaign.rule_results():
            run.results.append(result)
            terminal.add(result)
    run.results.sort(key=lambda result: (result.case.group.number, result.case.number))
    run.seconds = time.monotonic() - started
    terminal.finish(run)
    write_reports(run, options)
    return 1 if run.counts[Verdict.FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
