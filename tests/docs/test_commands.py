"""README.md and docs/homelab.md, word for word: each command does what it is there for.

What is replaced in a command, and by what, is in ``_words``; nothing else is. Models, addresses
and ports are this machine's; programs are those of this environment and of the llama.cpp build.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import Shown, pattern, shown, steps, substituted
from tests.docs.walk import UnknownCommandError, Walk, handler
from tests.parameters import mostly_slow
from tools import smollm2, upstream
from tools.serving.ports import free_port
from tools.serving.processes import PROJECT, ProgramError

README, HOMELAB = "README.md", "docs/homelab.md"
PROGRAMS = Path(sys.executable).parent

documents = pytest.mark.parametrize("document", mostly_slow([README, HOMELAB]))
needs_llama = pytest.mark.skipif(
    upstream.find_program("llama-server") is None or smollm2.find() is None,
    reason=f"no llama.cpp programs or no model: python -m tools.upstream, {smollm2.COMMAND}",
)


def _words(document: str, programs: Path = PROGRAMS, project: Path = PROJECT) -> dict[str, str]:
    """What has to be replaced in the commands of a document."""
    words = {
        "llama-completion": str(upstream.bin_dir() / "llama-completion"),
        "llama-server": str(upstream.bin_dir() / "llama-server"),
        "model.gguf": str(smollm2.find()),
    }
    # Two addresses of this machine that nobody else uses, for the reader's boxes.
    net = f"127.{random.SystemRandom().randrange(1, 255)}.{os.getpid() % 254 + 1}"
    a, b = f"{net}.10", f"{net}.11"
    if document == README:
        # Ports of the reader's own machine: here somebody else may have them.
        words |= {"50052": str(free_port()), "50060": str(free_port())}
        words |= {"hostA": a, "hostB": b, ".venv/bin/": f"{programs}/"}
    else:
        # Boxes that listen on all addresses would meet: they are one machine here.
        words |= {"0.0.0.0": a, "192.168.1.10": a, "192.168.1.11": b}
        words |= {"192.168.1.0/24": "127.0.0.0/8", "~/rpc/bin/": f"{programs}/"}
        words["<path or address of this repository>"] = str(project)
        words["~/rpc"] = str(programs.parent)
        # This model is so small that as many tokens are over before a terminal shows their pace,
        # and on some processors it has told its story after 70.
        words["-n 32"] = "-n 400 --ignore-eos"
    return words


def _commands(document: str) -> list[Shown]:
    return [one for one in shown(PROJECT / document) if one.is_command]


@documents
def test_every_command_is_known(document: str) -> None:
    """A command that nobody runs is one that may be wrong."""
    found = 0
    for command in _commands(document):
        for line in command.command_lines():
            for step in steps(substituted(line, _words(document))):
                handler(step, command)
                found += 1
    assert found >= 7, "the document's commands aren't found any more"


def test_a_new_command_fails_until_it_is_learnt(tmp_path: Path) -> None:
    path = tmp_path / "new.md"
    path.write_text("Type:\n\n    .venv/bin/python -m tools.new --option\n\nor `llama-new -m x`.\n")
    commands = shown(path)
    assert [command.line for command in commands] == [3, 5]
    for command in commands:
        with pytest.raises(UnknownCommandError, match=r"new\.md:\d: "):
            Walk(tmp_path, {}).run(command)


@pytest.mark.parametrize(
    "line", [".venv/bin/pip install '.[nonesuch]'", ".venv/bin/pip install ./nowhere"]
)
def test_what_can_not_be_installed_is_noticed(line: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError):
        Walk(tmp_path, {}).run(Shown("new.md", 1, line))


def _follow(document: str, walk: Walk) -> None:
    """Do what a document says, and see what it says that programs print."""
    for one in shown(PROJECT / document):
        if one.is_command:
            walk.run(one)
            if document == HOMELAB and "--host 0.0.0.0" in one.text and len(walk.servers) == 1:
                # What is typed on box A is typed on box B too.
                boxes = {**walk.words, "0.0.0.0": walk.words["192.168.1.11"]}
                walk.words, before = boxes, walk.words
                walk.run(one)
                walk.words = before
        elif not one.is_drawing:
            said = walk.said()
            for line in one.text.splitlines():
                assert re.search(pattern(line), said), f"{document} shows {line!r}, not:\n{said}"


@pytest.mark.upstream
@needs_llama
@documents
def test_a_reader_who_does_all_of_it(document: str, tmp_path: Path) -> None:
    with Walk(tmp_path, _words(document)) as walk:
        _follow(document, walk)
        assert len(walk.servers) >= 3


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.upstream
@needs_llama
@documents
def test_a_reader_who_installs_it_too(document: str, tmp_path: Path) -> None:
    """From nothing: a copy of the project, a new environment, packages from the registry."""
    clone = tmp_path / "clone"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, clone / name)
    # Who follows the README is in the clone; who sets up boxes is not, and has what was installed.
    home, programs = clone, clone / ".venv" / "bin"
    if document == HOMELAB:
        home, programs = tmp_path / "home", tmp_path / "rpc" / "bin"
        home.mkdir()
    words = _words(document, programs, clone)
    with Walk(tmp_path, words, programs=programs, home=home, install=True) as walk:
        _follow(document, walk)
