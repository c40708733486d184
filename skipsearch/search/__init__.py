"""Prompts in, mask out. The package is itself the function `skipsearch.search(...)`: see `run.search`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Search(ModuleType):
    """Lets the public function and the package share a name: importing any submodule binds the package to it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from skipsearch.search.run import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Search
