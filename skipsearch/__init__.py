"""skipsearch: which sublayers an LLM may skip while drafting, found, proven and used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipsearch.draft.view import draft_view
    from skipsearch.mask import SkipMask
    from skipsearch.maskfile import MaskFile, load_mask
    from skipsearch.model.load import load_model
    from skipsearch.online.self_speculative import self_speculative
    from skipsearch.plan import DraftPlan
    from skipsearch.search.result import SearchResult
    from skipsearch.search.run import search

__all__ = [
    "DraftPlan", "MaskFile", "SearchResult", "SkipMask", "draft_view", "load_mask", "load_model", "search",
    "self_speculative",
]  # fmt: skip

_HOMES = {
    "SkipMask": "mask", "DraftPlan": "plan", "MaskFile": "maskfile", "load_mask": "maskfile",
    "load_model": "model.load", "draft_view": "draft.view", "self_speculative": "online.self_speculative",
    "SearchResult": "search.result",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `skipsearch --help` must not wait for torch."""
    if name == "search":
        return import_module("skipsearch.search")
    if name not in _HOMES:
        raise AttributeError(f"module 'skipsearch' has no attribute {name!r}")
    return getattr(import_module(f"skipsearch.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, before they are imported too."""
    return sorted({*globals(), *__all__})
