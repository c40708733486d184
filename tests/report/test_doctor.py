"""Doctor: what is installed and does not fit."""

from __future__ import annotations

import pytest

from skipsearch.report import doctor


def test_a_version_outside_of_the_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents hours of hunting for what a package of another version breaks, and a word about what fits."""
    asked = ["transformers<5.25,>=5.18", "torch>=2.9", "optuna>=5", "ruff>=9; extra == 'dev'", "rich"]
    monkeypatch.setattr(doctor, "requires", lambda _name: asked)
    found = {"transformers": "5.17.0", "torch": "2.13.0+cpu", "optuna": "not installed", "ruff": "1", "rich": "1"}
    (said,) = doctor._other_versions(found)
    assert said == "transformers <5.25,>=5.18, 5.17.0 is installed: `pip install 'transformers<5.25,>=5.18'`"
    assert not doctor._other_versions(dict.fromkeys(doctor.PACKAGES, "99") | {"transformers": "5.24.0rc1"})
