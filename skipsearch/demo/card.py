"""The model card of the bundled model, written by the training run from its own figures."""

from __future__ import annotations

import json
from pathlib import Path

_CARD = """\
---
license: apache-2.0
language: code
---
# skipsearch demo model

A Llama-architecture causal language model of Python source: {layers} layers, {parameters:,} parameters,
byte-level BPE of 4096 tokens, context 512, weights in bfloat16. It exists so that skipsearch can be tried and
tested offline on trained weights and real text.

**Data.** The source files of CPython's standard library, as installed beside the training interpreter
(Python Software Foundation License): {corpus_tokens:,} tokens. One module in sixteen, chosen by a hash of
its path (`skipsearch.demo.corpus`), was left out; those modules supply calibration and held-out prompts.

**Recipe.** `python -m skipsearch.demo.train --minutes {minutes} --seed {seed}`: {steps} steps,
{training_tokens_seen:,} tokens seen, {threads} CPU threads, bf16 autocast, Muon for the matrices and AdamW for
the rest. *It was trained to be skippable*: every attention and MLP branch from layer 1 on was dropped at random
(probability rising with depth from about 0.15 to 0.5, spread around that from step to step), and in the last
third of the run randomly thinned networks were distilled towards the full one. Large models tolerate skipping
because they are deep and redundant; a plainly trained model of this size does not. Speed-ups on this model say
how well the tool works, not what to expect from another model.

**Result.** Held-out loss {held_out_loss} nats a token over {held_out_tokens:,} tokens of unseen modules (fp32
arithmetic on the shipped weights).

**Not for** writing code that anyone runs, for judging language models, or for text other than Python.
"""


def write_card(folder: Path, facts: dict[str, float | int]) -> None:
    """Write README.md and the figures behind it (training.json) into `folder`."""
    (folder / "README.md").write_text(_CARD.format(**facts))
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
