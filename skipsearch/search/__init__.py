"""The search for a mask. The package itself can be called, as `skipsearch.search(...)`: see `run.search`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Search(ModuleType):
    """Makes the package callable. Importing a submodule binds `skipsearch.search` to the package, not to a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from skipsearch.search.run import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Search
