"""Target: a causal LM with the properties that draft and verify need.

It is made where a model enters (`load_model`, `search`, `generate`) and passed on from there. It holds a reference to
the model, so an object that must not keep the model in memory must not keep its Target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipsearch.errors import DecodingError
from skipsearch.model.device import input_device
from skipsearch.model.masks import AttentionLayout
from skipsearch.model.sublayers import Sublayers, find_sublayers

UNLIMITED = 1 << 20  # tokens of context if the config has no limit


class CompiledForwards(Protocol):
    """The interface of a compiled backend; `skipsearch.compiled.model.CompiledModel` implements it.

    Buffers and stacks come from the backend and are only passed back to it.
    """

    chunk: int  # tokens of one forward of the prefill

    @property
    def packs(self) -> bool:
        """Whether products use packed copies of the weights."""

    def acquire(self, capacity: int, owner: object) -> Any:
        """Buffers for `capacity` tokens. The backend takes them back when `owner` is garbage-collected."""

    def stack_of(self, model: nn.Module) -> Any:
        """What the model, or a draft view of it, runs."""

    def forward(
        self, stack: Any, buffers: Any, start: int, place: int, tokens: int, keep_last: bool = False
    ) -> Any:  # fmt: skip
        """Run one forward of `tokens` tokens."""

    def width_for(self, tokens: int) -> int:
        """The width that a forward of so many tokens of the model is padded to."""

    def guesses(self, stack: Any) -> bool:
        """Whether a forward of several tokens costs about as much as one of one token."""

    def products(self, modules: Sequence[nn.Module], row: Tensor) -> Callable[[], Any]:
        """Linear layers of one build, as functions of a row that run as they do in forwards."""

    def draft(self, stack: Any, buffers: Any, start: int, place: int, steps: int) -> None:
        """Draft `steps` tokens greedily, without synchronisation with the host."""


def context_limit(config: Any) -> int:
    """The longest context in tokens that a text config allows."""
    return int(getattr(config, "max_position_embeddings", None) or UNLIMITED)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """The model whose output is decoded, with the properties that draft and verify need.

    Attributes:
        model: the causal LM; never changed.
        device: the device for token ids.
        context: the longest sequence that the model allows, in tokens.
        vocabulary: number of tokens.
        attention: which keys each layer's queries may see.
        takes_positions: whether the forward takes `position_ids`; models with ALiBi do not.
        takes_logits_to_keep: whether the forward can omit logits.
        compiled: the compiled backend for single sequences; None: eager decoding.
    """

    model: PreTrainedModel
    device: torch.device
    context: int
    vocabulary: int
    attention: AttentionLayout
    takes_positions: bool
    takes_logits_to_keep: bool
    compiled: CompiledForwards | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Target:
        """Read the properties of a model. The target is eager.

        A model whose sublayers cannot be skipped has one too: it is decoded plainly.
        """
        config = model.config.get_text_config(decoder=True)
        return cls(
            model=model, device=input_device(model), context=context_limit(config), vocabulary=config.vocab_size,
            attention=AttentionLayout.of(model),
            takes_positions="position_ids" in inspect.signature(model.forward).parameters,
            takes_logits_to_keep=model._supports_logits_to_keep(),
        )  # fmt: skip

    @property
    def sublayers(self) -> Sublayers:
        """The attention and MLP sublayers; found and proven at the first access, then remembered.

        Raises:
            UnsupportedModel: it cannot be proven that the sublayers can be skipped.
        """
        return find_sublayers(self.model)

    @property
    def num_layers(self) -> int:
        return self.sublayers.num_layers

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return list(self.model.get_submodule(self.sublayers.path).children())

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def backend(self) -> Literal["eager", "compiled"]:
        """The backend's name in mask.json."""
        return "eager" if self.compiled is None else "compiled"

    @property
    def eos_ids(self) -> frozenset[int]:
        """End-of-sequence tokens, from the model's generation config."""
        config = self.model.generation_config
        eos = config.eos_token_id if config is not None else None
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    def ids(self, tokens: Sequence[int]) -> Tensor:
        """One sequence of token ids [1, T] on the target's device."""
        return torch.tensor([tokens], device=self.device)

    def check_ids(self, ids: Tensor) -> None:
        """Refuse tokens that the model has no embedding for: some tokenizers have a few more. A GPU is not waited for.

        Raises:
            DecodingError: there is such a token.
        """
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if rows is not None and ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= rows:
            raise DecodingError(
                f"the prompt holds token {int(ids.max())}, the model has {rows} embeddings; use the model's own "
                f"tokenizer, or resize_token_embeddings"
            )

    def random_ids(self, length: int) -> Tensor:
        """A sequence of random tokens [1, length], the same for each call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (1, length), generator=generator).to(self.device)
