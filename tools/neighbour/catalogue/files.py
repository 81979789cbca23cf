"""Folders on disk that others of the machine get at: of tensors, and of compiled kernels."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from protocol.commands import Command
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from tools.neighbour.attack import Attacker, attack
from tools.serving.processes import PROJECT, Process, ProgramError, own_command
from tools.wire import tensor

TENSORS = "the folder of tensors"
KERNELS = "the folder of kernels"
SAME_HASH = "contents that another client gets"


def _offer(a: Attacker, content: bytes) -> bytes | None:
    """Return what a client gets that offers the hash of this content."""
    wire, handle, base = a.buffer(len(content))
    leaf = tensor(1, (len(content),), handle, base, GgmlType.I8)
    offer = {"tensor": leaf, "offset": 0, "hash": fnv1a_64(content)}
    if not wire.call(Command.SET_TENSOR_HASH, offer).result:
        return None
    return wire.get_tensor(leaf, len(content))


def _keep(a: Attacker, content: bytes) -> None:
    wire, handle, base = a.buffer(len(content))
    leaf = tensor(1, (len(content),), handle, base, GgmlType.I8)
    wire.call(Command.SET_TENSOR, {"tensor": leaf, "offset": 0, "cache_flag": 1}, content)


def _in_place_of(a: Attacker, make: Callable[[Path], None]) -> None:
    """Something else has the name of a content; it is offered, and sent to be kept."""
    content = os.urandom(4096)
    place = Path(a.where.cache) / f"{fnv1a_64(content):016x}"
    make(place)
    try:
        if _offer(a, content) is not None:
            a.found("what is no file is served")
        _keep(a, content)
    finally:
        with contextlib.suppress(OSError):
            place.unlink()
        with contextlib.suppress(OSError):
            place.rmdir()


@attack(TENSORS)
def a_pipe_for_a_content(a: Attacker) -> None:
    """A pipe under the name of a content, offered and sent to be kept"""
    _in_place_of(a, os.mkfifo)


@attack(TENSORS)
def a_folder_for_a_content(a: Attacker) -> None:
    """A folder under the name of a content"""
    _in_place_of(a, Path.mkdir)


@attack(TENSORS)
def a_link_for_a_content(a: Attacker) -> None:
    """A link to a private file under the name of a content"""
    private = a.scratch / "private"
    private.write_bytes(os.urandom(4096))
    private.chmod(0o600)
    before = private.read_bytes()
    _in_place_of(a, lambda place: place.symlink_to(private))
    if private.read_bytes() != before or private.stat().st_mode & 0o777 != 0o600:
        a.found("a private file was changed through a link")


@attack(TENSORS)
def names_of_unfinished_files(a: Attacker) -> None:
    """Pipes and links with the names that unfinished files have, while others are kept"""
    folder, private = Path(a.where.cache), a.scratch / "private"
    private.write_bytes(b"private")
    private.chmod(0o600)
    pipe, link = folder / ".partial-pipe", folder / ".partial-link"
    with contextlib.suppress(FileExistsError):
        os.mkfifo(pipe)
        link.symlink_to(private)
    try:
        _keep(a, os.urandom(5000))
    finally:
        for path in (pipe, link):
            path.unlink(missing_ok=True)
    if private.stat().st_mode & 0o777 != 0o600:
        a.found("a private file was made readable through a link")


def _after_damage(a: Attacker, damage: Callable[[Path, str], None]) -> None:
    """Keep a content, ``damage`` what lies in the folder under its name, and offer it."""
    content = os.urandom(8192)
    _keep(a, content)
    with contextlib.suppress(OSError):
        damage(Path(a.where.cache), f"{fnv1a_64(content):016x}")
    if _offer(a, content) not in (None, content):
        a.found("other bytes are served than were kept")


@attack(SAME_HASH)
def a_file_cut_short(a: Attacker) -> None:
    """A content whose file is cut short after it was kept, and offered by its hash"""
    _after_damage(a, lambda folder, name: os.truncate(folder / name, 4096))


@attack(SAME_HASH)
def a_file_of_others_bytes(a: Attacker) -> None:
    """A content whose file gets other bytes of the same length"""

    def damage(folder: Path, name: str) -> None:
        (folder / name).write_bytes(os.urandom(8192))

    _after_damage(a, damage)


@attack(SAME_HASH)
def a_sum_of_others_bytes(a: Attacker) -> None:
    """A content whose noted sum is replaced by noise"""

    def damage(folder: Path, name: str) -> None:
        for sums in folder.glob(".sums-*"):
            (sums / name).write_bytes(os.urandom(84))

    _after_damage(a, damage)


# The folders of a server that is started here; no kernel is compiled to say HELLO.
_FIND = (
    "import sys\n"
    "from pathlib import Path\n"
    "from rpc_server.native.folder import Folder\n"
    "folder = Folder(Path(sys.argv[1]), '0')\n"
    "print(folder.path)\n"
    "print(oct(folder.path.stat().st_mode & 0o777))\n"
    "print((folder.path / 'code.bin').exists())\n"
)


def _kernels(a: Attacker, prepare: Callable[[Path], None]) -> None:
    """Prepare a place for kernels, and see what a server takes from it."""
    base = a.scratch / "kernels"
    if base.exists():
        subprocess.run(["rm", "-rf", str(base)], check=True)
    prepare(base)
    done = subprocess.run(
        [sys.executable, "-c", _FIND, str(base)],
        cwd=PROJECT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    if done.returncode:
        a.found(f"a place for kernels ends the server: {done.stderr.splitlines()[-1]}")
        return
    path, mode, there = done.stdout.splitlines()
    if there == "True":
        a.found("code that others could have written is used")
    if mode != "0o700" and not path.startswith(str(a.scratch)):
        a.found(f"a folder of code has mode {mode}")


def _open_folder(base: Path, mode: int) -> None:
    (base / "kernels-0").mkdir(parents=True)
    (base / "kernels-0" / "code.bin").write_bytes(b"code of others")
    (base / "kernels-0").chmod(mode)


@attack(KERNELS)
def kernels_of_a_group(a: Attacker) -> None:
    """A folder of kernels that the group may write to, with code in it"""
    _kernels(a, lambda base: _open_folder(base, 0o770))


@attack(KERNELS)
def kernels_of_everybody(a: Attacker) -> None:
    """A folder of kernels with the sticky bit, as /tmp has it, with code in it"""
    _kernels(a, lambda base: _open_folder(base, 0o1777))


def _a_file(base: Path) -> None:
    base.write_bytes(b"no folder")


@attack(KERNELS)
def kernels_in_a_file(a: Attacker) -> None:
    """A file where the folder of kernels should be"""
    _kernels(a, _a_file)


@attack(TENSORS)
def servers_on_folders_of_others(a: Attacker) -> None:
    """A server that is started on a folder of tensors which others can write to"""
    folder = a.scratch / "open"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    with Process(own_command(0, "--threads", "1", "--cache-dir", str(folder))) as server:
        try:
            server.wait_for(r"endpoint +: ")
            a.found("a server uses a folder that others can write to")
        except ProgramError:
            if not re.search(r"^error: .*others can write to it", server.log, re.MULTILINE):
                a.found(f"a server doesn't say why it can't start: {server.log[-200:]!r}")
