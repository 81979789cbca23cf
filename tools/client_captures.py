"""Records what real programs send: a session each of how people use llama.cpp with a server.

    python -m tools.client_captures tests/data/captures/clients
    python -m tools.client_captures tests/data/captures/clients --only slots-flash

The programs are llama.cpp's, the server is its own ggml-rpc-server, the model has some ten
kilobytes. The cases of `python -m conformance` about what clients send are made after these.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import models, upstream
from tools.arguments import command_line
from tools.serving.ports import free_port
from tools.serving.processes import HOST, Process, ProgramError, listens, upstream_command

_SECONDS = 60.0
_TEXT = "the sky is"
# No compression is worth more time than this takes.
_LEVEL = 9

Run = Callable[[Sequence[int], Path], None]


@dataclass(frozen=True, slots=True)
class Use:
    """One way to use a server: ``run`` is given the ports of ``servers`` servers and a folder."""

    about: str
    run: Run
    servers: int = 1


def program(name: str) -> str:
    """Return the path of llama.cpp's program. Raises ProgramError where it isn't built."""
    path = upstream.find_program(name, upstream.DEFAULT_BUILD)
    if path is None:
        raise ProgramError(f"no {name} of llama.cpp b{upstream.DEFAULT_BUILD}: see tools.upstream")
    return str(path)


def _on(ports: Sequence[int]) -> list[str]:
    return ["--rpc", ",".join(f"{HOST}:{port}" for port in ports), "-ngl", "99"]


def _post(port: int, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return json.loads(answer.read())


def _complete(port: int, text: str = _TEXT, count: int = 3, **more: Any) -> None:
    body = {"prompt": text, "n_predict": count, "temperature": 0, "ignore_eos": True, **more}
    _post(port, "/completion", body)


@contextlib.contextmanager
def _server(ports: Sequence[int], folder: Path, *options: str) -> Iterator[int]:
    """llama-server with its model on the servers at ``ports``; its own port."""
    model = models.write_tiny_model(folder / "tiny.gguf")
    port = free_port()
    command = [
        *(program("llama-server"), "-m", str(model), "--host", HOST, "--port", str(port)),
        *("-c", "64", "-t", "1", "--no-webui", "--no-warmup", "--cache-ram", "0", "--offline"),
        *("-fit", "off", *_on(ports), *options),
    ]
    with Process(command) as process:
        process.wait_until(lambda: listens(port), _SECONDS, "listening socket")
        process.wait_for("listening on http", _SECONDS)
        yield port


def _slots(*options: str) -> Run:
    """A prompt, its slot saved, erased, restored, and used on."""

    def run(ports: Sequence[int], folder: Path) -> None:
        saving = ("--slot-save-path", str(folder), "-np", "1", *options)
        with _server(ports, folder, *saving) as port:
            _complete(port, id_slot=0, cache_prompt=True)
            for action in ("save", "erase", "restore"):
                _post(port, f"/slots/0?action={action}", {"filename": "slot.bin"})
            _complete(port, f"{_TEXT} blue", 2, id_slot=0, cache_prompt=True)

    return run


def _parallel(ports: Sequence[int], folder: Path) -> None:
    with _server(ports, folder, "-np", "3", "-kvu") as port:
        texts = (_TEXT, "a bird", "one two three four")
        threads = [threading.Thread(target=_complete, args=(port, text)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _embeddings(ports: Sequence[int], folder: Path) -> None:
    with _server(ports, folder, "--embedding", "--pooling", "mean", "-np", "1") as port:
        for text in (_TEXT, "a bird"):
            _post(port, "/embedding", {"content": text})


def _lora(ports: Sequence[int], folder: Path) -> None:
    model = models.write_tiny_model(folder / "base.gguf")
    adapter = models.write_lora(model, folder / "lora.gguf", rank=4)
    with _server(ports, folder, "--lora", str(adapter), "-np", "1") as port:
        _complete(port)


def _speculative(ports: Sequence[int], folder: Path) -> None:
    """A second model proposes tokens, the first one checks several at once."""
    draft = models.write_tiny_model(folder / "draft.gguf", ffn_width=32)
    options = ("-md", str(draft), "-ngld", "99", "--spec-draft-n-max", "3", "-np", "1")
    with _server(ports, folder, *options) as port:
        _complete(port, count=5)


def _completion(*options: str) -> Run:
    def run(ports: Sequence[int], folder: Path) -> None:
        model = models.write_tiny_model(folder / "tiny.gguf")
        command = [
            *(program("llama-completion"), "-m", str(model), "-p", _TEXT, "-n", "2", "-t", "1"),
            *("--temp", "0", "--ignore-eos", "--no-conversation", "--no-warmup"),
            *(*_on(ports), *options),
        ]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=True, **quiet)

    return run


USES: dict[str, Use] = {
    "slots": Use("a slot saved and restored, without flash attention", _slots("-fa", "off")),
    "slots-flash": Use("a slot saved and restored, with flash attention", _slots("-fa", "on")),
    "parallel": Use("three slots that generate at once", _parallel),
    "embeddings": Use("pooled embeddings of two texts", _embeddings),
    "lora": Use("an adapter beside the weights", _lora),
    "speculative": Use("a draft model beside the model", _speculative),
    "fit": Use("a dry run that looks how much fits, then the real one", _completion("-c", "32")),
    "tensor": Use(
        "a model cut over two servers by the client: one of the two",
        _completion("-c", "32", "-sm", "tensor", "-fit", "off", "-fa", "on"),
        servers=2,
    ),
}


def record(use: Use, path: Path) -> None:
    """Record one use beside upstream's server into a gzipped capture."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        folder = Path(scratch)
        ports = []
        for _ in range(use.servers):
            port = free_port()
            command = upstream_command(port, "-t", "1")
            if command is None:
                raise ProgramError("no ggml-rpc-server: see tools.upstream")
            process = running.enter_context(Process(command))
            process.wait_until(lambda port=port: listens(port), _SECONDS, "listening socket")  # type: ignore[misc]
            ports.append(port)
        plain = folder / "plain.pcapng"
        comment = f"llama.cpp b{upstream.DEFAULT_BUILD}: {use.about}"
        recorder = [
            *(sys.executable, "-m", "tools.record", "--listen", "0", "--to", f"{HOST}:{ports[0]}"),
            *("-o", str(plain), "--overwrite", "--plain", "--comment", comment),
        ]
        with Process(recorder) as process:
            ports[0] = int(process.wait_for(r"recording \S+:(\d+)", _SECONDS)[1])
            use.run(ports, folder)
        path.write_bytes(gzip.compress(plain.read_bytes(), _LEVEL, mtime=0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.client_captures", __doc__)
    parser.add_argument("folder", type=Path, help="where the captures go")
    parser.add_argument("--only", action="append", choices=list(USES), help="these alone")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only or USES:
        path = options.folder / f"{name}.pcapng.gz"
        try:
            record(USES[name], path)
        except (ProgramError, OSError, subprocess.SubprocessError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {path.stat().st_size} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
