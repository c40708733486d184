"""Whether a model is compiled: proven, refused, compiled again, or decoded eagerly with a warning."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_compiled import MASK

from skipsearch import self_speculative
from skipsearch.compiled import backend
from skipsearch.compiled.backend import compile_and_prove, with_backend
from skipsearch.compiled.model import WIDTHS, CompiledModel
from skipsearch.errors import BackendError, BackendWarning
from skipsearch.model.target import Target


def test_what_cannot_be_compiled_is_decoded_eagerly_with_one_warning(tiny: Any, ids: Any, monkeypatch: Any) -> None:
    """Prevents a model that the compiler refuses from failing, and the reason from being lost or repeated."""
    model = tiny("qwen2")

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(backend, "compile_and_prove", refuse)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **options)
    method = self_speculative(MASK, backend="compiled")
    with pytest.warns(BackendWarning, match="decoding eagerly: compiling failed .RuntimeError: no such kernel"):
        assert torch.equal(model.generate(ids, custom_generate=method, **options), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(ids, custom_generate=method, **options), plain)


def test_logits_that_differ_are_refused(tiny: Any, monkeypatch: Any) -> None:
    """Prevents pieces that compute something else from serving: two layers taken for one build, say."""
    model = tiny("llama")
    forward = CompiledModel.forward

    def wrong(self: Any, stack: Any, *given: Any, **named: Any) -> Any:
        return forward(self, replace(stack, layers=stack.layers[:-1], programs={}), *given, **named)

    monkeypatch.setattr(CompiledModel, "forward", wrong)
    monkeypatch.setitem(WIDTHS, "cpu", (1,))
    with pytest.raises(BackendError, match="compiled logits differ"):
        compile_and_prove(Target.of(model), None)


def test_changed_weights_are_seen(ids: Any, tiny: Any, monkeypatch: Any) -> None:
    """Prevents a model that was changed after compiling from being decoded with what it was before."""
    monkeypatch.setitem(WIDTHS, "cpu", (1, 13))
    model = copy.deepcopy(tiny("llama"))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    method = self_speculative(MASK, backend="compiled")
    before = model.generate(ids, custom_generate=method, **options)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    after = model.generate(ids, custom_generate=method, **options)
    assert torch.equal(after, model.generate(ids, **options)) and not torch.equal(after, before)


def test_an_unknown_backend_is_refused(tiny: Any) -> None:
    """Prevents a misspelt backend from meaning eager."""
    with pytest.raises(BackendError, match="backend is 'cuda', must be auto, eager or compiled"):
        with_backend(Target.of(tiny("llama")), "cuda")  # type: ignore[arg-type]


def test_a_home_that_cannot_be_written(tmp_path: Any, monkeypatch: Any) -> None:
    """Prevents decoding eagerly, or a traceback, for want of a place to keep what was compiled."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from skipsearch.compiled.compile import keep_compiled

    (tmp_path / "home").write_text("a file in its place")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    kept = keep_compiled()
    assert kept.is_dir() and kept.name.startswith("skipsearch-") and keep_compiled() == kept
    kept.rmdir()
