"""Joint decoding is lossy on purpose, and exactly as lossy as it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import make_tiny
from scipy.stats import chisquare
from transformers import LogitsProcessorList, PreTrainedModel

from skipsearch import SkipMask, draft_view, self_speculative
from skipsearch.errors import DecodingError
from skipsearch.joint.joint import Joint, JointDecoder, beam_step, joint_log_probs, longest_prefix
from skipsearch.joint.tree import Reader, TokenTree
from skipsearch.model.cache import SharedCache

MASK = SkipMask(attention=[0], mlp=[1], num_layers=2)
PROMPT = torch.tensor([[3, 4, 5, 3]])


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return make_tiny(
        "llama", vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )


def logs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def test_beam_weights_are_joint_likelihoods() -> None:
    """Prevents weights made by a softmax over probabilities, which are nearly uniform, and beams judged by one step."""
    joint_B, step_BV = logs(0.6, 0.4), torch.stack([logs(0.5, 0.5), logs(0.9, 0.1)])
    assert beam_step(joint_B, step_BV, 1, None) == [(1, 0)]  # .36 against .30, .30 and .04
    assert set(beam_step(joint_B, step_BV, 3, None)) == {(1, 0), (0, 0), (0, 1)}
    generator, counts = torch.Generator().manual_seed(0), [0, 0, 0, 0]
    for _ in range(4000):
        ((beam, token),) = beam_step(joint_B, step_BV, 1, generator)
        counts[2 * beam + token] += 1
    assert chisquare(counts, [4000 * share for share in (0.3, 0.3, 0.36, 0.04)]).pvalue > 1e-3


def test_fewer_continuations_than_beams_are_no_error() -> None:
    """Prevents a draw without replacement from asking for tokens that have no probability."""
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert beam_step(torch.zeros(1), certain, 4, torch.Generator().manual_seed(0)) == [(0, 0)]


def test_the_longest_prefix_by_its_own_ratio() -> None:
    """Prevents stopping at the first prefix that fails, and taking a longer one that fails."""
    tree = TokenTree(9)
    a = tree.add(0, 1)
    b = tree.add(a, 2)
    c = tree.add(b, 3)
    other = tree.add(0, 4)
    target = logs(1, 0.1, 0.09, 0.001, 0.5).tolist()
    draft = logs(1, 0.5, 0.1, 0.1, 0.4).tolist()
    # ratios: a .2, b .9, c .01, other 1
    assert longest_prefix(tree, target, draft, 0.5) == b
    assert longest_prefix(tree, target, draft, 0.95) == other
    assert longest_prefix(tree, target, draft, 0.005) == c
    assert longest_prefix(tree, logs(1, 0.1, 0.01, 0.001, 0.1).tolist(), draft, 0.9) == 0


def test_of_two_equally_deep_prefixes_the_likelier_one() -> None:
    """Prevents the order of beams from deciding."""
    tree = TokenTree(9)
    first, second = tree.add(0, 1), tree.add(0, 2)
    assert longest_prefix(tree, logs(1, 0.2, 0.3).tolist(), logs(1, 0.2, 0.2).tolist(), 0.5) == second
    assert longest_prefix(tree, logs(1, 0.3, 0.2).tolist(), logs(1, 0.2, 0.2).tolist(), 0.5) == first


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_a_tree_says_what_its_beams_say_alone(tiny: Any, ids: torch.Tensor, family: str) -> None:
    """Prevents a node from seeing its siblings, a wrong position, and stages that differ from one pass."""
    model: PreTrainedModel = tiny(family)
    tree = TokenTree(int(ids[0, -1]))
    for parent, token in [(0, 5), (0, 6), (1, 7), (2, 7), (3, 8), (1, 9)]:
        tree.add(parent, token)
    reader = Reader(model, SharedCache(model, 40))
    reader.catch_up(ids[:, :-1])
    logits_NV = reader.read(tree)
    for node in range(len(tree)):
        path = torch.tensor([[tree.tokens[n] for n in tree.path(node)]], dtype=torch.long)
        alone = model(input_ids=torch.cat([ids, path], 1)).logits[0, -1]
        torch.testing.assert_close(logits_NV[node], alone, atol=2e-4, rtol=1e-3)
    again = Reader(model, SharedCache(model, 40))
    again.catch_up(ids[:, :-1])
    part = TokenTree(int(ids[0, -1]))
    seen = 0
    got = []
    for parent, token in [(0, 5), (0, 6), (1, 7), (2, 7), (3, 8), (1, 9)]:
        if parent >= seen:
            got.append(again.read(part, seen))
            seen = len(part)
        part.add(parent, token)
    got.append(again.read(part, seen))
    torch.testing.assert_close(torch.cat(got), logits_NV, atol=2e-4, rtol=1e-3)


def test_a_kept_path_is_as_if_it_had_been_read_in_order(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents keys of rejected siblings from staying under the kept ones."""
    model = tiny("llama")
    reader = Reader(model, SharedCache(model, 40))
    reader.catch_up(ids[:, :-1])
    tree = TokenTree(int(ids[0, -1]))
    tree.add(0, 5)
    b = tree.add(0, 6)
    c = tree.add(b, 7)
    reader.read(tree)
    reader.keep([0, b, c])
    after = reader.read(TokenTree(8))[0]
    alone = model(input_ids=torch.cat([ids, torch.tensor([[6, 7, 8]])], 1)).logits[0, -1]
    torch.testing.assert_close(after, alone, atol=2e-4, rtol=1e-3)


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

    target = Reader(small, SharedCache(small, 80))
    view = draft_view(small, MASK)
    draft = Reader(view, SharedCache(view, 80)) if separate else Reader(view, target.cache)
    decoder = JointDecoder(
        target, draft, PROMPT, Joint(width=3, length=3, threshold=threshold), LogitsProcessorList(),
        Sampling.from_seed(1, torch.device("cpu")) if sampled else None,
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
        fresh = Reader(small, SharedCache(small, 80))
        fresh.catch_up(before[:, :-1])
        alone = Reader(view, SharedCache(view, 80)) if separate else Reader(view, fresh.cache)
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
    reader = Reader(small, SharedCache(small, 600))
    decoder = JointDecoder(reader, reader, PROMPT, Joint(width=64, length=3), LogitsProcessorList(), None)
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
                Reader(small, SharedCache(small, 600)), Reader(view, SharedCache(view, 600)), prompt,
                Joint(width=1, length=3, threshold=threshold), LogitsProcessorList(), None,
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
    reader = Reader(small, SharedCache(small, 600))
    free = JointDecoder(reader, reader, PROMPT, Joint(width=8, length=3), LogitsProcessorList(), None)
    tree, _, leaves = free._beams(3, frozenset())
    second = tree.tokens[tree.path(leaves[0])[1]]
    reader = Reader(small, SharedCache(small, 600))
    decoder = JointDecoder(reader, reader, PROMPT, Joint(width=8, length=3), LogitsProcessorList(), None)
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
