"""Joint decoding is lossy on purpose, and exactly as lossy as it says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import make_tiny
from transformers import PreTrainedModel

from skipsearch import SkipMask, draft_view, self_speculative
from skipsearch.decoding.processors import TokenSelection
from skipsearch.errors import DecodingError
from skipsearch.joint.joint import Joint, JointDecoder
from skipsearch.joint.tree import Reader, TokenTree
from skipsearch.model.cache import SharedCache
from skipsearch.model.target import Target

MASK = SkipMask(attention=[0], mlp=[1], num_layers=2)
PROMPT = torch.tensor([[3, 4, 5, 3]])


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return make_tiny(
        "llama", vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )


def reader_of(model: PreTrainedModel, view: PreTrainedModel | None = None) -> Reader:
    """With a cache of its own."""
    target = Target.of(model)
    return Reader(target, SharedCache(target, 600), view)


def joint_log_probs(model: PreTrainedModel, ids_1T: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every continuation of so many tokens [V**length, length] and its log-likelihood.

    Multi-token joint decoding (MTJD, arXiv 2407.09722, section 3) takes the likeliest.
    """
    rows = torch.tensor(list(itertools.product(range(model.config.vocab_size), repeat=length)))
    whole = torch.cat([ids_1T.expand(len(rows), -1), rows], 1)
    logits = model(input_ids=whole).logits[:, ids_1T.shape[1] - 1 : -1].double().log_softmax(-1)
    return rows, logits.gather(-1, rows[..., None])[..., 0].sum(-1)


def test_one_beam_of_the_model_itself_decodes_greedily(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents losing tokens between blocks: with the target as its own draft nothing can be rejected."""
    model = tiny("llama")
    nothing = SkipMask(num_layers=model.config.num_hidden_layers)
    settings: dict[str, Any] = {"max_new_tokens": 23, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    method = self_speculative(nothing, decoding="mtad", beam_width=1, threshold=0.9, max_length=4)
    assert torch.equal(model.generate(ids, custom_generate=method, **settings), model.generate(ids, **settings))
    assert method.stats.lossy and method.stats.acceptance_rate == 1


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_accepted_blocks_are_as_likely_as_promised(
    small: Any, threshold: float, separate: bool, sampled: bool
) -> None:  # fmt: skip
    """Prevents ratios of other prefixes, of other beams' thresholds, or from keys that were not the sequence's."""
    from skipsearch.decoding.accept import Sampling

    target = reader_of(small)
    view = draft_view(small, MASK)
    draft = reader_of(small, view) if separate else Reader(Target.of(small), target.cache, view)
    decoder = JointDecoder(
        target, draft, PROMPT, Joint(width=3, length=3, threshold=threshold),
        TokenSelection(sampling=Sampling.from_seed(1, torch.device("cpu")) if sampled else None),
    )  # fmt: skip
    seen = 0
    for _ in range(8):
        before = decoder.ids
        tokens, accepted, logits_NV, _ = decoder.block(3)
        assert torch.equal(decoder.ids[0, before.shape[1] :], torch.tensor(tokens)) and len(tokens) == accepted + 1
        logp_TV = small(input_ids=decoder.ids).logits[0].double().log_softmax(-1)
        places = range(before.shape[1] - 1, before.shape[1] - 1 + accepted)
        torch.testing.assert_close(
            logits_NV.double().log_softmax(-1), logp_TV[before.shape[1] - 1 : -1], atol=1e-4, rtol=1e-3
        )
        joint = sum(float(logp_TV[t, decoder.ids[0, t + 1]]) for t in places)
        # The draft reads its own keys within the block, and those of the target (or its own) before it.
        tree = TokenTree(int(before[0, -1]))
        fresh = reader_of(small)
        fresh.catch_up(before[:, :-1])
        alone = reader_of(small, view) if separate else Reader(Target.of(small), fresh.cache, view)
        if separate:
            alone.catch_up(before[:, :-1])
        node, drafted = 0, 0.0
        for token in tokens[:accepted]:
            drafted += float(alone.read(tree, node)[-1].double().log_softmax(-1)[token])
            node = tree.add(node, token)
        if accepted:
            assert joint - drafted > math.log(max(threshold, 1e-12)) - 1e-3
        seen += accepted
    assert seen


def test_wide_beams_of_the_model_itself_find_the_joint_mode(small: Any) -> None:
    """Prevents beams that are pruned by anything but their joint likelihood: exact joint decoding is enumerated."""
    reader = reader_of(small)
    decoder = JointDecoder(reader, reader, PROMPT, Joint(width=64, length=3))
    rows, likelihood = joint_log_probs(small, PROMPT, 3)
    tokens, accepted, *_ = decoder.block(3)
    assert accepted == 3 and tokens[:3] == rows[likelihood.argmax()].tolist()


@torch.no_grad()
def test_the_error_against_exact_joint_decoding_is_bounded(small: Any) -> None:
    """An accepted mode of the draft is less likely than the target's by no more than the draft misjudges that one, and
    the threshold: log p(p*) - log p(q*) <= log p(p*) - log q(p*) - log threshold, since q(q*) >= q(p*).
    """
    view, looked_at = draft_view(small, MASK), 0
    for seed in range(12):
        prompt = torch.randint(0, 8, (1, 4), generator=torch.Generator().manual_seed(seed))
        rows, target = joint_log_probs(small, prompt, 3)
        _, draft = joint_log_probs(view, prompt, 3)
        best, drafted = int(target.argmax()), int(draft.argmax())
        for threshold in (0.02, 0.2, 0.5, 0.8):
            decoder = JointDecoder(
                reader_of(small), reader_of(small, view), prompt, Joint(width=1, length=3, threshold=threshold)
            )  # fmt: skip
            # One beam, which is the mode of the draft: as an exact search over the draft would propose it.
            only = _path(rows[drafted].tolist(), view, decoder)
            decoder._beams = lambda _length, _eos, beam=only: beam  # type: ignore[method-assign]
            tokens, accepted, *_ = decoder.block(3)
            assert (accepted == 3) == (float(target[drafted] - draft[drafted]) > math.log(threshold))
            if accepted == 3:
                error = float(target[best] - target[drafted])
                assert error <= float(target[best] - draft[best]) - math.log(threshold) + 1e-6
                assert tokens[:3] == rows[drafted].tolist()
                looked_at += drafted != best
    assert looked_at >= 3  # cases in which there is an error at all


@torch.no_grad()
def test_no_beam_goes_on_behind_the_end(small: Any) -> None:
    """Prevents tokens behind an end-of-sequence token from deciding whether it is accepted."""
    reader = reader_of(small)
    free = JointDecoder(reader, reader, PROMPT, Joint(width=8, length=3))
    tree, _, leaves = free._beams(3, frozenset())
    second = tree.tokens[tree.path(leaves[0])[1]]
    reader = reader_of(small)
    decoder = JointDecoder(reader, reader, PROMPT, Joint(width=8, length=3))
    tree, joint, leaves = decoder._beams(3, frozenset({second}))
    paths = [[tree.tokens[node] for node in tree.path(leaf)] for leaf in leaves]
    assert any(path[-1] == second and len(path) < 3 for path in paths) and len(joint) == len(tree)
    assert all(second not in path[:-1] for path in paths) and any(len(path) == 3 for path in paths)


def _path(tokens: list[int], view: PreTrainedModel, decoder: JointDecoder) -> Any:
    tree, node, joint = TokenTree(int(decoder.ids[0, -1])), 0, [0.0]
    for token in tokens:
        node = tree.add(node, token)
    for place in range(len(tokens)):
        before = torch.cat([decoder.ids, torch.tensor([tokens[:place]], dtype=torch.long)], 1)
        joint.append(joint[-1] + float(view(input_ids=before).logits[0, -1].double().log_softmax(-1)[tokens[place]]))
    decoder._read = 0
    return tree, joint, [node]


def test_rows_processors_and_ends(small: Any) -> None:
    """Prevents padding from being read, an end of sequence inside a block from being passed, and lost processors."""
    ids = torch.tensor([[0, 0, 3, 4], [5, 3, 4, 5]])
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    method = self_speculative(MASK, decoding="mtad", threshold=0.1, max_length=3)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None,
                                "custom_generate": method}  # fmt: skip
    both = small.generate(ids, attention_mask=padded, **settings)
    alone = small.generate(ids[:1, 2:], attention_mask=padded[:1, 2:], **settings)
    assert torch.equal(both[0, 2:], alone[0])
    stopped = small.generate(ids[1:], attention_mask=padded[1:], **{**settings, "eos_token_id": int(both[1, 7])})
    assert stopped[0].tolist() == both[1, : both[1].tolist().index(int(both[1, 7]), 4) + 1].tolist()
    without = small.generate(
        ids[1:], attention_mask=padded[1:], suppress_tokens=[int(both[1, 4])], **settings
    )  # fmt: skip
    assert int(both[1, 4]) not in without[0, 4:].tolist()


def test_what_joint_decoding_refuses(small: Any, tiny: Any) -> None:
    """Prevents settings that silently do something else."""
    for wrong in ({"beam_width": 0}, {"threshold": 1.0}, {"threshold": -0.1}):
        with pytest.raises(DecodingError, match=f"{next(iter(wrong)).removeprefix('beam_')} is"):
            self_speculative(MASK, decoding="mtad", **wrong)  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match="decoding is 'beam'"):
        self_speculative(MASK, decoding="beam")
    with pytest.raises(DecodingError, match="draft_model"):
        self_speculative(MASK, draft_model=small)
    for one, other in ((MASK, small), (None, None)):
        with pytest.raises(DecodingError, match="one of the two"):
            self_speculative(one, decoding="mtad", draft_model=other)
    with pytest.raises(DecodingError, match="deterministic, ngram"):
        self_speculative(MASK, decoding="mtad", deterministic=True, ngram=4)
    with pytest.raises(DecodingError, match="'auto'"):
        self_speculative("auto", start=MASK, decoding="mtad")
    other = self_speculative(None, decoding="mtad", draft_model=tiny("llama"))
    with pytest.raises(DecodingError, match="draft_model has"):
        small.generate(PROMPT, custom_generate=other, max_new_tokens=4, do_sample=False)
    sliding = tiny("mistral") if getattr(tiny("mistral").config, "sliding_window", None) else tiny("gemma3_text")
    mask = SkipMask(attention=[0], num_layers=sliding.config.num_hidden_layers)
    with pytest.raises(DecodingError, match="sliding windows"):
        sliding.generate(PROMPT, custom_generate=self_speculative(mask, decoding="mtad"), max_new_tokens=4)


def test_a_smaller_model_may_draft(small: Any) -> None:
    """Prevents a separate draft's own cache from falling behind the sequence."""
    torch.manual_seed(5)
    other = make_tiny(
        "llama", vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    method = self_speculative(None, decoding="mtad", draft_model=other, threshold=0.2, max_length=3, beam_width=2)
    out = small.generate(
        PROMPT, custom_generate=method, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )  # fmt: skip
    assert out.shape[1] == 24 and 0 < method.stats.acceptance_rate < 1
