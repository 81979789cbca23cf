"""Does what a document tells its readers to type, command by command."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.docs.commands import Shown, steps, substituted
from tests.e2e import llama
from tools import upstream
from tools.serving.ports import free_port
from tools.serving.processes import (
    PROJECT,
    Process,
    ProgramError,
    listens,
    tail,
)

SECONDS = 240
# llama.cpp takes options from the environment too: the words stay as they are printed. Models like
# to talk, and a reader's port 8080 is free.
TOKENS = 12
# A server is looked at as a person does: on a terminal its lines are others than in a file.
# It ends with its terminal, also where whoever runs the tests is deaf to hang-ups (nohup).
_TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.chdir(sys.argv[1])
sys.exit(pty.spawn(sys.argv[2:]) >> 8)
"""
_ADDRESS = re.compile(r"([\w.]+):(\d+)")


class UnknownCommandError(AssertionError):
    """A document has a command that this module can't do: it must learn to."""


class Walk:
    """A reader who follows one document; logs go to ``folder``.

    ``words`` are what has to be replaced in its commands, and by what. A sentence's ``python`` is
    that of the folder ``programs``. What is to be installed is there already, unless ``install``
    is set: then environments are made anew. Commands run in the folder ``home``.
    """

    def __init__(
        self,
        folder: Path,
        words: Mapping[str, str],
        *,
        programs: Path = Path(sys.executable).parent,
        home: Path = PROJECT,
        install: bool = False,
    ) -> None:
        self.folder = folder
        self.words = dict(words)
        self.programs = programs
        self.home = home
        self.install = install
        self.servers: list[Process] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, command: Shown) -> None:
        """Do all that a block or span says. Raises UnknownCommandError, ProgramError."""
        for line in command.command_lines():
            for words in steps(substituted(line, self.words)):
                does = handler(words, command)
                if words[0] == "python":
                    words[0] = str(self.programs / "python")
                does(self, words)

    # -- what there is to do ---------------------------------------------------------------------

    def make_environment(self, words: Sequence[str]) -> None:
        """`python3 -m venv FOLDER`"""
        if self.install:
            _run(words, self.home)

    def launch(self, words: Sequence[str]) -> None:
        """`uvx`, `uv tool` or `pipx`, which are others' to install: what is named must exist."""
        _check_extras(words)
        scripts = _project()["scripts"]
        asked = [word for word in words if word.startswith("ggml-rpc-")]
        for name in asked:
            if name not in scripts:
                raise ProgramError(f"there is no command {name}")
        if not asked and "install" not in words:
            raise ProgramError(f"{words} starts no command")

    def pip_install(self, words: Sequence[str]) -> None:
        """`pip install WHAT`: what is named must exist; GPU libraries are resolved, not fetched."""
        asked = _check_extras(words)
        where = re.sub(r"\[.*", "", words[-1])
        if not (self.home / where / "pyproject.toml").exists():
            raise ProgramError(f"{words[-1]} is not this project")
        if self.install:
            dry = ["--dry-run"] if any(name.startswith("cuda") for name in asked) else []
            _run([*words[:2], *dry, *words[2:]], self.home)

    def serve(self, words: Sequence[str]) -> None:
        """`python -m rpc_server`: stays. A part that isn't there runs on a reader's other box."""
        for host, port in _ADDRESS.findall(_value(words, "--split")):
            if not listens(int(port), host):
                self._start([words[0], "-m", "rpc_server", "--host", host, "--port", port])
        self._start(words)

    def _start(self, words: Sequence[str]) -> None:
        log = self.folder / f"server-{len(self.servers)}.log"
        command = [sys.executable, "-c", _TERMINAL, str(self.home), *words]
        process = Process(command, log, {"COLUMNS": "200"})
        self._stack.callback(process.stop)
        process.wait_for(r"Devices:\s+\S", llama.START_SECONDS)
        self.servers.append(process)

    def complete(self, words: Sequence[str]) -> None:
        """`llama-completion`: says something, computed by the servers."""
        before = self._graphs()
        done = _run(words, self.home, {"LLAMA_ARG_N_PREDICT": str(TOKENS)})
        text = done.stdout.partition("assistant\n")[2] or done.stdout
        if len(text.split()) < 3:
            raise ProgramError(f"it says only {done.stdout!r}:\n{tail(done.stderr)}")
        self._demand_graphs(before)

    def chat(self, words: Sequence[str]) -> None:
        """`llama-server`: starts, and answers a question by the servers."""
        before, port = self._graphs(), free_port()
        env = {"LLAMA_ARG_PORT": str(port)}
        question = {"prompt": "The capital of France is", "n_predict": TOKENS, "temperature": 0}
        log = self.folder / f"llama-server-{port}.log"
        with llama.ChattyServer(words, port, log, env) as server:
            answer = server.post("/completion", question, SECONDS)["content"]
        if "Paris" not in answer:
            raise ProgramError(f"the capital of France is {answer!r}")
        self._demand_graphs(before)

    def look(self, words: Sequence[str]) -> None:
        """A tool that prints something and ends."""
        if not _run(words, self.home).stdout.strip():
            raise ProgramError(f"{words} printed nothing")

    def build(self, words: Sequence[str]) -> None:
        """`tools.upstream`: ends at once where all has been built."""
        if upstream.find_program("llama-server"):
            self.look(words)

    def test(self, words: Sequence[str]) -> None:
        """The whole test suite, of which this is a part: it is found, in a new environment."""
        if self.install:
            _run([*words, "--collect-only", "-q"], self.home)

    def said(self) -> str:
        """All that the servers have shown so far."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(one.log for one in self.servers))

    def _graphs(self) -> int:
        return len(re.findall(r"[1-9]\d* graphs in", self.said()))

    def _demand_graphs(self, before: int) -> None:
        self.servers[-1].wait_until(lambda: self._graphs() > before, 60, "graphs of the client")


_KNOWN: tuple[tuple[str, Callable[[Walk, Sequence[str]], None]], ...] = (
    (r"\S*python3 -m venv \S+", Walk.make_environment),
    (r"\S*pip install .+", Walk.pip_install),
    (r"(uvx|uv tool install|pipx run|pipx install) .+", Walk.launch),
    (r"\S*python -m rpc_server --prepare", Walk.look),
    (r"\S*python -m rpc_server( .+)?", Walk.serve),
    (r"\S*llama-completion .+", Walk.complete),
    (r"\S*llama-server .+", Walk.chat),
    (r"\S*python -m tools\.split_status .+", Walk.look),
    (r"\S*python -m tools\.upstream", Walk.build),
    (r"\S*python -m pytest", Walk.test),
)


def handler(words: Sequence[str], command: Shown) -> Callable[[Walk, Sequence[str]], None]:
    """What does a command. Raises UnknownCommandError."""
    line = " ".join(words)
    for known, does in _KNOWN:
        if re.fullmatch(known, line):
            return does
    raise UnknownCommandError(f"{command.document}:{command.line}: {line}")


def _value(words: Sequence[str], option: str) -> str:
    return words[words.index(option) + 1] if option in words else ""


def _project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return table


def _check_extras(words: Sequence[str]) -> set[str]:
    """The extras that a command names. Raises ProgramError for one that there is not."""
    asked = {name for word in words for name in re.findall(r"[\w]+", _brackets(word))}
    if missing := asked - set(_project()["optional-dependencies"]):
        raise ProgramError(f"there is no extra {sorted(missing)}")
    return asked


def _brackets(word: str) -> str:
    return "".join(re.findall(r"\[(.*?)\]", word))


def _run(
    words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **llama.CLIENT_ENV, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        # An installation may compile packages.
        timeout=3000,
        check=False,
    )
    if done.returncode:
        said = tail(done.stdout + done.stderr)
        raise ProgramError(f"{' '.join(words)} ended with status {done.returncode}:\n{said}")
    return done
