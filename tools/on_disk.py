"""Shows and checks what a server with ``--models`` has: the index of its GGUF files.

    python -m tools.models list [PATH...]       # files of the index, and whether they still hold
    python -m tools.models index PATH...        # index files and folders now, not while serving
    python -m tools.models verify [PATH...]     # hash all of it again, and compare

The index is this user's, the one that servers use. Without PATH all of it is meant. ``list`` and
``verify`` end with status 1 if a file is not as it was indexed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rpc_server.cache.store import HASH_THRESHOLD
from rpc_server.devices.cpu.hashing import CompiledLanes
from rpc_server.models.library import (
    UnusableError,
    checked_record,
    indexing,
    make_record,
    model_files,
)
from rpc_server.models.record import FileRecord, Records, default_folder
from rpc_server.observability.progress import shown
from tools.arguments import command_line

_MIB = 1 << 20


def _chosen(records: Records, paths: Sequence[Path]) -> Iterator[tuple[str, FileRecord | None]]:
    """Yield the files that are meant, each with its record if it has one."""
    if not paths:
        yield from ((record.path, record) for record in records.all())
        return
    for path in model_files(paths):
        yield path, records.find(path)


def _state(record: FileRecord | None) -> str:
    """Return what is to be said of a file; '' if it is served as indexed."""
    if record is None:
        return "not indexed"
    try:
        return "" if checked_record(record) is not None else "changed since it was indexed"
    except OSError as error:
        return error.strerror or str(error)


def _describe(record: FileRecord) -> str:
    offered = [t.size for t in record.tensors if t.size > HASH_THRESHOLD]
    share = 100 * sum(offered) / record.nbytes if record.nbytes else 0.0
    types = ", ".join(sorted({t.type for t in record.tensors}))
    return (
        f"{len(record.tensors)} tensors, {record.nbytes / _MIB:.1f} MiB ({types}); "
        f"{len(offered)} over 10 MiB, {share:.1f}% of the bytes"
    )


def _list(records: Records, paths: Sequence[Path]) -> int:
    status = 0
    for path, record in _chosen(records, paths):
        state = _state(record)
        print(path)
        if record is not None:
            print(f"  {_describe(record)}")
        if state:
            print(f"  {state}")
            status = 1
    return status


def _hashed(path: str, lanes: CompiledLanes) -> FileRecord:
    """Hash a file, and show how far that is. Raises as make_record does."""
    with shown(), indexing([path]) as task:
        return make_record(path, lanes, lambda n: task.advance(n, Path(path).name))


def _index(records: Records, paths: Sequence[Path]) -> int:
    status, lanes = 0, CompiledLanes()
    for path, record in _chosen(records, paths):
        if not _state(record):
            print(f"{path}: indexed before")
            continue
        try:
            made = _hashed(path, lanes)
        except (UnusableError, OSError) as error:
            status = 1
            print(f"{path}: {_reason(error)}")
            continue
        records.keep(made)
        print(f"{path}: {_describe(made)}")
    return status


def _verify(records: Records, paths: Sequence[Path]) -> int:
    status, lanes = 0, CompiledLanes()
    for path, record in _chosen(records, paths):
        said = "not indexed" if record is None else ""
        if record is not None:
            try:
                made = _hashed(path, lanes)
            except (UnusableError, OSError) as error:
                said = _reason(error)
            else:
                said = _difference(record, made)
        print(f"{path}: {said or 'as indexed'}")
        status |= bool(said)
    return status


def _difference(record: FileRecord, made: FileRecord) -> str:
    """Return how a file differs from its record, '' if its tensors are the same."""
    # A type may have got its name since.
    before, now = ({t.name: (t.offset, t.size, t.hash) for t in r.tensors} for r in (record, made))
    differ = [name for name in before | now if before.get(name) != now.get(name)]
    if not differ:
        return ""
    more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    return f"'{differ[0]}'{more} not as indexed"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


COMMANDS = {"list": _list, "index": _index, "verify": _verify}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.models", __doc__)
    parser.add_argument("command", choices=list(COMMANDS), help="what to do")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files and folders")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.paths if not path.exists()]
    if missing:
        parser.error(f"there is no file or folder {missing[0]}")
    if options.command == "index" and not options.paths:
        parser.error("index needs files or folders")
    return COMMANDS[options.command](Records(default_folder()), options.paths)


if __name__ == "__main__":
    sys.exit(main())
