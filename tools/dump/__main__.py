"""See --help."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from protocol.observe.conversation import Event, ObservedMessage
from tools.capture.errors import CaptureError, MissingToolError
from tools.dump.options import filters_of, parse

try:
    from tools.capture.connections import CapturedConnection, Connections, Listener, ReadOptions
    from tools.capture.files import Capture, Frame, open_file
    from tools.dump.extract import Extractor
    from tools.dump.graphs import GraphFinder
    from tools.dump.lines import LineView
    from tools.dump.live import Listening
    from tools.dump.objects import JsonView
    from tools.dump.progress import with_progress
    from tools.dump.screen import Screen
    from tools.dump.session import SessionWriter
    from tools.dump.stats import StatsView
except MissingToolError as error:
    # --help works without.
    if {"-h", "--help"} & set(sys.argv[1:]):
        parse(None)
    print(error, file=sys.stderr)
    sys.exit(1)


class _Views:
    """Tells every view, and counts what there was."""

    def __init__(self, views: Sequence[Listener]) -> None:
        self._views = views
        self.messages = 0

    def opened(self, connection: CapturedConnection) -> None:
        for view in self._views:
            view.opened(connection)

    def event(self, connection: CapturedConnection, event: Event) -> None:
        self.messages += isinstance(event, ObservedMessage)
        for view in self._views:
            view.event(connection, event)

    def closed(self, connection: CapturedConnection) -> None:
        for view in self._views:
            view.closed(connection)


@contextlib.contextmanager
def _source(options: argparse.Namespace) -> Iterator[Capture]:
    if options.live is not None:
        with Listening(options.live, frozenset(options.port)) as live:
            print(f"listening on {options.live}; Ctrl-C ends it", file=sys.stderr)
            yield Capture(live.pipe)
        if live.dropped:
            print(f"{live.dropped} packets came too fast and were not captured", file=sys.stderr)
    elif options.capture == "-":
        yield Capture(sys.stdin.buffer)
    else:
        with open_file(options.capture) as file:
            yield Capture(file)


def _read(connections: Connections, frames: Iterable[Frame]) -> str:
    """Feed all frames; why it ended early, if it did."""
    why = ""
    try:
        for frame in frames:
            connections.frame(frame)
    except CaptureError as error:
        why = str(error)
    except KeyboardInterrupt:
        why = "interrupted"
    connections.close()
    return why


def _nothing(connections: Connections, why: str) -> str:
    """Return why there is nothing to show."""
    others = ", ".join(
        f"{count} packets {kind}" for kind, count in connections.packets.others.items()
    )
    seen = (
        f"{connections.count} TCP connections were seen" if connections.count else "no TCP was seen"
    )
    if connections.options.ports:
        ports = ", ".join(map(str, sorted(connections.options.ports)))
        seen = f"{seen} on port {ports}"
    parts = [f"no ggml RPC found: {seen}", others, why]
    return "; ".join(part for part in parts if part)


def run(options: argparse.Namespace) -> int:
    """Do what the options say. Raises CaptureError, MissingToolError."""
    filters = filters_of(options)
    screen = Screen(sys.stdout, options.color, prompt=options.capture in (None, "-"))
    views: list[Listener] = []
    stats = StatsView(filters) if options.stats else None
    finder = GraphFinder(options.graph, filters) if options.graph is not None else None
    extractor = Extractor(options.extract, filters) if options.extract is not None else None
    session = (
        SessionWriter(options.save_session, filters) if options.save_session is not None else None
    )
    views += [view for view in (stats, finder, extractor) if view is not None]
    lines = not views and session is None
    if lines:
        views.append(
            JsonView(screen, filters, whole=options.verbose)
            if options.json
            else LineView(screen, filters, whole=options.verbose, hexadecimal=options.hex)
        )
    listener = _Views(views)
    connections = Connections(
        listener,
        ReadOptions(
            ports=frozenset(options.port),
            dialect=options.protocol,
            sink=extractor.sink if extractor is not None else None,
        ),
        session,
    )
    with _source(options) as capture:
        path = Path(options.capture) if options.capture not in (None, "-") else None
        frames = with_progress(capture, path, quiet=lines and screen.live)
        why = _read(connections, frames)
        if capture.truncated:
            why = "the capture ends within a packet"
    if not listener.messages:
        print(_nothing(connections, why), file=sys.stderr)
        return 1
    if why:
        print(why, file=sys.stderr)
    if stats is not None:
        stats.write(screen, options.json)
    if finder is not None:
        if finder.found is None:
            print(f"there are {finder.count} graphs, not {options.graph}", file=sys.stderr)
            return 1
        sys.stdout.write(finder.render(options.format))
    if extractor is not None:
        _report_extracted(extractor, extractor.finish())
    if session is not None:
        session.close()
        print(
            f"{session.packets} packets of {len(session.connections)} connections in "
            f"{options.save_session}",
            file=sys.stderr,
        )
    screen.flush()
    return 0


def _report_extracted(extractor: Extractor, index: Path) -> None:
    tensors = extractor.tensors.values()
    complete = sum(t.complete for t in tensors)
    cached = sum(t.hash is not None and not t.pieces for t in tensors)
    text = f"{len(tensors)} tensors, {extractor.bytes} bytes; {complete} complete"
    if cached:
        text += f"; {cached} that the server had in its cache are only named"
    print(f"{text}; listed in {index}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        return run(options)
    except (CaptureError, MissingToolError) as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has seen enough (head, less). Nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
