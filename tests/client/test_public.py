"""What ``client`` offers, and the programs of docs/python.md, run as they are printed there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

import client
from tests.server.process import running
from tests.upstream_server import Endpoint

PROJECT = Path(__file__).parents[2]
DOCUMENT = PROJECT / "docs/python.md"
PROGRAMS = re.findall(r"^## ([^\n]+)$.*?^```python\n(.*?)^```$", DOCUMENT.read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def second() -> Iterator[Endpoint]:
    with running("--threads", "1") as process:
        yield Endpoint("127.0.0.1", process.port)


def _write_model(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", np.arange(64, dtype=np.float32))
    writer.add_tensor("output.weight", np.ones((32, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("program", [p for _, p in PROGRAMS], ids=[t for t, _ in PROGRAMS])
def test_programs_of_the_document(
    program: str, ours: Endpoint, second: Endpoint, tmp_path: Path
) -> None:
    _write_model(tmp_path / "model.gguf")
    program = program.replace("localhost", "127.0.0.1")
    program = program.replace("50052", str(ours.port)).replace("50053", str(second.port))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_document_has_a_program_for_each_use() -> None:
    assert [title for title, _ in PROGRAMS] == [
        "Connect",
        "Run a graph",
        "Load a GGUF file",
        "Split over two servers",
    ]


def test_all_names_are_there_and_documented() -> None:
    for name in client.__all__:
        assert getattr(client, name).__doc__, name
    assert set(client.__all__) <= set(dir(client))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = client.nothing  # type: ignore[attr-defined]


def test_types_are_told_of_the_same_names() -> None:
    """Three lists name them: for the loader, for ``import *``, and for type checkers."""
    tree = ast.parse(Path(client.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {
        (node.names[0].asname, node.module)
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
    }
    assert found == set(client._HOMES.items())
    assert sorted(client._HOMES) == sorted(client.__all__)


def test_a_connection_loads_no_graphs() -> None:
    """Servers use the client's tunnels: they are not to load all that clients need."""
    code = "import client.tunnel, sys; print('client.builder.graph' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "False\n"
