"""llama-server with all of a model on RPC servers, for what asks it as its users do."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import upstream
from tools.serving.ports import free_port
from tools.serving.processes import HOST, PATIENCE, Process, ProgramError


def healthy(port: int) -> bool:
    """Return whether a llama-server at this port has its model loaded."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer,
    ):
        return bool(answer.status == 200)
    return False


class LlamaServer(Process):
    """llama-server, ``ready`` once it has loaded the model. ``rpc`` is as --rpc takes it."""

    def __init__(
        self,
        model: Path,
        rpc: str,
        options: Sequence[str] = (),
        log_path: Path | None = None,
        build: int = upstream.DEFAULT_BUILD,
    ) -> None:
        program = upstream.find_program("llama-server", build)
        if program is None:
            raise ProgramError("no llama-server: run python -m tools.upstream")
        self.port = free_port()
        super().__init__(
            [
                str(program),
                *("-m", str(model), "--host", HOST, "--port", str(self.port)),
                *("--rpc", rpc, "-ngl", "99", "-fit", "off", *options),
                *("--no-webui", "--no-warmup", "--cache-ram", "0", "--offline"),
            ],
            log_path,
        )

    def ready(self) -> bool:
        """Return whether it answers questions."""
        return healthy(self.port)

    def complete(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Return what it answers, greedily and with so many tokens, as its JSON has it.

        Raises OSError where there is no answer, TimeoutError among them.
        """
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.load(answer)
        return found
