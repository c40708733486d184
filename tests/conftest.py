"""Small models for every test: tiny random ones of each family in the registry, the bundled one, and their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from skipsearch.compiled.model import WIDTHS
from skipsearch.evaluate.prompts import Prompts, PromptSource, load_prompts
from skipsearch.model.families import FAMILIES, prove, tiny_model
from skipsearch.model.load import DEMO
from skipsearch.search import prepare

transformers.logging.set_verbosity_error()
settings.register_profile("same", derandomize=True, deadline=None)  # a red run must be red again
settings.load_profile("same")
torch.set_num_threads(1)  # two workers share two cores
WIDTHS["cpu"] = (1, 6, 9, 13)  # two fewer than served with: each takes seconds to compile
prepare.MOST_PROFILE = 2  # seconds: where two tests share a machine, a profile never gets as exact as it would wait for
pytest.register_assert_rewrite("traces")

make_tiny = tiny_model


@cache
def proven() -> dict[str, Any]:
    """What the installed library's models turn out to be, one list for every contract test."""
    found = {family: prove(family) for family in FAMILIES}
    supported = [name for name, row in found.items() if row.supported]
    return {"PROVEN": found, "SUPPORTED": supported, "REFUSED": [name for name in found if name not in supported]}


def __getattr__(name: str) -> Any:
    """Made where it is asked for: the process that hands out tests needs none of it."""
    if name in ("PROVEN", "SUPPORTED", "REFUSED"):
        return proven()[name]
    raise AttributeError(name)


def quiet(*_: Any) -> None:
    pass


def assert_one_sentence(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, message


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Models by family, made once; tests must not change them."""
    made: dict[str, PreTrainedModel] = {}
    return lambda family: made.setdefault(family, made[family] if family in made else make_tiny(family))


@pytest.fixture(scope="session")
def demo() -> Any:
    from skipsearch import load_model

    return load_model("demo")


@pytest.fixture(scope="session")
def shallow(demo: Any) -> Any:
    """The first six layers of the bundled model, for whole runs: they take a third of the time."""
    model = copy.deepcopy(demo.model)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:6], 6
    return replace(demo, name="shallow", model=model, preset=None, given=None)


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 97, (1, 11), generator=generator)


@pytest.fixture
def batch() -> torch.Tensor:
    """Three rows, two of them padded."""
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(4))
    ids[1, :4] = ids[2, :1] = 0
    return ids


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a chat template."""
    changed = copy.deepcopy(tokenizer)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    changed.chat_template = turns + "{% if add_generation_prompt %}<bot>{% endif %}"
    return changed


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Prompts]:
    """Prompts of a source; tables that the data set library makes of our files go where the files are."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(name: Any = "builtin", tokenizer: Any = tokenizer, **changes: Any) -> Prompts:
        limits = {"calibration": 4, "held_out": 4, "max_tokens": None, "room": 400, "seed": 0}
        limits |= {k: changes.pop(k) for k in list(changes) if k in limits}
        return load_prompts(PromptSource(name=str(name), **changes), tokenizer, **limits)

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
