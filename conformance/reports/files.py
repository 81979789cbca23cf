"""The files that a run is written to."""

from __future__ import annotations

import argparse

from conformance.reports.html import write_html
from conformance.reports.json_file import write_json
from conformance.reports.junit import write_junit
from conformance.suite.results import SuiteRun


def write_reports(run: SuiteRun, options: argparse.Namespace) -> None:
    """Write the files that the options of conformance.arguments.add_reports name."""
    for path, write in (
        (options.json, write_json),
        (options.junit, write_junit),
        (options.html, write_html),
    ):
        if path:
            write(run, path)
