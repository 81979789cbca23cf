"""Records the golden captures: a short session of a client of each protocol version.

    python -m tools.captures tests/data/captures              # all that can be made here
    python -m tools.captures tests/data/captures --only own-3.6

Captures named ``llama-`` are of llama.cpp's own llama-completion of that protocol version, with a
model of some ten kilobytes; they are skipped where the program hasn't been built
(``python -m tools.upstream --dialects``). Those named ``own-`` are of this project's client, which
speaks the versions that no llama.cpp is built of here. The server is this project's, its version
pinned; of ``upstream-`` it is llama.cpp's. Beside each capture its text by tools.dump is written,
to be read by a person.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from client.backend import Backend
from protocol.commands import Command
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from tools import models, upstream
from tools.arguments import command_line
from tools.serving.ports import free_port
from tools.serving.processes import HOST, PROJECT, Process, listens, own_command, upstream_command

# What a server of a capture has; a client may ask for it, and it is in the answers.
SERVER_OPTIONS = ("--threads", "1", "--mem", "64")
_START_SECONDS = 60.0
_LISTENS = r"endpoint +: \S+:(\d+)"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe of a capture: options of the server, and what talks to the port given to it.

    ``behind`` are options of a second server, which the client is connected to; it is told the
    address of the recorder by ``--split``. ``build`` is the llama.cpp that is needed, ``theirs``
    whether its server is the recorded one. ``text`` are the options of tools.dump.
    """

    run: Callable[[int, Path], None]
    comment: str
    server: tuple[str, ...] = ()
    behind: tuple[str, ...] | None = None
    build: int | None = None
    theirs: bool = False
    text: tuple[tuple[str, ...], ...] = (("-v",),)

    @property
    def possible(self) -> bool:
        """True if the programs that it takes are here."""
        programs = [upstream.DIALECT_CLIENT, *([upstream.DIALECT_WORKER] if self.theirs else [])]
        return self.build is None or all(
            upstream.find_program(name, self.build) is not None for name in programs
        )


def _llama(version: str, build: int, ffn_width: int = 96) -> Recipe:
    def run(port: int, folder: Path) -> None:
        program = upstream.find_program(upstream.DIALECT_CLIENT, build)
        model = models.write_tiny_model(folder / "tiny.gguf", ffn_width=ffn_width)
        subprocess.run(
            [
                *(str(program), "-m", str(model), "-p", "the sky", "-n", "3", "-c", "32"),
                *("-t", "1", "--temp", "0", "--ignore-eos", "--no-conversation", "--no-warmup"),
                *("--rpc", f"{HOST}:{port}", "-ngl", "99", "-fit", "off"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )

    return Recipe(
        run,
        f"llama-completion of llama.cpp b{build}, protocol {version}",
        ("--protocol", version),
        build=build,
        text=((), ("--graph", "1")),
    )


def _theirs() -> Recipe:
    recipe = _llama("7.0.0", upstream.DEFAULT_BUILD)
    comment = f"llama-completion and ggml-rpc-server of llama.cpp b{recipe.build}, protocol 7.0.0"
    return replace(recipe, comment=comment, theirs=True)


def _split() -> Recipe:
    # Wide enough for weights to be cut.
    whole = _llama("7.0.0", upstream.DEFAULT_BUILD, ffn_width=1024)
    return Recipe(
        whole.run,
        "a server that splits over another (SPLIT_*), used by llama-completion of llama.cpp "
        f"b{upstream.DEFAULT_BUILD}: what the server that splits sends",
        behind=("--tensor-split", "1,3"),
        build=upstream.DEFAULT_BUILD,
    )


# -- this project's client ------------------------------------------------------------------------


def _own(version: str) -> Recipe:
    return Recipe(
        lambda port, _folder: asyncio.run(_all_commands(port, version)),
        f"the client of this project, protocol {version}: each command of the version",
        ("--protocol", version),
    )


async def _all_commands(port: int, version: str) -> None:
    """Every command of a version, with values that are worth comparing."""
    random = np.random.default_rng(1)
    async with Backend.connect(HOST, port, version=version) as backend:
        connection, commands = backend.connection, backend.connection.dialect.commands
        if Command.DEVICE_COUNT in commands:
            await connection.device_count()
        await connection.get_device_memory()
        weights = await backend.tensor(GgmlType.Q8_0, (32, 16), name="weights")
        scales = np.full((16, 1), 0.01, np.float16).view(np.uint8)
        quants = random.integers(0, 256, (16, 32), np.uint8)
        await backend.upload(weights, np.concatenate([scales, quants], 1).tobytes())
        x = await backend.tensor(GgmlType.F32, (32, 2), random.random((2, 32)), name="x")
        y = await backend.tensor(GgmlType.F32, (32, 2), name="y")
        await connection.buffer_clear(y.buffer, 0)
        await connection.set_tensor_hash(y, fnv1a_64(b"nothing that a server has"))
        await connection.copy_tensor(x, y)
        if Command.MEMSET_TENSOR in commands:
            await connection.memset_tensor(y, 0, offset=4, size=8)
        graph = backend.graph
        product = graph.mul_mat(weights, graph.rms_norm(graph.add(x, y), 1e-6))
        result = graph.soft_max(product)
        plan = await backend.prepare(result)
        await plan.run()
        await backend.download(result)
        await backend.upload(x, random.random((2, 32)))
        # The same graph again: GRAPH_RECOMPUTE where there is such a command.
        await plan.run()
        await backend.download(result)
        await plan.free()
        await backend.compute(graph.silu(x))


def _cache() -> Recipe:
    return Recipe(
        lambda port, _folder: asyncio.run(_cached_tensor(port)),
        "the client of this project, protocol 7.0.0, with the server's tensor cache",
        ("--cache",),
    )


async def _cached_tensor(port: int) -> None:
    """A tensor that the server doesn't have, and then has."""
    values = np.random.default_rng(2).random(64, np.float32)
    async with Backend.connect(HOST, port) as backend:
        connection = backend.connection
        digest = fnv1a_64(values.tobytes())
        first = await backend.tensor(GgmlType.F32, (64,), name="first")
        await connection.set_tensor_hash(first, digest)
        await connection.set_tensor(first, values.tobytes(), cache_flag=1)
        second = await backend.tensor(GgmlType.F32, (64,), name="second")
        await connection.set_tensor_hash(second, digest)
        await backend.download(second)


RECIPES: dict[str, Recipe] = {
    **{
        f"llama-{version}": _llama(version, build)
        for version, build in upstream.DIALECT_BUILDS.items()
    },
    **{
        f"own-{version}": _own(version)
        for version in (
            *("4.0.3", "4.0.2", "3.6.1", "3.6.0", "3.5.0", "3.0.0"),
            *("2.0.0-90", "2.0.0-88", "2.0.0-86", "2.0.0-82", "1.0.0"),
        )
    },
    "upstream-7.0.0": _theirs(),
    "split-7.0.0": _split(),
    "cache-7.0.0": _cache(),
}


# -- recording ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(command: Sequence[str], pattern: str, scratch: Path) -> Iterator[int]:
    """A program that listens, and the port that it says."""
    # A cache that begins empty.
    with Process(command, env={"LLAMA_CACHE": str(scratch)}) as process:
        yield int(process.wait_for(pattern, _START_SECONDS)[1])


@contextlib.contextmanager
def _server(recipe: Recipe, scratch: Path) -> Iterator[int]:
    """The server that is recorded, and its port."""
    if not recipe.theirs:
        with _started(own_command(0, *SERVER_OPTIONS, *recipe.server), _LISTENS, scratch) as port:
            yield port
        return
    port = free_port()
    command = upstream_command(port, "-t", "1", build=recipe.build or upstream.DEFAULT_BUILD)
    assert command is not None
    with Process(command) as process:
        # What it prints stays in its buffers.
        process.wait_until(lambda: listens(port), _START_SECONDS, "listening socket")
        yield port


def record(name: str, path: Path) -> None:
    """Make one capture. CalledProcessError or ProgramError where a program fails."""
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        scratch = Path(folder)
        port = running.enter_context(_server(recipe, scratch))
        recorder = [
            *(sys.executable, "-m", "tools.record", "--listen", "0", "--to", f"{HOST}:{port}"),
            *("-o", str(path), "--overwrite", "--plain", "--comment", recipe.comment),
        ]
        port = running.enter_context(_started(recorder, r"recording \S+:(\d+)", scratch))
        if recipe.behind is not None:
            parts = ("--split", f"{HOST}:{port},local", "--split-mode", "row")
            coordinator = own_command(0, *SERVER_OPTIONS[:2], *parts, *recipe.behind)
            port = running.enter_context(_started(coordinator, _LISTENS, scratch))
        recipe.run(port, scratch)


def text_of(path: Path) -> str:
    """Return what tools.dump says of a capture, by the options that suit it."""
    command = [sys.executable, "-m", "tools.dump", "--color", "never", str(path)]
    texts = [
        subprocess.run(
            [*command, *options], cwd=PROJECT, capture_output=True, text=True, check=True
        ).stdout
        for options in RECIPES[path.stem].text
    ]
    return "\n".join(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.captures", __doc__)
    parser.add_argument("folder", type=Path, help=f"such as {PROJECT.name}/tests/data/captures")
    parser.add_argument("--only", action="append", choices=list(RECIPES))
    parser.add_argument("--text", action="store_true", help="record nothing: make the texts anew")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only or RECIPES:
        path = options.folder / f"{name}.pcapng"
        if not options.text:
            if not RECIPES[name].possible:
                print(f"{name}: skipped, llama.cpp b{RECIPES[name].build} is not built")
                continue
            record(name, path)
        path.with_suffix(".txt").write_text(text_of(path))
        print(f"{name}: {path.stat().st_size} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
