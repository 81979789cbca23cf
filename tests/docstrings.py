"""Docstrings that don't begin with a verb for what is done, or a noun for what there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_QUESTION = re.compile(r"(What|Whether|How|Where|Which|Who|When|Why|If|That)\b")
_WORD = re.compile(r"[A-Z][a-z]+\b")
# Words that begin a description of a thing, not of what a function does with it.
_NO_VERB = re.compile(
    r"(A|After|Again|All|Also|Alone|An|And|Another|Any|As|At|Before|Beside|Both|But|By|Each"
    r"|Eight|Either|Equal|Every|Few|For|Four|From|Here|However|If|In|Index|Into|Its|Least"
    r"|Like|Many|Memory|More|Most|Neither|Never|No|Nobody|None|Nothing|Number|Of|On|Once"
    r"|One|Only|Or|Other|Out|Over|Own|Perhaps|Room|Same|Several|Since|Size|So|Some|Somebody"
    r"|Source|Such|Text|That|The|Their|Then|There|These|They|This|Those|Three|To|Token|True"
    r"|Two|Under|Until|Up|Upstream|Value|Whatever|Whoever|Whole|With|Within|Without)\b"
)
_ENDS_IN_S = frozenset({"Address", "Compress", "Express", "Pass", "Process"})
# Their docstrings are texts that programs print: a case's reason, what an attack is.
_TEXTS = ("case", "attack", "family")

_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(body: list[ast.stmt], private: bool = False) -> Iterator[tuple[_Documented, bool]]:
    """Classes and functions outside of functions, and whether they are private."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inside = private or node.name.startswith("_")
            yield node, inside
            if isinstance(node, ast.ClassDef):
                yield from _documented(node.body, inside)


def _decorators(node: _Documented) -> set[str]:
    """The last names of its decorators."""
    plain = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return {ast.unparse(d).rsplit(".", 1)[-1] for d in plain}


def _is_verb(first: str) -> bool:
    found = _WORD.match(first)
    if not found:
        return False
    word = found.group()
    return not _NO_VERB.match(word) and (not word.endswith("s") or word in _ENDS_IN_S)


def faults(source: str) -> Iterator[str]:
    """Yield line, name and first line of what begins otherwise; private functions may."""
    for node, private in _documented(ast.parse(source).body):
        text, decorators = ast.get_docstring(node), _decorators(node)
        if text is None or decorators & set(_TEXTS):
            continue
        thing = isinstance(node, ast.ClassDef) or bool(
            decorators & {"property", "cached_property", "setter"}
        )
        wrong = _QUESTION.match(text) or not (thing or private or _is_verb(text))
        if wrong:
            yield f"{node.lineno} {node.name}: {text.splitlines()[0]}"
