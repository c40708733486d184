"""`generate --explain`: the same text, with marks or styles that say who drafted what."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from skipsearch import SkipMask, cli, self_speculative
from skipsearch.cli.terminal import PLAIN
from skipsearch.decoding.stats import Trail
from skipsearch.maskfile import MaskFile, ModelCard
from skipsearch.model.load import DEMO
from skipsearch.policy import DraftPolicy
from skipsearch.report.explain import ExplainingStreamer

CALL = ["generate", "--model", "demo", "--backend", "eager", "--max-new-tokens", "40", "--prompt", "def add(a, b):"]
NO_COLOUR = {"FORCE_COLOR": "", "NO_COLOR": "", "TTY_COMPATIBLE": "", "TERM": "xterm-256color", "COLUMNS": "200"}


def call(*arguments: str, **environment: str) -> Result:
    env = {name: value or None for name, value in {**NO_COLOUR, **environment}.items()}
    result = CliRunner().invoke(cli.app, [*CALL, *arguments], env=env)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("explain") / "mask.json"
    skip = SkipMask(attention=[4, 5, 9], mlp=[7, 8], num_layers=20)
    MaskFile.of(skip, model=ModelCard(id="demo", num_layers=20), draft=DraftPolicy(ngram=10)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return dict(json.loads(call("--json").stdout)["plain"])


def test_json_holds_pieces_and_the_same_tokens(plain: dict[str, Any], mask: str) -> None:
    """Prevents an explained text of other tokens, pieces that are not that text, and counts that are not theirs."""
    found = json.loads(call("--mask", mask, "--explain", "--json").stdout)["mask"]
    assert found["tokens"] == plain["tokens"] and "pieces" not in plain
    assert "".join(text for text, _ in found["pieces"]) == plain["text"]
    assert {source for _, source in found["pieces"]} <= {"mask", "ngram", "target"}
    target = sum(source == "target" for _, source in found["pieces"])
    assert target == len(found["tokens"]) - found["accepted"] == found["verifies"] + 1


def test_marks_where_there_are_no_colours(plain: dict[str, Any], mask: str) -> None:
    """Prevents sources that cannot be told apart in a pipe or with NO_COLOR, and escape codes there."""
    for environment in ({}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "dumb"}):
        shown = call("--mask", mask, "--explain", "--compare", **environment).stdout
        shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert "⟦drafted and accepted⟧   «from n-grams»   the target's own" in shown
        assert shown.count("⟦") == shown.count("⟧") > 2 and shown.count("«") == shown.count("»")
        assert "of 40 tokens: 40 by the target in 40 passes" in shown  # plain decoding beside it
        without = re.sub("[⟦⟧«»]", "", shown)
        assert without.count("def add(a, b):" + plain["text"] + "\nof 40 tokens") == 2
    assert "⟦a«b»".translate(PLAIN) == "[a{b}"


def test_styles_on_a_terminal(plain: dict[str, Any], mask: str) -> None:
    """Prevents marks inside the text on a terminal with colours, where the text is to be read as it is."""
    shown = call("--mask", mask, "--explain", FORCE_COLOR="1").stdout
    assert "⟦" not in shown and "\x1b[36mdrafted and accepted\x1b[0m" in shown
    assert "def add(a, b):" + plain["text"] + "\nof 40 tokens" in re.sub(r"\x1b\[[0-9;]*m", "", shown)


def test_the_text_comes_as_it_is_decoded(tiny: Any) -> None:
    """Prevents a text that waits for the end, tabs that become spaces, and U+FFFD for a character of several tokens."""
    tokenizer, method = AutoTokenizer.from_pretrained(DEMO), self_speculative(None)
    ids = tokenizer("\tx = '€'\r\n")["input_ids"]
    euro = ids.index(tokenizer("€")["input_ids"][0])
    method.stats.trails[0] = Trail(marks="m" * len(ids))
    out = io.StringIO(newline="")
    streamer = ExplainingStreamer(tokenizer, method, Console(file=out, width=20))
    streamer.put(torch.tensor([ids]))
    prompt, seen = out.getvalue(), []
    for token in ids:
        streamer.put(torch.tensor([token]))
        seen.append(out.getvalue()[len(prompt) :])
    streamer.end()
    assert prompt == "\tx = '€'\r\n" and out.getvalue() == f"{prompt}⟦{prompt}⟧\n"
    assert seen[0] and seen[euro] == seen[euro - 1] and "\ufffd" not in "".join(seen)
