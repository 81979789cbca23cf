"""What the repository says of itself in several places is the same."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tools.serving.processes import PROJECT

pytestmark = pytest.mark.skipif(
    not (PROJECT / ".ci/run").is_file(), reason="the repository's files are not here"
)


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    found = re.search(r"^test_command=\$\((.+)\)$", read(".ci/run"), re.MULTILINE)
    assert found
    command = subprocess.run(
        ["bash", "-c", found[1]], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    first, install, test = command.strip().split(" && ")
    assert command.count("\n") == 1
    assert first == "python3 -m venv .venv"
    assert test == ".venv/bin/python -m pytest"
    assert f"{first} && {install}" in read("CONTRIBUTING.md")
    assert test in read("CONTRIBUTING.md")


def test_what_judges_a_change_leaves_out_nothing_but_the_nightly_tests() -> None:
    commands = [
        (".ci/run", r"^.*bash .*-c \"\$test_command\"$"),
        (".github/workflows/ci.yml", r"^.*python -m pytest.*$"),
        (".github/workflows/nightly.yml", r"^.*python -m pytest.*$"),
    ]
    for name, pattern in commands:
        [command] = re.findall(pattern, read(name), re.MULTILINE)
        assert "-m 'not nightly'" in command, name


def test_extras_that_are_named_exist() -> None:
    extras = set(tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"])
    files = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), PROJECT / ".ci/run"]
    files += PROJECT.glob(".github/workflows/*.yml")
    for file in files:
        text = file.read_text(encoding="utf-8")
        for named in re.findall(r"(?:ggml-rpc-server|\.|project)\[([a-z0-9,]+)\]", text):
            assert set(named.split(",")) <= extras, f"{file.name}: [{named}]"


def test_findings_are_listed_and_can_be_run() -> None:
    scripts = {path.stem for path in (PROJECT / "findings").glob("*.sh")}
    listed = re.findall(r"^\| \[([\w-]+)\]\(\1\.sh\) ", read("findings/README.md"), re.MULTILINE)
    assert sorted(listed) == sorted(scripts)
    for name in scripts:
        text = read(f"findings/{name}.sh")
        assert os.access(PROJECT / f"findings/{name}.sh", os.X_OK)
        for part in ("Surprise", "Why a good guess is wrong", "Who it hurts", "Seen with"):
            assert f"\n# {part}: " in text, f"{name}: {part}"
        # Of packages only pinned versions, or it isn't the same tomorrow.
        for command in re.findall(r"^ *install (.*)", text.replace("\\\n", " "), re.MULTILINE):
            words = [word for word in command.split() if word[0] not in '-"$']
            assert all("==" in word for word in words), f"{name}: {command}"


def test_links_between_documents_lead_somewhere() -> None:
    for file in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("findings/*.md")]:
        # Calls of what a table holds look like links.
        text = re.sub(r"^ *```.*?^ *```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_the_typed_packages_are_marked() -> None:
    project = tomllib.loads(read("pyproject.toml"))["tool"]
    packages = [name.rstrip("*") for name in project["setuptools"]["packages"]["find"]["include"]]
    assert {*packages, "tests"} == set(project["mypy"]["packages"])
    for package in packages:
        assert (Path(PROJECT) / package / "py.typed").is_file()
