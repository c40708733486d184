"""Beams by joint likelihood, and the prefix of them that is accepted."""

from __future__ import annotations

import math

import torch
from scipy.stats import chisquare

from skipsearch.joint.joint import beam_step, longest_prefix
from skipsearch.joint.tree import TokenTree


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
