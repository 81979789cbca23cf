"""The floors that docs/architecture.md draws and the habits of the house, held against the code."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from tests import docstrings, places

PROJECT = Path(__file__).parents[1]
PACKAGES = ("protocol", "client", "rpc_server", "conformance", "tools")

# From the ground up. A module lies on the floor of the longest name that it begins with, and
# imports nothing from above. Imports for types alone count too: what can't be named can't be used.
FLOORS = (
    ("protocol.ggml",),
    ("protocol",),
    ("protocol.observe",),
    ("client.errors", "client.tensors", "client.tunnel"),
    ("client.builder",),
    ("client",),
    ("client.split",),
    (
        "rpc_server.children",
        "rpc_server.folders",
        "rpc_server.limits",
        "rpc_server.sockets",
        "rpc_server.turns",
        "rpc_server.observability",
    ),
    ("rpc_server.graph", "rpc_server.native", "rpc_server.types", "rpc_server.cache"),
    ("rpc_server.models",),
    ("rpc_server.ops",),
    ("rpc_server.devices.cpu.kernels.interface",),
    ("rpc_server.devices.cpu.kernels", "rpc_server.devices.base", "rpc_server.devices.planning"),
    ("rpc_server.devices.cpu",),
    ("rpc_server.devices.cuda", "rpc_server.devices.split"),
    ("rpc_server.devices",),
    ("rpc_server.session",),
    ("rpc_server.net", "rpc_server.observability.exporter"),
    ("rpc_server",),
    ("tools.serving", "tools.upstream"),
    ("conformance",),
    ("tools",),
)
# The version, which names no other module.
GROUND = "rpc_server"
# The client's public names, which are loaded when they are asked for.
PUBLIC = "client"

# What conformance may use of our client: it builds graphs and speaks, and judges by itself.
CLIENT_FOR_CONFORMANCE = (
    "client.builder",
    "client.connection",
    "client.errors",
    "client.split.steps",
    "client.tensors",
)


def _modules(*packages: str) -> dict[str, Path]:
    found = {}
    for package in packages:
        for path in sorted((PROJECT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules(*PACKAGES)


def _imports(path: Path, modules: Collection[str]) -> Iterator[str]:
    """Which of these modules a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules:
                    yield whole
                elif node.module and node.module in modules:
                    yield node.module


IMPORTS = {name: set(_imports(path, MODULES)) for name, path in MODULES.items()}


def _within(module: str, *names: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def _floor(module: str) -> int:
    if module == GROUND:
        return 0
    if module == PUBLIC:
        return _floor("client.split")
    at = {name: number for number, names in enumerate(FLOORS) for name in names}
    return at[max((name for name in at if _within(module, name)), key=len)]


def test_nothing_imports_from_a_floor_above() -> None:
    upward = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if _floor(other) > _floor(module)
    }
    assert not upward


def test_no_circles() -> None:
    """Modules whose imports are done, one after the other; what is left imports itself."""
    left = {module: set(others) - {module} for module, others in IMPORTS.items()}
    while free := {module for module, others in left.items() if not others}:
        left = {m: others - free for m, others in left.items() if m not in free}
    assert not left


def test_the_protocol_imports_nothing_of_ours_and_the_client_no_server() -> None:
    for module, others in IMPORTS.items():
        if _within(module, "protocol"):
            assert all(_within(other, "protocol") for other in others), module
        if _within(module, "client"):
            assert all(_within(other, "protocol", "client") for other in others), module


def test_conformance_reaches_servers_by_their_sockets() -> None:
    allowed = ("protocol", "conformance", "tools.serving", *CLIENT_FOR_CONFORMANCE)
    foreign = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if _within(module, "conformance")
        for other in others
        if not _within(other, *allowed)
    }
    assert not foreign


def test_the_server_imports_no_kernels() -> None:
    """They need numba: only the processes that compile import them."""
    kernels = "rpc_server.devices.cpu.kernels"
    for module, others in IMPORTS.items():
        if not _within(module, kernels):
            inside = {o for o in others if _within(o, kernels)}
            assert all(_within(o, f"{kernels}.interface") for o in inside), module


def test_devices_stand_beside_each_other() -> None:
    """A GPU's uses of the CPU's what compiled code and the server agree on: records, streams."""
    for module, others in IMPORTS.items():
        if _within(module, "rpc_server.devices.cuda"):
            inside = {o for o in others if _within(o, "rpc_server.devices.cpu")}
            shared = "rpc_server.devices.cpu.kernels.interface"
            assert all(_within(o, shared) for o in inside), module
        if _within(module, "rpc_server.devices.cpu"):
            strangers = ("rpc_server.devices.cuda", "rpc_server.devices.split")
            assert not any(_within(o, *strangers) for o in others), module


def test_few_modules_lie_beside_the_servers_folders() -> None:
    assert len(list((PROJECT / "rpc_server").glob("*.py"))) <= 8


def test_a_class_name_means_one_thing() -> None:
    where = defaultdict(set)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                where[node.name].add(module)
    twice = {name: modules for name, modules in where.items() if len(modules) > 1}
    assert not twice


def test_docstrings_begin_with_what_is_done_or_what_there_is() -> None:
    found = [
        f"{path.relative_to(PROJECT)}:{fault}"
        for path in MODULES.values()
        for fault in docstrings.faults(path.read_text())
    ]
    assert not found


def test_docstrings_that_begin_otherwise_are_found() -> None:
    source = '''
def size():
    """Bytes of it."""
def has():
    """Whether it is there."""
class Thing:
    """What there is."""
    @property
    def name(self):
        """The name."""
    def run(self):
        """Run it."""
    def _left(self):
        """The rest."""
    def _is_left(self):
        """Whether there is a rest."""
@GROUP.case(1)
def case():
    """Whatever is printed."""
'''
    lines = [fault.split(":")[0] for fault in docstrings.faults(source)]
    assert lines == ["2 size", "4 has", "6 Thing", "15 _is_left"]


def _reached(modules: dict[str, Path]) -> dict[Path, set[str]]:
    """By file the modules that it imports, itself or through others, or that are run for it."""
    direct = {name: set(_imports(path, modules)) for name, path in modules.items()}
    for name, others in places.BY_NAME.items():
        direct[name] |= {m for m in modules if _within(m, *others)}
    reached = {}
    for name, path in modules.items():
        seen, left = set[str](), [name]
        while left:
            if (module := left.pop()) not in seen:
                seen.add(module)
                # Importing a module imports the packages that it lies in.
                packages = module.rpartition(".")[0]
                left += [*direct[module], *([packages] if packages in modules else [])]
        reached[path] = seen
    return reached


def test_every_module_has_its_test_where_one_looks_for_it() -> None:
    reached = _reached(_modules(*PACKAGES, "tests"))
    without, wrong = [], []
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            continue
        tests = places.tests_of(module)
        if tests is None:
            without.append(module)
        elif module not in reached[tests]:
            wrong.append(f"{module} has nothing to do with {tests.relative_to(PROJECT)}")
    assert not without, "write a test of its name, or a row in tests/places.py"
    assert not wrong


def test_places_of_tests_are_of_modules_that_are_there() -> None:
    for name in [*places.FOLDERS, *places.ELSEWHERE, *places.BY_NAME]:
        assert any(_within(module, name) for module in [*MODULES, *_modules("tests")]), name
    for file in places.ELSEWHERE.values():
        assert (places.TESTS / file).is_file(), file


# Where paths in documents begin.
_FROM = ("", "rpc_server", "rpc_server/devices/cpu", "rpc_server/devices/cpu/kernels")
_PATH = re.compile(r"`([a-z_]+/[\w/.-]*)`")
_TOPS = (*PACKAGES, "tests", "docs")


def _is_there(path: str) -> bool:
    return any((PROJECT / start / path).exists() for start in _FROM)


@pytest.mark.parametrize("document", sorted((PROJECT / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_paths_that_documents_name_are_there(document: Path) -> None:
    """In all documents those from our folders on, in what tells of the code all."""
    code = document.stem in ("architecture", "extending", "glossary")
    for path in _PATH.findall(document.read_text()):
        if code or path.split("/")[0] in _TOPS:
            assert _is_there(path), path
