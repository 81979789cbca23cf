"""Which servers there are: on this network, and those that are named.

    python -m tools.workers                          # those that announce themselves (--announce)
    python -m tools.workers hostA hostB:50053        # and these
    python -m tools.workers --watch 10               # again and again
    python -m tools.workers --json
    python -m tools.workers --model model.gguf       # what they would make of a model, best first

Of each: address, software, device, memory, the protocols that it speaks, whether it has the split
extension, the round trip of a small request, how fast uploads go there, and how many bytes of
weights its kernels read in a second (Q4_0, a product of a few MB). Measuring uses some 40 MB there
for a second; --no-measure leaves it out. --no-find looks at none but those that are named.

With --model nothing is uploaded: the file's header is read, products of its kinds are timed on each
server, and the formula of docs/split.md says what each arrangement would do, with the commands to
type for the best of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from client.discovery import Browser
from client.errors import ConnectionLost, MissingPackageError
from client.model_header import ModelShape
from client.split.address import ServerAddress
from client.split.advice import advise
from client.split.survey import (
    Credentials,
    ServerReport,
    measure_boxes,
    survey_all,
    targets_of,
)
from client.tunnel import SecretError, client_context, read_token
from rpc_server.options import SPLIT_TOKEN_VARIABLE
from tools.arguments import command_line, positive, seconds
from tools.workers.advice import advice_json, advice_table, commands, describe
from tools.workers.report import console, servers_json, servers_table, size_text


class Looking:
    """Looks for servers again and again: the network is listened to all the while."""

    def __init__(self, options: argparse.Namespace, credentials: Credentials) -> None:
        self._options = options
        self._credentials = credentials
        self.ignored = 0

    async def once(self, browser: Browser | None) -> list[ServerReport]:
        """Return the reports of all servers that are named or announced now."""
        announced = targets_of(browser.servers) if browser is not None else []
        self.ignored = browser.ignored if browser is not None else 0
        named = {(t.host, t.port, t.tls) for t in self._options.servers}
        targets = self._options.servers + [
            t for t in announced if (t.host, t.port, t.tls) not in named
        ]
        return await survey_all(
            targets, measured=self._options.measure, credentials=self._credentials
        )


def show(reports: Sequence[ServerReport], as_json: bool, ignored: int = 0) -> None:
    """Print what was found."""
    if as_json:
        print(servers_json(reports), flush=True)
        return
    if not reports:
        print("no server found: name one, or start one with --announce", flush=True)
        return
    console().print(servers_table(reports))
    if ignored:
        print(f"{ignored} more announcements were not looked at")


async def advise_for(
    options: argparse.Namespace, credentials: Credentials, browser: Browser | None
) -> int:
    """Print what servers would make of the model; the exit status. Raises OSError, ValueError."""
    shape = await asyncio.to_thread(ModelShape.read, options.model)
    options.measure = False
    reports = await Looking(options, credentials).once(browser)
    measured = await measure_boxes(reports, shape, credentials)
    for endpoint, reason in measured.unusable.items():
        print(f"{endpoint}: {reason}", file=sys.stderr)
    boxes = measured.boxes
    if not boxes:
        print("error: no server answers", file=sys.stderr)
        return 1
    found = advise(shape, boxes, context=options.context * options.slots)
    model, context, slots = str(options.model), options.context, options.slots
    typed = [commands(p, boxes, model, context, slots) for p in found]
    if options.json:
        print(advice_json(found, boxes, shape, typed))
        return 0
    print(
        f"{shape.name}: {size_text(shape.weight_bytes)} of weights, {shape.layers} layers, "
        f"{size_text(shape.token_bytes)} read for a token"
    )
    console().print(advice_table(found[: options.most], boxes))
    best = found[0]
    print(f"Best: {describe(best, boxes)}" if best.fits else "None fits; the nearest:")
    for line in typed[0]:
        print(f"    {line}")
    return 0


async def run(options: argparse.Namespace, credentials: Credentials) -> int:
    """Look, and show; the exit status: 1 if nothing answers. Raises MissingPackageError."""
    async with contextlib.AsyncExitStack() as stack:
        browser = None
        if options.find:
            browser = await stack.enter_async_context(Browser(options.interface or None))
            await asyncio.sleep(options.seconds)
        if options.model is not None:
            return await advise_for(options, credentials, browser)
        return await _look(options, Looking(options, credentials), browser)


async def _look(options: argparse.Namespace, looking: Looking, browser: Browser | None) -> int:
    while True:
        reports = await looking.once(browser)
        if options.watch and not options.json and sys.stdout.isatty():
            console().clear()
        show(reports, options.json, looking.ignored)
        if not options.watch:
            return 0 if any(not r.error for r in reports) else 1
        await asyncio.sleep(options.watch)


def _target(text: str) -> ServerAddress:
    try:
        return ServerAddress.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line("tools.workers", __doc__)
    add = parser.add_argument
    add("servers", nargs="*", type=_target, metavar="HOST[:PORT]", help="or tls://HOST:PORT")
    add("--watch", type=seconds, metavar="N", help="every N seconds again, until Ctrl-C")
    add("--json", action="store_true", help="a list of objects on one line")
    add(
        "--seconds",
        type=seconds,
        default=3.0,
        metavar="N",
        help="how long to listen for announcements (default: %(default)g)",
    )
    add("--no-find", dest="find", action="store_false", help="only the servers that are named")
    add("--no-measure", dest="measure", action="store_false", help="don't measure speeds")
    add(
        "--interface",
        action="append",
        metavar="ADDRESS",
        help="listen on the network of this address of this machine only (default: all)",
    )
    add("--model", type=Path, metavar="FILE", help="a GGUF file: what would servers make of it?")
    add(
        "--context",
        type=positive,
        default=4096,
        metavar="N",
        help="positions of each slot (%(default)s)",
    )
    add("--slots", type=positive, default=1, metavar="N", help="sequences at once (%(default)s)")
    add("--most", type=positive, default=12, metavar="N", help="arrangements shown (%(default)s)")
    add("--ca", type=Path, metavar="FILE", help="what vouches for servers inside of TLS")
    token_help = f"token to show these (or in the variable {SPLIT_TOKEN_VARIABLE})"
    add("--token-file", type=Path, metavar="FILE", help=token_help)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 some server was found, 1 none (the reason is printed)."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not options.find and not options.servers:
        parser.error("--no-find leaves nothing to look at: name a server")
    # What others send that is no sound record is no concern of who looks for servers.
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
    try:
        token = read_token(options.token_file, SPLIT_TOKEN_VARIABLE)
        tls = client_context(options.ca) if options.ca else None
        return asyncio.run(run(options, Credentials(tls, token)))
    except (MissingPackageError, SecretError, ConnectionLost, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
