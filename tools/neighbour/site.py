"""The servers that are attacked: started here, on ports that the system chooses, and measured."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.neighbour.attack import Where
from tools.serving.processes import HOST, Process, own_command

# Clients' memory: what is attacked is the server, not the machine that this runs on.
_MEM_MIB = "3072"
_MEM_OF_WORKERS = "256"


@dataclass(frozen=True, slots=True)
class Footprint:
    """The footprint of a server.

    It is in bytes, and counts. ``files`` are unfinished ones that were left.
    """

    rss: int
    mappings: int
    descriptors: int
    threads: int
    files: int

    def kept(self, before: Footprint) -> str:
        """Return what is more than ``before``, in words; '' if nothing is, beyond noise."""
        found = []
        if self.rss - before.rss > _RSS_NOISE:
            found.append(f"{(self.rss - before.rss) >> 20} MiB of memory")
        for name, noise in _NOISE.items():
            more = getattr(self, name) - getattr(before, name)
            if more > noise:
                found.append(f"{more} {name}")
        return ", ".join(found)


# What an allocator, a device's scratch (64 MiB) and pools of threads keep for the next time.
_RSS_NOISE = 96 << 20
_NOISE = {"mappings": 40, "descriptors": 0, "threads": 8, "files": 0}


class Attacked:
    """A running server of this project's; leaving its context ends it and what belongs to it."""

    def __init__(self, kind: str, folder: Path, seconds: float) -> None:
        self.kind = kind
        self._folder = folder
        self._stack = contextlib.ExitStack()
        # Nobody asks nothing for so long in earnest, here.
        self._patience = max(2.0, seconds)
        try:
            self.process, self.where = getattr(self, f"_{kind.replace('-', '_')}")()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Attacked:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, *options: str) -> tuple[Process, int]:
        process = self._stack.enter_context(Process(own_command(0, *options)))
        return process, int(process.wait_for(r"endpoint +: \S+:(\d+)", 60)[1])

    def _worker(self) -> tuple[Process, Where]:
        options = ["--mem", _MEM_MIB, "--cache-dir", str(self._folder), "--cache-size", "64"]
        options += ["--metrics-port", "0", "--stall-timeout", str(self._patience)]
        options += ["--peer-timeout", str(self._patience), *self._tls()]
        process, port = self._start(*options)
        metrics = int(process.wait_for(r"metrics at http://\S+:(\d+)/")[1])
        tls = 0
        if "--tls-port" in options:
            tls = int(process.wait_for(r"endpoint, TLS +: \S+:(\d+)")[1])
        return process, Where(port, tls, metrics, str(self._folder), str(process.log_path))

    def _tls(self) -> Sequence[str]:
        """Options for TLS with a token; none where nothing is there to make a certificate."""
        if importlib.util.find_spec("trustme") is None:
            return []
        import trustme

        secrets = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        certificate = trustme.CA().issue_cert(HOST)
        certificate.private_key_and_cert_chain_pem.write_to_path(str(secrets / "cert.pem"))
        token = secrets / "token"
        token.write_text("of the neighbours' harness\n")
        token.chmod(0o600)
        cert = str(secrets / "cert.pem")
        return ["--tls-port", "0", "--tls-cert", cert, "--token-file", str(token)]

    def _read_only(self) -> tuple[Process, Where]:
        process, port = self._start(
            "--mem", _MEM_MIB, "--cache-dir", str(self._folder), "--cache-read-only"
        )
        return process, Where(port, 0, 0, str(self._folder), str(process.log_path))

    def _coordinator(self) -> tuple[Process, Where]:
        workers = [self._start("--mem", _MEM_OF_WORKERS)[1] for _ in range(2)]
        split = ",".join(f"{HOST}:{port}" for port in workers)
        mode = ("--split-mode", "row")
        process, port = self._start("--split", split, *mode, "--stall-timeout", str(self._patience))
        return process, Where(port, 0, 0, "", str(process.log_path))

    def level(self) -> Footprint:
        """Return what the server has now."""
        root = Path(f"/proc/{self.process.child.pid}")
        with (root / "maps").open("rb") as maps:
            mappings = sum(1 for _ in maps)
        unfinished = len(list(self._folder.glob(".partial-*")))
        return Footprint(
            self.process.rss(),
            mappings,
            len(os.listdir(root / "fd")),
            len(os.listdir(root / "task")),
            unfinished,
        )

    def settled(self, before: Footprint, seconds: float) -> Footprint:
        """Return the level once nothing is kept beyond ``before``, or after ``seconds``."""
        end = time.monotonic() + seconds
        level = self.level()
        while level.kept(before) and time.monotonic() < end:
            time.sleep(0.1)
            level = self.level()
        return level


@contextlib.contextmanager
def started(kind: str, seconds: float) -> Iterator[Attacked]:
    """Run a server of a kind, with a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="neighbour-cache-") as folder:
        Path(folder).chmod(0o700)
        with Attacked(kind, Path(folder), seconds) as site:
            yield site
