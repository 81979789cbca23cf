"""Rules for all tests."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sys
import threading
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu import catalog
from rpc_server.devices.cpu.instruction_sets import chosen_isa
from rpc_server.devices.cpu.kernels.interface.layout import PRODUCT_TYPES
from rpc_server.native.folder import cache_base
from rpc_server.native.library import Library
from rpc_server.native.routine import CompileError
from rpc_server.options import NO_PREPARE_VARIABLE
from tests.examples import without_our_numbers
from tools import smollm2

# Where a seed is given all that is made up is the same in every run: a change is judged by itself.
# Without one each run looks where none did before.
SEED = os.environ.get("TEST_SEED")

# How long an example takes says more about what else the machine does.
settings.register_profile("project", deadline=None, derandomize=SEED is not None)
settings.load_profile("project")

# Hundreds of servers are started, and pytest rewrites every test: where the environment says not to
# keep bytecode beside the sources it is kept in the cache, or all is compiled each time.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = str(cache_base() / "bytecode")
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"]
    sys.dont_write_bytecode = False

# Servers of tests compile what is asked of them, and leave the processors to the tests otherwise.
os.environ.setdefault(NO_PREPARE_VARIABLE, "1")

# CI has llama.cpp's programs: there, a test that was skipped for want of them has failed.
REQUIRE_UPSTREAM = bool(os.environ.get("REQUIRE_UPSTREAM"))


def pytest_configure(config: pytest.Config) -> None:
    """Have examples be those of the seed alone, and the kernels compiled that most tests need.

    By one process a core, while tests begin: each server that has to compile starts processes of
    its own, which takes longer. Only for a run of all tests: a single one needs few kernels.
    """
    if SEED is not None:
        same = contextlib.ExitStack()
        same.enter_context(without_our_numbers())
        config.add_cleanup(same.close)
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if everything and not hasattr(config, "workerinput") and not config.option.collectonly:
        library = catalog.library()
        threading.Thread(target=_compile_ahead, args=[library], daemon=True).start()


def _compile_ahead(library: Library) -> None:
    # Without a compiler tests say so themselves.
    with contextlib.suppress(CompileError):
        isa = chosen_isa()
        types = sorted(PRODUCT_TYPES)
        wanted = [catalog.kernels_of_weights(GgmlType.F16, isa)]
        wanted += [[catalog.product_of(type_, isa)] for type_ in types]
        library.request(itertools.chain(*wanted))


@pytest.fixture
def seed() -> int:
    """A seed for what a test makes up: of TEST_SEED, or a new one, which is printed."""
    chosen = int(SEED) if SEED is not None else random.SystemRandom().randrange(1 << 30)
    print(f"seed {chosen} (to repeat it: TEST_SEED={chosen})")
    return chosen


@contextlib.contextmanager
def _skipped_without_the_model() -> Iterator[None]:
    try:
        yield
    except smollm2.ModelUnavailableError as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    with _skipped_without_the_model():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    with _skipped_without_the_model():
        return (yield)


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
