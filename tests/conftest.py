"""Rules for all tests."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# CI has llama.cpp's programs: there, a test that was skipped for want of them has failed.
REQUIRE_UPSTREAM = bool(os.environ.get("REQUIRE_UPSTREAM"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_UPSTREAM and report.skipped and item.get_closest_marker("upstream"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped although REQUIRE_UPSTREAM is set: {reason}"
    return report
