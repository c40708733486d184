"""Small models for every test: tiny random ones of each family in the registry, and the bundled one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from transformers import PreTrainedModel

from skipsearch.model.families import FAMILIES, prove, tiny_model

transformers.logging.set_verbosity_error()
settings.register_profile("same", derandomize=True, deadline=None)  # a red run must be red again
settings.load_profile("same")
torch.set_num_threads(1)  # two workers share two cores

make_tiny = tiny_model
# What the installed library's models turn out to be, one list for every contract test.
PROVEN = {family: prove(family) for family in FAMILIES}
SUPPORTED = [name for name, row in PROVEN.items() if row.supported]
REFUSED = [name for name, row in PROVEN.items() if not row.supported]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Models by family, made once; tests must not change them."""
    made: dict[str, PreTrainedModel] = {}
    return lambda family: made.setdefault(family, made[family] if family in made else make_tiny(family))


@pytest.fixture(scope="session")
def demo() -> Any:
    from skipsearch import load_model

    return load_model("demo")


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 97, (1, 11), generator=generator)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
