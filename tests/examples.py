"""What hypothesis makes up, where that is to be the same in every run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

_PROVIDERS = "hypothesis.internal.conjecture.providers"
_FINDS = "_get_local_constants"


@contextlib.contextmanager
def without_our_numbers() -> Iterator[None]:
    """Have hypothesis draw none of the numbers that it finds in our modules meanwhile.

    What it makes up of a seed would depend on which modules are loaded by then, and change with any
    number in any of them. Older releases of it look for none.
    """
    providers = sys.modules.get(_PROVIDERS)
    if providers is None or not hasattr(providers, _FINDS):
        yield
        return
    nothing = providers.Constants()
    with mock.patch.object(providers, _FINDS, return_value=nothing):
        providers.CONSTANTS_CACHE.cache.clear()
        yield
    providers.CONSTANTS_CACHE.cache.clear()
