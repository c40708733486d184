"""Domains of text: told apart, recognised, and searched anew when they drift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from online_parts import POLICY

from skipsearch import SkipMask
from skipsearch.model.target import Target
from skipsearch.online.domains import Domains
from skipsearch.online.incumbent import PATIENCE, Incumbent
from skipsearch.online.tuner import OnTheFly


def tuner_of(model: Any, **settings: Any) -> OnTheFly:
    return OnTheFly(Target.of(model), POLICY, **settings)


def test_drift_of_acceptance_resumes_a_paused_search(demo: Any) -> None:
    """Prevents a search from pausing for ever, from being resumed by noise, and one domain from deciding for all."""
    tuner = tuner_of(demo.model)
    one, other = (tuner.domains.of(torch.tensor(ids)) for ids in ([5, 6, 7], [50, 60, 70]))
    shared = one.incumbent
    assert other is not one and other.incumbent is shared
    shared.rejected = PATIENCE
    assert shared.pause(100) and shared.paused_at == 100
    for _ in range(180):
        tuner.domains.drifts(one, 5, 4, [])
    assert shared.expected == pytest.approx(0.8) and shared.paused_at == 100
    for _ in range(60):
        tuner.domains.drifts(other, 5, 2, [])
    assert other.incumbent is not shared and other.incumbent.paused_at is None and one.incumbent is shared
    for _ in range(60):
        tuner.domains.drifts(one, 5, 2, [])
    assert one.incumbent is shared and shared.paused_at is None and shared.expected is None and not shared.tried


def test_domains_are_told_apart_and_recognised(demo: Any) -> None:
    """Prevents a returning domain from being searched anew, and a new one from being served as an old one."""
    domains = Domains(4096, Incumbent(POLICY))
    encode = lambda text: demo.tokenizer(text, return_tensors="pt")["input_ids"][0]
    code = "def read_config(path):\n    with open(path) as file:\n        return json.load(file)\n"
    sums = "12 + 34 * 56 = 78; 90 / 12 - 34 = 56, 7 times 89 is 623 and 623 minus 12 is 611\n"
    first = domains.of(encode(code))
    first.incumbent.mask = SkipMask(mlp=[2], num_layers=20)
    for name in ("load", "parse", "check"):
        assert domains.of(encode(code.replace("read", name))) is first
    second = domains.of(encode(sums))
    assert second is not first and second.incumbent is first.incumbent  # the nearest one's, to begin with
    assert domains.of(encode(sums.replace("12", "31"))) is second
    assert domains.of(encode(code.replace("read", "write"))) is first
