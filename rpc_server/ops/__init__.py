"""ggml's ops, a file per family; importing the package fills the op table.

Adding an op is one entry in one family file: its contract and its array reference. A device that
wants it faster adds a lowering of its own.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
