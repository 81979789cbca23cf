"""Pictures of terminals: what a program printed is what is drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.text import Text

pytest.importorskip("pyte", reason="no pyte: pip install '.[pictures]'")

from tools import pictures
from tools.serving.processes import PROJECT, ProgramError

SVG = "{http://www.w3.org/2000/svg}"


def drawn(path: Path) -> list[str]:
    """The lines of a picture."""
    lines: dict[float, str] = {}
    for text in ElementTree.parse(path).iter(f"{SVG}text"):
        if "clip-path" in text.attrib:
            # A text for each run of one style; blank ones aren't drawn.
            lines[float(text.attrib["y"])] = lines.get(float(text.attrib["y"]), "") + (
                text.text or ""
            )
    return [line.replace("\xa0", " ").rstrip() for _, line in sorted(lines.items())]


@pytest.mark.slow
def test_a_dump_is_drawn_as_it_is_printed(tmp_path: Path) -> None:
    assert pictures.main(["dump", "-o", str(tmp_path)]) == 0
    command, *lines, dots = drawn(tmp_path / "terminal-dump.svg")
    words = command.removeprefix("$ python ").split()
    printed = subprocess.run(
        [sys.executable, *words], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert dots.strip() == "..."
    assert len(lines) > 20
    for line, expected in zip(lines[:10], printed, strict=False):
        assert line.replace(" ", "") == expected.replace(" ", "")


def test_colours_and_what_is_written_over(tmp_path: Path) -> None:
    code = "print('\\x1b[1;33myellow\\x1b[0m plain'); print('first\\rsecond')"
    with pictures.running([sys.executable, "-c", code], "python") as terminal:
        terminal.end()
        command, first, second = terminal.lines()
    assert (command.plain, first.plain, second.plain) == ("$ python", "yellow plain", "second")
    style = first.get_style_at_offset(pictures._PLAIN, 0)
    assert style.bold
    assert style.color is not None
    assert style.color.name == "yellow"


def test_a_program_that_ends_early_is_told_of() -> None:
    with (
        pictures.running([sys.executable, "-c", "print('no such port')"], "server") as terminal,
        pytest.raises(ProgramError, match="no such port"),
    ):
        terminal.wait_for("Devices:")


def test_ports_are_replaced_within_lines() -> None:
    (line,) = pictures._with_port([Text("on h:1234, or h:1234.")], 1234, 50052)
    assert line.plain == "on h:50052, or h:50052."


def test_pictures_in_the_docs_begin_with_a_command() -> None:
    for name in pictures.SCENES:
        lines = drawn(PROJECT / f"docs/pictures/terminal-{name}.svg")
        assert lines[0].startswith("$ python -m ")
        assert "/home/" not in "".join(lines)
