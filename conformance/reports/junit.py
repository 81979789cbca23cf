"""A run as JUnit XML, which CI systems show: a suite per group, a test per case."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from conformance.suite.results import CaseResult, SuiteRun, Verdict

# XML 1.0 has no room for these, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(run: SuiteRun) -> ElementTree.Element:
    """Return the testsuites element."""
    counts = run.counts
    root = ElementTree.Element("testsuites", name=f"ggml RPC conformance of {run.server}")
    _count(root, run.results)
    root.set("time", f"{run.seconds:.3f}")
    groups: dict[int, list[CaseResult]] = {}
    for result in run.results:
        groups.setdefault(result.case.group.number, []).append(result)
    for results in groups.values():
        group = results[0].case.group
        suite = ElementTree.SubElement(root, "testsuite", name=f"{group.number} {group.title}")
        _count(suite, results)
        suite.set("time", f"{sum(result.seconds for result in results):.3f}")
        for result in results:
            suite.append(_test(result))
    assert int(root.get("failures", 0)) == counts[Verdict.FAIL]
    return root


def _count(element: ElementTree.Element, results: list[CaseResult]) -> None:
    verdicts = [result.verdict for result in results]
    element.set("tests", str(len(verdicts)))
    element.set("failures", str(verdicts.count(Verdict.FAIL)))
    skipped = verdicts.count(Verdict.SKIPPED) + verdicts.count(Verdict.NOT_RUN)
    element.set("skipped", str(skipped))
    element.set("errors", "0")


def _test(result: CaseResult) -> ElementTree.Element:
    case = result.case
    test = ElementTree.Element(
        "testcase",
        classname=f"conformance.{case.group.name}",
        name=str(case),
        time=f"{result.seconds:.3f}",
    )
    came = _clean(result.came)
    if result.verdict is Verdict.FAIL:
        failure = ElementTree.SubElement(test, "failure", message=came)
        lines = [f"sent: {case.sends}", f"expected: {case.expects}", f"came: {came}"]
        lines += [f"why: {case.why}", f"source: {case.source}"]
        if result.output:
            lines += ["the server's output:", _clean(result.output)]
        failure.text = "\n".join(lines)
    elif result.verdict in (Verdict.SKIPPED, Verdict.NOT_RUN):
        ElementTree.SubElement(test, "skipped", message=came)
    elif result.verdict is Verdict.DIFFERS:
        out = ElementTree.SubElement(test, "system-out")
        out.text = f"differs, in what the protocol leaves open: {came}"
    return test


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)


def write_junit(run: SuiteRun, path: Path) -> None:
    tree = ElementTree.ElementTree(to_junit(run))
    ElementTree.indent(tree)
    tree.write(path, encoding="utf-8", xml_declaration=True)
