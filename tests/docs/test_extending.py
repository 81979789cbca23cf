"""docs/extending.md's steps for an op and a type, done in a copy of the project and tried there.

The copy's server with its kernels is held against the copy's references, by the differential tester
with the copy's new family and type: nobody else has these.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
DOCUMENT = PROJECT / "docs" / "extending.md"
PACKAGES = ("protocol", "client", "rpc_server", "conformance", "tools")

# A server in which every node runs as its op's reference.
_REFERENCES = """
import sys
from rpc_server.__main__ import main
from rpc_server.devices.cpu.plan import CpuPlanBuilder
CpuPlanBuilder.__init__.__kwdefaults__["use_kernels"] = False
sys.exit(main())
"""


@dataclass
class Step:
    """What is added to one file: each block begins with a line that is there already."""

    path: str
    blocks: list[list[str]] = field(default_factory=list)


def steps(title: str) -> list[Step]:
    """Return the numbered steps of a section of the document."""
    section = DOCUMENT.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    found: list[Step] = []
    block: list[str] | None = None
    for line in section.splitlines():
        if begins := re.match(r"\d+\. `([\w/.]+)`", line):
            found.append(Step(begins[1]))
        elif line == "   ```":
            if block is None:
                block = []
            else:
                found[-1].blocks.append(block)
                block = None
        elif block is not None:
            block.append(line[3:])
    return found


def apply(step: Step, project: Path) -> None:
    """Do a step as somebody would who reads it."""
    path = project / step.path
    lines = path.read_text().splitlines()
    for known, *new in step.blocks:
        assert lines.count(known) == 1, f"{step.path} has {lines.count(known)} lines {known!r}"
        at = lines.index(known) + 1
        lines[at:at] = new
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project with the document's op and type."""
    folder = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / package, folder / package, ignore=ignored)
    shutil.copy(PROJECT / "pyproject.toml", folder)
    for title in ("Add an op", "Add a type"):
        for step in steps(title):
            apply(step, folder)
    yield folder
    shutil.rmtree(folder)


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Kernels of the copy are nobody else's.
    environment = {**os.environ, "XDG_CACHE_HOME": str(copy / "cache"), "PYTHONPATH": str(copy)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=copy, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("title", "files"), [("Add an op", 6), ("Add a type", 8)])
def test_how_many_files_there_are_to_touch(title: str, files: int) -> None:
    paths = [step.path for step in steps(title)]
    assert len(paths) == len(set(paths)) == files
    assert all(step.blocks for step in steps(title))


def test_what_is_added_is_as_the_rest(copy: Path) -> None:
    paths = {step.path for title in ("Add an op", "Add a type") for step in steps(title)}
    for what in (["check"], ["format", "--check"]):
        done = run(copy, "-m", "ruff", *what, *sorted(paths))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("family", "variant"),
    [("CUBE", ""), ("MUL_MAT", "q4_x->f32"), ("GET_ROWS", "q4_x"), ("CPY", "f32->q4_x")],
)
@pytest.mark.slow
def test_kernels_of_what_was_added_agree_with_references(
    copy: Path, family: str, variant: str
) -> None:
    server = shlex.join([sys.executable, "-m", "rpc_server", "-p"]) + " {port}"
    references = shlex.join([sys.executable, "-c", _REFERENCES, "-p"]) + " {port}"
    chosen = ["--only", family, *(["--variant", variant] if variant else [])]
    done = run(
        copy, "-m", "conformance.differential", "--profile", "short", *chosen,
        "--command", server, "--reference-command", references,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(rf"^ *{family}\b", done.stdout, re.M), done.stdout


@pytest.mark.slow
def test_what_was_added_runs_as_kernels(copy: Path) -> None:
    script = """
import json
from tools import op_table
for name in [name for name in op_table.FAMILIES if name not in ("CUBE", "MUL_MAT", "GET_ROWS")]:
    del op_table.FAMILIES[name]
print(json.dumps({op: sorted(found.kernel) for op, found in op_table.tried().items()}))
"""
    done = run(copy, "-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert kernels["CUBE"] == ["BF16", "F16", "F32"]
    assert "Q4_X" in kernels["MUL_MAT"]
    assert "Q4_X" in kernels["GET_ROWS"]
