"""What the catalog says of kernels, without having any, is what there is."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

from protocol.ggml.types import CACHE_TYPES, DECODABLE
from rpc_server.devices.cpu import catalog, kernels
from rpc_server.devices.cpu.kernels import dequantize, formats, quantize
from rpc_server.devices.cpu.kernels.interface.layout import PRODUCT_TYPES, SCALE_GROUPS
from rpc_server.native.source import is_routine

PROJECT = Path(__file__).parents[2]


def _catalogued() -> set[tuple[str, str]]:
    """(module, name) of all kernels and families of kernels."""
    plain = {k for k in vars(catalog).values() if isinstance(k, catalog.Kernel)}
    plain |= set(catalog.CONVERTERS.values())
    # A family is known by what it makes.
    families = [v for name, v in vars(catalog).items() if name.endswith("_kernel")]
    return {(k.module, k.name) for k in plain | {family(0) for family in families}}


def test_every_kernel_is_in_the_catalog_and_nothing_else() -> None:
    written = set()
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and name[0] != "_" and (is_routine(value) or name.endswith("_kernel")):
                written.add((module.__name__, name))
    assert written == _catalogued()


def test_types_with_kernels() -> None:
    assert set(formats.FORMATS) == PRODUCT_TYPES
    assert set(formats.QUANTIZED) == set(SCALE_GROUPS)
    assert set(quantize.QUANTIZERS) == set(CACHE_TYPES)
    assert {*dequantize.ROWS, *dequantize.GRID_TYPES} == DECODABLE


def test_a_kernel_has_a_label_that_tells_it_from_others() -> None:
    labels = {
        catalog.norm_kernel(0).label,
        catalog.norm_kernel(1).label,
        catalog.set_rows_kernel(None).label,
        catalog.set_rows_kernel(2).label,
        catalog.product_kernel(2, 4).label,
        catalog.product_kernel(24, 0).label,
        catalog.sum_all.label,
    }
    assert len(labels) == 7
    assert "norm.norm_kernel-0" in labels


def _imported(path: Path) -> set[Path]:
    """Files of ours that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        files = (PROJECT / (name.replace(".", "/") + ".py") for name in names)
        found |= {file for file in files if file.exists()}
    return found


def test_all_that_kernels_are_compiled_from_is_in_their_fingerprint() -> None:
    due = [p for folder in catalog.COMPILED for p in folder.rglob("*.py")]
    assert len(due) > 40
    seen: set[Path] = set()
    while due:
        path = due.pop()
        if path not in seen:
            seen.add(path)
            due += _imported(path)
    outside = {p for p in seen if not any(p.is_relative_to(f) for f in catalog.COMPILED)}
    # What opens the folder of compiled code decides where it is kept, not what it is; nor does what
    # shows how far compilers are, or by what their processes find the modules.
    assert {p.name for p in outside} == {"children.py", "folders.py", "progress.py", "text.py"}
