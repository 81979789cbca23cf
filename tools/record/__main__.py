"""Record what llama.cpp and an RPC server say to each other.

    python -m tools.record --listen 50060 --to 127.0.0.1:50052 -o session.pcapng
    llama-completion -m model.gguf --rpc 127.0.0.1:50060 -ngl 99 -p "Once upon a time"

Stands between any client and any server of the ggml RPC protocol and passes everything on as it
came. The file is an ordinary capture: Wireshark opens it (with the dissector of tools.wireshark),
tools.dump prints it, tools.replay sends it to another server. It holds all data that passed, the
model's weights included: it becomes as large as the model.

End it with Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from protocol.endpoint import format_endpoint
from tools import arguments
from tools.record.frames import Address
from tools.record.proxy import Proxy
from tools.record.recorder import Recorder
from tools.record.screen import screen, summary
from tools.record.stats import RecordStats
from tools.record.watching import Backlog

_FLUSH_SECONDS = 0.2

_EPILOG = """\
exit status: 0 ended by Ctrl-C or SIGTERM; 1 could not start; 2 wrong options;
3 the recording is incomplete, since its file could not be written (passing on went on)
"""


async def _run(options: argparse.Namespace, recorder: Recorder) -> int:
    loop = asyncio.get_running_loop()
    asked_to_end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, asked_to_end.set)
    lines: list[str] = []
    stats = RecordStats(lines.append)
    backlog = Backlog(recorder, stats)
    proxy = Proxy(options.to, backlog, lines.append)
    host, port = options.listen
    try:
        port = await proxy.listen(host, port)
    except OSError as error:
        where = format_endpoint(host, port)
        print(f"can't listen on {where}: {error.strerror}", file=sys.stderr)
        return 1
    to = Address(*options.to)
    print(f"recording {Address(host, port)} -> {to} into {recorder.path}", flush=True)
    with screen(stats, recorder, plain=options.plain) as display:
        told = False
        shown = loop.time()
        while not asked_to_end.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked_to_end.wait(), _FLUSH_SECONDS)
            backlog.work()
            recorder.flush()
            if recorder.stopped and not told:
                lines.append(f"recording stopped: {recorder.stopped}; still passing on")
                told = True
            while lines:
                display.say(lines.pop(0))
            if loop.time() - shown >= display.interval:
                shown = loop.time()
                display.update()
        await proxy.close()
        backlog.work()
        recorder.close()
        for line in lines:
            display.say(line)
    print(summary(stats, recorder), flush=True)
    return 3 if recorder.failed else 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = arguments.command_line("tools.record", __doc__, _EPILOG)
    add = parser.add_argument
    add(
        "--listen",
        type=arguments.listening,
        required=True,
        metavar="[HOST:]PORT",
        help="where clients are to connect to (host: 127.0.0.1; port 0: any, printed)",
    )
    arguments.add_server(parser)
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the capture, pcapng")
    add("--overwrite", action="store_true", help="replace the file if there is one")
    add(
        "--limit",
        type=arguments.size,
        metavar="SIZE",
        help="stop recording at this size of the file, such as 2G; passing on goes on",
    )
    add("--comment", default="", help="a comment to keep in the file")
    add("--plain", action="store_true", help="lines instead of a table that changes in place")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = make_parser().parse_args(words)
    if options.output.is_file() and not options.overwrite:
        print(f"{options.output} exists; --overwrite replaces it", file=sys.stderr)
        return 1
    try:
        recorder = Recorder(options.output, comment=options.comment, limit=options.limit)
    except OSError as error:
        print(f"can't write {options.output}: {error.strerror}", file=sys.stderr)
        return 1
    try:
        return asyncio.run(_run(options, recorder))
    finally:
        recorder.close()


if __name__ == "__main__":
    sys.exit(main())
