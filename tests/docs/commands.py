"""What readers of the documents are told to type, and what they are shown, read from the documents.

A block of code (indented or fenced) and a span of code that is a whole command line. Substitution
and splitting are here too; what a command means is the test's business.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

# What begins a command line; text in spans that begins otherwise is a name or an option.
_PROGRAM = re.compile(r"(python3?|pip|pipx|uvx?|git|llama-\S+|\S+/bin/\S+|\.ci/run)\s+\S")
# Lines and arrows of a drawing.
_DRAWING = re.compile("[─│┌└├>]{2}|──")


@dataclass(frozen=True)
class Shown:
    """A block or span of a document: the text, and the line where it begins."""

    document: str
    line: int
    text: str

    @property
    def is_command(self) -> bool:
        """Whether its first line is a command line; else it is a drawing or what a program says."""
        return _PROGRAM.match(self.text) is not None

    @property
    def is_drawing(self) -> bool:
        return _DRAWING.search(self.text) is not None

    def command_lines(self) -> list[str]:
        """The lines, those that end in a backslash joined with the next."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in joined.splitlines() if line.strip()]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def shown(path: Path) -> list[Shown]:
    """Return the blocks of code of a document and the commands in its sentences, in order."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        if token.map is None:
            continue
        line = token.map[0] + 1
        if token.type in ("code_block", "fence"):
            found.append(Shown(path.name, line, token.content.strip("\n")))
        for child in token.children or ():
            text = " ".join(child.content.split())
            if child.type == "code_inline" and _PROGRAM.match(text):
                found.append(Shown(path.name, line, text))
    return found


def substituted(line: str, words: Mapping[str, str]) -> str:
    """A command line with each key of ``words`` replaced, longer keys first."""
    if not words:
        return line
    keys = sorted(words, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, keys)), lambda found: words[found[0]], line)


def steps(line: str) -> list[list[str]]:
    """Return the commands of a line, which ``&&`` joins, as words; without comments."""
    words = shlex.split(line, comments=True)
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def pattern(text: str) -> str:
    """A regular expression for a line that a program says: any numbers, units, and processor."""
    text = re.sub(r"CPU: .*? \(", "CPU: PROCESSOR (", text)
    escaped = re.escape(text).replace("PROCESSOR", ".+")
    return re.sub(r"[KMG]iB", "[KMG]iB", re.sub(r"\d+(?:(?:\\?\.|:)\d+)*", r"[\\d.:]+", escaped))
